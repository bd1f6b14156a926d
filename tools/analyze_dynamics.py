"""Run :mod:`megatron_slm.cli.analyze_dynamics` under Megatron-LM's name."""

import sys

from megatron_slm.cli.analyze_dynamics import main

if __name__ == "__main__":
    sys.exit(main())
