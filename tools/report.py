"""Run :mod:`megatron_slm.cli.report`."""

import sys

from megatron_slm.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
