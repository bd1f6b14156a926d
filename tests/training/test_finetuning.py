"""Fine-tuning: packed examples compared with a plain definition, layouts, resume, and selection."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.corpus.loss_masks import LossMask, has_mask
from megatron_slm.finetune import selection
from megatron_slm.finetune.selection import SelectionJob, corpus_threshold, select_over_corpora
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.scores.sidecar import Sidecar, read_header, sidecar_path
from megatron_slm.testing.chat import make_examples
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import Outcome, captured, command, launch, losses, records
from megatron_slm.tokenizers.tokenizer import ByteTokenizer, TokenizerFiles


def conversations(count: int, seed: int) -> list[dict[str, Any]]:
    """Return conversations of one or two turns in the style of ChatML without special tokens, of up to 32 bytes."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        prompt, completion = ("".join(rng.choices("abcd é", k=rng.randint(1, 9))) for _ in range(2))
        pairs.append({"prompt": prompt, "completion": completion + "e"})
    return pairs


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finetuning")
    make_examples(directory / "one", conversations(120, 1))
    make_examples(directory / "two", conversations(60, 2))
    return directory


def sft(directory: Path, name: str | None, *, corpus: Any = "one", **flags: Any) -> list[str]:
    prefix = str(directory / f"{corpus}_sft_document")
    flags = {"objective": "sft", "train_iters": 4, "losses_only": True, **flags}
    return command(prefix, None if name is None else directory / name, **flags)


def run_commands(rank: int, world_size: int, commands: list[tuple[str, list[str]]]) -> list[Outcome]:
    """Run commands, given as module and arguments, one after another in this process."""
    return [captured(argv, importlib.import_module(f"megatron_slm.cli.{module}").main) for module, argv in commands]


def _packed_and_alone(rank: int, world_size: int, argv: list[str]) -> list[dict[str, Any]]:
    """Return loss and gradients of a packed batch, and of its examples one by one by the plain definition."""
    from megatron_slm.config.checks import resolve
    from megatron_slm.config.flags import parse
    from megatron_slm.data.batches import BatchStream
    from megatron_slm.runtime import process
    from megatron_slm.runtime.console import make_console
    from megatron_slm.training.setup import build_run, parallel_layout
    from megatron_slm.training.step import StepPasses

    results = []
    for embedding in ("rope", "learned_absolute"):
        config = resolve(parse([*argv, "--position-embedding-type", embedding]).config, int(os.environ["WORLD_SIZE"]))
        groups = process.start(parallel_layout(config), seed=1)
        with contextlib.redirect_stdout(io.StringIO()):
            run = build_run(config, ByteTokenizer(TokenizerFiles()), groups, make_console(False))
        micro_batches = next(BatchStream(run.datasets.train, run.shape, device=groups.device))
        run.state.zero_grad()
        parts = StepPasses(run.state.model_chunks, micro_batches, [None] * len(micro_batches)).run(run.state.selection)
        total, count = (float(sum(part.sums.values[place] for part in parts)) for place in (0, 1))
        model = run.state.model_chunks[0].module
        packed = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
        alone, tokens = _alone(model, micro_batches)
        run.state.zero_grad()
        (alone / tokens).backward()
        worst = max(float((packed[name] - p.main_grad).abs().max()) for name, p in model.named_parameters())
        largest = max(float(gradient.abs().max()) for gradient in packed.values())
        results.append({"packed": total / count, "alone": float(alone) / tokens, "count": (count, tokens)})
        results[-1] |= {"difference": worst, "largest": largest}
        process.stop()
    return results


