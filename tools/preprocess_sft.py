"""Run :mod:`megatron_slm.cli.preprocess_sft` under Megatron-LM's name."""

import sys

from megatron_slm.cli.preprocess_sft import main

if __name__ == "__main__":
    sys.exit(main())
