"""Linear cross-entropy: every implementation and mode against the plain float64 definition, in value and gradient."""

from __future__ import annotations

from typing import Any

import definition
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_slm.objective.linear_cross_entropy import chunked
from megatron_slm.objective.linear_cross_entropy.api import linear_cross_entropy
from megatron_slm.objective.linear_cross_entropy.backward_rows import median
from megatron_slm.objective.linear_cross_entropy.forward_grad_policy import ForwardGradPolicy
from megatron_slm.objective.linear_cross_entropy.settings import LinearCrossEntropyConfig
from megatron_slm.testing.ranks import run_ranks

S, B, H, VOCAB, PADDED = 12, 3, 10, 61, 72  # on 4 ranks the last shard has 7 entries of 18
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.5},
    "z-loss": {"z_loss": 0.05},
    "both": {"softcap": 4.0, "z_loss": 0.1},
}
MODES: dict[str, dict[str, Any]] = {
    "torch": {"implementation": "torch"},
    "recompute": {"implementation": "chunked", "chunk_bytes": 3000},
    "small blocks": {"implementation": "chunked", "chunk_bytes": 700},
    "kept": {"implementation": "chunked", "saved_logits_bytes": 1 << 20},
    "all early": {"implementation": "chunked", "threshold": -torch.inf, "chunk_bytes": 2000},
    "some early": {"implementation": "chunked", "threshold": 3.5, "chunk_bytes": 3000},
    "none early": {"implementation": "chunked", "threshold": 1e6, "chunk_bytes": 2000},
}
SELECTIONS = {"0.6": 0.6, "all": 1.0, "none": 0.0}


def make(dtype: torch.dtype = torch.float32, share: float = 0.6, seed: int = 5, length: int = S) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(length, B, H, generator=chance).to(dtype),
        "weight": torch.randn(PADDED, H, generator=chance).to(dtype),
        "labels": torch.randint(0, VOCAB, (length, B), generator=chance),
        "incoming": 3.0 * (torch.rand(length, B, generator=chance) < share),
        "valid": torch.rand(B, length, generator=chance) < 0.9,
    }


def expected(data: dict[str, Tensor], softcap: float | None = None, z_loss: float = 0.0) -> dict[str, Tensor]:
    hidden, weight = (data[name].double().requires_grad_() for name in ("hidden", "weight"))
    logits = hidden @ weight[:VOCAB].t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = definition.token_losses(logits, data["labels"])
    objective = ((loss + z_loss * logits.logsumexp(-1).square()) * data["incoming"]).sum()
    gradients = torch.autograd.grad(objective, (hidden, weight))
    return {
        "loss": loss.detach(),
        "entropy": definition.entropies(logits.detach()),
        "hidden": gradients[0],
        "weight": gradients[1],
    }


def run(
    data: dict[str, Tensor],
    *,
    threshold: float | None = None,
    policy: ForwardGradPolicy | None = None,
    **head: Any,
) -> dict[str, Tensor]:
    """The loss, entropy and gradients; on the ranks of ``head["tp_group"]`` with this rank's shards."""
    group, rank, ranks = head.get("tp_group"), 0, 1
    if group is not None:
        rank, ranks = group.rank(), group.size()
    hidden = data["hidden"].chunk(ranks)[rank] if head.get("sequence_parallel") else data["hidden"]
    hidden = hidden.detach().clone().requires_grad_()
    weight = data["weight"].chunk(ranks)[rank].detach().clone().requires_grad_()
    early = policy if threshold is None else ForwardGradPolicy(data["valid"], threshold)
    result = linear_cross_entropy(
        hidden,
        weight,
        data["labels"],
        LinearCrossEntropyConfig(vocab_size=VOCAB, **head),
        forward_grad=early,
        with_entropy=True,
    )
    assert result.entropy is not None and result.loss.dtype == result.entropy.dtype == torch.float32
    gradients = torch.autograd.grad((result.loss * data["incoming"]).sum(), (hidden, weight))
    assert gradients[0].dtype == gradients[1].dtype == data["hidden"].dtype
    return {"loss": result.loss.detach(), "entropy": result.entropy, "hidden": gradients[0], "weight": gradients[1]}


