"""Test that losses and selected tokens of every layout agree with one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_slm.testing.tiny import MODEL, command, launch, launch_and_fail, launch_each, make_corpus, records

STEPS = 2  # the second has updated weights
LAYOUTS = [
    *[(1, 1, 2), (1, 2, 1), (2, 1, 1)],
    (2, 2, 2),
    # more ranks in a dimension, of which a pipeline of three stages is tested below, and pairs of dimensions
    *(pytest.param(*dims, marks=pytest.mark.slow) for dims in [(1, 1, 4), (1, 4, 1), (4, 1, 1)]),
    *(pytest.param(*dims, marks=pytest.mark.slow) for dims in [(1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 4, 2), (4, 1, 2)]),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a corpus, a base model, a reference model, and the single-process baseline run."""
    directory = tmp_path_factory.mktemp("layouts")
    corpus = make_corpus(directory / "corpus", 1)
    clean = make_corpus(directory / "clean", 2)
    models = ((corpus, "base", 2), (clean, "rm", 3))
    launch_each([command(text, directory / name, train_iters=n, eval_iters=0) for text, name, n in models])
    launch(slm(directory, "one", eval_iters=1))
    return directory


def slm(directory: Path, name: str, tp: int = 1, pp: int = 1, dp: int = 1, **flags: Any) -> list[str]:
    return command(
        str(directory / "corpus_text_document"),
        directory / name,
        dp=dp,
        losses_only=True,
        load=directory / "base",
        finetune=True,
        train_iters=STEPS,
        objective="slm",
        reference_load=directory / "rm",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        use_distributed_optimizer=True,
        **flags,
    )


def assert_same(directory: Path, name: str, other: str = "one") -> None:
    expected, got = records(directory / other), records(directory / name)
    assert len(got) == len(expected) == STEPS
    for one, many in zip(expected, got, strict=True):
        for figure in ("loss", "loss_all", "loss_unselected", "threshold", "grad_norm"):
            assert many[figure] == pytest.approx(one[figure], rel=2e-4, abs=2e-5), figure
        assert many["share_selected"] == one["share_selected"]
        assert many["selection"] == one["selection"], "another set of tokens was selected"


def assert_same_evaluations(directory: Path, name: str) -> None:
    one, many = ([record["loss"] for record in records(directory / run, "eval")] for run in ("one", name))
    assert len(one) == 2 and many == pytest.approx(one, rel=2e-4)


@pytest.mark.parametrize(("tp", "pp", "dp"), LAYOUTS, ids=str)
def test_every_layout_agrees_with_one_process(workspace: Path, tp: int, pp: int, dp: int) -> None:
    name = f"tp{tp}pp{pp}dp{dp}"
    launch(slm(workspace, name, tp, pp, dp, eval_iters=1), tp * pp * dp)
    assert_same(workspace, name)
    assert_same_evaluations(workspace, name)


def test_sequence_parallel_agrees(workspace: Path) -> None:
    launch(slm(workspace, "sp", tp=2, sequence_parallel=True), 2)
    assert_same(workspace, "sp")


def test_interleaved_pipeline_agrees(workspace: Path) -> None:
    launch(slm(workspace, "interleaved", pp=2, num_layers_per_virtual_pipeline_stage=1), 2)
    assert_same(workspace, "interleaved")


@pytest.mark.parametrize(
    ("stages", "flags"),
    [(2, {"decoder_first_pipeline_num_layers": 1}), (3, {"decoder_last_pipeline_num_layers": 2})],
    ids=["1+3", "1+1+2"],
)
def test_uneven_pipeline_agrees(workspace: Path, stages: int, flags: dict[str, int]) -> None:
    """The reference model has the same number of layers and the same split."""
    launch(slm(workspace, f"uneven-{stages}", pp=stages, **flags), stages)
    assert_same(workspace, f"uneven-{stages}")


def test_reference_model_of_another_depth_in_an_uneven_pipeline(workspace: Path) -> None:
    """Its layers are split evenly; if this is impossible, every rank raises an error."""
    corpus = str(workspace / "clean_text_document")
    launch(command(corpus, workspace / "rm2", train_iters=2, num_layers=2, eval_iters=0))
    for name, flags in (("flat", {}), ("deep", {"pp": 2, "decoder_last_pipeline_num_layers": 1})):
        launch(
            [*slm(workspace, f"rm2-{name}", **flags), "--reference-load", str(workspace / "rm2")], flags.get("pp", 1)
        )
    assert_same(workspace, "rm2-deep", "rm2-flat")
    uneven = slm(workspace, "rm2-three", pp=3, decoder_last_pipeline_num_layers=2)
    code, errors = launch_and_fail([*uneven, "--reference-load", str(workspace / "rm2")], 3)
    assert (
        code == 2
        and f"--reference-load {workspace / 'rm2'}" in errors
        and "the reference model has 2 layers, which" in errors
    )


def test_reference_model_with_a_longer_sequence_length(workspace: Path) -> None:
    """Losses are independent of the reference model's sequence length, which must not be shorter than the run's."""
    corpus = str(workspace / "clean_text_document")
    commands = []
    for length in (32, 64):
        untrained = {"train_iters": 1, "lr": 0, "seq_length": length, "eval_iters": 0}
        commands.append(command(corpus, workspace / f"rm-{length}", **untrained))
        commands.append([*slm(workspace, f"with-{length}"), "--reference-load", str(workspace / f"rm-{length}")])
    launch_each(commands)
    assert_same(workspace, "with-64", "with-32")
    longer = [*slm(workspace, "longer"), "--reference-load", str(workspace / "rm-32"), "--seq-length", "64"]
    for action in ([], ["--dry-run"]):
        code, errors = launch_and_fail([*longer, *action])
        assert code == 2 and "was trained with --seq-length 32, and this run has 64" in errors


