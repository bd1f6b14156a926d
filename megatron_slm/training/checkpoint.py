"""Content of a run's checkpoint as Megatron-Core's sharded state, and the steps of saving it.

A checkpoint is written under a temporary name and renamed when it is complete; the tracker file is updated last. If a
run fails while saving, the previous checkpoint therefore remains the newest.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_slm.checkpoint import weights
from megatron_slm.checkpoint.compatibility import CHECKPOINT_VERSION, additional_entries
from megatron_slm.checkpoint.megatron_lm.saved_arguments import megatron_arguments
from megatron_slm.checkpoint.optimizer_state import sharded_optimizer_state
from megatron_slm.checkpoint.requests import model_state
from megatron_slm.checkpoint.writing import RecordingStrategy, read_records
from megatron_slm.config.checkpoint_files import CONFIG_FILE, TRACKER, Manifest, file_sizes, step_directory
from megatron_slm.config.recipe import dump_config
from megatron_slm.config.schema import RunConfig
from megatron_slm.mcore.saving import deferred_save_errors, share_results_in_memory
from megatron_slm.model.size import padded_vocab_size
from megatron_slm.runtime.checksums import local_checksum, text_checksum
from megatron_slm.runtime.collective import gather_on_first_rank, on_first_rank
from megatron_slm.runtime.errors import refuse
from megatron_slm.runtime.files import explained_write, sync, write_text
from megatron_slm.runtime.groups import Groups
from megatron_slm.tokenizers.identity import tokenizer_identity
from megatron_slm.training.data_order import DataRecord
from megatron_slm.training.optimizer import gather_parameters
from megatron_slm.training.schedule import schedule_state
from megatron_slm.training.state import TrainState

HISTORY = "reference"
RNG = "rng"
SELECTION = "selection"
SPIKES = "spikes"


@dataclass
class Save:
    """Represent a save in progress, with all that its completion needs later."""

    partial: Path
    final: Path
    strategy: RecordingStrategy
    manifest: Manifest  # without files and checksums
    data: DataRecord
    config: str  # YAML
    ranks: int

    @property
    def step(self) -> int:
        return self.manifest.step

    def complete(self, seconds: float) -> Manifest:
        """Publish the checkpoint on rank 0, and return its manifest. Not collective.

        Args:
            seconds: maximum time to wait for the records of other ranks.

        Raises:
            ConfigError: a file could not be written.
        """
        with explained_write(self.partial, "--save"):
            records = read_records(self.partial, self.ranks, seconds)
            self.strategy.finish(self.partial, records)
            self.data.write(self.partial)
            write_text(self.partial / CONFIG_FILE, self.config, "--save")
            known = {name: checksum for record in records for name, checksum in record.checksums.items()}
            # A network file system may list the files of other hosts late.
            sizes = file_sizes(self.partial) | {name: (self.partial / name).stat().st_size for name in known}
            checksums = {name: known.get(name) or local_checksum(self.partial / name, "--save") for name in sizes}
            manifest = replace(self.manifest, files=sizes, checksums=checksums)
            _publish(manifest, self.partial, self.final)
        return manifest

    def discard(self) -> None:
        """Remove the files of a failed save, which may have filled the disk."""
        shutil.rmtree(self.partial, ignore_errors=True)


def plan_save(state: TrainState, config: RunConfig) -> Save:
    """Return the save of the current step."""
    assert config.checkpoint.save is not None
    final = step_directory(Path(config.checkpoint.save), state.progress.step)
    return Save(
        partial=final.with_name(f"{final.name}.partial"),
        final=final,
        strategy=RecordingStrategy(),
        manifest=_manifest(state),
        data=state.data,
        config=dump_config(config),
        ranks=state.groups.world_size,
    )


def begin_save(save: Save, state: TrainState, config: RunConfig) -> AsyncRequest:
    """Prepare the directory of a save, and return the request that writes this rank's files. Collective.

    Raises:
        ConfigError: the directory cannot be written; on every rank.
    """
    gather_parameters(state.model_chunks)
    on_first_rank(lambda: _prepare(save.partial))
    return _prepare_request(_all_state(state, config), save)


def _prepare(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    with explained_write(partial, "--save"):
        partial.mkdir(parents=True)


def _prepare_request(state: dict[str, Any], save: Save) -> AsyncRequest:
    """Write ``common.pt``, and plan the other files. An error on one rank is raised on every rank."""
    share_results_in_memory()
    request = None
    with deferred_save_errors(weights.CHECKPOINT_ERRORS) as errors:
        try:
            request = dist_checkpointing.save(state, str(save.partial), save.strategy, async_sharded_save=True)
        except weights.CHECKPOINT_ERRORS as error:
            errors.append(error)
    reasons = gather_on_first_rank(weights.brief(errors[0]) if errors else None)
    on_first_rank(lambda: refuse([f"{reason}." for reason in reasons if reason is not None][:1]))
    assert request is not None, "errors are raised above"
    return request


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
    content: dict[str, Any] = model_state(plain_chunks(state.model_chunks))
    if config.checkpoint.save_optim:
        content["optimizer"] = sharded_optimizer_state(state.optimizer, content, is_loading=False)
        content["scheduler"] = schedule_state(state.scheduler)
    if state.history is not None:
        content[HISTORY] = state.history.sharded_state()
    content[SPIKES] = state.spikes.state_dict()
    if config.checkpoint.save_rng:
        content[RNG] = random_state(state.groups)
    if state.selection.state_dict():
        content[SELECTION] = selection_state(state)
    return _with_megatron_content(content, state, config)


def _with_megatron_content(content: dict[str, Any], state: TrainState, config: RunConfig) -> dict[str, Any]:
    """Return the content with the entries that Megatron-LM needs to load the weights."""
    progress = state.progress
    arguments = megatron_arguments(
        config,
        padded_vocab_size=padded_vocab_size(config.model, state.tokenizer.vocab_size, state.groups.tp_size),
        step=progress.step,
        consumed_samples=progress.consumed_samples,
    )
    return {
        name: {**part, **additional_entries(part)} if name.startswith("model") else part
        for name, part in content.items()
    } | {"args": arguments, "checkpoint_version": CHECKPOINT_VERSION, "iteration": progress.step}


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


def _manifest(state: TrainState) -> Manifest:
    """Return the manifest of the current step, without files."""
    return Manifest(
        step=state.progress.step,
        consumed_samples=state.progress.consumed_samples,
        tokenizer=tokenizer_identity(state.tokenizer),
        layout=state.layout(),
        files={},
    )
