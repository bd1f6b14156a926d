"""Run :mod:`megatron_slm.cli.plot_metrics`."""

import sys

from megatron_slm.cli.plot_metrics import main

if __name__ == "__main__":
    sys.exit(main())
