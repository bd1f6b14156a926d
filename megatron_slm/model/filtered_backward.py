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

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.model.activation import activate
from megatron_slm.model.selected_tokens import BackwardFilter, SelectedTokens
from megatron_slm.objective.vocab_shard import gather_sequence, reduce_hidden_gradient


class FilteredQueryLinear(ColumnParallelLinear):
    """Projection to queries, keys and values: gradients of the queries of selected tokens, and of all keys and values.

    Ranks that hold a part of a query group use the plain backward pass: the gradients are equal, since those of the
    queries of unselected tokens are zero.
    """

    def __init__(self, *sizes: int, backward_filter: BackwardFilter, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.backward_filter = backward_filter

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        groups, size = self.config.num_query_groups, self.tp_group.size()
        if groups % size:
            return super()._forward_impl(input, weight, bias, **options)
        heads = (groups // size, self.config.num_attention_heads // groups, self.config.kv_channels)
        return FilteredQueries.apply(input, weight, bias, heads, InputOfShards.of(self), self.backward_filter.current)


class FilteredRowLinear(RowParallelLinear):
    """Row-parallel linear layer at the end of a branch, with gradients of selected tokens. It adds its bias itself."""

    def __init__(self, *sizes: int, backward_filter: BackwardFilter, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.backward_filter = backward_filter

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        selected = self.backward_filter.current
        return complete_branch(self, FilteredProduct.apply(input_, self.weight, selected), self.bias, selected), None


class FirstMLPLinear(ColumnParallelLinear):
    """First layer of an MLP that computes its products; returns its parameters.

    They are used after a module call, so that hooks which gather sharded parameters run.
    """

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias


class LastMLPLinear(RowParallelLinear):
    """Last layer of an MLP that computes its products; see :class:`FirstMLPLinear`."""

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias


class FilteredMLP(MLP):
    """MLP with gradients of selected tokens.

    Its backward pass runs on selected rows only, activations included, which it computes from the values before the
    activation. It saves these and the input: half of the values that the exact backward pass saves with SwiGLU.
    """

    def __init__(self, *arguments: Any, backward_filter: BackwardFilter, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.backward_filter = backward_filter

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        assert per_token_scale is None, "experts have no filtered backward pass"
        selected = self.backward_filter.current
        weight, bias = self.linear_fc1()
        last_weight, last_bias = self.linear_fc2()
        product = FilteredMLPProducts.apply(
            hidden_states,
            *(weight, bias, last_weight),
            partial(activate, self.config),
            InputOfShards.of(self.linear_fc1),
            selected,
        )
        return complete_branch(self.linear_fc2, product, last_bias, selected), None


def complete_branch(layer: RowParallelLinear, product: Tensor, bias: Tensor | None, selected: SelectedTokens) -> Tensor:
    """Sum the products of a row-parallel layer over its shards, and add its bias.

    Args:
        layer: last layer of a branch.
        product: [s, b, h], this rank's part of the sum.
        bias: [h], of the layer.
        selected: tokens with gradients of the bias.

    Returns:
        [s, b, h], or [s / tp, b, h] with sequence parallelism.
    """
    group = layer.tp_group
    if layer.sequence_parallel:
        output = reduce_scatter_to_sequence_parallel_region(product, group=group)
    else:
        output = reduce_from_tensor_model_parallel_region(product, group=group)
    if bias is None:
        return output
    shards, shard = (group.size(), group.rank()) if layer.sequence_parallel else (1, 0)
    return FilteredBias.apply(output, bias, selected, shards, shard)


@dataclass(frozen=True)
class InputOfShards:
    """Gather the input of a column-parallel layer, and reduce its gradient."""

    group: ProcessGroup | None  # ranks whose gradients of the input are summed
    sequence_parallel: bool

    @classmethod
    def of(cls, layer: ColumnParallelLinear) -> InputOfShards:
        """Return the input of a layer."""
        reduces = layer.allreduce_dgrad or layer.sequence_parallel
        return cls(layer.tp_group if reduces else None, layer.sequence_parallel)

    def gather(self, input: Tensor) -> Tensor:
        """Return the complete input, [s, b, h], from this rank's, which is [s / tp, b, h] in sequence parallelism."""
        return gather_sequence(input, self.group, self.sequence_parallel)

    def reduce(self, grad: Tensor) -> Tensor:
        """Return the gradient of this rank's input from that of the complete input by this rank's shard."""
        return reduce_hidden_gradient(grad, self.group, self.sequence_parallel)


class FilteredProduct(torch.autograd.Function):
    """Compute ``input @ weight.t()``, [s, b, out], from [s, b, in], with gradients of selected rows."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, selected: SelectedTokens) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.selected = selected
        return torch.matmul(input, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        rows = ctx.selected.rows
        grad = take_rows(grad, rows)
        return spread_rows(grad @ weight, rows, input), grad.t() @ take_rows(input, rows), None


class FilteredMLPProducts(torch.autograd.Function):
    """Compute ``activate(input @ weight.t(), bias) @ last_weight.t()``, with gradients of selected rows."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        last_weight: Tensor,
        activate: Callable[[Tensor, Tensor | None], Tensor],
        shards: InputOfShards,
        selected: SelectedTokens,
    ) -> Tensor:
        before = torch.matmul(shards.gather(input), weight.t())
        ctx.save_for_backward(input, weight, bias, last_weight, before)
        ctx.activate, ctx.shards, ctx.selected = activate, shards, selected
        return torch.matmul(activate(before, bias), last_weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, last_weight, before = ctx.saved_tensors
        rows, x = ctx.selected.rows, ctx.shards.gather(input)
        grad = take_rows(grad, rows)
        inputs = [take_rows(before, rows).requires_grad_()]
        inputs += [] if bias is None else [bias.detach().requires_grad_()]
        with torch.enable_grad():
            after = ctx.activate(inputs[0], inputs[1] if len(inputs) > 1 else None)
        grad_before, *grad_bias = torch.autograd.grad(after, inputs, grad @ last_weight)
        grad_input = ctx.shards.reduce(spread_rows(grad_before @ weight, rows, x))
        grad_weight, grad_last = grad_before.t() @ take_rows(x, rows), grad.t() @ after.detach()
        return grad_input, grad_weight, grad_bias[0] if grad_bias else None, grad_last, None, None, None


class FilteredQueries(torch.autograd.Function):
    """Compute ``input @ weight.t() + bias``, with gradients of all keys and values, and of selected queries."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        heads: tuple[int, int, int],
        shards: InputOfShards,
        selected: SelectedTokens,
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.has_bias, ctx.heads, ctx.shards, ctx.selected = bias is not None, heads, shards, selected
        output = torch.matmul(shards.gather(input), weight.t())
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        rows, x = ctx.selected.rows, ctx.shards.gather(input)
        grad, flat_x = take_rows(grad, None), take_rows(x, None)
        if rows is None:
            grad_input, grad_weight = grad @ weight, grad.t() @ flat_x
        else:
            grad_input, grad_weight = query_gradients(grad, flat_x, weight, rows, ctx.heads)
        grad_bias = grad.sum(0) if ctx.has_bias else None
        return ctx.shards.reduce(grad_input.view_as(x)), grad_weight, grad_bias, None, None, None


def take_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """Return rows of [s, b, h] as [n, h]; all rows if None."""
    values = values.detach().reshape(-1, values.size(-1))
    return values if rows is None else values[rows]


def spread_rows(values: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """Return zeros of the shape of ``like``, [s, b, h], with ``values``, [n, h], in its rows."""
    if rows is None:
        return values.view_as(like)
    return values.new_zeros(like.numel() // like.size(-1), like.size(-1)).index_copy_(0, rows, values).view_as(like)


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
