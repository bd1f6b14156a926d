"""Token dynamics compared with plain numpy: lines, classes, sigmoids, selections, categories, and the results."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_slm.analysis import dynamics
from megatron_slm.analysis.dynamics import CLASSES, classify, fit_lines, fit_sigmoids
from megatron_slm.analysis.dynamics_report import Dynamics, Trajectories, category_table, class_table, plot
from megatron_slm.analysis.token_categories import CATEGORIES, categorize

X = np.array([1e6, 2e6, 3e6, 5e6, 8e6, 1e7, 1.3e7, 2e7])


def sigmoid(midpoint: float, width: float, floor: float, height: float) -> np.ndarray:
    return floor + height / (1 + np.exp((np.log(X) - math.log(midpoint)) / width))


def test_lines_are_those_of_polyfit() -> None:
    losses = np.random.default_rng(1).normal(3, 1, (len(X), 50))
    lines = fit_lines(X, losses)
    for token in range(50):
        slope, offset = np.polyfit(X, losses[:, token], 1)
        assert lines.first[token] == pytest.approx(offset + slope * X[0])
        assert lines.last[token] == pytest.approx(offset + slope * X[-1])
        residual = losses[:, token] - offset - slope * X
        assert lines.residual[token] == pytest.approx((residual**2).sum())


def test_classes_of_the_paper() -> None:
    change = np.array([-0.3, 0.3, 0.1, -0.1, -0.2, 0.2])
    last = np.array([0.0, 9.0, 5.0, 1.0, 5.0, 1.0])  # mean 3.5
    names = [CLASSES[number] for number in classify(change, last)]
    assert names == ["H→L", "L→H", "H→H", "L→L", "H→H", "L→L"]


def test_sigmoids_of_the_grid_are_found_exactly_and_others_closely() -> None:
    u = np.log(X)
    midpoint = float(np.exp(np.linspace(u[0], u[-1], dynamics.MIDPOINTS)[9]))
    width = 0.2 * (u[-1] - u[0])
    curves = [sigmoid(midpoint, width, 1.0, 2.0), sigmoid(4.2e6, 0.3, 0.5, 3.0), sigmoid(6e6, 0.5, 2.0, -1.0)]
    fits = fit_sigmoids(X, np.stack(curves, 1))
    found = [fits.midpoint[0], fits.width[0], fits.floor[0], fits.height[0], fits.residual[0]]
    assert found == pytest.approx([midpoint, width, 1.0, 2.0, 0.0], abs=1e-9)
    assert fits.midpoint[1] == pytest.approx(4.2e6, rel=0.1) and fits.height[2] < 0
    total = ((np.stack(curves, 1) - np.mean(curves, 1)) ** 2).sum(0)
    assert (fits.residual < 0.01 * total).all()


def test_sigmoids_are_least_squares_fits() -> None:
    """The residual of each token is the least over the grid, by numpy's solver."""
    losses, u = np.random.default_rng(2).normal(3, 1, (len(X), 5)), np.log(X)
    fits = fit_sigmoids(X, losses)
    for token in range(5):
        residuals = []
        for midpoint in np.linspace(u[0], u[-1], dynamics.MIDPOINTS):
            for share in dynamics.WIDTHS:
                curve = 1 / (1 + np.exp((u - midpoint) / (share * (u[-1] - u[0]))))
                design = np.stack((np.ones_like(u), curve), 1)
                solution = np.linalg.lstsq(design, losses[:, token], rcond=None)[0]
                residuals.append(((losses[:, token] - design @ solution) ** 2).sum())
        assert fits.residual[token] == pytest.approx(min(residuals))


def test_criterion_of_akaike_is_corrected_for_few_checkpoints() -> None:
    """Maximum log-likelihood of Gaussian residuals up to a constant, and the correction of Hurvich and Tsai."""
    residual, checkpoints = np.array([0.5, 2.0]), 8
    for parameters in (2, 4):
        count = parameters + 1  # with the variance
        likelihood = -checkpoints / 2 * np.log(residual / checkpoints)
        expected = -2 * likelihood + 2 * count + 2 * count * (count + 1) / (checkpoints - count - 1)
        assert dynamics.akaike(residual, checkpoints, parameters) == pytest.approx(expected)


