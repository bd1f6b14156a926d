"""Suppression of inapplicable warnings of Megatron-Core's datasets."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_cache_warnings() -> Iterator[None]:
    """Suppress warnings about a missing cache, which :mod:`megatron_slm.data.index_cache` writes."""
    loggers = [logging.getLogger(f"megatron.core.datasets.{name}") for name in ("gpt_dataset", "blended_dataset")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
