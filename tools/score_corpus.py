"""Run :mod:`megatron_slm.cli.score_corpus` under Megatron-LM's name."""

import sys

from megatron_slm.cli.score_corpus import main

if __name__ == "__main__":
    sys.exit(main())
