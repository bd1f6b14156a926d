"""Run :mod:`megatron_slm.cli.train_tokenizer` under Megatron-LM's name."""

import sys

from megatron_slm.cli.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
