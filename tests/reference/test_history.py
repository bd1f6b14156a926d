"""Test that the reference model follows the history of the training model by its definition, also after a resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_slm.config.checks import resolve
from megatron_slm.config.flags import parse
from megatron_slm.config.schema import ReferenceConfig
from megatron_slm.reference.history import ModelHistory
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import captured, command, losses, make_corpus, run_each

DECAY = 0.75
AVERAGE = {"reference_history": "average", "reference_average_decay": DECAY}
REFRESHED = {"reference_history": "start", "reference_refresh_interval": 2}
STEPS = 5


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("history")
    make_corpus(directory / "corpus", 1)
    return directory


def settings(workspace: Path, save: str | None = None, **flags: Any) -> list[str]:
    """Return the command line of a run whose reference model is its history."""
    corpus, directory = str(workspace / "corpus_text_document"), None if save is None else workspace / save
    common = {"objective": "slm", "num_layers": 1, "train_iters": STEPS, "eval_iters": 0}
    return command(corpus, directory, **{**common, **flags})


def _weights(chunks: Any) -> dict[str, torch.Tensor]:
    named = ((name, weight) for chunk in chunks for name, weight in chunk.named_parameters())
    return {name.replace("module.", ""): weight.double().clone() for name, weight in named}


def _histories(rank: int, world_size: int, commands: list[list[str]]) -> list[list[tuple[Any, Any]]]:
    """Train by each command line; return the weights of both models before every step."""
    from megatron_slm.training import loop

    one_step, found = loop.one_step, []

    def observed(run: Any, *arguments: Any) -> Any:
        found[-1].append((_weights(run.state.model_chunks), _weights(run.state.history.replica.chunks)))
        return one_step(run, *arguments)

    loop.one_step = observed
    for argv in commands:
        found.append([])
        outcome = captured(argv)
        assert outcome.code == 0, outcome.errors
    return found


def test_weights_follow_their_definition(workspace: Path) -> None:
    """Compare with averages in float64; a skipped step counts, and fp32 averages do not lose small differences."""
    start, refreshed, average, half = run_ranks(
        _histories,
        1,
        [
            settings(workspace, reference_history="start"),
            settings(workspace, **REFRESHED),
            settings(workspace, **AVERAGE, iterations_to_skip=2),
            settings(workspace, **AVERAGE, bf16=True),
        ],
        initialize=False,
    )[0]
    for found, source in ((start, [0] * STEPS), (refreshed, [0, 0, 2, 2, 4])):
        for (_, reference), step in zip(found, source, strict=True):
            trained = found[step][0]
            assert reference.keys() == trained.keys()
            assert all(torch.equal(reference[name], trained[name]) for name in trained)
    for found, error in ((average, 1e-6), (half, 2**-8)):
        expected = found[0][0]
        for trained, reference in found:
            expected = {name: DECAY * expected[name] + (1 - DECAY) * weight for name, weight in trained.items()}
            for name, weight in reference.items():
                torch.testing.assert_close(weight, expected[name], rtol=error, atol=error)
    assert not torch.equal(*(average[-1][index]["decoder.final_layernorm.weight"] for index in (0, 1)))


def _layer(**parts: Any) -> torch.nn.Module:
    """Return a module with parameters by their names, in which __ separates modules."""
    root = torch.nn.Module()
    for path, value in parts.items():
        *modules, name = path.split("__")
        module = root
        for each in modules:
            if not hasattr(module, each):
                module.add_module(each, torch.nn.Module())
            module = getattr(module, each)
        module.register_parameter(name, torch.nn.Parameter(torch.full((2,), value)))
    return root


def test_layers_of_another_implementation_have_the_same_history() -> None:
    """Transformer Engine has layer norms in linear layers, except with a filtered backward pass."""
    engine = {"self_attention__linear_qkv__layer_norm_weight": 0.0, "mlp__linear_fc1__layer_norm_weight": 0.0}
    local = {"input_layernorm__weight": 1.0, "pre_mlp_layernorm__weight": 2.0}
    for ours, theirs in ((engine, local), (local, engine)):
        replica: Any = SimpleNamespace(chunks=[_layer(**ours)])
        history = ModelHistory(replica, ReferenceConfig(reference_history="start"))
        history.restart([_layer(**theirs)])
        assert [weight[0].item() for weight in replica.chunks[0].parameters()] == list(theirs.values())
    with pytest.raises(ConfigError, match=r"have no weight mlp\.linear_fc2\.weight"):
        ModelHistory(
            SimpleNamespace(chunks=[_layer(mlp__linear_fc2__weight=1.0)]),  # type: ignore[arg-type]
            ReferenceConfig(reference_history="start"),
        ).restart([_layer(**local)])


def test_resume_is_exact(workspace: Path) -> None:
    """Averages and refreshed copies are saved; a history of another kind begins with the resumed weights."""
    runs, kinds = [], {"average": {**AVERAGE, "bf16": True}, "refreshed": REFRESHED}
    for name, kind in kinds.items():
        runs.append(settings(workspace, name, **kind, exit_interval=3))
        runs.append(settings(workspace, name, **kind, load=workspace / name))
        runs.append(settings(workspace, f"{name}-uninterrupted", **kind, losses_only=True))
    runs.append(settings(workspace, "other", reference_history="start", load=workspace / "average", bf16=True))
    outcomes = run_each(*runs)
    assert [outcome.errors for outcome in outcomes if outcome.code] == []
    for name in kinds:
        assert losses(workspace / name) == losses(workspace / f"{name}-uninterrupted")
    assert "contains no such history, which begins with the weights of step 5" in outcomes[-1].output


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"dp": 2}])
def test_another_layout_continues_the_history(workspace: Path, layout: dict[str, Any]) -> None:
    """A run of one rank is resumed on two ranks, with overlapped parameter gathers, and on one rank again."""
    from megatron_slm.testing.tiny import launch

    name, layers = "-".join(map(str, layout)), {"num_layers": 2}
    overlap = dict.fromkeys(("use_distributed_optimizer", "overlap_param_gather", "overlap_grad_reduce"), True)
    launch(settings(workspace, name, **AVERAGE, **layers, train_iters=6, exit_interval=2))
    again = {**AVERAGE, **layers, "train_iters": 6, "load": workspace / name}
    launch(settings(workspace, name, **again, **layout, **overlap, exit_interval=2), 2)
    launch(settings(workspace, name, **again))
    launch(settings(workspace, f"{name}-one", **AVERAGE, **layers, train_iters=6, losses_only=True))
    for ours, theirs in zip(losses(workspace / name), losses(workspace / f"{name}-one"), strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({**REFRESHED, "reference_load": "rm"}, "--reference-load and --reference-history were both given"),
        ({**AVERAGE, "reference_scores": "rm"}, "--reference-scores and --reference-history were both given"),
        (
            {**AVERAGE, "reference_refresh_interval": 2},
            "--reference-refresh-interval 2 needs --reference-history start",
        ),
        ({"reference_history": "start", "reference_average_decay": 0.5}, "needs --reference-history average"),
        ({**AVERAGE, "reference_in_bubbles": True}, "a reference model that does not change between steps"),
        ({**REFRESHED, "reference_in_bubbles": True}, "a reference model that does not change between steps"),
        ({**AVERAGE, "fp8_param_gather": True}, "which --fp8-param-gather keeps in FP8 only"),
        ({**AVERAGE, "objective": "clm"}, "--reference-history has no effect with --objective clm"),
    ],
)
def test_settings_without_effect_are_refused(workspace: Path, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(parse(settings(workspace, **flags)).config, 1)
