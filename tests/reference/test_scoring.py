"""Scoring a corpus: equal to the model run by hand, for any layout; goes on after a kill; selects as the model does."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.config.schema import DataConfig, ParallelConfig, ReferenceConfig
from megatron_slm.corpus.checks import check_corpus
from megatron_slm.data.batches import BatchShape, BatchStream
from megatron_slm.data.datasets import build_datasets
from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.exact import select
from megatron_slm.objective.selection.policy import parse_policy
from megatron_slm.reference.replica import ReferenceReplica
from megatron_slm.reference.scoring import ScoringJob, reference_config, score_corpora
from megatron_slm.reference.windows import Documents, as_micro_batch, span
from megatron_slm.runtime import process
from megatron_slm.runtime.console import make_console
from megatron_slm.runtime.groups import Groups, ParallelLayout
from megatron_slm.scores.samples import ScoredSamples, label_places
from megatron_slm.scores.sets import check_scores, open_scores
from megatron_slm.scores.sidecar import Sidecar, read_header, sidecar_path
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, launch_each, make_corpus
from megatron_slm.tokenizers.tokenizer import ByteTokenizer, TokenizerFiles
from megatron_slm.training.step import token_batch

WINDOW = 32
TOKENIZER = ByteTokenizer(TokenizerFiles())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a reference model, and a model that was trained less."""
    folder = tmp_path_factory.mktemp("scoring")
    corpus = make_corpus(folder / "corpus", 1, documents=12)
    other = make_corpus(folder / "other", 2)
    launch_each([command(corpus, folder / "rm", train_iters=40), command(other, folder / "base", train_iters=8)])
    return folder


def job(folder: Path, name: str, *, tp: int = 1, pp: int = 1, sp: bool = False, **settings: Any) -> ScoringJob:
    return ScoringJob(
        reference=ReferenceConfig(reference_load=str(folder / "rm")),
        corpora=[str(folder / "corpus_text_document")],
        name=name,
        parallel=ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sp),
        **{"micro_batch_size": 2, "chunk_tokens": 700, "seconds_between_records": 0, **settings},
    )


