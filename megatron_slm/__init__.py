"""Selective Language Modeling on Megatron-Core: pretrain on the tokens that are worth learning."""

import warnings

__version__ = "0.1.0"

# Megatron-Core says so of each of its modules; the trainer's log says once what is there and what is not.
warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*")
# It warns of its own default.
warnings.filterwarnings("ignore", message="full scope is deprecated.*")
# It calls functions that torch has deprecated, on CPUs through our redirection; every rank would print so.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron\.core|megatron_slm\.runtime\.cpu)\b")
# It reads .grad of views of parameters, and recomputes core attention as --recompute-granularity selective asks.
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
warnings.filterwarnings("ignore", message="If you are using transformer_engine as the transformer implementation")
