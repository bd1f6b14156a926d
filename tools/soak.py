"""Run :mod:`megatron_slm.cli.soak`."""

import sys

from megatron_slm.cli.soak import main

if __name__ == "__main__":
    sys.exit(main())
