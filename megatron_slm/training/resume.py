"""Load the initial checkpoint of a run."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from rich.console import Console

from megatron_slm.checkpoint import weights
from megatron_slm.checkpoint.optimizer_buckets import has_buckets, load_buckets
from megatron_slm.checkpoint.optimizer_state import load_optimizer_state, master_weight_request, saved_step
from megatron_slm.checkpoint.requests import Shapes, check_weights, weight_request
from megatron_slm.checkpoint.source import CheckpointSource, find_source
from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.config.checkpoint_files import Manifest
from megatron_slm.config.resume import check_weights_fit, loss_changed, reconcile, score_changed
from megatron_slm.config.schema import RunConfig
from megatron_slm.mcore.optimizer import load_loss_scale
from megatron_slm.runtime.collective import on_first_rank
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.tokenizer import Tokenizer
from megatron_slm.training.checkpoint import RNG, SELECTION, SPIKES, plain_chunks, random_state, selection_state
from megatron_slm.training.data_order import DataRecord, read_saved_run
from megatron_slm.training.optimizer import build_scheduler
from megatron_slm.training.policy_checks import needs_reference
from megatron_slm.training.run_length import RunLength
from megatron_slm.training.schedule import resume_schedule
from megatron_slm.training.start import Checkpoint, Start
from megatron_slm.training.state import TrainProgress, TrainState

OPTIMIZER_REMEDY = "Add --no-load-optim, or --finetune to start a new run from its weights."


def resume(state: TrainState, config: RunConfig, start: Start, reference: str | None, console: Console) -> RunConfig:
    """Load the verified initial checkpoint, and print its differences from the flags. Collective over all ranks.

    Args:
        reference: identity of the reference model.

    Returns:
        the configuration, including the settings that a resumed run adopts from its checkpoint.
    """
    if start.checkpoint is None:
        return config
    source = _find(start.checkpoint)
    config, differences = _compare(start, source, config, state.tokenizer, reference)
    if differences:
        console.print(differences, markup=False)
    if not start.weights_only:
        _resume_from(source, state, config, reference)
        return config
    source.load_weights(plain_chunks(state.model_chunks))
    state.optimizer.reload_model_params()
    return config


def check_start(start: Start, config: RunConfig, tokenizer: Tokenizer, reference: str | None) -> str:
    """Validate the verified initial checkpoint of a run, for --dry-run.

    Returns:
        one line with the differences from the flags, or an empty string.

    Raises:
        ConfigError: the checkpoint is incomplete or damaged, or does not match the run.
    """
    if start.checkpoint is None:
        return ""
    source = _find(start.checkpoint)
    if not start.weights_only:
        weights.check_objects(source.directory, source.flag)
    differences = _compare(start, source, config, tokenizer, reference)[1]
    if not start.weights_only and config.checkpoint.load_optim:
        _check_schedule(source, config)
    return differences


def _check_schedule(source: CheckpointSource, config: RunConfig) -> None:
    """Compare the configured schedule with that of a checkpoint, as :func:`resume` does."""
    saved = read_saved_run(source, config)
    length = RunLength.from_config(config, saved.milestones, saved.config.training)
    scheduler = build_scheduler(SimpleNamespace(param_groups=[]), config, length)
    common = weights.common_state(source.directory, source.flag)
    resume_schedule(scheduler, _saved_schedule(common), saved.consumed, source.directory, source.flag)


def _saved_schedule(state: dict[str, Any]) -> dict[str, Any] | None:
    """Return the schedule in a checkpoint's state, by our or Megatron-LM's key."""
    return state.get("scheduler", state.get("opt_param_scheduler"))


def _find(checkpoint: Checkpoint) -> CheckpointSource:
    """Return the source of a verified checkpoint. Collective over all ranks."""
    return on_first_rank(lambda: find_source(checkpoint.path, checkpoint.step, checkpoint.flag))


def _read(source: CheckpointSource, config: RunConfig) -> tuple[Manifest, RunConfig, DataRecord]:
    """Return the manifest, configuration and data record of a checkpoint. Collective over all ranks."""
    return on_first_rank(lambda: (source.manifest(), source.config_over(config), DataRecord.read(source.directory)))


def _compare(
    start: Start, source: CheckpointSource, config: RunConfig, tokenizer: Tokenizer, reference: str | None
) -> tuple[RunConfig, str]:
    """Compare a checkpoint with the flags, and return the same values as :func:`reconcile`."""
    flag, directory = source.flag, source.directory
    if start.weights_only:
        saved = on_first_rank(lambda: source.config_over(config))
        lines = (check_weights_fit(config, saved, directory, flag), _compare_vocabularies(source, saved, tokenizer))
        return config, "\n".join(filter(None, lines))
    manifest, saved, record = _read(source, config)
    on_first_rank(lambda: _check_tokenizer(source, tokenizer))
    if config.checkpoint.load_optim and not saved.checkpoint.save_optim:
        raise ConfigError(
            f"{flag}: {directory} has no optimizer state (it was saved with --no-save-optim). {OPTIMIZER_REMEDY}"
        )
    further = _reference_difference(config, saved, record, reference)
    adopted, differences = reconcile(config, saved, directory, flag, further)
    return adopted, "\n".join(filter(None, (differences, _completion(config, manifest, start))))


def _compare_vocabularies(source: CheckpointSource, saved: RunConfig, tokenizer: Tokenizer) -> str:
    """Return a line if a run starts from a published model of another tokenizer. Collective over all ranks.

    Raises:
        ConfigError: the tokenizer has more entries than the published model.
    """
    if not source.defines_settings:
        return ""
    rows = saved.model.vocab_size or 0
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            f"{source.flag}: {tokenizer.source} has ids up to {tokenizer.vocab_size - 1}, and the model in "
            f"{source.directory} has {rows} embeddings. Use the tokenizer of the model."
        )
    conflict = on_first_rank(lambda: source.tokenizer_conflict(tokenizer))
    return "" if conflict is None else f"tokenizer of {source.directory}: {conflict[0]} -> {conflict[1]}"


def _completion(config: RunConfig, manifest: Manifest, start: Start) -> str:
    """Return a line if the checkpoint has reached the end of the run, so that nothing is left to train."""
    training = config.training
    is_complete = manifest.step >= training.train_iters
    shown = f"--train-iters {training.train_iters}"
    if training.train_samples is not None:
        is_complete = not BatchSizes.from_config(training).steps_until(
            training.train_samples, manifest.consumed_samples
        )
        shown = f"--train-samples {training.train_samples}"
    if not is_complete or not start.trains:
        return ""
    return (
        f"nothing to train: the checkpoint is at step {manifest.step} ({manifest.consumed_samples:,} samples), and the "
        f"run ends at {shown}. Give more to extend it, or --skip-train to evaluate the checkpoint."
    )


def _reference_difference(config: RunConfig, saved: RunConfig, record: DataRecord, reference: str | None) -> list[str]:
    """Return a difference if the flags are equal but the reference model's content has changed."""
    ours, theirs = config.reference, saved.reference
    named = {"--reference-load": " ".join(ours.reference_load), "--reference-scores": " ".join(ours.reference_scores)}
    bubbles = theirs.reference_in_bubbles  # does not affect the scores
    have_equal_flags = replace(ours, reference_in_bubbles=bubbles) == theirs
    if None in (reference, record.reference) or reference == record.reference or not have_equal_flags:
        return []
    return [f"the content of {flag} {value} has changed" for flag, value in named.items() if value][-1:]