def test_sigmoids_of_noise_are_not_better_than_lines() -> None:
    """Four parameters fit noise at eight checkpoints better than two; the criterion must not take this for evidence."""
    losses = np.random.default_rng(4).normal(3, 0.1, (len(X), 1000))
    fits = fit_lines(X, losses), fit_sigmoids(X, losses)
    line, curve = (dynamics.akaike(each.residual, len(X), size) for each, size in zip(fits, (2, 4), strict=True))
    assert (curve < line).mean() < 0.05


def test_selections_perplexities_and_overlaps() -> None:
    selected = dynamics.select_top(np.array([1.0, 5.0, 3.0, 3.0, 0.0]), 0.6)
    assert selected.tolist() == [False, True, True, True, False]
    least = dynamics.select_top(np.array([1.0, 5.0, 3.0]), 1e-12)
    assert least.tolist() == [False, True, False], "as in training, a ratio above 0 selects a token"
    losses = np.array([[1.0, 2.0], [3.0, 5.0]])
    masks = [np.array([True, False]), np.array([True, True])]
    expected = [[math.exp(1), math.exp(3)], [math.exp(1.5), math.exp(4)]]
    assert dynamics.perplexities(losses, masks).tolist() == pytest.approx(np.array(expected))
    assert dynamics.overlaps(masks).tolist() == [[1.0, 1.0], [0.5, 1.0]]


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("the", "words"),
        (" don't", "words"),
        ("naïve", "words"),
        ("数", "words"),
        ("42", "digits"),
        (" 7", "digits"),
        ("½", "digits"),
        (",", "punctuation"),
        ("...", "punctuation"),
        ("-", "punctuation"),
        (" ", "whitespace"),
        ("\n\t", "whitespace"),
        ("+=", "code"),
        ("x_1", "code"),
        ("foo();", "code"),
        ("", "other"),
        ("\ufffd", "other"),
        ("\x00", "other"),
    ],
)
def test_categories(text: str, category: str) -> None:
    assert categorize(text) == category and category in CATEGORIES


def make(reference: bool, checkpoints: int = len(X)) -> Trajectories:
    rng = np.random.default_rng(3)
    losses = np.stack([sigmoid(3e6, 0.3, 1.0, 2.0), np.full(len(X), 4.0), np.full(len(X), 0.5), 1 + X / 1e7], 1)
    losses = (losses[:checkpoints, rng.integers(0, 4, 200)] + rng.normal(0, 0.01, (checkpoints, 200))).clip(0)
    return Trajectories(
        steps=list(range(10, 10 * checkpoints + 1, 10)),
        tokens=X[:checkpoints],
        losses=losses,
        categories=rng.integers(0, 2, 200),
        reference=np.full(200, 1.0) if reference else None,
    )


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("checkpoints", [2, 6, 7, len(X)])
def test_results(tmp_path: Path, reference: bool, checkpoints: int) -> None:
    found = Dynamics.analyze(make(reference, checkpoints))
    record = json.loads(json.dumps(found.record()))
    assert sum(each["share"] for each in record["classes"].values()) == pytest.approx(1)
    assert ("sigmoid" in record["fits"]) == (checkpoints > 6) and ("selection" in record) == reference
    if checkpoints == len(X):
        assert all(each["share"] > 0.15 for each in record["classes"].values())
        assert record["fits"]["sigmoid"]["learning_tokens_quartiles"][1] == pytest.approx(3e6, rel=0.2)
    if reference:
        shares = record["selection"]["categories"]
        assert shares["words"]["share"] + shares["digits"]["share"] == pytest.approx(1)
        assert len(category_table(found).rows) == len(CATEGORIES)
    assert len(class_table(found).rows) == 4
    plot(found, tmp_path / "plot.png", "--output")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_losses_of_a_diverged_run_have_no_perplexity(tmp_path: Path) -> None:
    data = make(True)
    found = Dynamics.analyze(replace(data, losses=data.losses * 1000))
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert None in record["selection"]["perplexity"][0]
    plot(found, tmp_path / "plot.png", "--output")


def test_an_empty_class_has_no_loss() -> None:
    data = make(False)
    output = io.StringIO()
    Console(file=output, width=200).print(class_table(Dynamics.analyze(replace(data, losses=data.losses * 0 + 2))))
    rows = [line.split() for line in output.getvalue().splitlines()[1:]]
    full, empty = ["100.0%", "2.000", "2.000"], ["0.0%", "-", "-"]
    assert rows == [[name, *(full if name == "L→L" else empty)] for name in CLASSES]
