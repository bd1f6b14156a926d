"""Temporary replacement of attributes of other libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def replaced_attributes(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Replace attributes of modules and classes, given as (owner, name, value), within the block."""
    with ExitStack() as stack:
        for owner, name, value in replacements:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
