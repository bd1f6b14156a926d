"""Run :mod:`megatron_slm.cli.evaluate` under Megatron-LM's name."""

import sys

from megatron_slm.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
