"""Score sidecars: reference loss (and entropy) of every token of a corpus, indexed by position in ``.bin``.

A sidecar is one file: a header of 4,096 bytes (8 bytes of magic, then JSON padded with spaces), the reference losses,
and optionally the entropies, with two bytes per value in ``.bin`` order. The loss of a token is that of predicting it
from the preceding text, and the entropy that of the predicting distribution. Indexing by position makes a sidecar
independent of seed, epoch, blend, sequence length and number of ranks.

The sidecar NAME of the corpus ``directory/corpus`` is ``directory/corpus.NAME.scores``. If the name has a directory,
``other/NAME``, it is ``other/corpus.NAME.scores``. One name therefore covers all corpora of a blend.
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

from megatron_slm.corpus.headers import HEADER_BYTES, check_fields, pack_header
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.scores.quantization import DTYPE, Quantization

MAGIC = b"SLMSCORE"
VERSION = 4
READABLE = (2, 3, 4)
FIRST_WITH_CHECKSUMS, FIRST_WITH_TWO_BYTES_ONLY = 3, 4
FLAG = "--reference-scores"
TOOL = "tools/score_corpus.py"
EXAMPLE = "example"  # context of fine-tuning examples


@dataclass(frozen=True)
class ContextRule:
    """Represent the context in which tokens are scored.

    ``kind`` "document" limits the context to the document, "stream" to the corpus. "example" is "document" without the
    end-of-document token before the text, as in fine-tuning; the first token has no score. Scoring windows of
    ``window`` tokens start every ``stride`` tokens, so that each token has all preceding text as context, or at least
    ``window`` − ``stride`` + 1 tokens of it, including the end-of-document token before the text.
    """

    kind: str
    window: int
    stride: int

    def __str__(self) -> str:
        return f"{self.kind}, window {self.window}, stride {self.stride}"


@dataclass(frozen=True)
class ScoresHeader:
    """Represent the header of a sidecar."""

    tokens: int
    corpus: str  # fingerprint of the .idx and the .bin
    tokenizer: str  # name and fingerprint
    reference: str  # fingerprint of the reference model's checkpoint
    context: ContextRule
    loss: Quantization
    entropy: Quantization | None
    eod: int | None = None  # end-of-document id, the first input of a text; not recorded in versions 2 and 3
    bytes_per_value: int = DTYPE.itemsize  # 1 in some files of versions 2 and 3, which are rejected
    clamped: int = 0  # number of losses above the ceiling
    complete: bool = False
    checksum: str | None = None  # checksum of the content; None while unfinished, and in version 2

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the content: [1 or 2, tokens], losses and optional entropies."""
        return (1 if self.entropy is None else 2), self.tokens

    @property
    def file_bytes(self) -> int:
        """File size in bytes."""
        return self.entropy_start if self.entropy is None else self.entropy_start + self.tokens * DTYPE.itemsize

    @property
    def entropy_start(self) -> int:
        """Byte offset of the entropies; the losses follow the header."""
        return HEADER_BYTES + self.tokens * DTYPE.itemsize

    def unfinished(self) -> ScoresHeader:
        """Return the header without the fields that are set on completion; it identifies a scoring job."""
        return replace(self, clamped=0, complete=False, checksum=None)

    def pack(self) -> bytes:
        """Return the header as 4,096 bytes."""
        fields = {"version": VERSION, **asdict(self), "max_error_nats": self.loss.max_error}
        return pack_header(MAGIC, fields)

    @staticmethod
    def unpack(block: bytes) -> ScoresHeader:
        """Parse the header in ``block``.

        Raises:
            ValueError: the header is truncated, damaged, or of another format or version.
        """
        if len(block) < HEADER_BYTES:
            raise ValueError(f"is truncated: {len(block)} bytes, less than a header")
        if not block.startswith(MAGIC):
            raise ValueError("is not a score sidecar")
        try:
            fields: dict[str, Any] = json.loads(block[len(MAGIC) :])
            if (version := fields["version"]) in READABLE:
                return _parse_header(fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"has a damaged header ({error})") from error
        raise ValueError(f"has version {version}; supported versions are {READABLE[0]} to {READABLE[-1]}")


