"""Filtered backward pass: the branches of a transformer layer propagate gradients of selected tokens only.

A layer computes ``h = x + attention(norm(x))`` and ``y = h + mlp(norm(h))``. In the filtered backward pass the outputs
of both branches at unselected tokens are constants. So the gradient of an unselected token reaches earlier layers on
the residual stream, and through its keys and values, to which selected queries attend. The weights of the MLP, the
query projection and the output projection receive gradients of selected tokens only, and their products in the
backward pass run on selected rows only. The forward pass and all losses are those of the exact backward pass; if all
tokens are selected, the gradients are, too. Collider (arXiv 2502.00340) drops gradients of unselected tokens
everywhere.

The layers refer to the :class:`SelectedTokens` of the micro-batch of their forward pass, whose selection is known when
its backward pass starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.model.selected_tokens import BackwardFilter, SelectedTokens
from megatron_slm.objective.vocab_shard import gather_sequence, reduce_hidden_gradient


class FilteredColumnLinear(ColumnParallelLinear):
    """Column-parallel linear layer with gradients of selected tokens."""

    def __init__(self, *sizes: int, backward_filter: BackwardFilter, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.backward_filter = backward_filter

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        return FilteredLinear.apply(input, weight, bias, self._backward())

    def _backward(self, query_heads: tuple[int, int, int] | None = None) -> LinearBackward:
        reduces = self.allreduce_dgrad or self.sequence_parallel
        group = self.tp_group if reduces else None
        return LinearBackward(self.backward_filter.current, group, self.sequence_parallel, query_heads)


class FilteredQueryLinear(FilteredColumnLinear):
    """Projection to queries, keys and values: gradients of the queries of selected tokens, and of all keys and values.

    Ranks that hold a part of a query group use the plain backward pass: the gradients are equal, since those of the
    queries of unselected tokens are zero.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        groups, size = self.config.num_query_groups, self.tp_group.size()
        if groups % size:
            return super(FilteredColumnLinear, self)._forward_impl(input, weight, bias, **options)
        queries = self.config.num_attention_heads // groups
        return FilteredLinear.apply(
            input, weight, bias, self._backward((groups // size, queries, self.config.kv_channels))
        )


class FilteredRowLinear(RowParallelLinear):
    """Row-parallel linear layer at the end of a branch, with gradients of selected tokens. It adds its bias itself."""

    def __init__(self, *sizes: int, backward_filter: BackwardFilter, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.backward_filter = backward_filter

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        return FilteredLinear.apply(input, weight, bias, LinearBackward(self.backward_filter.current))

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        output, bias = super().forward(input_)
        if bias is not None:
            shards = self.tp_group.size() if self.sequence_parallel else 1
            shard = self.tp_group.rank() if self.sequence_parallel else 0
            output = FilteredBias.apply(output, bias, self.backward_filter.current, shards, shard)
        return output, None


@dataclass(frozen=True)
class LinearBackward:
    """Describe the backward pass of a linear layer."""

    selected: SelectedTokens
    group: ProcessGroup | None = None  # ranks whose gradients of the input are summed
    sequence_parallel: bool = False
    query_heads: tuple[int, int, int] | None = None  # query groups, queries per group, head size of a QKV projection


class FilteredLinear(torch.autograd.Function):
    """Compute ``input @ weight.t() + bias``, with gradients of selected rows.

    Shapes are those of Megatron-Core's linear layers: input [s, b, in], [s / tp, b, in] with sequence parallelism;
    output [s, b, out].
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, backward: LinearBackward) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.has_bias, ctx.backward = bias is not None, backward
        output = torch.matmul(gather_sequence(input, backward.group, backward.sequence_parallel), weight.t())
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        plan: LinearBackward = ctx.backward
        x = gather_sequence(input, plan.group, plan.sequence_parallel)
        rows, flat_x, flat_grad = plan.selected.rows, x.reshape(-1, x.size(-1)), grad.reshape(-1, grad.size(-1))
        if rows is None:
            grad_input, grad_weight = flat_grad @ weight, flat_grad.t() @ flat_x
        elif plan.query_heads is None:
            selected = flat_grad[rows]
            grad_input = torch.zeros_like(flat_x).index_copy_(0, rows, selected @ weight)
            grad_weight = selected.t() @ flat_x[rows]
        else:
            grad_input, grad_weight = query_gradients(flat_grad, flat_x, weight, rows, plan.query_heads)
        grad_bias = flat_grad.sum(0) if ctx.has_bias else None
        grad_input = reduce_hidden_gradient(grad_input.view_as(x), plan.group, plan.sequence_parallel)
        return grad_input, grad_weight, grad_bias, None


def query_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, rows: Tensor, heads: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input and weight of a QKV projection, with the queries of selected rows only.

    Args:
        grad: [n, groups * (queries + 2) * size], per group its queries, its key and its value.
        x: [n, in].
        weight: [groups * (queries + 2) * size, in].
        rows: [k] int64, selected rows.
        heads: query groups, queries per group, head size.
    """
    groups, queries, size = heads
    split = [queries * size, 2 * size]
    grad_query, grad_key_value = grad.view(len(grad), groups, -1).split(split, dim=2)
    grad_query, grad_key_value = grad_query[rows].flatten(1), grad_key_value.flatten(1)
    of_query, of_key_value = (
        part.flatten(0, 1) for part in weight.view(groups, -1, weight.size(1)).split(split, dim=1)
    )
    grad_input = (grad_key_value @ of_key_value).index_add_(0, rows, grad_query @ of_query)
    products = grad_query.t() @ x[rows], grad_key_value.t() @ x
    grad_weight = torch.cat([product.view(groups, -1, x.size(1)) for product in products], dim=1)
    return grad_input, grad_weight.view_as(weight)


class FilteredBias(torch.autograd.Function):
    """Add a bias to the output of a branch, with the bias's gradient of selected tokens."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, bias: Tensor, selected: SelectedTokens, shards: int, shard: int) -> Tensor:
        ctx.selected, ctx.shards, ctx.shard = selected, shards, shard
        return output + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask = ctx.selected.known_mask().chunk(ctx.shards)[ctx.shard]
        return grad, (grad * mask.unsqueeze(-1)).sum((0, 1)), None, None, None
