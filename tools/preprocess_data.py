"""Run :mod:`megatron_slm.cli.preprocess_data` under Megatron-LM's name."""

import sys

from megatron_slm.cli.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main())
