"""Implementations of the LM head's selective loss and its gradients: this project's and baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.api import linear_cross_entropy
from megatron_slm.objective.linear_cross_entropy.forward_grad_policy import ForwardGradPolicy
from megatron_slm.objective.linear_cross_entropy.settings import LinearCrossEntropyConfig
from megatron_slm.objective.selection.forward_grad import SpeculativeThreshold
from megatron_slm.objective.selection.threshold import select_highest


class Unavailable(Exception):
    """Raised if an implementation is not available on this machine."""


@dataclass
class Problem:
    """Input of the LM head for one micro-batch."""

    hidden: Tensor  # [N, 1, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N, 1]
    reference_loss: Tensor  # [1, N]
    ratio: float
    threshold: float = 0.0  # exact threshold
    guess: Tensor | None = None  # speculative threshold of similar micro-batches

    @classmethod
    def make(cls, shape: tuple[int, int, int], ratio: float, device: str, dtype: torch.dtype) -> Problem:
        """Create random inputs with logits of unit scale and reference losses of similar spread to token losses."""
        tokens, width, entries = shape
        torch.manual_seed(1)
        problem = cls(
            torch.randn(tokens, 1, width, device=device, dtype=dtype).requires_grad_(),
            (torch.randn(entries, width, device=device) * width**-0.5).to(dtype).requires_grad_(),
            torch.randint(0, entries, (tokens, 1), device=device),
            torch.randn(1, tokens, device=device),
            ratio,
        )
        problem._estimate_thresholds()
        return problem

    def _estimate_thresholds(self) -> None:
        """Compute the exact threshold, and a speculative one from micro-batches with other labels."""
        guess, labels = SpeculativeThreshold(), self.labels
        with torch.no_grad():
            for _ in range(4):
                self.labels = torch.randint_like(labels, self.weight.size(0))
                guess.observe(self.select(self._losses())[1])
            self.labels = labels
            self.threshold = float(self.select(self._losses())[1])
        self.guess = guess.estimate()

    def _losses(self) -> Tensor:
        return linear_cross_entropy(self.hidden, self.weight, self.labels, LinearCrossEntropyConfig()).loss

    def select(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return the selected tokens [N, 1] fp32 and the threshold from token losses [N, 1]."""
        score = (loss.detach().t() - self.reference_loss).float()
        order = torch.arange(score.size(1), device=score.device)[None]
        count = torch.full((1,), -int(-self.ratio * score.size(1) // 1), device=score.device)
        selected, threshold = select_highest(score, torch.ones_like(score, dtype=torch.bool), count, order, None)
        return selected.t().float(), threshold[0]

    def selective_backward(self, loss: Tensor) -> None:
        """Select tokens by their losses [N, 1], and run backward for the selected ones."""
        (loss * self.select(loss)[0]).sum().backward()

    def flat(self) -> tuple[Tensor, Tensor]:
        return self.hidden.flatten(0, 1), self.labels.flatten()


def _standard(problem: Problem) -> None:
    hidden, labels = problem.flat()
    loss = F.cross_entropy(F.linear(hidden, problem.weight).float(), labels, reduction="none")
    problem.selective_backward(loss[:, None])


def make_standard(problem: Problem) -> Callable[[], None]:
    return partial(_standard, problem)


def make_compiled(problem: Problem) -> Callable[[], None]:
    def token_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")

    compiled = torch.compile(token_loss)
    hidden, labels = problem.flat()
    return lambda: problem.selective_backward(compiled(hidden, problem.weight, labels)[:, None])


def make_megatron(problem: Problem) -> Callable[[], None]:
    import torch.distributed as dist
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    if not dist.is_initialized():
        backend = "nccl" if problem.hidden.is_cuda else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD

    def run() -> None:
        logits = F.linear(problem.hidden, problem.weight)
        problem.selective_backward(fused_vocab_parallel_cross_entropy(logits, problem.labels, group))

    return run


def make_liger(problem: Problem) -> Callable[[], None]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    _needs_gpu(problem)
    hidden, labels = problem.flat()
    return lambda: liger_fused_linear_cross_entropy(hidden, problem.weight, labels, reduction="sum").backward()


def make_cut(problem: Problem, impl: str) -> Callable[[], None]:
    from cut_cross_entropy import linear_cross_entropy as cut

    if impl == "cce":
        _needs_gpu(problem)
    hidden, labels = problem.flat()
    return lambda: problem.selective_backward(cut(hidden, problem.weight, labels, reduction="none", impl=impl)[:, None])


def make_quack(problem: Problem) -> Callable[[], None]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    _needs_gpu(problem)
    hidden, labels = problem.flat()
    return lambda: chunked_linear_cross_entropy(hidden, problem.weight, labels, reduction="sum").backward()


def _needs_gpu(problem: Problem) -> None:
    if not problem.hidden.is_cuda:
        raise Unavailable("needs a GPU")


def make_ours(
    problem: Problem, *, forward_grad: str = "", implementation: str | None = None, saves_logits: bool = False
) -> Callable[[], None]:
    implementation = implementation or ("triton" if problem.hidden.is_cuda else "chunked")
    head = LinearCrossEntropyConfig(implementation=implementation, saved_logits_bytes=1 << 40 if saves_logits else 0)
    valid = torch.ones_like(problem.reference_loss, dtype=torch.bool)
    masks = {
        "": None,
        "all": ForwardGradPolicy(valid),
        "predicted": ForwardGradPolicy(valid, problem.threshold, problem.reference_loss),
        "speculative": ForwardGradPolicy(
            valid, problem.guess if problem.guess is not None else 0.0, problem.reference_loss
        ),
    }

    def run() -> None:
        loss = linear_cross_entropy(
            problem.hidden, problem.weight, problem.labels, head, forward_grad=masks[forward_grad]
        ).loss
        if forward_grad == "all":
            loss.sum().backward()
        elif forward_grad == "predicted":
            (loss * (loss.detach() - problem.reference_loss.t() >= problem.threshold)).sum().backward()
        else:
            problem.selective_backward(loss)

    return run


@dataclass(frozen=True)
class Implementation:
    """Represent an implementation: its factory, and its FLOPs in units of NHV for a ratio k."""

    make: Callable[[Problem], Callable[[], None]]
    flops: Callable[[float], float]
    is_ours: bool = False


IMPLEMENTATIONS = {
    "standard": Implementation(make_standard, lambda k: 6),
    "torch.compile": Implementation(make_compiled, lambda k: 6),
    "megatron fused": Implementation(make_megatron, lambda k: 6),
    "liger (all tokens)": Implementation(make_liger, lambda k: 6),
    "cut-cross-entropy": Implementation(partial(make_cut, impl="cce"), lambda k: 8),
    "cut-cross-entropy, torch.compile": Implementation(partial(make_cut, impl="torch_compile"), lambda k: 6),
    "quack (all tokens)": Implementation(make_quack, lambda k: 6),
    "ours, torch": Implementation(partial(make_ours, implementation="torch"), lambda k: 6, True),
    "ours, all tokens": Implementation(partial(make_ours, forward_grad="all"), lambda k: 6, True),
    "ours, recompute": Implementation(make_ours, lambda k: 2 + 6 * k, True),
    "ours, speculative": Implementation(partial(make_ours, forward_grad="speculative"), lambda k: 2 + 4 * k, True),
    "ours, saved logits": Implementation(partial(make_ours, saves_logits=True), lambda k: 2 + 4 * k, True),
    "ours, predicted": Implementation(partial(make_ours, forward_grad="predicted"), lambda k: 2 + 4 * k, True),
}
