"""Score sidecars in the formats of earlier releases."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_slm.runtime.checksums import text_checksum
from megatron_slm.scores.sidecar import HEADER_BYTES


def make_former(path: Path, version: int, width: int = 2) -> None:
    """Rewrite the sidecar ``path`` in the format of an earlier version, with ``width`` bytes per value."""
    block = path.read_bytes()
    fields = json.loads(block[8:HEADER_BYTES])
    content = block[HEADER_BYTES:]
    for name in ("eod", "bytes_per_value", "header_checksum"):
        del fields[name]
    fields["version"], fields["codebook_bytes"] = version, 0
    fields["entropy"]["bytes"] = fields["loss"]["bytes"] = width
    if width == 1:
        fields["loss"] |= {"vocab_size": 257, "bins": 32, "least": 2}
        del fields["loss"]["curve"]
        fields["codebook_bytes"] = 257 * 32
        content = bytes(257 * 32) + content[: len(content) // 2]
    if version == 2:
        del fields["checksum"]
    else:
        fields["header_checksum"] = text_checksum(json.dumps(fields, sort_keys=True))
    path.write_bytes(block[:8] + json.dumps(fields).encode().ljust(HEADER_BYTES - 8) + content)