def _resume_from(source: CheckpointSource, state: TrainState, config: RunConfig, reference: str | None) -> None:
    settings, directory, flag = config.checkpoint, source.directory, source.flag
    manifest, saved, record = _read(source, config)
    shapes = weights.saved_shapes(directory, flag)
    chunks = plain_chunks(state.model_chunks)
    check_weights(chunks, shapes, directory, flag)
    loaded = _load(flag, directory, state, config, shapes, same_layout=manifest.layout == state.layout())
    exact = saved.training.params_dtype != "fp32" and config.training.params_dtype == "fp32"
    masters = master_weight_request(weight_request(chunks, shapes), shapes) if exact else {}
    _load_model(flag, directory, state, loaded, masters)
    if settings.load_optim:
        read = partial(weights.load_state, directory=directory, flag=flag)
        model = weight_request(chunks, shapes)
        if has_buckets(shapes):
            load_buckets(state.optimizer, model, shapes, read, flag)
        else:
            load_optimizer_state(state.optimizer, model, shapes, saved_step(loaded.get("optimizer")), read, flag)
        load_loss_scale(state.optimizer, loaded.get("optimizer"))
    else:
        state.optimizer.reload_model_params()
    schedule = _saved_schedule(loaded) if settings.load_optim else None
    resume_schedule(state.scheduler, schedule, manifest.consumed_samples, directory, flag)
    thresholds = loaded.get(SELECTION, loaded.get(state.selection.legacy_key))
    if not (needs_reference(config) or needs_reference(saved)):
        saved = replace(saved, reference=config.reference)  # neither has an effect
    is_same = reference is not None and reference == record.reference
    has_other_reference = bool(_reference_difference(config, saved, record, reference))
    if thresholds is not None and not (has_other_reference or score_changed(config, saved, same_reference=is_same)):
        state.selection.load_state_dict(thresholds)
    if not (has_other_reference or loss_changed(config, saved, same_reference=is_same)):
        state.spikes.load_state_dict(loaded.get(SPIKES, {}))
    if RNG in loaded:
        _set_random_states(loaded[RNG])
    state.progress = TrainProgress(manifest.step, manifest.consumed_samples)


def _load(
    flag: str, directory: Path, state: TrainState, config: RunConfig, saved: Shapes, *, same_layout: bool
) -> dict[str, Any]:
    """Load weights, random states, the selection state, and all common (unsharded) state."""
    request = weight_request(plain_chunks(state.model_chunks), saved)
    if config.checkpoint.load_rng and same_layout and any(key.startswith(f"{RNG}/") for key in saved):
        request[RNG] = random_state(state.groups)
    for key in (SELECTION, state.selection.legacy_key):
        selection = selection_state(state, key)
        if selection.unique_key in saved:
            request[SELECTION] = selection
            break
    return weights.load_state(request, directory, flag)


def _load_model(flag: str, directory: Path, state: TrainState, loaded: dict[str, Any], masters: dict[str, Any]) -> None:
    """Copy weights into the model; ``masters`` requests the fp32 master weights of a 16-bit checkpoint instead."""
    if masters:
        for chunk, found in weights.load_state(masters, directory, flag).items():
            if chunk in masters:
                loaded[chunk].update(found)
    weights.put_weights(plain_chunks(state.model_chunks), loaded)


def _check_tokenizer(source: CheckpointSource, tokenizer: Tokenizer) -> None:
    if (conflict := source.tokenizer_conflict(tokenizer)) is not None:
        theirs, ours, remedy = conflict
        raise ConfigError(
            f"{source.flag}: {source.directory} was trained with the tokenizer {theirs}, and this run has {ours}. "
            f"{remedy}, or use --finetune with a model of this tokenizer."
        )


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])
