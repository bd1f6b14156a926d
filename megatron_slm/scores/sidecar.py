"""Score sidecars: the reference loss (and entropy) of every token of a corpus, by its position in ``.bin``.

A sidecar is one file: a header of 4,096 bytes (eight of magic, then JSON, padded with spaces), the reference losses,
and then the entropies if they were asked for; two bytes per value, in the order of ``.bin``. The loss of a token is
that of predicting it, and the entropy that of the distribution that predicts it, both from the text before it. Since
values are found by position, a sidecar serves any seed, epoch, blend, sequence length and number of ranks.

The sidecar NAME of the corpus ``directory/corpus`` is ``directory/corpus.NAME.scores``; with a directory in the name,
``other/NAME``, it is ``other/corpus.NAME.scores``. So one name serves all corpora of a blend.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.runtime.checksums import text_checksum
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.scores.quantization import DTYPE, Quantization

MAGIC = b"SLMSCORE"
VERSION = 4
READABLE = (2, 3, 4)
FIRST_WITH_CHECKSUMS, FIRST_WITH_TWO_BYTES_ONLY = 3, 4
HEADER_BYTES = 4096
FLAG = "--reference-scores"
TOOL = "tools/score_corpus.py"


@dataclass(frozen=True)
class ContextRule:
    """The text before a token when it is scored.

    ``kind`` "document": the text of its document; "stream": the text before it in the corpus. Scoring windows hold
    ``window`` tokens and begin every ``stride`` tokens, so that a token has all the text there is, or at least
    ``window`` − ``stride`` + 1 tokens of it, the end-of-document token before the text included.
    """

    kind: str
    window: int
    stride: int

    def __str__(self) -> str:
        return f"{self.kind}, window {self.window}, stride {self.stride}"


@dataclass(frozen=True)
class ScoresHeader:
    """Header of a sidecar."""

    tokens: int
    corpus: str  # fingerprint of the .idx and the .bin
    tokenizer: str  # name and fingerprint
    reference: str  # fingerprint of the reference model's checkpoint
    context: ContextRule
    loss: Quantization
    entropy: Quantization | None
    eod: int | None = None  # end-of-document id, the input before a text; versions 2 and 3 do not record it
    bytes_per_value: int = DTYPE.itemsize  # 1 in some files of versions 2 and 3, which are refused
    clamped: int = 0  # losses above the ceiling
    complete: bool = False
    checksum: str | None = None  # of everything after the header; None while unfinished, and in version 2

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the content: the losses and, if there are any, the entropies of all tokens."""
        return (1 if self.entropy is None else 2), self.tokens

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.entropy_start if self.entropy is None else self.entropy_start + self.tokens * DTYPE.itemsize

    @property
    def entropy_start(self) -> int:
        """Offset of the entropies; the losses begin after the header."""
        return HEADER_BYTES + self.tokens * DTYPE.itemsize

    def unfinished(self) -> ScoresHeader:
        """Return the header without the fields that are known only at the end: the identity of a scoring job."""
        return replace(self, clamped=0, complete=False, checksum=None)

    def pack(self) -> bytes:
        """Return the 4,096 bytes of the header."""
        fields = {"version": VERSION, **asdict(self), "max_error_nats": self.loss.max_error}
        fields["header_checksum"] = _checksum(fields)
        text = json.dumps(fields, indent=1).encode("ascii")
        assert len(text) < HEADER_BYTES - len(MAGIC), "a header has a fixed size"
        return MAGIC + text.ljust(HEADER_BYTES - len(MAGIC) - 1) + b"\n"

    @staticmethod
    def unpack(block: bytes) -> ScoresHeader:
        """Return the header that ``block`` holds.

        Raises:
            ValueError: the header is cut short, foreign, of another version, or damaged.
        """
        if len(block) < HEADER_BYTES:
            raise ValueError(f"is cut short: {len(block)} bytes, less than a header")
        if not block.startswith(MAGIC):
            raise ValueError("is not a score sidecar")
        try:
            fields: dict[str, Any] = json.loads(block[len(MAGIC) :])
            if (version := fields["version"]) in READABLE:
                return _header_of(fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"has a damaged header ({error})") from error
        raise ValueError(f"is of version {version}, and this program reads {READABLE[0]} to {READABLE[-1]}")


