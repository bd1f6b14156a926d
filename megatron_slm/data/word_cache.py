"""An encoder of texts to the bytes of a corpus."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_slm.data.tokenizer import Tokenizer


def fast_encoder(tokenizer: Tokenizer, dtype: np.dtype, *, check_every: int = 1000) -> Callable[[str], bytes]:
    """A function from a text to its token ids as the bytes of an array of ``dtype``."""
    return lambda text: np.array(tokenizer.encode(text), dtype).tobytes()
