"""Warnings of Megatron-Core's datasets that do not apply here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_cache_warnings() -> Iterator[None]:
    """Silence warnings that no cache is written: :mod:`megatron_slm.data.index_cache` writes it."""
    loggers = [logging.getLogger(f"megatron.core.datasets.{name}") for name in ("gpt_dataset", "blended_dataset")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
