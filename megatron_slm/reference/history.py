"""Reference model from the history of the training model θ.

The weights θ̃ of the reference model in step t (from 0), if θₜ are those of the training model before that step:

    start                      θ̃ₜ = θ₀
    start, refreshed every n   θ̃ₜ = θ of step n · ⌊t ÷ n⌋
    average, decay d           θ̃₀ = θ₀,   θ̃ₜ = d · θ̃ₜ₋₁ + (1 − d) · θₜ

The copied weights are those of the forward pass. Averages are fp32, so that small differences are not rounded away;
the replica's parameters are rounded from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_slm.checkpoint.requests import Shapes, loadable_model_state, weight_names, weight_request
from megatron_slm.config.schema import ReferenceConfig
from megatron_slm.reference.replica import ReferenceReplica
from megatron_slm.runtime.errors import ConfigError

PREFIX = "reference."  # of the keys in checkpoints


class ModelHistory:
    """Update the weights of a replica from those of the training model, which has the same layers on the same ranks.

    The implementation of the layers may differ, as with a filtered backward pass or another precision.

    Args:
        replica: replica with the architecture of the training model.
        settings: kind of history.
    """

    def __init__(self, replica: ReferenceReplica, settings: ReferenceConfig) -> None:
        self.replica, self._settings = replica, settings
        self._averages: list[dict[str, Tensor]] = [{} for _ in replica.chunks]  # fp32, by name; of other dtypes
        if settings.reference_history == "average":
            for averages, parameters in zip(self._averages, self._parameters(), strict=True):
                averages |= {
                    name: weight.float() for name, weight in parameters.items() if weight.dtype != torch.float32
                }

    def is_due(self, step: int) -> bool:
        """Return whether the reference model changes after ``step`` steps."""
        interval = self._settings.reference_refresh_interval
        return self._settings.reference_history == "average" or (interval is not None and step % interval == 0)

    def update(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Average or copy the current weights of the training model's chunks."""
        is_average = self._settings.reference_history == "average"
        self._follow(chunks, 1 - self._settings.reference_average_decay if is_average else 1.0)

    def restart(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Begin the history with the weights of the training model's chunks."""
        self._follow(chunks, 1.0)

    @torch.no_grad()
    def _follow(self, chunks: Sequence[torch.nn.Module], share: float) -> None:
        """Move the weights toward those of ``chunks`` by a share of the difference; 1 copies them."""
        for chunk, mine, averages in zip(chunks, self._parameters(), self._averages, strict=True):
            trained = dict(unwrap_model(chunk).named_parameters())
            for name, weight in mine.items():
                average, current = averages.get(name, weight), _find_weight(trained, name)
                if share == 1:
                    average.copy_(current)
                else:
                    average.lerp_(current.to(average.dtype), share)
                if average is not weight:
                    weight.copy_(average)

    def sharded_state(self) -> dict[str, Any]:
        """Return the weights as Megatron-Core's sharded state, with keys that any layout can read."""
        return self._stored(loadable_model_state(self.replica.chunks))

    def request(self, saved: Shapes) -> dict[str, Any]:
        """Return the sharded state to request from a checkpoint with the keys ``saved``."""
        keys = {key.removeprefix(PREFIX): shape for key, shape in saved.items() if key.startswith(PREFIX)}
        return self._stored(weight_request(self.replica.chunks, keys))

    def _stored(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the sharded state of the replica under the keys of the reference model, with its averages."""
        return {
            chunk: {name: _stored_entry(leaf, averages.get(name)) for name, leaf in entries.items()}
            for (chunk, entries), averages in zip(state.items(), self._averages, strict=True)
        }

    @torch.no_grad()
    def load(self, loaded: dict[str, Any]) -> None:
        """Set the weights from the loaded :meth:`request`."""
        for index, (mine, averages) in enumerate(zip(self._parameters(), self._averages, strict=True)):
            entries = loaded[f"model{index}"]
            for name, weight in mine.items():
                if name in averages:
                    averages[name].copy_(entries[name])
                weight.copy_(entries[name])

    def _parameters(self) -> Iterator[dict[str, Tensor]]:
        """Yield the parameters of each chunk by their names, which are also those in its sharded state."""
        return (dict(unwrap_model(chunk).named_parameters()) for chunk in self.replica.chunks)


def _find_weight(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a weight by its name in any layer implementation.

    Raises:
        ConfigError: there is none.
    """
    found = [weights[each] for each in weight_names(name) if each in weights]
    if not found:
        raise ConfigError(
            f"--reference-history: the layers of the training model have no weight {name}. Leave --reference-precision "
            "out, so that both models have the same layers."
        )
    return found[0]


def _stored_entry(leaf: Any, average: Tensor | None) -> Any:
    """Return an entry of the sharded state under the key of the reference model, with the value of its average."""
    if not hasattr(leaf, "key"):
        return leaf
    values: dict[str, Any] = {"key": PREFIX + leaf.key}
    if average is not None:
        values["data"] = average
        if isinstance(leaf, ShardedTensor):
            values["dtype"] = average.dtype
    return replace(leaf, **values)
