"""Combination of several reference models: the losses of all for each token, or one model for each corpus."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_slm.config.schema import DataConfig, ReferenceConfig
from megatron_slm.data.blends import locate_corpus, training_blend
from megatron_slm.runtime.errors import ConfigError

if TYPE_CHECKING:  # settings are checked before torch is imported
    from torch import Tensor

COMBINE, CORPORA = "--reference-combine", "--reference-corpora"


@dataclass(frozen=True)
class Combine:
    """Combine the values of several reference models by minimum or weighted mean."""

    weights: tuple[float, ...] | None  # weights with a sum of 1; None: minimum

    @staticmethod
    def parse(text: str, count: int) -> Combine:
        """Parse ``--reference-combine`` for ``count`` models: "mean", "min", or one weight per model.

        Raises:
            ConfigError: the name is unknown, the number of weights differs from ``count``, a weight is not above 0, or
                their sum is not finite.
        """
        if text == "mean":
            return Combine((1 / count,) * count)
        if text == "min":
            return Combine(None)
        try:
            weights = [float(weight) for weight in text.split(",")]
        except ValueError:
            raise ConfigError(f"{COMBINE} must be mean, min, or weights such as 0.7,0.3, not {text!r}.") from None
        if len(weights) != count:
            raise ConfigError(
                f"{COMBINE} {text}: expected one weight per reference model, {count}, not {len(weights)}."
            )
        if not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise ConfigError(f"{COMBINE} {text}: every weight must be above 0.")
        if not math.isfinite(sum(weights)):
            raise ConfigError(f"{COMBINE} {text}: the sum of the weights is infinite. Use smaller weights.")
        return Combine(tuple(weight / sum(weights) for weight in weights))

    def arrays(self, values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return the combination of one array per model, fp32 of the same shape."""
        if len(values) == 1:
            return values[0]
        if self.weights is None:
            return np.minimum.reduce(list(values))
        total = sum(weight * value.astype(np.float64) for weight, value in zip(self.weights, values, strict=True))
        return np.asarray(total, np.float32)

    def tensors(self, values: Sequence[Tensor]) -> Tensor:
        """Return the combination of one tensor per model, fp32 of the same shape, on their device."""
        if len(values) == 1:
            return values[0]
        if self.weights is None:
            return functools.reduce(lambda one, other: one.minimum(other), values)
        first, *others = [value.double() * weight for weight, value in zip(self.weights, values, strict=True)]
        return sum(others, first).float()


def reference_of_corpus(reference: ReferenceConfig, data: DataConfig) -> tuple[int, ...]:
    """Return the position of the reference model or sidecar of each corpus of the training blend.

    The result is () without ``--reference-corpora``.

    Raises:
        ConfigError: the arguments are not in pairs, a model or a corpus is unknown, a model has no corpus, or a corpus
            has no model or two.
    """
    arguments, models = reference.reference_corpora, reference.references
    if not arguments:
        return ()
    prefixes = training_blend(data)[0]
    if len(prefixes) < 2:
        raise ConfigError(f"{CORPORA} needs a blend of several corpora. Leave it out for one corpus.")
    if len(arguments) % 2:
        raise ConfigError(
            f"{CORPORA} {' '.join(arguments)}: expected pairs of a reference model and a corpus, for example rm-web "
            "web rm-math math."
        )
    found: dict[int, int] = {}
    for name, corpus in zip(arguments[0::2], arguments[1::2], strict=True):
        place = locate_corpus(corpus, prefixes, CORPORA)
        if place in found:
            raise ConfigError(f"{CORPORA}: the corpus {corpus} is named twice. Give it one reference model.")
        found[place] = _locate_model(name, models)
    for name, missing in (
        ("corpora without a reference model", [each for place, each in enumerate(prefixes) if place not in found]),
        ("reference models without a corpus", [each for n, each in enumerate(models) if n not in found.values()]),
    ):
        if missing:
            raise ConfigError(f"{CORPORA}: {name}: {', '.join(missing)}. Name every corpus and every model.")
    return tuple(found[place] for place in range(len(prefixes)))


def _locate_model(name: str, models: Sequence[str]) -> int:
    found = [place for place, model in enumerate(models) if Path(model).absolute() == Path(name).absolute()]
    found = found or [place for place, model in enumerate(models) if Path(model).name == name]
    if len(found) != 1:
        problem = "is the name of several reference models" if found else "is not a reference model of the run"
        raise ConfigError(f"{CORPORA}: {name} {problem}. They are {', '.join(models)}.")
    return found[0]
