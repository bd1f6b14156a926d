"""Run :mod:`megatron_slm.cli.pretrain`: ``python -m megatron_slm.pretrain``."""

import sys

from megatron_slm.cli.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
