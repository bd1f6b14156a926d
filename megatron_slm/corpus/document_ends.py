"""Validation of document ends, for corpora whose metadata does not record the end-of-document id."""

from __future__ import annotations

import numpy as np

from megatron_slm.corpus.index import Index, mapped_tokens
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.base import Tokenizer

SAMPLED_DOCUMENTS = 1000


def check_document_ends(index: Index, tokenizer: Tokenizer, flag: str) -> None:
    """Raise ConfigError if all sampled documents end with a special token other than the end-of-document token.

    A token that the tokenizer itself appends to every text is accepted.
    """
    end = _common_end(index)
    if end is None or end == tokenizer.eod or end not in tokenizer.special_ids or tokenizer.encode("a")[-1] == end:
        return
    raise ConfigError(
        f"{flag} {index.prefix} ends its documents with the id {end}, but the end-of-document id of "
        f"{tokenizer.source} is {tokenizer.eod}. Set --eod-id {end}, or use the tokenizer that made the corpus."
    )


def _common_end(index: Index) -> int | None:
    """Return the last id of the first documents, or None if they differ or there are no documents."""
    bounds = index.boundaries[: SAMPLED_DOCUMENTS + 1]
    last = bounds[1:][np.diff(bounds) > 0] - 1
    places = index.pointers[last] // index.dtype.itemsize + index.lengths[last] - 1
    ends = np.unique(mapped_tokens(index)[places])
    return int(ends[0]) if len(ends) == 1 else None
