"""Loss masks of a corpus: one bit per token, set for tokens whose prediction contributes to the loss.

The mask NAME of the corpus ``directory/corpus`` is the file ``directory/corpus.NAME.mask``: a header of 4,096 bytes (8
bytes of magic, then JSON padded with spaces), and one bit per token in the order of ``.bin``, highest bit first. The
mask ``answers`` is written by tools/preprocess_sft.py, others by tools/select_tokens.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_slm.config.selection import ANSWERS
from megatron_slm.corpus.fingerprints import corpus_fingerprint, corpus_identity
from megatron_slm.corpus.headers import HEADER_BYTES, check_fields, pack_header
from megatron_slm.runtime.checksums import text_checksum
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import atomic_path, check_replaceable

FLAG = "--slm-loss-mask"
MAGIC = b"SLMMASK1"
READ_BYTES = 1 << 24
AGAIN = {ANSWERS: "Recreate the corpus with tools/preprocess_sft.py."}
SELECT_AGAIN = "Recreate the mask with tools/select_tokens.py."


@dataclass(frozen=True)
class MaskHeader:
    """Represent the header of a loss mask."""

    tokens: int
    selected: int  # number of set bits
    corpus: str  # fingerprint of the .idx and the .bin
    checksum: str  # of the bits
    origin: dict[str, Any] = field(default_factory=dict)  # settings of the tool that wrote the mask

    def pack(self) -> bytes:
        """Return the header as 4,096 bytes."""
        return pack_header(MAGIC, asdict(self))

    @staticmethod
    def unpack(block: bytes) -> MaskHeader:
        """Parse the header in ``block``.

        Raises:
            ValueError: the header is truncated, damaged or of another format.
        """
        if not block.startswith(MAGIC):
            raise ValueError("is not a loss mask")
        try:
            fields = json.loads(block[len(MAGIC) :])
            check_fields(fields)
            return MaskHeader(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"has a damaged header ({error})") from error


def mask_path(prefix: str, name: str) -> Path:
    """Return the path of a loss mask."""
    return Path(f"{prefix}.{name}.mask")


def has_mask(prefix: str, name: str) -> bool:
    """Return whether the corpus has the mask."""
    return mask_path(prefix, name).is_file()


def mask_names(prefix: str) -> list[str]:
    """Return the names of the loss masks of a corpus."""
    start = f"{Path(prefix).name}."
    names = [path.name for path in Path(prefix).parent.iterdir() if path.suffix == ".mask" and is_mask(path)]
    found = [name.removeprefix(start).removesuffix(".mask") for name in names if name.startswith(start)]
    return sorted(name for name in found if "." not in name)


def find_mask(prefix: str, name: str) -> str | None:
    """Return the mask of a corpus for a run with the mask ``name``: itself, otherwise ``answers``, otherwise None."""
    return next((each for each in (name, ANSWERS) if has_mask(prefix, each)), None)


def is_mask(path: Path) -> bool:
    """Return whether a file is a loss mask."""
    return read_block(path).startswith(MAGIC)


def read_block(path: Path) -> bytes:
    """Return the header block of a file, or nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(HEADER_BYTES)
    except OSError:
        return b""


