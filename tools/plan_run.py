"""Run :mod:`megatron_slm.cli.plan_run`."""

import sys

from megatron_slm.cli.plan_run import main

if __name__ == "__main__":
    sys.exit(main())
