"""Save a run in Megatron-Core's distributed checkpoint format.

A checkpoint is written under a temporary name and renamed when it is complete; the tracker file is updated last. If a
run fails while saving, the previous checkpoint therefore remains the newest.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_slm.checkpoint import weights
from megatron_slm.checkpoint.optimizer_state import sharded_optimizer_state
from megatron_slm.config.checkpoint_files import CONFIG_FILE, TRACKER, Manifest, file_sizes, step_directory
from megatron_slm.config.recipe import dump_config
from megatron_slm.config.schema import RunConfig
from megatron_slm.mcore.saving import deferred_save_errors, share_results_in_memory
from megatron_slm.runtime.checksums import file_checksums, text_checksum
from megatron_slm.runtime.collective import gather_on_first_rank, on_first_rank
from megatron_slm.runtime.errors import ConfigError, refuse
from megatron_slm.runtime.files import explained_write, sync, write_text
from megatron_slm.runtime.groups import Groups
from megatron_slm.tokenizers.identity import tokenizer_identity
from megatron_slm.training.optimizer import gather_parameters
from megatron_slm.training.schedule import schedule_state
from megatron_slm.training.state import TrainState

RNG = "rng"
SELECTION = "selection"
SPIKES = "spikes"


def save_checkpoint(state: TrainState, config: RunConfig) -> Path:
    """Write a checkpoint of the current step to --save, and return its directory. Collective over all ranks.

    Raises:
        ConfigError: the directory cannot be written, for example because the disk is full; on every rank. Earlier
            checkpoints are unchanged.
    """
    assert config.checkpoint.save is not None
    root = Path(config.checkpoint.save)
    final = step_directory(root, state.progress.step)
    partial = final.with_name(f"{final.name}.partial")
    gather_parameters(state.model_chunks)
    try:
        on_first_rank(lambda: _prepare(partial))
        _save_state(_all_state(state, config), partial)
        names = on_first_rank(lambda: _complete(partial, state, config))
        checksums = file_checksums([partial / name for name in names], "--save", just_written=True)
        manifest = _manifest(state, partial, dict(zip(names, checksums, strict=True)))
        on_first_rank(lambda: _publish(manifest, partial, final))
    except ConfigError as error:
        raise ConfigError(
            f"--save {root}: the checkpoint of step {state.progress.step} could not be written: {error} "
            "Check free disk space and permissions. Earlier checkpoints are unchanged."
        ) from error
    return final


def _prepare(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    with explained_write(partial, "--save"):
        partial.mkdir(parents=True)


def _save_state(state: dict[str, Any], directory: Path) -> None:
    """Write sharded state. An error on one rank is raised on every rank."""
    share_results_in_memory()
    with deferred_save_errors(weights.CHECKPOINT_ERRORS) as errors:
        try:
            dist_checkpointing.save(state, str(directory))
        except weights.CHECKPOINT_ERRORS as error:
            errors.append(error)
    reasons = gather_on_first_rank(weights.brief(errors[0]) if errors else None)
    on_first_rank(lambda: refuse([f"{reason}." for reason in reasons if reason is not None][:1]))


def _complete(partial: Path, state: TrainState, config: RunConfig) -> list[str]:
    """Add the configuration and the data record; return the names of all files."""
    state.data.write(partial)
    write_text(partial / CONFIG_FILE, dump_config(config), "--save")
    return list(file_sizes(partial))


def _publish(manifest: Manifest, partial: Path, final: Path) -> None:
    """Write the manifest, rename the checkpoint to its final name, and update the tracker.

    An existing checkpoint of that name is replaced.
    """
    manifest.write(partial, text_checksum)
    with explained_write(final, "--save"):
        for name in manifest.files:
            sync(partial / name)
        replaced = final.with_name(f"{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    write_text(final.parent / TRACKER, f"{manifest.step}\n", "--save")


def random_state(groups: Groups) -> ShardedObject:
    """Return this rank's random states as sharded state."""
    return ShardedObject(
        RNG,
        _random_states(groups.device),
        (groups.pp_size, groups.tp_size),
        (groups.pp_rank, groups.tp_rank),
        replica_id=groups.dp_cp.rank(),
    )


def selection_state(state: TrainState, key: str = SELECTION) -> ShardedObject:
    """Return the selection state as sharded state: shared by all ranks, or one per data-parallel rank."""
    groups, selection = state.groups, state.selection
    shape: tuple[int, ...] = (1,)
    offset: tuple[int, ...] = (0,)
    replica = groups.rank
    if selection.has_rank_state:
        shape, offset = (groups.pp_size, groups.dp_cp.size()), (groups.pp_rank, groups.dp_cp.rank())
        replica = groups.tp_rank
    return ShardedObject(key, selection.state_dict(), shape, offset, replica_id=replica)


def _all_state(state: TrainState, config: RunConfig) -> dict[str, Any]:
    """Return the complete checkpoint content as Megatron-Core's sharded state."""
    content: dict[str, Any] = weights.model_state(plain_chunks(state.model_chunks))
    if config.checkpoint.save_optim:
        content["optimizer"] = sharded_optimizer_state(state.optimizer, content, is_loading=False)
        content["scheduler"] = schedule_state(state.scheduler)
    content[SPIKES] = state.spikes.state_dict()
    if config.checkpoint.save_rng:
        content[RNG] = random_state(state.groups)
    if state.selection.state_dict():
        content[SELECTION] = selection_state(state)
    return content


def plain_chunks(chunks: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """Return the chunks without their data-parallel wrapper, which is not saved in checkpoints."""
    return [chunk.module for chunk in chunks]  # type: ignore[misc]


def _random_states(device: torch.device) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _manifest(state: TrainState, directory: Path, checksums: dict[str, str]) -> Manifest:
    return Manifest(
        step=state.progress.step,
        consumed_samples=state.progress.consumed_samples,
        tokenizer=tokenizer_identity(state.tokenizer),
        layout=state.layout(),
        files=on_first_rank(lambda: file_sizes(directory)),
        checksums=checksums,
    )