@contextlib.contextmanager
def started(own: ScoringJob) -> Any:
    parallel = own.parallel
    layout = ParallelLayout(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield process.start(layout)
    finally:
        process.stop()


def _score(rank: int, world_size: int, own: ScoringJob, dies_at: int = 0) -> None:
    if dies_at:
        _die_at(dies_at)
    with started(own) as groups:
        score_corpora(own, TOKENIZER, groups, make_console(False))


def score(own: ScoringJob, world_size: int = 1) -> Path:
    run_ranks(_score, world_size, own, initialise=False)
    return sidecar_path(own.corpora[0], own.name)


def opened(path: Path) -> Sidecar:
    return Sidecar(path, read_header(path))


def assert_agree(path: Path, other: Path) -> None:
    """A value between two codes may get either of them; neither is further from it than the header states."""
    one, two = opened(path), opened(other)
    header, tokens = one.header, one.header.tokens
    assert replace(header, checksum=None) == replace(two.header, checksum=None) and header.entropy is not None
    for ours, theirs, error in (
        (one.losses(0, tokens), two.losses(0, tokens), header.loss.max_error),
        (one.entropies(0, tokens), two.entropies(0, tokens), header.entropy.max_error),
    ):
        assert np.abs(ours - theirs).max() <= 2 * error


def _by_hand(rank: int, world_size: int, own: ScoringJob) -> tuple[np.ndarray, np.ndarray]:
    """Losses and entropies from one forward pass per window and text, without packing."""
    with started(own) as groups:
        config = reference_config(own)
        model = ReferenceReplica(config, TOKENIZER, groups, with_entropy=True)
        corpus = check_corpus(own.corpora[0], "--data-path")
        ids = np.fromfile(f"{corpus.prefix}.bin", corpus.dtype)
        rule = own.rule(WINDOW)
        texts = [(0, corpus.tokens)] if own.context == "stream" else list(Documents(corpus).beginning_in(0, 1 << 40))
        found = np.full((2, corpus.tokens), np.nan)
        for begin, end in texts:
            number = 0
            while np.isnan(found[0, begin:end]).any():
                each = span(begin, end, number, rule)
                batch = as_micro_batch([[each]], ids, 1, WINDOW, TOKENIZER.eod, packed=False)
                scores = model.score([batch])[0]
                assert scores.entropy is not None
                for row, values in enumerate((scores.loss, scores.entropy)):
                    known = values[0, : len(each)].numpy()
                    fresh = np.isnan(found[row, each.start : each.stop])
                    found[row, each.start : each.stop][fresh] = known[fresh]
                number += 1
        return found[0], found[1]


@pytest.mark.parametrize(("context", "stride"), [("document", 20), ("stream", 32), ("document", 9)])
def test_scores_are_the_models(workspace: Path, context: str, stride: int) -> None:
    own = job(workspace, f"hand-{context}-{stride}", context=context, stride=stride, with_entropy=True)
    sidecar = opened(score(own))
    losses, entropies = run_ranks(_by_hand, 1, own, initialise=False)[0]
    header, tokens = sidecar.header, sidecar.header.tokens
    below = losses <= header.loss.ceiling
    assert header.clamped == (~below).sum() and below.mean() > 0.99
    assert np.abs(sidecar.losses(0, tokens) - losses)[below].max() <= header.loss.max_error + 1e-4
    assert header.entropy is not None
    assert np.abs(sidecar.entropies(0, tokens) - entropies).max() <= header.entropy.max_error + 1e-4


@pytest.fixture(scope="module")
def alone(workspace: Path) -> Path:
    """What one process makes, with windows that overlap and entropies."""
    return score(job(workspace, "alone", with_entropy=True))


def test_data_parallel_ranks_make_the_same_bytes(workspace: Path, alone: Path) -> None:
    two = score(job(workspace, "dp2", with_entropy=True), 2)
    assert two.read_bytes() == alone.read_bytes()


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [({"tp": 2}, 2), ({"pp": 2}, 2), ({"tp": 2, "sp": True}, 2), ({"tp": 2, "pp": 2}, 4)],
    ids=str,
)
def test_every_layout_agrees(workspace: Path, alone: Path, settings: dict[str, Any], world_size: int) -> None:
    name = "".join(f"{key}{value}" for key, value in settings.items()) + str(world_size)
    own = job(workspace, name, with_entropy=True, **settings)
    assert_agree(score(own, world_size), alone)


def test_micro_batch_and_chunks_do_not_matter(workspace: Path, alone: Path) -> None:
    own = job(workspace, "cut", with_entropy=True, micro_batch_size=5, chunk_tokens=10**6)
    assert_agree(score(own), alone)


