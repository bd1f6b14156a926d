"""Run :mod:`megatron_slm.cli.inspect_dataset` under Megatron-LM's name."""

import sys

from megatron_slm.cli.inspect_dataset import main

if __name__ == "__main__":
    sys.exit(main())
