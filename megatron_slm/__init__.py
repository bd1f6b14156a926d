"""Selective Language Modeling on Megatron-Core: pretrain on the tokens that are worth learning."""

import warnings

__version__ = "0.1.0"

# Megatron-Core says so of each of its modules; the trainer's log says once what is there and what is not.
warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*")
# It warns of its own default.
warnings.filterwarnings("ignore", message="full scope is deprecated.*")
# It loads checkpoints through functions that torch has deprecated; every rank of a resumed run says so.
warnings.filterwarnings("ignore", message="`load_state_dict` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
