"""The score sidecar of a corpus: the reference loss (and entropy) of every one of its tokens, by place in ``.bin``.

A sidecar is one file: a header of 4,096 bytes (eight of magic, then JSON, filled up with spaces), the codebooks of the
token ids where a loss has one byte, the codes of the reference losses, and, where they were asked for, the codes of the
entropies: one value per token, in the order of ``.bin``. The loss of a token is that of predicting it, and the entropy
that of the distribution that predicts it, both from the text before it. Keyed by place, a sidecar serves any seed,
epoch, blend, sequence length and number of ranks.

Where it lies: the sidecar NAME of the corpus ``folder/corpus`` is ``folder/corpus.NAME.scores``; with a folder in the
name, ``other/NAME``, it is ``other/corpus.NAME.scores``. So a few names stand for the sidecars of a whole blend.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.data.scores.code import ScoreCode
from megatron_slm.data.scores.codebooks import Codebooks, TokenCode
from megatron_slm.runtime.checksums import text_checksum
from megatron_slm.runtime.errors import ConfigError

MAGIC = b"SLMSCORE"
VERSION = 3
READABLE = (2, 3)  # version 2 has no checksums
HEADER_BYTES = 4096
FLAG = "--reference-scores"
TOOL = "tools/score_corpus.py"


@dataclass(frozen=True)
class ContextRule:
    """Which text stands before a token when it is scored.

    ``kind`` "document": the text of its own document; "stream": whatever stands before it in the corpus. Scoring
    windows hold ``window`` tokens and begin every ``stride`` tokens, so that a token has all the text there is, or at
    least ``window`` − ``stride`` + 1 tokens of it, the end-of-document token before the text included.
    """

    kind: str
    window: int
    stride: int

    def __str__(self) -> str:
        return f"{self.kind}, window {self.window}, stride {self.stride}"


@dataclass(frozen=True)
class ScoresHeader:
    """What a sidecar says of itself."""

    tokens: int
    corpus: str  # fingerprint of the .idx and the .bin
    tokenizer: str  # name and fingerprint
    reference: str  # fingerprint of the reference model's checkpoint
    context: ContextRule
    loss: TokenCode | ScoreCode
    entropy: ScoreCode | None
    clamped: int = 0  # losses above the ceiling of their code
    complete: bool = False
    checksum: str | None = None  # of everything after the header; None while unfinished, and in version 2

    @property
    def file_bytes(self) -> int:
        """The size of the whole file."""
        width = self.loss.bytes + (self.entropy.bytes if self.entropy is not None else 0)
        return self.loss_start + self.tokens * width

    @property
    def loss_start(self) -> int:
        """Where the codes of the losses begin: after the codebooks, if there are any."""
        return HEADER_BYTES + self.loss.table_bytes

    @property
    def entropy_start(self) -> int:
        """Where the codes of the entropies begin."""
        return self.loss_start + self.tokens * self.loss.bytes

    def unfinished(self) -> ScoresHeader:
        """The same without what is known only at the end: what identifies a scoring job."""
        return replace(self, clamped=0, complete=False, checksum=None)

    def pack(self) -> bytes:
        """The header's 4,096 bytes."""
        facts = {"version": VERSION, **asdict(self)}
        facts |= {"max_error_nats": self.loss.max_error, "codebook_bytes": self.loss.table_bytes}
        facts["header_checksum"] = _checksum(facts)
        text = json.dumps(facts, indent=1).encode("ascii")
        assert len(text) < HEADER_BYTES - len(MAGIC), "a header has a fixed size"
        return MAGIC + text.ljust(HEADER_BYTES - len(MAGIC) - 1) + b"\n"

    @staticmethod
    def unpack(block: bytes) -> ScoresHeader:
        """Read a header.

        Raises:
            ValueError: cut short, foreign, of another version, or damaged; the message says which.
        """
        if len(block) < HEADER_BYTES:
            raise ValueError(f"is cut short: {len(block)} bytes, less than a header")
        if not block.startswith(MAGIC):
            raise ValueError("is not a score sidecar")
        try:
            facts: dict[str, Any] = json.loads(block[len(MAGIC) :])
            if facts["version"] == VERSION and facts.pop("header_checksum") != _checksum(facts):
                raise ValueError("its content does not match its checksum")
            version = facts.pop("version")
            if version in READABLE:
                facts.pop("max_error_nats"), facts.pop("codebook_bytes")
                loss, entropy = facts.pop("loss"), facts.pop("entropy")
                return ScoresHeader(
                    context=ContextRule(**facts.pop("context")),
                    loss=TokenCode(**loss) if "vocab_size" in loss else ScoreCode(**loss),
                    entropy=None if entropy is None else ScoreCode(**entropy),
                    **facts,
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"has a damaged header ({error})") from error
        raise ValueError(f"is of version {version}, and this program reads {READABLE[0]} to {READABLE[-1]}")