def _die_at(count: int) -> None:
    """End this process without a word at its ``count``-th write to disk, records of progress included."""
    real, left = os.fsync, [count]

    def fsync(file: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(file)

    os.fsync = fsync  # type: ignore[assignment]


def test_goes_on_after_kills(workspace: Path, alone: Path) -> None:
    """Killed at five moments in a row, ended by two ranks; the bytes are those of one job that was left alone."""
    own = job(workspace, "killed", with_entropy=True)
    path = sidecar_path(own.corpora[0], own.name)
    done = []
    for dies_at in (1, 3, 4, 5, 8):
        with pytest.raises(AssertionError, match="died without a word"):
            run_ranks(_score, 1, own, dies_at, initialise=False)
        assert not path.is_file()
        record = path.with_name(f"{path.name}.progress")
        done.append(record.read_text() if record.is_file() else "")
    assert len(set(done)) > 3, "the kills came at different places"
    assert score(replace(own, micro_batch_size=2), 2).read_bytes() == alone.read_bytes()
    assert not list(path.parent.glob(f"{path.name}.*"))


def test_what_is_finished_is_kept(workspace: Path, alone: Path) -> None:
    before = alone.stat().st_mtime_ns
    assert score(job(workspace, "alone", with_entropy=True)).stat().st_mtime_ns == before
    with pytest.raises(AssertionError, match="was made with another entropy"):
        score(job(workspace, "alone"))


Agreement = tuple[int, int, int, float]
"""Tokens, tokens on which the two selections differ, tokens selected, and the largest distance from the threshold of
the excess loss of one that differs."""


def _score_and_select(rank: int, world_size: int, own: ScoringJob) -> Agreement:
    """Make the sidecar of a job, and compare the selection with that of the co-located model."""
    with started(own) as groups:
        score_corpora(own, TOKENIZER, groups, make_console(False))
        learning = ReferenceConfig(reference_load=(own.reference.reference_load or "").replace("rm", "base"))
        model, learner = (
            ReferenceReplica(reference_config(each), TOKENIZER, groups, with_entropy=False)
            for each in (own, replace(own, reference=learning))
        )
        return _compare(own, own.corpora[0], groups, model, learner)


def _compare(
    own: ScoringJob, corpus: str, groups: Groups, model: ReferenceReplica, learner: ReferenceReplica
) -> Agreement:
    data = DataConfig(data_path=[corpus])
    source = ReferenceConfig(reference_scores=[own.name])
    headers = check_scores(source, data, TOKENIZER, with_entropy=False)
    scores = open_scores(source, headers, data, with_entropy=False)
    dataset = _second_document_first(data)
    in_windows = [
        number
        for number in range(len(dataset))
        if len(places := list(label_places(dataset, number))) == 1 and places[0][0] % WINDOW == 0
    ]
    scored = torch.utils.data.Subset(ScoredSamples(dataset, scores), in_windows)
    shape = BatchShape(32, 1, 0, 1)
    stream = BatchStream(scored, shape, device=groups.device)
    selector = SelectionConfig(parse_policy("excess"), group=groups.dp_cp)
    tokens = differ = selected = 0
    farthest = 0.0
    for _ in range(len(in_windows) // 32):
        [batch] = next(stream)
        [beside], [loss] = model.score([batch]), learner.score([batch])
        assert batch.reference_loss is not None
        one, two = (
            select(token_batch(batch, loss.loss, reference, batch.first_sample), selector, 0.6)
            for reference in (beside, replace(beside, loss=batch.reference_loss))
        )
        tokens, selected = tokens + one.selected.numel(), selected + int(one.selected.sum())
        other = one.selected != two.selected
        differ += int(other.sum())
        distance = (loss.loss - beside.loss - one.threshold).abs()
        farthest = max(farthest, float(distance[other].max()) if other.any() else 0.0)
    return tokens, differ, selected, farthest


def _second_document_first(data: DataConfig) -> Any:
    """Samples of a corpus of two documents, in an order of documents that begins with the second."""
    for seed in range(50):
        dataset: Any = build_datasets(
            data, tokenizer=TOKENIZER, seq_length=WINDOW, train_samples=1, valid_samples=0, seed=seed
        ).train
        if dataset.document_index[0] == 1:
            return dataset
    raise AssertionError("no seed of fifty puts the second document first")


def test_selects_as_the_model_beside_it_does(workspace: Path) -> None:
    """In the same context: the first document ends one token before a window does, and the second, which comes first
    in training, is cut into samples at the very places at which the scoring windows are cut."""
    text = make_corpus(workspace / "more", 1, documents=40)  # of the words that the reference model knows
    corpus = str(workspace / "two")
    _two_documents(corpus, np.fromfile(f"{text}.bin", np.uint16))
    same = replace(job(workspace, "same", context="stream", stride=WINDOW), corpora=[corpus])
    tokens, differ, selected, farthest = run_ranks(_score_and_select, 1, same, initialise=False)[0]
    error = opened(sidecar_path(corpus, same.name)).header.loss.max_error
    assert tokens > 7000 and selected == pytest.approx(0.6 * tokens, abs=10)
    assert differ < 0.001 * tokens, f"{differ} of {tokens} tokens"
    assert farthest <= 2 * error, "a token was exchanged that was not at the threshold"


def _two_documents(prefix: str, ids: np.ndarray) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for part in (ids[: WINDOW - 1], ids[WINDOW - 1 :]):
        builder.add_document(torch.from_numpy(part.astype(np.int32)), [len(part)])
    builder.finalize(f"{prefix}.idx")
