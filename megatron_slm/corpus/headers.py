"""Headers of fixed size for binary files beside a corpus: a magic number, and fields as JSON with their checksum."""

from __future__ import annotations

import json
from typing import Any

from megatron_slm.runtime.checksums import text_checksum

HEADER_BYTES = 4096


def pack_header(magic: bytes, fields: dict[str, Any]) -> bytes:
    """Return a header of HEADER_BYTES with the fields and their checksum."""
    fields = {**fields, "header_checksum": fields_checksum(fields)}
    text = json.dumps(fields, indent=1).encode("ascii")
    assert len(text) < HEADER_BYTES - len(magic), "the header has a fixed size"
    return magic + text.ljust(HEADER_BYTES - len(magic) - 1) + b"\n"


def check_fields(fields: dict[str, Any]) -> None:
    """Remove the checksum from the fields of a header.

    Raises:
        ValueError: the fields do not match it.
        KeyError: there is no checksum.
    """
    if fields.pop("header_checksum") != fields_checksum(fields):
        raise ValueError("its content does not match its checksum")


def fields_checksum(fields: dict[str, Any]) -> str:
    """Return the checksum of the fields of a header."""
    return text_checksum(json.dumps(fields, sort_keys=True))
