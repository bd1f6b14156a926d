"""Test that reference scores from the pipeline's bubbles equal those of a separate pass."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_slm.data.batches import MicroBatch
from megatron_slm.reference.bubble_plan import BEFORE_BACKWARD, Plan, plan_bubbles
from megatron_slm.reference.bubbles import BubbleReference, PartialForward
from megatron_slm.testing.ranks import run_ranks, shared_process_group
from megatron_slm.testing.tiny import captured, command, launch, losses, make_corpus


@pytest.mark.parametrize(
    ("stages", "micro_batches", "reference", "backward", "plan"),
    [
        (4, 8, 1, 2, [(6, 6, 8), (3, 5, 8), (0, 4, 8), (0, 3, 8)]),
        (4, 8, 0.25, 2, [(8, 8, 8), (8, 8, 8), (6, 8, 8), (0, 8, 8)]),
        (4, 8, 1, 3, [(8, 8, 8), (5, 8, 8), (1, 7, 8), (0, 6, 8)]),
        (2, 2, 3, 2, [(0, 0, 2), (0, 0, 2)]),
        (2, 2, 1, 2, [(2, 2, 2), (0, 2, 2)]),
        (4, 3, 1, 2, [(0, 0, 3)] * 4),
    ],
)
def test_plans(stages: int, micro_batches: int, reference: float, backward: float, plan: Plan) -> None:
    assert plan_bubbles(stages, micro_batches, reference=reference, backward=backward) == plan


def test_no_stage_computes_before_the_previous_one() -> None:
    for stages in range(2, 9):
        for micro_batches in range(1, 40):
            for reference in (0.1, 0.7, 1, 2.5):
                plan = plan_bubbles(stages, micro_batches, reference=reference, backward=2)
                for earlier, later in itertools.pairwise(plan):
                    assert all(first >= second for first, second in zip(earlier, later, strict=True))
                assert all(list(parts) == sorted(parts) and parts[-1] == micro_batches for parts in plan)


def bubble_reference(rank: int = 3, **attributes: Any) -> BubbleReference:
    """Return the reference source of one of four stages, without a model."""
    reference = object.__new__(BubbleReference)
    groups = SimpleNamespace(pp_size=4, pp_rank=rank, is_last_stage=rank == 3)
    vars(reference).update(groups=groups, upcoming=None, _forwards=0, **attributes)
    return reference


@pytest.mark.parametrize("rank", range(4))
def test_the_first_bubble_follows_the_forward_passes_of_the_warm_up(rank: int) -> None:
    """In 1F1B, a stage has one forward pass for itself and each later stage before its first backward pass."""
    begun: list[tuple[int, int]] = []
    chunk, output = torch.nn.Module(), torch.ones(1, requires_grad=True)
    reference = bubble_reference(rank)
    following = SimpleNamespace(micro_batches=range(8), run=lambda part: begun.append((part, reference._forwards)))
    vars(reference).update(_next=following)
    for _ in range(8):
        reference._after_forward(chunk, None, output)
    assert begun == [(BEFORE_BACKWARD, 4 - rank)]


def test_scores_of_other_micro_batches_are_discarded() -> None:
    planned, others = [object()], [object()]
    begun = SimpleNamespace(micro_batches=planned, finish=lambda: ["from the bubbles"])
    replica = SimpleNamespace(score=lambda micro_batches: ["from a separate pass"])
    for micro_batches, expected in ((planned, "from the bubbles"), (others, "from a separate pass")):
        assert bubble_reference(replica=replica, _next=begun).score(micro_batches) == [expected]


@pytest.mark.parametrize(("has_torch_attention", "shape"), [(True, (4, 2, 3)), (False, (8, 1, 3))])
def test_received_activations_have_the_rows_of_packed_documents(
    monkeypatch: pytest.MonkeyPatch, has_torch_attention: bool, shape: tuple[int, ...]
) -> None:
    """Transformer Engine packs the documents of all samples into one row, from the first stage to the last."""
    chunk: Any = torch.nn.Module()
    chunk.has_torch_attention = has_torch_attention
    chunk.config = SimpleNamespace(sequence_parallel=False, hidden_size=3, pipeline_dtype=torch.float32)
    groups: Any = SimpleNamespace(pp_rank=1, tp_size=1, device=torch.device("cpu"))
    values = torch.zeros(2, 4, dtype=torch.int64)
    documents = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]], dtype=torch.int32)
    batch = MicroBatch(values, values, values.bool(), values, values[:, 0], 0, documents)
    received: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "recv", lambda values, **_: received.append(values))
    replica: Any = SimpleNamespace(chunks=[chunk])
    PartialForward(replica, [batch], [(0, 0, 1)] * 2, groups, pipeline=None)._receive(batch)  # type: ignore[arg-type]
    assert received[0].shape == shape


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a corpus and a reference model whose width differs from the training model's."""
    directory = tmp_path_factory.mktemp("bubbles")
    corpus = make_corpus(directory / "corpus", 1)
    launch(command(corpus, directory / "rm", train_iters=2, hidden_size=16))
    return directory


