"""dispatch and combine: copies in expert order, and back to token order."""

from typing import Any

import torch
from torch import Tensor

from kmeans_route import backends
from kmeans_route.ops.schema import direct, direct_in_backward, no_autocast
from kmeans_route.types import Dispatch


def dispatch(
    x: Tensor, indices: Tensor, counts: Tensor, valid: Tensor, backend: Any, *, copies: bool = True
) -> Dispatch:
    """Rows of x (T, D) in the order of their experts, differentiable in x."""
    if backend.PLAIN:
        sent: Dispatch = backend.dispatch_fwd(x, indices, counts, valid, copies=copies)
        return sent
    return Dispatch(*_dispatch_call(x, indices, counts, valid, copies, backend.NAME))


def _dispatch_body(
    x: Tensor, indices: Tensor, counts: Tensor, valid: Tensor, copies: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sent: tuple[Tensor, Tensor, Tensor, Tensor] = backends.get(backend).dispatch_fwd(
        x, indices, counts, valid, copies=copies
    )
    return sent


_dispatch = torch.library.custom_op("kmeans_route::dispatch", _dispatch_body, mutates_args=())


@_dispatch.register_fake
def _(x: Tensor, indices: Tensor, counts: Tensor, valid: Tensor, copies: bool, backend: str) -> tuple[Tensor, ...]:
    rows = indices.numel()
    return Dispatch(
        x_sorted=x.new_empty(rows if copies else 0, x.shape[1]),
        positions=torch.empty_like(indices, memory_format=torch.contiguous_format),
        token_of_row=indices.new_empty(rows),
        offsets=indices.new_empty(counts.shape[0] + 1, dtype=torch.int32),
    )


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _x, _indices, _counts, valid, ctx.copies, ctx.backend = inputs
    ctx.save_for_backward(Dispatch(*output).positions, valid)
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _dispatch_backward(ctx: Any, d_x_sorted: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * (ctx.num_inputs - 1)
    if d_x_sorted is None or not ctx.copies:
        return None, *rest
    positions, valid = ctx.saved_tensors
    return _gather_sum_call(d_x_sorted, positions, None, valid, ctx.backend), *rest


_dispatch.register_autograd(_dispatch_backward, setup_context=_dispatch_setup)
_dispatch_call = direct(_dispatch, _dispatch_body, _dispatch_setup, _dispatch_backward)


def _gather_sum_body(rows: Tensor, positions: Tensor, weights: Tensor | None, valid: Tensor, backend: str) -> Tensor:
    """The backward of dispatch: a plain sum of each token's rows."""
    with no_autocast(rows):
        summed: Tensor = backends.get(backend).combine_fwd(rows, positions, weights, valid)
        return summed


_gather_sum = torch.library.custom_op("kmeans_route::gather_sum", _gather_sum_body, mutates_args=())
_gather_sum_call = direct_in_backward(_gather_sum, _gather_sum_body)


@_gather_sum.register_fake
def _(rows: Tensor, positions: Tensor, weights: Tensor | None, valid: Tensor, backend: str) -> Tensor:
    return rows.new_empty(positions.shape[0], rows.shape[1])


def combine(y_sorted: Tensor, weights: Tensor, sent: Dispatch, valid: Tensor, backend: Any) -> Tensor:
    """Weighted sum of each token's rows (T, D), differentiable in y_sorted and weights."""
    call = _combine_body if backend.PLAIN else _combine_call
    y: Tensor = call(y_sorted, weights, sent.positions, sent.token_of_row, sent.offsets, valid, backend.NAME)
    return y


def _combine_body(
    y_sorted: Tensor,
    weights: Tensor,
    positions: Tensor,
    token_of_row: Tensor,
    offsets: Tensor,
    valid: Tensor,
    backend: str,
) -> Tensor:
    with no_autocast(y_sorted):
        y: Tensor = backends.get(backend).combine_fwd(y_sorted, positions, weights, valid)
        return y


_combine = torch.library.custom_op("kmeans_route::combine", _combine_body, mutates_args=())


@_combine.register_fake
def _(y_sorted: Tensor, weights: Tensor, positions: Tensor, *_args: Any) -> Tensor:
    return y_sorted.new_empty(positions.shape[0], y_sorted.shape[1])


def _combine_bwd_body(
    dy: Tensor,
    y_sorted: Tensor,
    weights: Tensor,
    positions: Tensor,
    token_of_row: Tensor,
    offsets: Tensor,
    valid: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with no_autocast(dy):
        back: tuple[Tensor, Tensor] = backends.get(backend).combine_bwd(
            dy, y_sorted, weights, positions, token_of_row, offsets, valid
        )
        return back


_combine_bwd = torch.library.custom_op("kmeans_route::combine_bwd", _combine_bwd_body, mutates_args=())
_combine_bwd_call = direct_in_backward(_combine_bwd, _combine_bwd_body)


@_combine_bwd.register_fake
def _(dy: Tensor, y_sorted: Tensor, weights: Tensor, *_args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y_sorted, memory_format=torch.contiguous_format), torch.empty_like(
        weights, memory_format=torch.contiguous_format
    )


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _combine_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    d_rows, d_weights = _combine_bwd_call(dy, *tensors, ctx.backend)
    return d_rows, d_weights, *(None,) * (len(tensors) - 1)


_combine.register_autograd(_combine_backward, setup_context=_combine_setup)
_combine_call = direct(_combine, _combine_body, _combine_setup, _combine_backward)
