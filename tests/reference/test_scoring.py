"""Test corpus scoring: scores equal direct evaluation in every layout, jobs resume, and selections agree."""

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
from megatron_slm.reference.windows import Documents, build_micro_batch, span
from megatron_slm.runtime import process
from megatron_slm.runtime.console import make_console
from megatron_slm.runtime.groups import Groups, ParallelLayout
from megatron_slm.scores import quantization
from megatron_slm.scores.samples import ScoredSamples, label_ranges
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
    """Create a corpus, a reference model, and a less trained base model."""
    directory = tmp_path_factory.mktemp("scoring")
    corpus = make_corpus(directory / "corpus", 1, documents=8)
    other = make_corpus(directory / "other", 2)
    models = ((corpus, "rm", 40), (other, "base", 8))
    commands = [command(text, directory / name, train_iters=n, num_layers=2) for text, name, n in models]
    experts = {"num_experts": 2, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
    commands.append(command(corpus, directory / "experts", train_iters=1, num_layers=2, **experts))
    launch_each(commands)
    return directory


def job(directory: Path, name: str, *, tp: int = 1, pp: int = 1, sp: bool = False, **settings: Any) -> ScoringJob:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sp)
    defaults = {
        "reference": ReferenceConfig(reference_load=[str(directory / "rm")]),
        "parallel": parallel,
        "micro_batch_size": 2,
        "chunk_tokens": 700,
        "seconds_between_records": 0,
    }
    return ScoringJob(corpora=[str(directory / "corpus_text_document")], name=name, **{**defaults, **settings})


@contextlib.contextmanager
def started(scoring: ScoringJob) -> Any:
    parallel = scoring.parallel
    layout = ParallelLayout(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        expert=parallel.expert_model_parallel_size,
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield process.start(layout)
    finally:
        process.stop()


def _score(rank: int, world_size: int, scoring: ScoringJob, dies_at: int = 0) -> None:
    if dies_at:
        _die_at(dies_at)
    with started(scoring) as groups:
        score_corpora(scoring, TOKENIZER, groups, make_console(False))


def score(scoring: ScoringJob, world_size: int = 1) -> Path:
    run_ranks(_score, world_size, scoring, initialize=False)
    return sidecar_path(scoring.corpora[0], scoring.name)


def opened(path: Path) -> Sidecar:
    return Sidecar(path, read_header(path))


def assert_agree(path: Path, other: Path) -> None:
    """Assert that two sidecars differ by at most twice the header's rounding error per value."""
    one, two = opened(path), opened(other)
    header, tokens = one.header, one.header.tokens
    assert replace(header, checksum=None) == replace(two.header, checksum=None) and header.entropy is not None
    for ours, theirs, error in (
        (one.losses(0, tokens), two.losses(0, tokens), header.loss.max_error),
        (one.entropies(0, tokens), two.entropies(0, tokens), header.entropy.max_error),
    ):
        assert np.abs(ours - theirs).max() <= 2 * error


def _direct_scores(rank: int, world_size: int, scoring: ScoringJob) -> tuple[np.ndarray, np.ndarray]:
    """Return losses and entropies from one forward pass per window, without packing."""
    with started(scoring) as groups:
        config = reference_config(scoring)
        model = ReferenceReplica(config, config.reference.reference_load[0], TOKENIZER, groups, with_entropy=True)
        corpus = check_corpus(scoring.corpora[0], "--data-path")
        ids = np.fromfile(f"{corpus.prefix}.bin", corpus.dtype)
        rule = scoring.rule(WINDOW)
        texts = [(0, corpus.tokens)] if scoring.context == "stream" else list(Documents(corpus).starting_in(0, 1 << 40))
        found = np.full((2, corpus.tokens), np.nan)
        for start, stop in texts:
            number = 0
            while np.isnan(found[0, start:stop]).any():
                each = span(start, stop, number, rule)
                batch = build_micro_batch([[each]], ids, 1, WINDOW, TOKENIZER.eod, packed=False)
                scores = model.score([batch])[0]
                assert scores.entropy is not None
                for row, values in enumerate((scores.loss, scores.entropy)):
                    known = values[0, : len(each)].numpy()
                    fresh = np.isnan(found[row, each.start : each.stop])
                    found[row, each.start : each.stop][fresh] = known[fresh]
                number += 1
        return found[0], found[1]


@pytest.mark.parametrize(("context", "stride"), [("document", 20), ("stream", 32), ("document", 9)])
def test_scores_match_direct_evaluation(workspace: Path, context: str, stride: int) -> None:
    scoring = job(workspace, f"hand-{context}-{stride}", context=context, stride=stride, with_entropy=True)
    sidecar = opened(score(scoring))
    losses, entropies = run_ranks(_direct_scores, 1, scoring, initialize=False)[0]
    header, tokens = sidecar.header, sidecar.header.tokens
    below = losses <= header.loss.ceiling
    assert header.clamped == (~below).sum() and below.mean() > 0.99
    assert np.abs(sidecar.losses(0, tokens) - losses)[below].max() <= header.loss.max_error + 1e-4
    assert header.entropy is not None
    assert np.abs(sidecar.entropies(0, tokens) - entropies).max() <= header.entropy.max_error + 1e-4


def _score_with_a_low_ceiling(rank: int, world_size: int, scoring: ScoringJob) -> None:
    quantization.LOSS_MARGIN = -5.0
    _score(rank, world_size, scoring)


def test_clamped_losses_are_counted_once(workspace: Path) -> None:
    """However often progress is recorded."""
    scoring = job(workspace, "clamped")
    run_ranks(_score_with_a_low_ceiling, 1, scoring, initialize=False)
    sidecar = opened(sidecar_path(scoring.corpora[0], scoring.name))
    header = sidecar.header
    at_ceiling = int((sidecar.losses(0, header.tokens) == np.float32(header.loss.ceiling)).sum())
    assert header.clamped == pytest.approx(at_ceiling, rel=0.01) and header.clamped > 100


@pytest.fixture(scope="module")
def single_process(workspace: Path) -> Path:
    """Create a sidecar with entropies and overlapping windows in one process."""
    return score(job(workspace, "single", with_entropy=True))


def test_data_parallel_sidecars_are_identical(workspace: Path, single_process: Path) -> None:
    two = score(job(workspace, "dp2", with_entropy=True), 2)
    assert two.read_bytes() == single_process.read_bytes()


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [({"tp": 2}, 2), ({"pp": 2}, 2), ({"tp": 2, "sp": True}, 2), ({"tp": 2, "pp": 2}, 4)],
    ids=str,
)
def test_every_layout_agrees(workspace: Path, single_process: Path, settings: dict[str, Any], world_size: int) -> None:
    name = "".join(f"{key}{value}" for key, value in settings.items()) + str(world_size)
    scoring = job(workspace, name, with_entropy=True, **settings)
    assert_agree(score(scoring, world_size), single_process)


