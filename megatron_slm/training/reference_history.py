"""Begin or continue the history of a training model, for --reference-history."""

from __future__ import annotations

from rich.console import Console

from megatron_slm.checkpoint.requests import Shapes
from megatron_slm.checkpoint.source import CheckpointSource, find_source
from megatron_slm.checkpoint.weights import load_state, saved_shapes
from megatron_slm.config.schema import RunConfig
from megatron_slm.reference.history import PREFIX
from megatron_slm.runtime.collective import on_first_rank
from megatron_slm.training.start import Start
from megatron_slm.training.state import TrainState


def start_history(state: TrainState, config: RunConfig, start: Start, console: Console) -> None:
    """Load the history of a resumed run, or begin one with a copy of the training model. Collective over all ranks.

    Raises:
        ConfigError: the saved history is unreadable; on every rank.
    """
    history, checkpoint = state.history, start.checkpoint
    if history is None:
        return
    if checkpoint is not None and not start.weights_only:
        source = on_first_rank(lambda: find_source(checkpoint.path, checkpoint.step, checkpoint.flag))
        shapes = saved_shapes(source.directory, source.flag)
        if _continues(source, config, shapes):
            history.load(load_state(history.request(shapes), source.directory, source.flag))
            return
        console.print(
            f"--reference-history {config.reference.reference_history}: {source.directory} contains no such history, "
            f"which begins with the weights of step {state.progress.step}",
            markup=False,
        )
    history.restart(state.model_chunks)


def _continues(source: CheckpointSource, config: RunConfig, shapes: Shapes) -> bool:
    """Return whether a checkpoint contains a history of the configured kind. Collective over all ranks."""
    saved = on_first_rank(lambda: source.config_over(config)).reference.reference_history
    return saved == config.reference.reference_history and any(key.startswith(PREFIX) for key in shapes)