def assert_agrees(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest value of each tensor, the relevant measure of a gradient's rounding error."""
    for name, value in wanted.items():
        scale = float(value.abs().max()) or 1.0
        torch.testing.assert_close(got[name].double() / scale, value / scale, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_fixed_number_of_early_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Too many and too few rows: the backward pass computes the missing ones, and fillers have no gradient."""
    data = make()
    monkeypatch.setitem(chunked.FIXED_SIZE, "cpu", True)
    for threshold in (-torch.inf, 3.0, torch.inf):
        policy = ForwardGradPolicy(data["valid"], threshold, share=share)
        assert_agrees(run(data, policy=policy, chunk_bytes=2000), expected(data), 1e-5)


def test_rows_known_on_the_host_are_chosen() -> None:
    data = make()
    policy = ForwardGradPolicy(data["valid"], valid_on_host=data["valid"].numpy())
    assert_agrees(run(data, policy=policy, chunk_bytes=2000), expected(data), 1e-5)
    loss = torch.zeros(6)
    for fixed_size in (False, True):
        indices, is_chosen = policy.choose(slice(2, 8), loss, fixed_size=fixed_size)
        assert torch.equal(indices, data["valid"].t().reshape(-1)[2:8].nonzero().squeeze(1)) and bool(is_chosen.all())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_agrees_with_the_definition(mode: str, variant: str, selection: str, dtype: torch.dtype) -> None:
    data = make(dtype, SELECTIONS[selection])
    got = run(data, **MODES[mode], **VARIANTS[variant])
    assert_agrees(got, expected(data, **VARIANTS[variant]), TOLERANCE[dtype])
    unselected = data["incoming"] == 0
    assert bool((got["hidden"][unselected] == 0).all()), "an unselected token got a gradient"
    assert bool((got["weight"][VOCAB:] == 0).all()), "the padding got a gradient"


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("mode", MODES)
def test_bf16_weights_have_fp32_logits(mode: str, softcap: float | None) -> None:
    """Losses are exact for the bf16 weights; logits that are rounded to bf16 are off by 0.1 here."""
    data = make(torch.bfloat16)
    data["hidden"] = data["hidden"] * 4
    got, wanted = run(data, **MODES[mode], softcap=softcap), expected(data, softcap)
    for name in ("loss", "entropy"):
        assert_agrees({name: got[name]}, {name: wanted[name]}, 1e-6)


@pytest.mark.parametrize("share", [0.02, 0.6, 0.98])
@pytest.mark.parametrize("mode", ["recompute", "kept", "some early"])
def test_many_rows(mode: str, share: float) -> None:
    """More than are moved to their places at a time."""
    data = make(share=share, length=500)
    assert_agrees(run(data, **MODES[mode]), expected(data), TOLERANCE[torch.float32])


def _on_shards(rank: int, world_size: int, dtype: torch.dtype, cases: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    return [run(make(dtype), tp_group=dist.group.WORLD, **case) for case in cases]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_vocabulary_shards(tensor_parallel: int, dtype: torch.dtype) -> None:
    """Every mode and variant, with and without sequence parallelism; the padding is uneven over the shards."""
    modes = [{**mode, "sequence_parallel": sequence} for mode in MODES.values() for sequence in (False, True)]
    variants = [VARIANTS["plain"], VARIANTS["both"]]
    cases = [{**mode, **variant} for mode in modes for variant in variants]
    parts = run_ranks(_on_shards, tensor_parallel, dtype, cases)
    for number, case in enumerate(cases):
        mine = [part[number] for part in parts]
        whole = {name: mine[0][name] for name in ("loss", "entropy")}
        for part in mine:
            assert torch.equal(part["loss"], whole["loss"]), "ranks differ in the loss"
        sequence = case["sequence_parallel"]
        whole["hidden"] = torch.cat([part["hidden"] for part in mine]) if sequence else mine[-1]["hidden"]
        whole["weight"] = torch.cat([part["weight"] for part in mine])
        variant = {name: case[name] for name in ("softcap", "z_loss") if name in case}
        assert_agrees(whole, expected(make(dtype), **variant), TOLERANCE[dtype])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0, 1),
    threshold=st.floats(-2, 12),
    scale=st.sampled_from([1.0, -0.5, 1e-4]),
)
def test_any_guess_gives_the_same_gradient(seed: int, share: float, threshold: float, scale: float) -> None:
    """Early tokens that have nothing to do with those whose gradient arrives, at any scale of the loss."""
    data = make(share=share, seed=seed)
    data["incoming"] = data["incoming"] * scale
    got = run(data, implementation="chunked", threshold=threshold, chunk_bytes=3000)
    assert_agrees(got, expected(data), 1e-5)


def test_guess_that_is_wrong_everywhere() -> None:
    """Early are exactly the tokens that are not selected; and weights that differ from token to token."""
    data = make()
    loss = expected(data)["loss"]
    data["incoming"] = (loss < 3.0) * torch.rand(S, B, generator=torch.Generator().manual_seed(1))
    assert_agrees(run(data, implementation="chunked", threshold=3.0), expected(data), 1e-5)
    data["incoming"] = 0.5 * (loss >= 3.0) + 0.25 * (loss < 3.0)
    assert_agrees(run(data, implementation="chunked", threshold=3.0), expected(data), 1e-5)


def test_early_scores_are_losses_minus_offsets() -> None:
    data = make()
    offset = torch.rand(B, S, generator=torch.Generator().manual_seed(2)) * 3
    loss = torch.arange(S * B).float()
    chosen = ForwardGradPolicy(data["valid"], 12.0, offset).chosen(slice(5, 20), loss[5:20])
    score = loss.view(S, B) - offset.t()
    assert torch.equal(chosen, ((score >= 12.0) & data["valid"].t()).flatten()[5:20])
    rows = torch.full((B, S), 12.0)
    assert torch.equal(ForwardGradPolicy(data["valid"], rows, offset).chosen(slice(5, 20), loss[5:20]), chosen)


class _LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation gives back."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize(("threshold", "share"), [(None, 1 / 16), (3.5, 1 / 8)], ids=["recompute", "early"])
def test_the_logits_are_never_all_there(threshold: float | None, share: float) -> None:
    chance = torch.Generator().manual_seed(1)
    tokens, width, entries = 512, 8, 2048
    hidden = torch.randn(tokens, 1, width, generator=chance).requires_grad_()
    weight = torch.randn(entries, width, generator=chance).requires_grad_()
    labels = torch.randint(0, entries, (tokens, 1), generator=chance)
    early = None if threshold is None else ForwardGradPolicy(torch.ones(1, tokens, dtype=torch.bool), threshold)
    with _LargestTensor() as largest:
        loss = linear_cross_entropy(hidden, weight, labels, LinearCrossEntropyConfig(), forward_grad=early).loss
        (loss * (loss.detach() > 4)).sum().backward()
    assert largest.elements <= tokens * entries * share
    with _LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, labels, LinearCrossEntropyConfig(implementation="torch"))
    assert largest.elements >= tokens * entries, "the measurement sees nothing"


@pytest.mark.parametrize("saved_logits_bytes", [0, 1 << 30], ids=["recompute", "kept"])
def test_products_have_full_tiles(monkeypatch: pytest.MonkeyPatch, saved_logits_bytes: int) -> None:
    """All chunks but the last one are multiples of 256 wide, and all rows are aligned, for a vocabulary of any size."""
    chunks: list[Tensor] = []
    for name in ("statistics", "gradient", "picked_gradient"):
        original = getattr(chunked.TorchChunkMath, name)

        def recorded(math: Any, logits: Tensor, *rest: Any, original: Any = original, **options: Any) -> Any:
            chunks.append(logits)
            return original(math, logits, *rest, **options)

        monkeypatch.setattr(chunked.TorchChunkMath, name, recorded)
    tokens, entries = 700, 5003
    hidden, weight = torch.randn(tokens, 1, 8).requires_grad_(), torch.randn(entries, 8).requires_grad_()
    settings = LinearCrossEntropyConfig(saved_logits_bytes=saved_logits_bytes)
    loss = linear_cross_entropy(hidden, weight, torch.arange(tokens)[:, None], settings).loss
    loss[:400].sum().backward()
    widths = [chunk.size(1) for chunk in chunks]
    assert len(widths) > 8 and sum(width % 256 > 0 for width in widths) == 2, "the last one in each pass"
    assert all(chunk.stride(0) % 64 == 0 and chunk.stride(0) - chunk.size(1) < 64 for chunk in chunks)


def _with_main_grad(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.nn.Parameter(weight.clone())
    weight.main_grad = torch.full(weight.shape, 0.25, dtype=dtype)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return weight


@pytest.mark.parametrize("threshold", [None, 3.5], ids=["recompute", "early"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradient_is_added_to_main_grad(dtype: torch.dtype, threshold: float | None) -> None:
    """As Megatron-Core's DDP wants it: two micro-batches add up, in fp32 under bf16 weights too."""
    data = make(dtype)
    weight = _with_main_grad(data["weight"])
    early = None if threshold is None else ForwardGradPolicy(data["valid"], threshold)
    for _ in range(2):
        loss = linear_cross_entropy(
            data["hidden"], weight, data["labels"], LinearCrossEntropyConfig(vocab_size=VOCAB), forward_grad=early
        ).loss
        before = weight.main_grad.clone()
        (loss * data["incoming"]).sum().backward()
        added = {"weight": weight.main_grad - before}
        assert_agrees(added, {"weight": expected(data)["weight"]}, TOLERANCE[dtype])
        assert weight.grad_added_to_main_grad and weight.grad.dtype == dtype
        weight.grad = None


def test_tied_weight_gets_both_gradients() -> None:
    """A weight that is also the embedding: autograd adds the embedding's gradient to a placeholder of zeros."""
    data = make()
    weight = _with_main_grad(data["weight"])
    weight.zero_out_wgrad = True
    embedded = weight[data["labels"]].sum()
    loss = linear_cross_entropy(data["hidden"], weight, data["labels"], LinearCrossEntropyConfig(vocab_size=VOCAB)).loss
    ((loss * data["incoming"]).sum() + embedded).backward()
    rows = torch.bincount(data["labels"].flatten(), minlength=PADDED).double()[:, None].expand(-1, H)
    assert torch.equal(weight.grad.double(), rows)
    assert_agrees({"weight": weight.main_grad - 0.25}, {"weight": expected(data)["weight"]}, 1e-5)


def test_no_gradient_no_work() -> None:
    """Evaluation does not change main_grad, and returns the same losses."""
    data = make()
    weight = _with_main_grad(data["weight"])
    early = ForwardGradPolicy(data["valid"])
    with torch.no_grad():
        loss = linear_cross_entropy(
            data["hidden"], weight, data["labels"], LinearCrossEntropyConfig(vocab_size=VOCAB), forward_grad=early
        ).loss
    assert bool((weight.main_grad == 0.25).all()) and not loss.requires_grad
    assert_agrees({"loss": loss}, {"loss": expected(data)["loss"]}, 1e-5)


def test_not_a_number_is_not_hidden() -> None:
    """A hidden state that diverged shows in its token's loss, and in no other."""
    data = make()
    data["hidden"][2, 1, 3] = torch.nan
    for implementation in ("torch", "chunked"):
        loss = linear_cross_entropy(
            data["hidden"], data["weight"], data["labels"], LinearCrossEntropyConfig(implementation=implementation)
        ).loss
        assert loss.isnan().nonzero().tolist() == [[2, 1]]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.15, 0.5, 1.0])  # 0, 11, 16, 51 and 101 values