def test_experts_can_be_divided_among_ranks(workspace: Path) -> None:
    reference = ReferenceConfig(reference_load=[str(workspace / "experts")])
    alone, divided = (
        job(workspace, f"ep{size}", reference=reference, parallel=ParallelConfig(expert_model_parallel_size=size))
        for size in (1, 2)
    )
    assert_agree(score(replace(alone, with_entropy=True)), score(replace(divided, with_entropy=True), 2))


def test_scores_are_independent_of_micro_batch_and_chunk_sizes(workspace: Path, single_process: Path) -> None:
    scoring = job(workspace, "cut", with_entropy=True, micro_batch_size=5, chunk_tokens=10**6)
    assert_agree(score(scoring), single_process)


def _die_at(count: int) -> None:
    """Kill this process at its ``count``-th fsync, progress records included."""
    real, left = os.fsync, [count]

    def fsync(file: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(file)

    os.fsync = fsync  # type: ignore[assignment]


def test_killed_job_resumes(workspace: Path, single_process: Path) -> None:
    """A job killed five times and completed by two ranks writes the same bytes as an uninterrupted job."""
    scoring = job(workspace, "killed", with_entropy=True)
    path = sidecar_path(scoring.corpora[0], scoring.name)
    done = []
    for dies_at in (1, 3, 4, 5, 8):
        with pytest.raises(AssertionError, match="died without a result"):
            run_ranks(_score, 1, scoring, dies_at, initialize=False)
        assert not path.is_file()
        record = path.with_name(f"{path.name}.progress")
        done.append(record.read_text() if record.is_file() else "")
    assert len(set(done)) > 3, "the kills were at different positions"
    assert score(replace(scoring, micro_batch_size=2), 2).read_bytes() == single_process.read_bytes()
    assert not list(path.parent.glob(f"{path.name}.*"))


def test_finished_sidecar_is_kept(workspace: Path, single_process: Path) -> None:
    before = single_process.stat().st_mtime_ns
    assert score(job(workspace, "single", with_entropy=True)).stat().st_mtime_ns == before
    with pytest.raises(AssertionError, match="was made with another entropy"):
        score(job(workspace, "single"))


Agreement = tuple[int, int, int, float]
"""Tokens, differing tokens, selected tokens, and the largest distance of a differing excess loss to the threshold."""


def _score_and_select(rank: int, world_size: int, scoring: ScoringJob) -> Agreement:
    """Create the sidecar of a job, and compare its selection with the co-located model's."""
    with started(scoring) as groups:
        score_corpora(scoring, TOKENIZER, groups, make_console(False))
        learning = ReferenceConfig(
            reference_load=[path.replace("rm", "base") for path in scoring.reference.reference_load]
        )
        model, learner = (
            ReferenceReplica(
                reference_config(each), each.reference.reference_load[0], TOKENIZER, groups, with_entropy=False
            )
            for each in (scoring, replace(scoring, reference=learning))
        )
        return _compare(scoring, scoring.corpora[0], groups, model, learner)


def _compare(
    scoring: ScoringJob, corpus: str, groups: Groups, model: ReferenceReplica, learner: ReferenceReplica
) -> Agreement:
    data = DataConfig(data_path=[corpus])
    source = ReferenceConfig(reference_scores=[scoring.name])
    headers = check_scores(source, data, TOKENIZER, with_entropy=False)
    scores = open_scores(source, headers, data, with_entropy=False)
    dataset = _second_document_first(data)
    in_windows = [
        number
        for number in range(len(dataset))
        if len(places := list(label_ranges(dataset, number))) == 1 and places[0][0] % WINDOW == 0
    ]
    scored = torch.utils.data.Subset(ScoredSamples(dataset, scores), in_windows)
    shape = BatchShape(32, 1, 0, 1)
    stream = BatchStream(scored, shape, device=groups.device)
    selector = SelectionConfig(parse_policy("excess"), dp_cp_group=groups.dp_cp)
    tokens = differ = selected = 0
    farthest = 0.0
    for _ in range(len(in_windows) // 32):
        [batch] = next(stream)
        [exact], [loss] = model.score([batch]), learner.score([batch])
        assert batch.reference_loss is not None
        one, two = (
            select(token_batch(batch, loss, reference, batch.first_sample), selector, 0.6)
            for reference in (exact, replace(exact, loss=batch.reference_loss))
        )
        tokens, selected = tokens + one.selected.numel(), selected + int(one.selected.sum())
        other = one.selected != two.selected
        differ += int(other.sum())
        distance = (loss.loss - exact.loss - one.threshold).abs()
        farthest = max(farthest, float(distance[other].max()) if other.any() else 0.0)
    return tokens, differ, selected, farthest


def _second_document_first(data: DataConfig) -> Any:
    """Return samples of a corpus of two documents in an order that starts with the second document."""
    for seed in range(50):
        dataset: Any = build_datasets(
            data, tokenizer=TOKENIZER, seq_length=WINDOW, train_samples=1, valid_samples=0, seed=seed
        ).train
        if dataset.document_index[0] == 1:
            return dataset
    raise AssertionError("no seed starts with the second document")


def test_selection_matches_the_co_located_model(workspace: Path) -> None:
    """The context is equal, since the samples of the second document, which training reads first, have the same
    boundaries as the scoring windows: the first document ends one token before a window."""
    text = make_corpus(workspace / "more", 1, documents=40)  # has the reference model's vocabulary of words
    corpus = str(workspace / "two")
    _two_documents(corpus, np.fromfile(f"{text}.bin", np.uint16))
    same = replace(job(workspace, "same", context="stream", stride=WINDOW), corpora=[corpus])
    tokens, differ, selected, farthest = run_ranks(_score_and_select, 1, same, initialize=False)[0]
    error = opened(sidecar_path(corpus, same.name)).header.loss.max_error
    assert tokens > 7000 and selected == pytest.approx(0.6 * tokens, abs=10)
    assert differ < 0.001 * tokens, f"{differ} of {tokens} tokens"
    assert farthest <= 2 * error, "a differing token is not at the threshold"


def _two_documents(prefix: str, ids: np.ndarray) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for part in (ids[: WINDOW - 1], ids[WINDOW - 1 :]):
        builder.add_document(torch.from_numpy(part.astype(np.int32)), [len(part)])
    builder.finalize(f"{prefix}.idx")