def _checksum(facts: dict[str, Any]) -> str:
    return text_checksum(json.dumps(facts, sort_keys=True))


def sidecar_path(prefix: str, name: str) -> Path:
    """The file of the sidecar ``name`` of the corpus ``prefix``."""
    folder, corpus = Path(name).parent, Path(prefix)
    home = folder if "/" in name else corpus.parent
    return home / f"{corpus.name}.{Path(name).name}.scores"


def partial_path(path: Path) -> Path:
    """The name of a sidecar that is being made."""
    return path.with_name(f"{path.name}.partial")


class Sidecar:
    """A whole sidecar, read from disk where it is needed.

    Raises:
        ConfigError: missing, unfinished, cut short, foreign, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self._code = read_loss_code(path, self.header)
        start = self.header.loss_start
        self._losses = np.memmap(path, self.header.loss.dtype, "r", start, (self.header.tokens,))
        self._entropies: NDArray[Any] | None = None
        if self.header.entropy is not None:
            code, start = self.header.entropy, self.header.entropy_start
            self._entropies = np.memmap(path, code.dtype, "r", start, (self.header.tokens,))

    def losses(self, start: int, stop: int, labels: NDArray[Any]) -> NDArray[np.float32]:
        """Reference losses of the tokens [start, stop) of the corpus, whose ids are ``labels``, nats."""
        return self._code.decode(self._losses[start:stop], labels)

    def entropies(self, start: int, stop: int) -> NDArray[np.float32]:
        """Reference entropies of the tokens [start, stop) of the corpus, nats."""
        assert self._entropies is not None and self.header.entropy is not None, "checked when it was opened"
        return self.header.entropy.decode(self._entropies[start:stop])


def read_loss_code(path: Path, header: ScoresHeader) -> Codebooks | ScoreCode:
    """What encodes and decodes the losses of a sidecar, finished or not.

    Raises:
        ConfigError: damaged codebooks.
    """
    if isinstance(header.loss, ScoreCode):
        return header.loss
    try:
        return Codebooks.read(path, HEADER_BYTES, header.loss)
    except ValueError as error:
        raise ConfigError(f"{FLAG}: {path} {error}. Remove it, and make it again with {TOOL}.") from error


def read_header(path: Path) -> ScoresHeader:
    """The header of a sidecar that is whole.

    Raises:
        ConfigError: missing, unfinished, cut short, foreign, or damaged.
    """
    if not path.is_file():
        if partial_path(path).is_file():
            raise ConfigError(f"{FLAG}: {path} is not finished yet. Run {TOOL} with the same flags again: it goes on.")
        raise ConfigError(f"{FLAG}: {path} is missing. Make it with {TOOL}.")
    try:
        with path.open("rb") as file:
            header = ScoresHeader.unpack(file.read(HEADER_BYTES))
    except OSError as error:
        raise ConfigError(f"{FLAG}: {path} cannot be read ({error.strerror}). Check its permissions.") from error
    except ValueError as error:
        raise ConfigError(f"{FLAG}: {path} {error}. Make it again with {TOOL}.") from error
    size = path.stat().st_size
    if size != header.file_bytes:
        raise ConfigError(
            f"{FLAG}: {path} has {size} bytes, and its header promises {header.file_bytes}. "
            f"Copy it again, or make it again with {TOOL}."
        )
    if not header.complete:
        raise ConfigError(f"{FLAG}: {path} was never finished. Remove it, and make it again with {TOOL}.")
    return header