def test_median_without_waiting(share: float) -> None:
    values, counted = torch.randn(101), torch.randperm(101) < share * 101
    expected = values.where(counted, torch.nan).nanmedian().nan_to_num(0.0)
    assert median(values, counted).tolist() == [expected]


def test_no_tokens() -> None:
    hidden, weight = torch.zeros(0, 2, H, requires_grad=True), torch.randn(PADDED, H, requires_grad=True)
    for early in (None, ForwardGradPolicy(torch.zeros(2, 0, dtype=torch.bool))):
        loss = linear_cross_entropy(
            hidden, weight, torch.zeros(0, 2, dtype=torch.long), LinearCrossEntropyConfig(), forward_grad=early
        ).loss
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert loss.shape == (0, 2) and bool((gradients[1] == 0).all())


@pytest.mark.parametrize("label", [-1, VOCAB])
def test_label_outside_the_vocabulary_is_refused(label: int) -> None:
    data = make()
    data["labels"][0, 0] = label
    with pytest.raises(ValueError, match=f"a label is {label}, and the vocabulary has {VOCAB}"):
        linear_cross_entropy(data["hidden"], data["weight"], data["labels"], LinearCrossEntropyConfig(vocab_size=VOCAB))


def test_unknown_engine_is_refused() -> None:
    data = make()
    with pytest.raises(ValueError, match=r"'cuda' is unknown; there are torch, chunked, triton"):
        linear_cross_entropy(
            data["hidden"], data["weight"], data["labels"], LinearCrossEntropyConfig(implementation="cuda")
        )
