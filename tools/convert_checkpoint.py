"""Run :mod:`megatron_slm.cli.convert_checkpoint` under Megatron-LM's name."""

import sys

from megatron_slm.cli.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
