"""Run :mod:`megatron_slm.cli.merge_datasets` under Megatron-LM's name."""

import sys

from megatron_slm.cli.merge_datasets import main

if __name__ == "__main__":
    sys.exit(main())