def _header_of(fields: dict[str, Any]) -> ScoresHeader:
    if fields["version"] >= FIRST_WITH_CHECKSUMS and fields.pop("header_checksum") != _checksum(fields):
        raise ValueError("its content does not match its checksum")
    if fields.pop("version") < FIRST_WITH_TWO_BYTES_ONLY:
        del fields["codebook_bytes"]
        fields["bytes_per_value"] = fields["loss"]["bytes"]
    del fields["max_error_nats"]
    context, loss, entropy = (fields.pop(name) for name in ("context", "loss", "entropy"))
    return ScoresHeader(
        context=ContextRule(**context),
        loss=_quantization_of(loss),
        entropy=None if entropy is None else _quantization_of(entropy),
        **fields,
    )


def _quantization_of(fields: dict[str, Any]) -> Quantization:
    """Versions 2 and 3 have further fields: the bytes of a value, and the shape of the codebooks of one-byte losses."""
    return Quantization(**{name: fields[name] for name in ("ceiling", "curve") if name in fields})


def _checksum(fields: dict[str, Any]) -> str:
    return text_checksum(json.dumps(fields, sort_keys=True))


def sidecar_path(prefix: str, name: str) -> Path:
    """Return the path of the sidecar ``name`` of the corpus ``prefix``."""
    corpus = Path(prefix)
    directory = Path(name).parent if "/" in name else corpus.parent
    return directory / f"{corpus.name}.{Path(name).name}.scores"


def partial_path(path: Path) -> Path:
    """Return the temporary path of a sidecar that is being written."""
    return path.with_name(f"{path.name}.partial")


class Sidecar:
    """The values of a sidecar, mapped and read from disk on demand.

    Args:
        path: the file.
        header: its header, from :func:`read_header`, perhaps on another host.

    Raises:
        ConfigError: the file is missing, unreadable or cut short on this host.
    """

    def __init__(self, path: Path, header: ScoresHeader) -> None:
        self.header = header
        try:
            self._codes = np.memmap(path, DTYPE, "r", HEADER_BYTES, header.shape)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{FLAG}: {path} cannot be mapped ({error}). Copy it to every host.") from error

    def losses(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the reference losses of the tokens [start, stop) of the corpus, in nats."""
        return self.header.loss.decode(self._codes[0, start:stop])

    def entropies(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the reference entropies of the tokens [start, stop) of the corpus, in nats."""
        assert self.header.entropy is not None, "check_scores refuses a sidecar without entropies"
        return self.header.entropy.decode(self._codes[1, start:stop])


def read_header(path: Path) -> ScoresHeader:
    """Return the header of a complete sidecar.

    Raises:
        ConfigError: the sidecar is missing, unfinished, cut short, foreign, or damaged.
    """
    if not path.is_file():
        if partial_path(path).is_file():
            raise ConfigError(f"{FLAG}: {path} is not finished yet. Run {TOOL} with the same flags again to continue.")
        raise ConfigError(f"{FLAG}: {path} is missing. Make it with {TOOL}.")
    try:
        with path.open("rb") as file:
            header = ScoresHeader.unpack(file.read(HEADER_BYTES))
    except OSError as error:
        raise ConfigError(f"{FLAG}: {path} cannot be read ({error.strerror}). Check its permissions.") from error
    except ValueError as error:
        raise ConfigError(f"{FLAG}: {path} {error}. Remove it, and make it again with {TOOL}.") from error
    size = path.stat().st_size
    if header.bytes_per_value == DTYPE.itemsize and size != header.file_bytes:
        raise ConfigError(
            f"{FLAG}: {path} has {size} bytes, and its header promises {header.file_bytes}. "
            f"Copy it again, or remove it and make it again with {TOOL}."
        )
    if not header.complete:
        raise ConfigError(f"{FLAG}: {path} was never finished. Remove it, and make it again with {TOOL}.")
    return header


def rescore_command(prefixes: Iterable[str], name: str, header: ScoresHeader, *, with_entropy: bool) -> str:
    """Return the command that scores corpora again by the rule of ``header``; CHECKPOINT is the reference model."""
    words = ["--reference-load", "CHECKPOINT", "--data-path", *prefixes, FLAG, name]
    words += ["--context", header.context.kind, "--stride", str(header.context.stride)]
    words += ["--entropy"] if with_entropy or header.entropy is not None else []
    return shlex.join(["python", TOOL, *words])
