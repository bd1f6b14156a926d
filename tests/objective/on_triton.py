"""The ``triton`` implementation against the definition; run by test_triton.py: by Triton's interpreter, or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from test_linear_cross_entropy import SELECTIONS, TOLERANCE, VARIANTS, VOCAB, assert_agrees, expected, make, run
from test_shared_offsets import compared, shifted

from megatron_slm.objective.linear_cross_entropy import triton_math

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
MODES = {
    "recompute": {},
    "small blocks": {"chunk_bytes": 900},
    "kept": {"saved_logits_bytes": 1 << 20},
    "some early": {"threshold": 3.5, "chunk_bytes": 3000},
}


CASES = [
    ("recompute", "plain", torch.float32, 32),
    ("recompute", "both", torch.float32, 4096),
    ("recompute", "both", torch.bfloat16, 32),
    ("small blocks", "plain", torch.bfloat16, 4096),
    ("kept", "both", torch.float32, 4096),
    ("some early", "both", torch.float32, 4096),
    ("some early", "plain", torch.bfloat16, 32),
]


@pytest.mark.parametrize(("mode", "variant", "dtype", "tile"), CASES, ids=str)
def test_agrees_with_the_definition(
    mode: str, variant: str, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that are wider than a row, and rows of several tiles, the last of them not full."""
    monkeypatch.setattr(triton_math, "LARGEST_TILE", tile)
    plain = make(dtype, length=5)
    data = {name: value.to(DEVICE) for name, value in plain.items()}
    got = {
        name: value.cpu()
        for name, value in run(data, implementation="triton", **MODES[mode], **VARIANTS[variant]).items()
    }
    wanted = expected(plain, **VARIANTS[variant])
    assert_agrees(got, wanted, TOLERANCE[dtype])
    assert bool((got["weight"][VOCAB:] == 0).all()), "the padding got a gradient"
    for name in ("loss", "entropy"):  # exact for bf16 weights too
        assert_agrees({name: got[name]}, {name: wanted[name]}, 1e-5)


@pytest.mark.parametrize("selection", ["all", "none"])
def test_everything_and_nothing_selected(selection: str) -> None:
    data = make(share=SELECTIONS[selection], length=5)
    got = run({name: value.to(DEVICE) for name, value in data.items()}, implementation="triton")
    assert_agrees({name: value.cpu() for name, value in got.items()}, expected(data), 1e-5)


@pytest.mark.parametrize(("mode", "offset"), [("small blocks", -1e4), ("some early", 1e3)])
def test_offset_changes_nothing(mode: str, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_math, "LARGEST_TILE", 32)
    data = shifted(offset)
    got = run({name: value.to(DEVICE) for name, value in data.items()}, implementation="triton", **MODES[mode])
    assert_agrees(compared({name: value.cpu() for name, value in got.items()}), compared(expected(data)), 2e-6)


def test_impossible_entries() -> None:
    data = shifted(1e3)
    data["hidden"][..., -1] = 1.0
    data["weight"][:40, -1] = -torch.inf
    data["labels"].clamp_(min=40)
    got = run({name: value.to(DEVICE) for name, value in data.items()}, implementation="triton", chunk_bytes=700)
    wanted = {name: values for name, values in expected(data).items() if name in ("loss", "entropy")}
    assert_agrees({name: got[name].cpu() for name in wanted}, wanted, 2e-6)


def test_not_a_number_is_not_hidden() -> None:
    data = make(length=5)
    data["hidden"][2, 1, 3] = torch.nan
    loss = run({name: value.to(DEVICE) for name, value in data.items()}, implementation="triton")["loss"]
    assert loss.isnan().nonzero().tolist() == [[2, 1]]
