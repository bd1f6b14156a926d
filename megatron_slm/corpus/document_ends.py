"""The token that ends the documents of a corpus, for corpora whose metadata does not name it."""

from __future__ import annotations

import numpy as np

from megatron_slm.corpus.index import Index, mapped_tokens
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.base import Tokenizer

SAMPLED_DOCUMENTS = 1000


def check_document_ends(index: Index, tokenizer: Tokenizer, flag: str) -> None:
    """Raise ConfigError if all documents end with a special token that is not the tokenizer's end of a document.

    A token with which the tokenizer itself ends every text is none of these.
    """
    end = _common_end(index)
    if end is None or end == tokenizer.eod or end not in tokenizer.special_ids or tokenizer.encode("a")[-1] == end:
        return
    raise ConfigError(
        f"{flag} {index.prefix} ends its documents with the id {end}, and the end-of-document id of "
        f"{tokenizer.source} is {tokenizer.eod}. Give --eod-id {end}, or use the tokenizer that made the corpus."
    )


def _common_end(index: Index) -> int | None:
    """Return the id that ends each of the first documents; None if they differ, or there are none."""
    bounds = index.boundaries[: SAMPLED_DOCUMENTS + 1]
    last = bounds[1:][np.diff(bounds) > 0] - 1
    places = index.pointers[last] // index.dtype.itemsize + index.lengths[last] - 1
    ends = np.unique(mapped_tokens(index)[places])
    return int(ends[0]) if len(ends) == 1 else None
