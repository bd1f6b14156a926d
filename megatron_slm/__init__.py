"""Selective Language Modeling on Megatron-Core: pretrain on the most useful tokens."""

import logging
import warnings

__version__ = "0.1.0"

# Repeated by many modules of Megatron-Core; the trainer logs the available libraries once.
warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*")
# Megatron-Core's warning about its default.
warnings.filterwarnings("ignore", message="full scope is deprecated.*")
# Megatron-Core calls deprecated torch functions, on CPUs through mcore.cpu; every rank would print the warning.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron\.core|megatron_slm\.mcore\.cpu)\b")
# Megatron-Core reads .grad of parameter views, and recomputes core attention with --recompute-granularity selective.
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
warnings.filterwarnings("ignore", message="If you are using transformer_engine as the transformer implementation")
# The MLP with a filtered backward pass is a subclass of Megatron-Core's, and finds its process group itself.
logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
    lambda record: "Unknown MLP type" not in record.getMessage()
)