class LossMask:
    """Access the memory-mapped bits of a mask.

    Raises:
        ConfigError: the mask is missing, unreadable, truncated or damaged.
    """

    def __init__(self, prefix: str, name: str) -> None:
        self.header = read_header(prefix, name)
        path = mask_path(prefix, name)
        try:
            self._bytes = np.memmap(path, np.uint8, "r", HEADER_BYTES, (_byte_count(self.header.tokens),))
        except (OSError, ValueError) as error:
            raise _error(prefix, name, f"cannot be mapped ({error})") from error

    def parts(self) -> Iterator[NDArray[np.bool_]]:
        """Yield the bits of all tokens in consecutive parts."""
        for start in range(0, self.header.tokens, READ_BYTES):
            yield self.get(start, min(start + READ_BYTES, self.header.tokens))

    def get(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return the bits of the tokens [start, stop) of the corpus."""
        first = start // 8
        return np.unpackbits(self._bytes[first : -(-stop // 8)])[start - 8 * first : stop - 8 * first].astype(bool)


def read_header(prefix: str, name: str) -> MaskHeader:
    """Read the header of a mask.

    Raises:
        ConfigError: the mask is missing, truncated or damaged.
    """
    path = mask_path(prefix, name)
    if not path.is_file():
        raise _error(prefix, name, "is missing")
    try:
        header = MaskHeader.unpack(read_block(path))
    except ValueError as error:
        raise _error(prefix, name, str(error)) from error
    size, wanted = path.stat().st_size, HEADER_BYTES + _byte_count(header.tokens)
    if size != wanted:
        raise _error(prefix, name, f"has {size} bytes, but its header requires {wanted}")
    return header


def check_mask(prefix: str, name: str, *, verify: bool = True) -> MaskHeader:
    """Validate a mask against its corpus and its checksum, and return its header.

    Args:
        verify: compare the content with the checksum.

    Raises:
        ConfigError: the mask is missing, damaged, or belongs to another corpus.
    """
    header = read_header(prefix, name)
    if header.corpus != corpus_fingerprint(prefix):
        raise _error(prefix, name, "was made for another corpus")
    if verify and _content_checksum(mask_path(prefix, name)) != header.checksum:
        raise _error(prefix, name, "is damaged: its content does not match its checksum")
    return header


def write_mask(
    prefix: str, name: str, parts: Iterable[NDArray[np.bool_]], origin: dict[str, Any], files: str | None = None
) -> MaskHeader:
    """Write the mask of a complete corpus atomically, and return its header.

    Args:
        parts: the bits of all tokens, in consecutive parts.
        origin: settings of the tool, for the header.
        files: prefix of the corpus files if they are not yet renamed to ``prefix``.

    Raises:
        ConfigError: the file cannot be written, or is not a mask.
    """
    path, digest = mask_path(prefix, name), xxhash.xxh3_128()
    tokens = selected = 0
    rest = np.zeros(0, bool)  # bits that do not fill a byte yet
    with atomic_path(path, FLAG, is_ours=is_mask) as temporary, temporary.open("wb") as file:
        file.write(bytes(HEADER_BYTES))
        for part in parts:
            tokens, selected = tokens + len(part), selected + int(part.sum())
            bits = np.concatenate((rest, part))
            whole = len(bits) // 8 * 8
            digest.update(packed := np.packbits(bits[:whole]).tobytes())
            file.write(packed)
            rest = bits[whole:]
        digest.update(packed := np.packbits(rest).tobytes())
        file.write(packed)
        corpus = corpus_fingerprint(files or prefix)
        header = MaskHeader(tokens, selected, corpus, f"xxh3:{digest.hexdigest()}", origin)
        file.seek(0)
        file.write(header.pack())
    return header


def check_mask_writable(prefix: str, name: str, flag: str) -> None:
    """Raise ConfigError if writing the mask would replace another file."""
    check_replaceable(mask_path(prefix, name), flag, is_ours=is_mask)


def masked_identity(prefix: str, name: str | None) -> str:
    """Return the identity of a corpus and of its mask in a run with the mask ``name``, if there is one."""
    identity = corpus_identity(prefix)
    found = None if name is None else find_mask(prefix, name)
    return identity if found is None else text_checksum(f"{identity} {found} {read_header(prefix, found).checksum}")


def _byte_count(tokens: int) -> int:
    return -(-tokens // 8)


def _content_checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        while data := file.read(READ_BYTES):
            digest.update(data)
    return f"xxh3:{digest.hexdigest()}"


def _error(prefix: str, name: str, problem: str) -> ConfigError:
    return ConfigError(f"{FLAG} {name}: {mask_path(prefix, name)} {problem}. {AGAIN.get(name, SELECT_AGAIN)}")
