"""Run :mod:`megatron_slm.cli.inspect_run` under Megatron-LM's name."""

import sys

from megatron_slm.cli.inspect_run import main

if __name__ == "__main__":
    sys.exit(main())
