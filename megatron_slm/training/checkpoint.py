"""Saves and resumes a run in Megatron-Core's distributed checkpoint format.

A checkpoint is written under a temporary name and renamed when it is whole; the tracker file is moved last. So a run
that dies while saving leaves the checkpoint before it as the newest.
"""

from __future__ import annotations

import queue
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_slm.config.recipe import write_config
from megatron_slm.config.schema import Config
from megatron_slm.data.tokenizers.identity import identity_conflict, tokenizer_identity
from megatron_slm.data.tokenizers.tokenizer import Tokenizer
from megatron_slm.model import weights
from megatron_slm.model.experts import AuxiliaryLosses
from megatron_slm.objective.carried import CarriedThreshold
from megatron_slm.objective.early_rule import EarlyRule, ThresholdGuess
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.groups import Groups
from megatron_slm.training.optimizer import allocate_adam_state, gather_parameters, separate_adam_steps

# The one sharding of the optimizer state that can be read back in any layout.
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
GUESS = "guess"  # the guessed threshold of each data-parallel rank; not in every checkpoint


@dataclass
class Position:
    """Where in its run a run is."""

    step: int = 0
    consumed_samples: int = 0


@dataclass(frozen=True)
class Trainable:
    """What a checkpoint holds besides the position."""

    chunks: Sequence[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    groups: Groups
    tokenizer: Tokenizer
    early: EarlyRule | None = None  # tells which tokens may get their gradient at once; without it, none do
    carried: CarriedThreshold | None = None
    auxiliary: AuxiliaryLosses | None = None  # of a model with experts

    @property
    def guess(self) -> ThresholdGuess | None:
        """The guessed threshold, where the run guesses."""
        return self.early.guess if self.early is not None and self.early.speculate else None

    def layout(self) -> dict[str, int]:
        groups = self.groups
        layout = {"tensor": groups.tp_size, "pipeline": groups.pp_size, "data": groups.dp_size}
        return {**layout, "context": groups.cp_size} if groups.cp_size > 1 else layout


def save_checkpoint(trainable: Trainable, position: Position, config: Config) -> Path:
    """Write the checkpoint of ``position`` below --save. Collective over all ranks.

    Raises:
        ConfigError: the folder cannot be written, for example because the disk is full; what was there stays.
    """
    assert config.checkpoint.save is not None
    root = Path(config.checkpoint.save)
    final = weights.step_directory(root, position.step)
    partial = final.with_name(f"{final.name}.partial")
    logging_rank = trainable.groups.is_logging_rank
    gather_parameters(trainable.chunks)
    try:
        if logging_rank:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        state = _state(trainable, config, is_loading=False, with_rng=config.checkpoint.save_rng, with_guess=True)
        _hand_results_over_in_memory()
        dist_checkpointing.save(state, str(partial))
        dist.barrier()
        if logging_rank:
            write_config(config, partial / weights.CONFIG_FILE)
            _manifest(trainable, position, partial).write(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _move_tracker(root, position.step)
    except weights.CHECKPOINT_ERRORS as error:
        raise ConfigError(
            f"--save {root}: the checkpoint of step {position.step} could not be written: {weights.brief(error)}. "
            "Is the disk full, or the folder read-only? Earlier checkpoints are untouched."
        ) from error
    dist.barrier()
    return final


def _hand_results_over_in_memory() -> None:
    """Give Megatron-Core's writer a plain queue for its results.

    It starts a process to hold that queue otherwise, for saves that go on beside training. It would import torch anew
    on every rank, seconds and hundreds of MB, and a save that is waited for puts and gets in one process.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def resume(trainable: Trainable, config: Config) -> tuple[Position, str | None]:
    """Begin where the flags say: from scratch, from another run's weights, or where this run stopped.

    Returns:
        the position, and the folder that was read (None from scratch). Collective over all ranks.
    """
    own = config.checkpoint
    resumable = own.load is not None and not own.finetune
    if resumable and _has_checkpoint(own.load, own.ckpt_step):
        directory = weights.checkpoint_directory(str(own.load), own.ckpt_step, "--load")
        return _resume_from(directory, trainable, config), str(directory)
    if resumable and own.exit_on_missing_checkpoint:
        raise ConfigError(f"--load {own.load}: there is no checkpoint, and --exit-on-missing-checkpoint is on.")
    base, flag = (own.load, "--load") if own.finetune else (own.pretrained_checkpoint, "--pretrained-checkpoint")
    if base is None:
        return Position(), None
    directory = weights.checkpoint_directory(base, own.ckpt_step if own.finetune else None, flag)
    weights.load_weights(_plain(trainable.chunks), directory, flag)
    trainable.optimizer.reload_model_params()
    return Position(), str(directory)


def _has_checkpoint(path: str | None, step: int | None) -> bool:
    return path is not None and (
        weights.latest_step(Path(path)) is not None
        or (Path(path) / weights.MANIFEST_FILE).is_file()
        or (step is not None and weights.step_directory(Path(path), step).is_dir())
    )


def _resume_from(directory: Path, trainable: Trainable, config: Config) -> Position:
    own = config.checkpoint
    manifest = weights.read_manifest(directory)
    _check_same_run(directory, manifest, config, trainable)
    same_layout = manifest.layout == trainable.layout()
    with_rng = own.load_rng and same_layout
    with_guess = same_layout and trainable.guess is not None and weights.holds(directory, GUESS, "--load")
    state = _state(trainable, config, is_loading=True, with_rng=with_rng, with_guess=with_guess)
    loaded = weights.load_state(state, directory, "--load")
    weights.put_weights(_plain(trainable.chunks), loaded)
    if own.load_optim:
        trainable.optimizer.load_state_dict(loaded["optimizer"])
        separate_adam_steps(trainable.optimizer)
        _load_schedule(trainable.scheduler, loaded["scheduler"], directory)
    else:
        trainable.optimizer.reload_model_params()
    if trainable.carried is not None and "carried" in loaded:
        trainable.carried.load_state_dict(loaded["carried"])
    if trainable.guess is not None and GUESS in loaded:
        trainable.guess.load_state_dict(loaded[GUESS], trainable.groups.device)
    if "rng" in loaded:
        _set_random_states(loaded["rng"])
    return Position(manifest.step, manifest.consumed_samples)


def _load_schedule(scheduler: OptimizerParamScheduler, state: dict[str, Any], directory: Path) -> None:
    try:
        scheduler.load_state_dict(state)
    except AssertionError as error:  # Megatron-Core's way to say that the schedules differ
        raise ConfigError(
            f"--load: the schedule of {directory} is not that of the flags ({error}). Give the same --lr, --min-lr, "
            "--lr-decay-*, --lr-warmup-* and --train-iters, or choose one with --override-opt_param-scheduler (the "
            "flags') or --use-checkpoint-opt_param-scheduler (the checkpoint's)."
        ) from error


def _check_same_run(directory: Path, manifest: weights.Manifest, config: Config, trainable: Trainable) -> None:
    if (conflict := identity_conflict(manifest.tokenizer, trainable.tokenizer)) is not None:
        theirs, ours, remedy = conflict
        raise ConfigError(
            f"--load: {directory} was trained with the tokenizer {theirs}, and this run has {ours}. {remedy}, or "
            "--finetune from a model of yours."
        )
    saved = weights.saved_config(directory)
    if config.checkpoint.load_optim and not saved.checkpoint.save_optim:
        raise ConfigError(
            f"--load: {directory} holds no optimizer state (it was saved with --no-save-optim). "
            "Add --no-load-optim, or --finetune to begin anew from its weights."
        )


def _state(
    trainable: Trainable, config: Config, *, is_loading: bool, with_rng: bool, with_guess: bool
) -> dict[str, Any]:
    """Everything that a checkpoint holds, as Megatron-Core's sharded state."""
    groups = trainable.groups
    state: dict[str, Any] = weights.model_state(_plain(trainable.chunks))
    own = config.checkpoint
    if own.load_optim if is_loading else own.save_optim:
        allocate_adam_state(trainable.optimizer)
        optimizer = trainable.optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=OPTIMIZER_FORMAT
        )
        state["optimizer"] = optimizer
        state["scheduler"] = trainable.scheduler.state_dict()
    if with_rng:
        state["rng"] = ShardedObject(
            "rng",
            _random_states(groups.device),
            (groups.pp_size, groups.tp_size),
            (groups.pp_rank, groups.tp_rank),
            replica_id=groups.dp_cp.rank(),
        )
    if with_guess and trainable.guess is not None:
        state[GUESS] = ShardedObject(
            GUESS,
            trainable.guess.state_dict(),
            (groups.pp_size, groups.dp_cp.size()),
            (groups.pp_rank, groups.dp_cp.rank()),
            replica_id=groups.tp_rank,
        )
    if trainable.carried is not None and not is_loading:
        state["carried"] = trainable.carried.state_dict()
    return state


def _plain(chunks: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """The chunks without their data-parallel wrapper, which has no part in a checkpoint."""
    return [chunk.module for chunk in chunks]  # type: ignore[misc]


def _random_states(device: torch.device) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])


def _manifest(trainable: Trainable, position: Position, directory: Path) -> weights.Manifest:
    return weights.Manifest(
        step=position.step,
        consumed_samples=position.consumed_samples,
        tokenizer=tokenizer_identity(trainable.tokenizer),
        layout=trainable.layout(),
        files=weights.file_sizes(directory),
    )


def _move_tracker(root: Path, step: int) -> None:
    new = root / f"{weights.TRACKER}.partial"
    new.write_text(f"{step}\n", encoding="utf-8")
    new.replace(root / weights.TRACKER)
