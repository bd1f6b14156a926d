"""Score sidecars: parallel writing, resuming, locking, and rejection of damaged, unrelated and former files."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from former_sidecars import make_former
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.corpus.fingerprints import BLOCK, BLOCKS, files_fingerprint
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.scores.quantization import Quantization
from megatron_slm.scores.sets import Headers, verify_scores
from megatron_slm.scores.sidecar import (
    HEADER_BYTES,
    ContextRule,
    ScoresHeader,
    Sidecar,
    check_paths_differ,
    read_header,
    sidecar_path,
)
from megatron_slm.scores.writer import (
    Progress,
    SidecarWriter,
    content_checksum,
    finish,
    is_finished,
    partial_path,
    record_progress,
    reserved,
)


def header(tokens: int = 100, entropy: bool = True) -> ScoresHeader:
    return ScoresHeader(
        tokens=tokens,
        corpus="c" * 64,
        tokenizer="ByteTokenizer " + "t" * 64,
        reference="r" * 64,
        context=ContextRule("document", 32, 16),
        loss=Quantization.for_losses(257),
        entropy=Quantization.for_entropies(257) if entropy else None,
        eod=256,
    )


def write(path: Path, wanted: ScoresHeader, losses: np.ndarray, entropies: np.ndarray) -> None:
    """Two writers write the second half first."""
    half = wanted.tokens // 3
    with reserved(path, wanted):
        for start, stop in ((half, wanted.tokens), (0, half)):
            writer = SidecarWriter(path, wanted)
            writer.write_losses(start, wanted.loss.encode(losses[start:stop]))
            if wanted.entropy is not None:
                writer.write_entropies(start, wanted.entropy.encode(entropies[start:stop]))
            writer.sync()
            writer.close()
        finish(path, wanted, Progress(clamped=3), content_checksum(path))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 500), st.booleans(), st.integers(0, 2**32 - 1))
def test_write_read_round_trip(tmp_path_factory: pytest.TempPathFactory, tokens: int, entropy: bool, seed: int) -> None:
    path = tmp_path_factory.mktemp("scores") / "corpus.rm.scores"
    wanted = header(tokens, entropy)
    rng = np.random.default_rng(seed)
    losses = rng.uniform(0, wanted.loss.ceiling, tokens).astype(np.float32)
    entropies = rng.uniform(0, math.log(257), tokens).astype(np.float32)
    write(path, wanted, losses, entropies)
    sidecar = Sidecar(path, read_header(path))
    assert sidecar.header == replace(wanted, clamped=3, complete=True, checksum=sidecar.header.checksum)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    start, stop = sorted(rng.integers(0, tokens + 1, 2).tolist())
    assert np.abs(sidecar.losses(start, stop) - losses[start:stop]).max(initial=0) <= wanted.loss.max_error
    if wanted.entropy is not None:
        assert np.abs(sidecar.entropies(start, stop) - entropies[start:stop]).max(initial=0) <= wanted.entropy.max_error
    assert path.stat().st_size == HEADER_BYTES + tokens * 2 * (2 if entropy else 1)


def finished(directory: Path) -> Path:
    path = directory / "corpus.rm.scores"
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
        (Path.unlink, "is missing. Create it with"),
        (lambda path: path.rename(f"{path}.partial"), "is not finished yet"),
        (lambda path: path.write_bytes(b"SLM"), "is truncated: 3 bytes"),
        (lambda path: path.write_bytes(b"x" * 9000), "is not a score sidecar"),
        (lambda path: path.write_bytes(b"SLMSCORE" + b"{" * 9000), "has a damaged header"),
        (lambda path: path.write_bytes(b"SLMSCORE" + b"[1] ".ljust(9000)), "has a damaged header"),
        (lambda path: _edit(path, version=1), "has version 1; supported versions are 2 to 4"),
        (lambda path: _edit(path, color="red"), "has a damaged header"),
        (lambda path: _edit(path, tokens=99), "has a damaged header (its content does not match its checksum)"),
        (lambda path: _edit(path, header_checksum=None), "has a damaged header"),
        (lambda path: _unfinish(path), "was never finished"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 4495 bytes, but its header requires 4496"),
        (lambda path: path.write_bytes(path.read_bytes() + b"1"), "has 4497 bytes"),
    ],
)
def test_damaged_sidecar_is_rejected(tmp_path: Path, damage: object, message: str) -> None:
    path = finished(tmp_path)
    damage(path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="--reference-scores") as caught:
        read_header(path)
    assert message in str(caught.value)


def _headers(path: Path) -> Headers:
    return {path: read_header(path)}


@pytest.mark.parametrize("place", [HEADER_BYTES, -1, -201])
def test_flipped_bit_is_rejected(tmp_path: Path, place: int) -> None:
    """The flipped bit is in the codes of losses or entropies, in which every value is valid."""
    path = finished(tmp_path)
    verify_scores(_headers(path))
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"corpus.rm.scores is damaged: its content does not match its checksum"):
        verify_scores(_headers(path))


@pytest.mark.parametrize("version", [2, 3])
def test_two_byte_sidecar_of_an_earlier_version_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: int
) -> None:
    path = finished(tmp_path)
    wanted, content = read_header(path), path.read_bytes()[HEADER_BYTES:]
    make_former(path, version)
    found = read_header(path)
    assert found == replace(wanted, eod=None, checksum=wanted.checksum if version == 3 else None)
    assert is_finished(path, header()), "it is kept"
    verify_scores({path: found})
    assert ("has no checksum" in capsys.readouterr().err) == (version == 2)
    assert Sidecar(path, found).losses(0, 100) == pytest.approx(np.ones(100), abs=2e-4)
    assert path.read_bytes()[HEADER_BYTES:] == content


def test_one_byte_sidecar_is_replaced_by_the_same_job(tmp_path: Path) -> None:
    path = finished(tmp_path)
    content = path.read_bytes()
    make_former(path, 3, width=1)
    with pytest.raises(ConfigError, match="was made with another reference"):
        is_finished(path, replace(header(), reference="x"))
    assert not is_finished(path, header(entropy=False)), "the former format has no use"
    former = path.read_bytes()
    partial_path(path).write_bytes(former)
    record_progress(path, Progress(1, 2, 3, 4))
    with reserved(path, header()) as begun:
        assert begun == Progress(), "an unfinished one-byte sidecar is not continued"
        assert path.read_bytes() == former, "it stays until the new one is complete"
    write(path, header(), np.ones(100, np.float32), np.ones(100, np.float32))
    assert path.read_bytes() == content


def test_sidecar_paths() -> None:
    assert sidecar_path("data/corpus", "rm") == Path("data/corpus.rm.scores")
    assert sidecar_path("data/corpus.v2", "rm") == Path("data/corpus.v2.rm.scores")
    assert sidecar_path("data/corpus", "./rm") == Path("corpus.rm.scores")
    assert sidecar_path("/a/corpus", "/b/c/rm") == Path("/b/c/corpus.rm.scores")


def test_corpora_of_one_name_have_no_common_sidecar() -> None:
    corpora = ["web/train", "math/train"]
    check_paths_differ(corpora, "rm")
    check_paths_differ(["web/a", "math/b"], "/fast/rm")
    with pytest.raises(ConfigError, match="web/train and math/train have the same name, and thus the same sidecar"):
        check_paths_differ(corpora, "/fast/rm")


@pytest.mark.parametrize(
    "other", [{"reference": "x"}, {"tokens": 99}, {"context": ContextRule("stream", 32, 32)}, {"eod": 7}]
)
def test_sidecar_of_another_job_is_not_overwritten(tmp_path: Path, other: dict[str, object]) -> None:
    path = finished(tmp_path)
    assert is_finished(path, header())
    with pytest.raises(ConfigError, match=f"was made with another {next(iter(other))}"):
        is_finished(path, replace(header(), **other))  # type: ignore[arg-type]
    begun = tmp_path / "begun.rm.scores"
    assert not is_finished(begun, header())
    with reserved(begun, header()):
        record_progress(begun, Progress(2, 3, 4, 5))
    with reserved(begun, header()) as progress:
        assert progress == Progress(2, 3, 4, 5)
    with (
        pytest.raises(ConfigError, match=f"was made with another {next(iter(other))}"),
        reserved(begun, replace(header(), **other)),  # type: ignore[arg-type]
    ):
        pass


@pytest.mark.parametrize("record", ["", "{", "[1]", '{"chunk": 1}', '{"chunk": null, "rows": 0}', None])
def test_unusable_progress_is_not_continued(tmp_path: Path, record: str | None) -> None:
    """The progress record is damaged, or its file is missing (None)."""
    path = tmp_path / "corpus.rm.scores"
    with reserved(path, header()):
        record_progress(path, Progress(2, 3, 4, 5))
    if record is None:
        partial_path(path).unlink()
    else:
        path.with_name(f"{path.name}.progress").write_text(record)
    with reserved(path, header()) as progress:
        assert progress == Progress()


def test_concurrent_writer_is_rejected(tmp_path: Path) -> None:
    """The second writer is rejected while the first holds the lock, and does not change its file."""
    path = tmp_path / "corpus.rm.scores"
    with reserved(path, header()):
        record_progress(path, Progress(2, 3, 4, 5))
        before = {each: each.read_bytes() for each in tmp_path.iterdir()}
        with pytest.raises(ConfigError, match=r"another process writes .*rm.scores.partial"), reserved(path, header()):
            pass
        assert {each: each.read_bytes() for each in tmp_path.iterdir()} == before
    with reserved(path, header()) as progress:
        assert progress == Progress(2, 3, 4, 5)


def test_full_disk_is_reported_before_scoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = finished(tmp_path).with_name("new.rm.scores")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for function in ("posix_fallocate", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with (
                pytest.raises(ConfigError, match=r"No space left on device.* takes 4,496 bytes"),
                reserved(path, header()),
            ):
                pass
        assert [each.name for each in tmp_path.iterdir()] == ["corpus.rm.scores"]


def test_job_can_be_resumed_after_a_full_disk_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "corpus.rm.scores"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with reserved(path, header()):
        record_progress(path, Progress(2, 3, 4, 100))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(ConfigError, match="No space left"):
                finish(path, header(), Progress(2, 3, 4, 100), "xxh3:0")
    assert not path.exists()
    with reserved(path, header()) as progress:
        assert progress == Progress(2, 3, 4, 100)


def test_fingerprint_depends_on_ends_size_and_order(tmp_path: Path) -> None:
    """The sparse file is larger than the sampled blocks."""
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
