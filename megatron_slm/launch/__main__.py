"""Run :mod:`megatron_slm.launch.command`: ``python -m megatron_slm.launch``."""

import sys

from megatron_slm.launch.command import main

if __name__ == "__main__":
    sys.exit(main())