def test_reference_model_with_more_learned_positions(workspace: Path) -> None:
    positions = {"position_embedding_type": "learned_absolute", "seq_length": 64}
    reference = command(str(workspace / "clean_text_document"), workspace / "rm-learned", train_iters=1, **positions)
    launch_each([reference, [*slm(workspace, "learned"), "--reference-load", str(workspace / "rm-learned")]])
    assert len(records(workspace / "learned")) == STEPS


VARIANTS = {
    "torch": {"slm_cross_entropy": "torch"},
    "saved logits": {"slm_saved_logits_mb": 8},
    "speculative": {"slm_exact_mode": "speculative"},
    "speculative, TP 2": {"slm_exact_mode": "speculative", "tp": 2, "sequence_parallel": True},
    "speculative, PP 2 DP 2": {"slm_exact_mode": "speculative", "pp": 2, "dp": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_implementations_agree(workspace: Path, variant: str) -> None:
    """Compare engines and exact modes; two micro-batches per step provide a speculative threshold."""
    flags = {"dp": 1, **VARIANTS[variant]}
    micro_batch = ["--micro-batch-size", str(4 // flags["dp"])]
    if not (workspace / "halves").exists():
        launch([*slm(workspace, "halves"), "--micro-batch-size", "4"])
    launch([*slm(workspace, variant, **flags), *micro_batch], flags.get("tp", 1) * flags.get("pp", 1) * flags["dp"])
    assert_same(workspace, variant, "halves")


def test_tied_embedding_agrees(workspace: Path) -> None:
    """The head uses the embedding's weight: on the same stage, on the last of two stages, and on vocabulary shards."""
    model = [word for word in MODEL if word != "--untie-embeddings-and-output-weights"]
    corpus = str(workspace / "corpus_text_document")
    flags = {"model": model, "train_iters": STEPS, "objective": "slm", "slm_score": "token-loss"}
    base = command(corpus, workspace / "tied-base", **flags)
    flags |= {"load": workspace / "tied-base", "finetune": True, "losses_only": True}
    one, chunked, pp, tp = (
        command(corpus, workspace / f"tied-{name}", **flags, **more)
        for name, more in (
            ("one", {"slm_cross_entropy": "torch"}),
            ("chunked", {}),
            ("pp", {"pipeline_model_parallel_size": 2}),
            ("tp", {"tensor_model_parallel_size": 2}),
        )
    )
    launch_each([base, one, chunked])
    launch(pp, 2)
    launch(tp, 2)
    for name in ("chunked", "pp", "tp"):
        assert_same(workspace, f"tied-{name}", "tied-one")


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
def test_context_parallel_agrees(workspace: Path, tp: int, pp: int, dp: int) -> None:
    name = f"cp2tp{tp}pp{pp}dp{dp}"
    more = {"sequence_parallel": True} if tp > 1 else {}
    launch(slm(workspace, name, tp, pp, dp, context_parallel_size=2, eval_iters=1, **more), 2 * tp * pp * dp)
    assert_same(workspace, name)
    assert_same_evaluations(workspace, name)


@pytest.mark.parametrize("scope", ["sequence", "micro-batch", "global-batch"])
def test_context_parallel_agrees_in_every_scope(workspace: Path, scope: str) -> None:
    """Attention is also restarted after each document."""
    more = {"slm_scope": scope, "reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}
    launch(slm(workspace, f"{scope}-cp1", **more))
    launch(slm(workspace, f"{scope}-cp2", context_parallel_size=2, **more), 2)
    for one, two in zip(records(workspace / f"{scope}-cp1"), records(workspace / f"{scope}-cp2"), strict=True):
        assert one["selection"] == two["selection"]
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-4)


def test_overlapped_communication_agrees(workspace: Path) -> None:
    launch(slm(workspace, "overlap", dp=2, overlap_grad_reduce=True, overlap_param_gather=True), 2)
    assert_same(workspace, "overlap")


def test_plain_optimizer_agrees(workspace: Path) -> None:
    launch([*slm(workspace, "plain", dp=2), "--no-use-distributed-optimizer"], 2)
    assert_same(workspace, "plain")


def test_micro_batches_do_not_change_random_selection(workspace: Path) -> None:
    """With sequence scope and a random score, the selection is independent of the split."""
    for name, dp, size in (("random-1", 1, 8), ("random-2", 2, 2)):
        flags = slm(workspace, name, dp=dp, slm_scope="sequence")
        flags += ["--slm-score", "random", "--micro-batch-size", str(size)]
        launch(flags, dp)
    one, two = (records(workspace / name) for name in ("random-1", "random-2"))
    assert [record["selection"] for record in one] == [record["selection"] for record in two]
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-4)


def test_everything_selected_is_clm_bit_for_bit(workspace: Path) -> None:
    corpus = str(workspace / "corpus_text_document")
    base = {"load": workspace / "base", "finetune": True, "train_iters": STEPS, "losses_only": True}
    k1 = [*slm(workspace, "k1"), "--slm-selection-ratio", "1.0", "--no-use-distributed-optimizer"]
    launch_each([command(corpus, workspace / "clm", **base), k1])
    for clm, k1 in zip(records(workspace / "clm"), records(workspace / "k1"), strict=True):
        for figure in ("loss", "loss_all", "grad_norm", "selection", "share_selected"):
            assert clm[figure] == k1[figure], figure