def settings(workspace: Path, name: str, **flags: Any) -> list[str]:
    """Return the command line of a run with a co-located reference model."""
    reference = {"objective": "slm", "reference_load": workspace / "rm", "hidden_dropout": 0.1}
    return command(str(workspace / "corpus_text_document"), workspace / name, **{**reference, **flags})


def _run_each(rank: int, world_size: int, commands: list[list[str]]) -> list[tuple[int, str, int]]:
    """Run each command line; return its exit code, errors, and number of micro-batches scored in bubbles."""
    from megatron_slm.reference.bubble_plan import NEXT_STEP
    from megatron_slm.reference.bubbles import PartialForward

    run, outcomes, ahead = PartialForward.run, [], 0

    def counted(self: PartialForward, part: int) -> None:
        nonlocal ahead
        before = self._computed
        run(self, part)
        ahead += self._computed - before if part != NEXT_STEP else 0

    PartialForward.run = counted  # type: ignore[method-assign]
    with shared_process_group():
        for argv in commands:
            ahead = 0
            outcome = captured(argv)
            outcomes.append((outcome.code, outcome.errors, ahead))
    return outcomes


def scored_ahead(ranks: int, *commands: list[str]) -> list[list[int]]:
    """Run the trainer once per command line; return the micro-batches scored in bubbles by command line and rank."""
    results = run_ranks(_run_each, ranks, list(commands), initialize=False)
    for outcomes in results:
        for code, errors, _ in outcomes:
            assert code == 0, errors
    return [[outcomes[index][2] for outcomes in results] for index in range(len(commands))]


def test_bubbles_do_not_change_a_run(workspace: Path) -> None:
    """Two stages with resume, a skipped step, evaluation, ranking passes; the data is read up to the last step only."""
    two = {"pipeline_model_parallel_size": 2, "micro_batch_size": 4, "eval_interval": 2, "train_iters": 6}
    two |= {"eval_iters": 1, "iterations_to_skip": 3, "slm_scope": "global-batch", "recompute_granularity": "selective"}
    parts = settings(workspace, "two-parts", **two, reference_in_bubbles=True, save_interval=2)
    separate, together, first, rest = scored_ahead(
        2,
        settings(workspace, "two", **two, losses_only=True),
        settings(workspace, "two-bubbles", **two, reference_in_bubbles=True, losses_only=True),
        [*parts, "--exit-interval", "4"],
        [*parts, "--load", str(workspace / "two-parts")],
    )
    assert losses(workspace / "two-bubbles") == losses(workspace / "two")
    assert losses(workspace / "two-parts") == losses(workspace / "two")
    assert separate == [0, 0] and min(together + first + rest) > 0


@pytest.mark.slow
def test_four_stages_do_not_change_a_run(workspace: Path) -> None:
    """Micro-batches below, equal to and above 2 x (stages - 1); and two stages with sequence parallelism."""
    four = [{"pipeline_model_parallel_size": 4, "global_batch_size": batch} for batch in (8, 12, 16)]
    sequence = {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    layouts = [*four, {**sequence, "global_batch_size": 8}]
    flags = {"micro_batch_size": 2, "train_iters": 3, "eval_iters": 0}
    commands = []
    for index, layout in enumerate(layouts):
        commands.append(settings(workspace, f"four-{index}", **flags, **layout))
        commands.append(settings(workspace, f"four-{index}-bubbles", **flags, **layout, reference_in_bubbles=True))
    ahead = scored_ahead(4, *commands)
    for index, counts in enumerate(ahead[1::2]):
        assert losses(workspace / f"four-{index}-bubbles") == losses(workspace / f"four-{index}")
        assert min(counts) > 0
