"""The sidecar's file: written by several hands, read anywhere; another's, a damaged or an unfinished one is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.data.fingerprints import BLOCK, BLOCKS, files_fingerprint
from megatron_slm.data.scores import writer as score_writer
from megatron_slm.data.scores.code import ScoreCode
from megatron_slm.data.scores.codebooks import Codebooks, fit, loss_code
from megatron_slm.data.scores.sets import Combine, CorpusScores, ScoreSet, verify_scores
from megatron_slm.data.scores.sidecar import HEADER_BYTES, ContextRule, ScoresHeader, Sidecar, read_header, sidecar_path
from megatron_slm.data.scores.writer import (
    Progress,
    SidecarWriter,
    content_checksum,
    finish,
    is_finished,
    record_progress,
    reserve,
)
from megatron_slm.runtime.errors import ConfigError


def header(tokens: int = 100, width: int = 1, entropy: bool = True) -> ScoresHeader:
    return ScoresHeader(
        tokens=tokens,
        corpus="c" * 64,
        tokenizer="ByteTokenizer " + "t" * 64,
        reference="r" * 64,
        context=ContextRule("document", 32, 16),
        loss=loss_code(257, width),
        entropy=ScoreCode.for_entropy(257, width) if entropy else None,
    )


def books(wanted: ScoresHeader, losses: np.ndarray) -> Codebooks | ScoreCode:
    """Fitted to the losses themselves."""
    if isinstance(wanted.loss, ScoreCode):
        return wanted.loss
    counts = np.zeros((wanted.loss.vocab_size, wanted.loss.bins), np.int32)
    wanted.loss.count(counts, losses, labels(wanted))
    return fit(wanted.loss, counts)


def labels(wanted: ScoresHeader) -> np.ndarray:
    return np.arange(wanted.tokens) * 7 % 257


def write(path: Path, wanted: ScoresHeader, losses: np.ndarray, entropies: np.ndarray) -> None:
    """By two hands, the later part first."""
    reserve(path, wanted)
    code, ids = books(wanted, losses), labels(wanted)
    half = wanted.tokens // 3
    for start, stop in ((half, wanted.tokens), (0, half)):
        writer = SidecarWriter(path, wanted)
        if isinstance(code, Codebooks):
            writer.write_codebooks(code)
        writer.write_losses(start, code.encode(losses[start:stop], ids[start:stop]))
        if wanted.entropy is not None:
            writer.write_entropies(start, wanted.entropy.encode(entropies[start:stop]))
        writer.sync()
        writer.close()
    finish(path, wanted, Progress(clamped=3), content_checksum(path))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 500), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 2**32 - 1))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, width: int, entropy: bool, seed: int
) -> None:
    path = tmp_path_factory.mktemp("scores") / "corpus.rm.scores"
    wanted = header(tokens, width, entropy)
    chance = np.random.default_rng(seed)
    losses = chance.uniform(0, wanted.loss.ceiling, tokens).astype(np.float32)
    entropies = chance.uniform(0, math.log(257), tokens).astype(np.float32)
    write(path, wanted, losses, entropies)
    sidecar = Sidecar(path)
    assert sidecar.header == replace(wanted, clamped=3, complete=True, checksum=sidecar.header.checksum)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    start, stop = sorted(chance.integers(0, tokens + 1, 2).tolist())
    read = sidecar.losses(start, stop, labels(wanted)[start:stop])
    assert np.abs(read - losses[start:stop]).max(initial=0) <= wanted.loss.max_error
    if wanted.entropy is not None:
        assert np.abs(sidecar.entropies(start, stop) - entropies[start:stop]).max(initial=0) <= wanted.entropy.max_error
    table = 257 * 32 if width == 1 else 0
    assert path.stat().st_size == HEADER_BYTES + table + tokens * width * (2 if entropy else 1)


def finished(folder: Path) -> Path:
    path = folder / "corpus.rm.scores"
    write(path, header(), np.ones(100, np.float32), np.ones(100, np.float32))
    return path


def _edit(path: Path, **facts: object) -> None:
    block = path.read_bytes()
    there = json.loads(block[8:HEADER_BYTES]) | facts
    path.write_bytes(block[:8] + json.dumps(there).encode().ljust(HEADER_BYTES - 8) + block[HEADER_BYTES:])


def _unfinish(path: Path) -> None:
    path.write_bytes(replace(read_header(path), complete=False).pack() + path.read_bytes()[HEADER_BYTES:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing. Make it with"),
        (lambda path: path.rename(f"{path}.partial"), "is not finished yet"),
        (lambda path: path.write_bytes(b"SLM"), "is cut short: 3 bytes"),
        (lambda path: path.write_bytes(b"x" * 9000), "is not a score sidecar"),
        (lambda path: path.write_bytes(b"SLMSCORE" + b"{" * 9000), "has a damaged header"),
        (lambda path: path.write_bytes(b"SLMSCORE" + b"[1] ".ljust(9000)), "has a damaged header"),
        (lambda path: _edit(path, version=1), "is of version 1, and this program reads 2 to 3"),
        (lambda path: _edit(path, colour="red"), "has a damaged header"),
        (lambda path: _edit(path, tokens=99), "has a damaged header (its content does not match its checksum)"),
        (lambda path: _edit(path, header_checksum=None), "has a damaged header"),
        (lambda path: _unfinish(path), "was never finished"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 12519 bytes, and its header promises 12520"),
        (lambda path: path.write_bytes(path.read_bytes() + b"1"), "has 12521 bytes"),
    ],
)
def test_damage_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    path = finished(tmp_path)
    damage(path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="--reference-scores") as caught:
        read_header(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(("place", "byte"), [(0, 1), (5, 0), (31, 255), (32, 9)])
def test_damaged_codebooks_are_refused(tmp_path: Path, place: int, byte: int) -> None:
    """A first code that is not 0, and bins that lost their codes."""
    path = finished(tmp_path)
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + place] = byte
    path.write_bytes(bytes(content))
    with pytest.raises(ConfigError, match=r"corpus.rm.scores has damaged codebooks"):
        Sidecar(path)


def _scores(path: Path) -> ScoreSet:
    return {"corpus": CorpusScores((Sidecar(path),), Combine.parse("mean", 1), with_entropy=True)}


@pytest.mark.parametrize("place", [HEADER_BYTES + 257 * 32, -1, -101])
def test_one_flipped_bit_is_refused(tmp_path: Path, place: int) -> None:
    """In the codes of losses and entropies, where every byte is a valid code."""
    path = finished(tmp_path)
    verify_scores(_scores(path))
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"corpus.rm.scores is damaged: its content does not match its checksum"):
        verify_scores(_scores(path))


def test_sidecar_of_an_earlier_version_is_read_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = finished(tmp_path)
    block = path.read_bytes()
    facts = json.loads(block[8:HEADER_BYTES])
    del facts["checksum"], facts["header_checksum"]
    facts["version"] = 2
    path.write_bytes(block[:8] + json.dumps(facts).encode().ljust(HEADER_BYTES - 8) + block[HEADER_BYTES:])
    verify_scores(_scores(path))
    assert "has no checksum" in capsys.readouterr().err


def test_names() -> None:
    assert sidecar_path("data/corpus", "rm") == Path("data/corpus.rm.scores")
    assert sidecar_path("data/corpus.v2", "rm") == Path("data/corpus.v2.rm.scores")
    assert sidecar_path("data/corpus", "./rm") == Path("corpus.rm.scores")
    assert sidecar_path("/a/corpus", "/b/c/rm") == Path("/b/c/corpus.rm.scores")


@pytest.mark.parametrize("other", [{"reference": "x"}, {"tokens": 99}, {"context": ContextRule("stream", 32, 32)}])
def test_another_jobs_file_is_not_overwritten(tmp_path: Path, other: dict[str, object]) -> None:
    path = finished(tmp_path)
    assert is_finished(path, header())
    with pytest.raises(ConfigError, match=f"was made with another {next(iter(other))}"):
        is_finished(path, replace(header(), **other))  # type: ignore[arg-type]
    begun = tmp_path / "begun.rm.scores"
    assert not is_finished(begun, header())
    reserve(begun, header())
    record_progress(begun, Progress(2, 3, 4, 5))
    assert reserve(begun, header()) == Progress(2, 3, 4, 5)
    with pytest.raises(ConfigError, match=f"was made with another {next(iter(other))}"):
        reserve(begun, replace(header(), **other))  # type: ignore[arg-type]


def test_full_disk_is_said_before_the_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = finished(tmp_path).with_name("new.rm.scores")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(score_writer.os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"No space left on device. It needs 12,520 bytes in all"):
        reserve(path, header())
    assert [each.name for each in tmp_path.iterdir()] == ["corpus.rm.scores"]


def test_combinations() -> None:
    values = [np.array([1, 5, 3], np.float32), np.array([2, 1, 3], np.float32)]
    assert Combine.parse("mean", 2)(values) == pytest.approx([1.5, 3, 3])
    assert Combine.parse("min", 2)(values).tolist() == [1, 1, 3]
    assert Combine.parse("3,1", 2)(values) == pytest.approx([1.25, 4, 3])
    assert Combine.parse("mean", 1)(values[:1]).tolist() == [1, 5, 3]
    assert Combine.parse("min", 2)(values).dtype == Combine.parse("0.1,0.9", 2)(values).dtype == np.float32
    for text, message in (
        ("most", "should be mean, min, or weights such as 0.7,0.3, not 'most'"),
        ("1,2,3", "has 3 weights, and --reference-scores names 2 sidecars"),
        ("1,0", "every weight must be above 0"),
        ("1,nan", "every weight must be above 0"),
    ):
        with pytest.raises(ConfigError) as caught:
            Combine.parse(text, 2)
        assert message in str(caught.value)


def test_fingerprint_sees_ends_size_and_order(tmp_path: Path) -> None:
    """A sparse file of more than the blocks that are read."""
    path, small = tmp_path / "large", tmp_path / "small"
    size = 3 * BLOCK * BLOCKS + 5
    prints = []
    for place, byte, length in ((0, b"\0", size), (0, b"x", size), (size - 1, b"x", size), (0, b"\0", size + 1)):
        with path.open("wb") as file:
            file.truncate(length)
            file.seek(place)
            file.write(byte)
        prints.append(files_fingerprint([path]))
    assert len(set(prints)) == 4
    small.write_bytes(bytes(BLOCK + 3))
    before = files_fingerprint([small, path])
    assert files_fingerprint([path, small]) != before
    content = bytearray(small.read_bytes())
    content[BLOCK // 2] = 1
    small.write_bytes(bytes(content))
    assert files_fingerprint([small, path]) != before