def _parse_header(fields: dict[str, Any]) -> ScoresHeader:
    if fields["version"] >= FIRST_WITH_CHECKSUMS:
        check_fields(fields)
    if fields.pop("version") < FIRST_WITH_TWO_BYTES_ONLY:
        del fields["codebook_bytes"]
        fields["bytes_per_value"] = fields["loss"]["bytes"]
    del fields["max_error_nats"]
    context, loss, entropy = (fields.pop(name) for name in ("context", "loss", "entropy"))
    return ScoresHeader(
        context=ContextRule(**context),
        loss=_parse_quantization(loss),
        entropy=None if entropy is None else _parse_quantization(entropy),
        **fields,
    )


def _parse_quantization(fields: dict[str, Any]) -> Quantization:
    """Return a recorded quantization, ignoring the bytes per value and codebook shape of versions 2 and 3."""
    return Quantization(**{name: fields[name] for name in ("ceiling", "curve") if name in fields})


def sidecar_path(prefix: str, name: str) -> Path:
    """Return the path of the sidecar ``name`` of the corpus ``prefix``."""
    corpus = Path(prefix)
    directory = Path(name).parent if "/" in name else corpus.parent
    return directory / f"{corpus.name}.{Path(name).name}.scores"


def check_paths_differ(prefixes: Iterable[str], name: str) -> None:
    """Raise ConfigError if two corpora have the same sidecar: in a directory of their own, it has the corpus's name."""
    owners: dict[Path, str] = {}
    for prefix in prefixes:
        if (other := owners.setdefault(sidecar_path(prefix, name), prefix)) != prefix:
            raise ConfigError(
                f"{FLAG} {name}: the corpora {other} and {prefix} have the same name, and thus the same sidecar "
                f"{sidecar_path(prefix, name)}. Give the name without a directory, so that sidecars are beside the "
                "corpora, or rename a corpus."
            )


def partial_path(path: Path) -> Path:
    """Return the temporary path of a sidecar that is being written."""
    return path.with_name(f"{path.name}.partial")


class Sidecar:
    """Access the memory-mapped values of a sidecar.

    Args:
        path: path of the file.
        header: result of :func:`read_header`, possibly from another host.

    Raises:
        ConfigError: the file is missing, unreadable or truncated on this host.
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
        assert self.header.entropy is not None, "check_scores rejects sidecars without entropies"
        return self.header.entropy.decode(self._codes[1, start:stop])


def read_header(path: Path) -> ScoresHeader:
    """Read the header of a complete sidecar.

    Raises:
        ConfigError: the sidecar is missing, unfinished, truncated, damaged, or of another format.
    """
    if not path.is_file():
        if partial_path(path).is_file():
            raise ConfigError(f"{FLAG}: {path} is not finished yet. Run {TOOL} again with the same flags to continue.")
        raise ConfigError(f"{FLAG}: {path} is missing. Create it with {TOOL}.")
    try:
        with path.open("rb") as file:
            header = ScoresHeader.unpack(file.read(HEADER_BYTES))
    except OSError as error:
        raise ConfigError(f"{FLAG}: {path} cannot be read ({error.strerror}). Check its permissions.") from error
    except ValueError as error:
        raise ConfigError(f"{FLAG}: {path} {error}. Remove it, and recreate it with {TOOL}.") from error
    size = path.stat().st_size
    if header.bytes_per_value == DTYPE.itemsize and size != header.file_bytes:
        raise ConfigError(
            f"{FLAG}: {path} has {size} bytes, but its header requires {header.file_bytes}. "
            f"Copy it again, or remove it and recreate it with {TOOL}."
        )
    if not header.complete:
        raise ConfigError(f"{FLAG}: {path} was never finished. Remove it, and recreate it with {TOOL}.")
    return header


def rescore_command(prefixes: Iterable[str], name: str, header: ScoresHeader, *, with_entropy: bool) -> str:
    """Return the command that rescores corpora with the context of ``header``; CHECKPOINT is a placeholder."""
    arguments = ["--reference-load", "CHECKPOINT", "--data-path", *prefixes, FLAG, name]
    arguments += ["--context", header.context.kind, "--stride", str(header.context.stride)]
    arguments += ["--entropy"] if with_entropy or header.entropy is not None else []
    return shlex.join(["python", TOOL, *arguments])
