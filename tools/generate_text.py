"""Run :mod:`megatron_slm.cli.generate_text` as a script."""

import sys

from megatron_slm.cli.generate_text import main

if __name__ == "__main__":
    sys.exit(main())
