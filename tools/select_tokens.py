"""Run :mod:`megatron_slm.cli.select_tokens` under Megatron-LM's name."""

import sys

from megatron_slm.cli.select_tokens import main

if __name__ == "__main__":
    sys.exit(main())