def _alone(model: Any, micro_batches: list[Any]) -> tuple[torch.Tensor, int]:
    """Return the summed float64 loss of the trained labels of every example, each run by itself, and their number."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for batch in micro_batches:
        for row in range(batch.tokens.size(0)):
            starts = (batch.position_ids[row] == 0).nonzero().flatten().tolist()
            for start, stop in zip(starts, [*starts[1:], batch.tokens.size(1)], strict=True):
                trained = batch.loss_mask[row, start:stop]
                if not trained.any():
                    continue
                positions = torch.arange(stop - start)[None]
                hidden = model(batch.tokens[row : row + 1, start:stop], positions, None)
                logits = (hidden.heads[0][:, 0] @ hidden.lm_head.weight.t())[:, :257].double()
                found = -logits.log_softmax(-1).gather(-1, batch.labels[row, start:stop, None]).squeeze(-1)
                total, tokens = total + found[trained].sum(), tokens + int(trained.sum())
    return total, tokens


def test_packed_examples_equal_examples_alone(workspace: Path) -> None:
    """Loss and gradients of a batch are those of its examples, of which each is run without the others."""
    argv = sft(workspace, None, valid_data_path=f"own={workspace / 'two_sft_document'}", transformer_impl="local")
    [results] = run_ranks(_packed_and_alone, 1, argv, initialize=False)
    for result in results:
        assert result["count"][0] == result["count"][1] > 100
        assert result["packed"] == pytest.approx(result["alone"], rel=1e-5)
        assert result["difference"] < 1e-5 * max(result["largest"], 1), result


def test_resume_is_bit_for_bit_and_selects_only_if_asked(workspace: Path) -> None:
    flags = {"hidden_dropout": 0.1, "corpus": "one", "train_iters": 4}
    part = sft(workspace, "part", load=workspace / "part", losses_only=False, **flags)
    outcomes = run_ranks(
        run_commands,
        1,
        [
            ("pretrain", sft(workspace, "whole", **flags)),
            ("pretrain", [*part, "--exit-interval", "2"]),
            ("pretrain", [*part, "--exit-interval", "9"]),
            ("pretrain", sft(workspace, "random", slm_score="random", slm_selection_ratio=0.5)),
            ("pretrain", sft(workspace, "never", slm_selection_ratio=0.5)),
            ("pretrain", sft(workspace, "never", eod_mask_loss=True, slm_loss_mask="mine")),
            ("pretrain", [*sft(workspace, "never", objective="clm"), "--sft", "--dry-run"]),
            ("pretrain", [*sft(workspace, "never", objective="clm"), "--dry-run"]),
        ],
        initialize=False,
    )[0]
    assert [outcome.code for outcome in outcomes] == [0, 0, 0, 0, 2, 2, 2, 0], [outcome.errors for outcome in outcomes]
    assert losses(workspace / "part") == losses(workspace / "whole")
    whole, half = records(workspace / "whole"), records(workspace / "random")
    assert [record["share_selected"] for record in whole] == [1.0] * 4
    assert [record["share_selected"] for record in half] == pytest.approx([0.5] * 4, abs=0.01)
    assert "--slm-selection-ratio has no effect with --objective sft and every answer token" in outcomes[4].errors
    assert "--eod-mask-loss has no effect with --objective sft" in outcomes[5].errors
    assert "--sft contradicts" in outcomes[6].errors
    assert "one_sft_document: the examples of tools/preprocess_sft.py are read as plain text" in outcomes[7].errors


def test_layouts_agree_with_one_process(workspace: Path) -> None:
    flags = {"load": workspace / "base", "finetune": True, "use_distributed_optimizer": True, "train_iters": 3}
    base = sft(workspace, "base", train_iters=1, losses_only=False)
    alone = [("pretrain", base), ("pretrain", sft(workspace, "alone", **flags))]
    outcomes = run_ranks(run_commands, 1, alone, initialize=False)[0]
    assert not any(outcome.code for outcome in outcomes), outcomes
    launch(sft(workspace, "dp", dp=2, **flags), 2)
    launch(sft(workspace, "cp", context_parallel_size=2, **flags), 2)
    for name in ("dp", "cp"):
        for expected, found in zip(records(workspace / "alone"), records(workspace / name), strict=True):
            for figure in ("loss", "loss_all", "grad_norm"):
                assert found[figure] == pytest.approx(expected[figure], rel=2e-4), figure
            assert found["selection"] == expected["selection"]


def test_selection_by_a_reference_model_and_over_the_corpus(workspace: Path) -> None:
    """Sidecars and a co-located model select the same tokens; one threshold selects over both corpora."""
    both = [str(workspace / f"{name}_sft_document") for name in ("one", "two")]
    blend = ["0.5", both[0], "0.5", both[1]]
    scoring = ["--data-path", *both, "--micro-batch-size", "4"]
    slm = {"data_path": blend, "slm_selection_ratio": 0.5, "train_iters": 3, "slm_scope": "global-batch"}

    def model(name: str, seed: int) -> tuple[str, list[str]]:
        return "pretrain", sft(workspace, name, corpus="two", train_iters=2, seed=seed, losses_only=False)

    def scored(name: str) -> tuple[str, list[str]]:
        flags = ["--reference-load", str(workspace / name), "--reference-scores", name]
        return "score_corpus", [*scoring, *flags]

    outcomes = run_ranks(
        run_commands,
        1,
        [
            *(model("base1", 1), model("rm", 2), scored("base1"), scored("rm")),
            ("pretrain", sft(workspace, "located", reference_load=workspace / "rm", **slm)),
            ("pretrain", sft(workspace, "sidecars", reference_scores="rm", **slm)),
        ],
        initialize=False,
    )[0]
    assert not any(outcome.code for outcome in outcomes), outcomes
    for located, sidecars in zip(records(workspace / "located"), records(workspace / "sidecars"), strict=True):
        assert located["loss"] == pytest.approx(sidecars["loss"], rel=2e-3)
        assert located["share_selected"] == sidecars["share_selected"] == pytest.approx(0.5, abs=0.01)
    _check_corpus_selection(workspace, both)


def _check_corpus_selection(workspace: Path, both: list[str]) -> None:
    tokenizer = ByteTokenizer(TokenizerFiles())
    job = SelectionJob(both, "base1", "rm", 0.3, "best")
    threshold, found = select_over_corpora(job, tokenizer)
    excess, selected = [], []
    for prefix in both:
        answers, chosen = LossMask(prefix, "answers"), LossMask(prefix, "best")
        count = answers.header.tokens
        base, rm = (Sidecar(path, read_header(path)) for path in (sidecar_path(prefix, n) for n in ("base1", "rm")))
        mask = answers.get(0, count)
        excess.append((base.losses(0, count) - rm.losses(0, count))[mask])
        selected.append(chosen.get(0, count)[mask])
        assert not (chosen.get(0, count) & ~mask).any()
    scores, chosen_tokens = np.concatenate(excess), np.concatenate(selected)
    wanted = -(-3 * len(scores) // 10)
    order = np.argsort(-scores, kind="stable")[:wanted]
    assert set(np.flatnonzero(chosen_tokens)) == set(order), "the highest scores, the first ones among equals"
    assert threshold == scores[order[-1]] and sum(each.selected for each in found) == wanted
    with pytest.raises(ConfigError, match="in \\(0, 1\\]"):
        select_over_corpora(SelectionJob(both, "base1", "rm", 0.0, "best"), tokenizer)
    with pytest.raises(ConfigError, match="a/b must consist of letters"):
        select_over_corpora(SelectionJob(both, "base1", "rm", 0.5, "a/b"), tokenizer)
    for prefix in both:
        shutil.copy(sidecar_path(prefix, "rm"), sidecar_path(prefix, "copied"))
    with pytest.raises(ConfigError, match="contain the losses of the same model"):
        select_over_corpora(SelectionJob(both, "copied", "rm", 0.5, "best"), tokenizer)
    launch(sft(workspace, "best", slm_loss_mask="best", train_iters=2))
    assert len(records(workspace / "best")) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "write_mask", _stop)
        with pytest.raises(KeyboardInterrupt):
            select_over_corpora(SelectionJob(both, "base1", "rm", 0.5, "best"), tokenizer)
    assert not any(has_mask(prefix, "best") for prefix in both), "no masks of different thresholds"


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_corpus_threshold_with_ties_and_signs() -> None:
    rng = np.random.default_rng(0)
    scores = rng.choice(np.array([-2.5, -0.0, 0.0, 1e-9, 3.0, -1e-9, 0.1], np.float32), 500)
    for count in (1, 2, 99, 250, 499, 500):
        threshold, ties = corpus_threshold(lambda: iter(np.split(scores, [7, 100])), count)
        assert threshold == np.sort(scores)[-count]
        assert ties == count - (scores > threshold).sum()
