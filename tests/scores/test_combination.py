"""Test the combination of reference models by a plain float64 definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_slm.config.schema import DataConfig, ReferenceConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.scores.combination import Combine, reference_of_corpus

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=4)


def combined(text: str, values: list[list[float]]) -> NDArray[np.float64]:
    """Combine the losses of several models token by token."""
    weights = [1.0] * len(values) if text in ("mean", "min") else [float(weight) for weight in text.split(",")]
    each = zip(*values, strict=True)
    if text == "min":
        return np.array([min(losses) for losses in each])
    return np.array([sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights) for losses in each])


@given(weights=WEIGHTS, kind=st.sampled_from(["mean", "min", "weights"]), data=st.data())
def test_arrays_and_tensors_equal_the_definition(weights: list[float], kind: str, data: st.DataObject) -> None:
    losses = st.lists(st.floats(0, 20, width=32), min_size=3, max_size=3)
    values = [data.draw(losses) for _ in weights]
    text = ",".join(map(str, weights)) if kind == "weights" else kind
    combine, expected = Combine.parse(text, len(weights)), combined(text, values)
    arrays = combine.arrays([np.array(value, np.float32) for value in values])
    tensors = combine.tensors([torch.tensor(value) for value in values])
    assert arrays.dtype == np.float32 and tensors.dtype == torch.float32
    np.testing.assert_allclose(arrays, expected, rtol=1e-6, atol=1e-30)
    np.testing.assert_array_equal(arrays, tensors.numpy())


def test_one_model_is_not_changed() -> None:
    values = np.array([1, 5, 3], np.float32)
    assert Combine.parse("mean", 1).arrays([values]) is values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("most", "must be mean, min, or weights such as 0.7,0.3, not 'most'"),
        ("1,2,3", "expected one weight per reference model, 2, not 3"),
        ("1,0", "every weight must be above 0"),
        ("1,-1", "every weight must be above 0"),
        ("1,nan", "every weight must be above 0"),
        ("1e308,1e308", "the sum of the weights is infinite"),
    ],
)
def test_wrong_combinations_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Combine.parse(text, 2)
    assert message in str(caught.value)


def of_corpus(directory: Path, arguments: str, models: str = "runs/rm-web runs/rm-math") -> tuple[int, ...]:
    blend = [argument for name in ("web", "math", "code") for argument in ("1", str(directory / name))]
    reference = ReferenceConfig(reference_load=models.split(), reference_corpora=arguments.split())
    return reference_of_corpus(reference, DataConfig(data_path=blend))


def test_every_corpus_has_a_model(tmp_path: Path) -> None:
    assert of_corpus(tmp_path, "") == ()
    assert of_corpus(tmp_path, "rm-math math runs/rm-web web rm-math code") == (0, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("rm-web web rm-math", "expected pairs of a reference model and a corpus"),
        ("rm-web web rm-math math", "corpora without a reference model: "),
        ("rm-web web rm-web math rm-web code", "reference models without a corpus: runs/rm-math"),
        ("rm-web web rm-math math rm-web math", "the corpus math is named twice"),
        ("rm web rm-math math rm-web code", "rm is not a reference model of the run. They are runs/rm-web, "),
        ("rm-web web rm-math text rm-web code", "text is not a corpus of the run"),
    ],
)
def test_wrong_assignments_are_refused(tmp_path: Path, arguments: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of_corpus(tmp_path, arguments)
    assert message in str(caught.value)


def test_models_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    models = "a/rm b/rm"
    assert of_corpus(tmp_path, "a/rm web b/rm math b/rm code", models) == (0, 1, 1)
    assert of_corpus(tmp_path, f"./a/rm/ web b/rm math {Path.cwd()}/b/rm code", models) == (0, 1, 1)
    with pytest.raises(ConfigError, match="rm is the name of several reference models"):
        of_corpus(tmp_path, "rm web b/rm math b/rm code", models)
