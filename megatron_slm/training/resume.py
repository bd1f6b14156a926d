"""Load the initial checkpoint of a run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from rich.console import Console

from megatron_slm.checkpoint import weights
from megatron_slm.checkpoint.optimizer_state import load_optimizer_state, master_weight_request, saved_step
from megatron_slm.checkpoint.source import CheckpointSource, find_source
from megatron_slm.config.checkpoint_files import Manifest, read_manifest, saved_config
from megatron_slm.config.resume import check_weights_fit, reconcile, score_changed
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.collective import on_first_rank
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.identity import identity_conflict
from megatron_slm.tokenizers.tokenizer import Tokenizer
from megatron_slm.training.checkpoint import RNG, SELECTION, SPIKES, plain_chunks, random_state, selection_state
from megatron_slm.training.data_order import DataRecord
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
        _resume_from(source.directory, state, config, reference, source.flag)
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
    return _compare(start, source, config, tokenizer, reference)[1]


def _find(checkpoint: Checkpoint) -> CheckpointSource:
    """Return the source of a verified checkpoint. Collective over all ranks."""
    return on_first_rank(lambda: find_source(checkpoint.path, checkpoint.step, checkpoint.flag))


def _read(directory: Path, flag: str) -> tuple[Manifest, RunConfig, DataRecord]:
    """Return the manifest, configuration and data record of a checkpoint. Collective over all ranks."""
    return on_first_rank(lambda: (read_manifest(directory, flag), saved_config(directory), DataRecord.read(directory)))


def _compare(
    start: Start, source: CheckpointSource, config: RunConfig, tokenizer: Tokenizer, reference: str | None
) -> tuple[RunConfig, str]:
    """Compare a checkpoint with the flags, and return the same values as :func:`reconcile`."""
    flag, directory = source.flag, source.directory
    if start.weights_only:
        saved = on_first_rank(source.config)
        lines = (check_weights_fit(config, saved, directory, flag), _compare_vocabularies(source, saved, tokenizer))
        return config, "\n".join(filter(None, lines))
    manifest, saved, record = _read(directory, flag)
    _check_tokenizer(directory, manifest, tokenizer, flag)
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
        is_complete = training.train_samples - manifest.consumed_samples < training.global_batch_size
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
    named = {"--reference-load": ours.reference_load, "--reference-scores": " ".join(ours.reference_scores)}
    if None in (reference, record.reference) or reference == record.reference or ours != theirs:
        return []
    return [f"the content of {flag} {value} has changed" for flag, value in named.items() if value][-1:]


def _resume_from(directory: Path, state: TrainState, config: RunConfig, reference: str | None, flag: str) -> None:
    settings = config.checkpoint
    manifest, saved, record = _read(directory, flag)
    keys = weights.saved_keys(directory, flag)
    loaded = _load(flag, directory, state, config, keys, same_layout=manifest.layout == state.layout())
    _load_model(flag, directory, state, loaded, keys, exact=saved.training.bf16 and not config.training.bf16)
    if settings.load_optim:
        load_optimizer_state(
            state.optimizer,
            weights.model_state(plain_chunks(state.model_chunks)),
            keys,
            saved_step(loaded.get("optimizer")),
            lambda request: weights.load_state(request, directory, flag),
            flag,
        )
    else:
        state.optimizer.reload_model_params()
    schedule = loaded.get("scheduler") if settings.load_optim else None
    resume_schedule(state.scheduler, schedule, manifest.consumed_samples, directory, flag)
    thresholds = loaded.get(SELECTION, loaded.get(state.selection.legacy_key))
    is_comparable = not (score_changed(config, saved) or _reference_difference(config, saved, record, reference))
    if thresholds is not None and is_comparable:
        state.selection.load_state_dict(thresholds)
    state.spikes.load_state_dict(loaded.get(SPIKES, {}))
    if RNG in loaded:
        _set_random_states(loaded[RNG])
    state.progress = TrainProgress(manifest.step, manifest.consumed_samples)


def _load(
    flag: str, directory: Path, state: TrainState, config: RunConfig, keys: frozenset[str], *, same_layout: bool
) -> dict[str, Any]:
    """Load weights, random states, the selection state, and all common (unsharded) state."""
    request = weights.loadable_model_state(plain_chunks(state.model_chunks))
    if config.checkpoint.load_rng and same_layout and any(key.startswith(f"{RNG}/") for key in keys):
        request[RNG] = random_state(state.groups)
    for key in (SELECTION, state.selection.legacy_key):
        saved = selection_state(state, key)
        if saved.unique_key in keys:
            request[SELECTION] = saved
            break
    return weights.load_state(request, directory, flag)


def _load_model(
    flag: str, directory: Path, state: TrainState, loaded: dict[str, Any], keys: frozenset[str], *, exact: bool
) -> None:
    """Copy weights into the model; with ``exact``, use the fp32 master weights of a bf16 checkpoint."""
    chunks = plain_chunks(state.model_chunks)
    if exact and (request := master_weight_request(weights.loadable_model_state(chunks), keys)):
        for chunk, masters in weights.load_state(request, directory, flag).items():
            if chunk in request:
                loaded[chunk].update(masters)
    weights.put_weights(chunks, loaded)


def _check_tokenizer(directory: Path, manifest: Manifest, tokenizer: Tokenizer, flag: str) -> None:
    if (conflict := identity_conflict(manifest.tokenizer, tokenizer)) is not None:
        theirs, ours, remedy = conflict
        raise ConfigError(
            f"{flag}: {directory} was trained with the tokenizer {theirs}, and this run has {ours}. {remedy}, or "
            "use --finetune with a model of this tokenizer."
        )


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])
