"""Run :mod:`megatron_slm.cli.show_selection`."""

import sys

from megatron_slm.cli.show_selection import main

if __name__ == "__main__":
    sys.exit(main())
