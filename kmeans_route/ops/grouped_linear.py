"""One product an expert over rows sorted by expert."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kmeans_route import backends
from kmeans_route.backends.torch import zero_past_end_
from kmeans_route.ops.schema import direct, direct_in_backward, no_autocast
from kmeans_route.reference import grouped_linear_reference


def _one_call(rows: Tensor, weight: Tensor) -> bool:
    """Whether grouped_mm takes these shapes: rows of a multiple of 16 bytes, in a dtype it knows, and some of them."""
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    known = rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return hasattr(F, "grouped_mm") and aligned and known and rows.shape[0] > 0


def _spans(offsets: Tensor) -> list[slice]:
    ends = offsets.tolist()
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """rows[offsets[e] : offsets[e+1]] @ weight[e].T for every e: (M, N) from (M, D), (E, N, D), (E+1,) int32."""
    if backends.by_definition():
        with no_autocast(rows):
            return grouped_linear_reference(rows, weight, offsets)
    y: Tensor = _grouped_linear_call(rows, weight, offsets)
    return y


def _grouped_linear_body(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """One grouped_mm where it takes the shapes, else a loop over the experts, which reads the offsets back to the host.
    Rows at offsets[E] and after may hold anything and come out 0: grouped_mm leaves them unwritten, and anomaly mode
    and hooks that look for NaN would find some there. An operator of its own, because torch.compile knows grouped_mm
    in bf16 only, and because its own backward refuses expanded gradients.
    """
    with no_autocast(rows):
        if _one_call(rows, weight):
            y = F.grouped_mm(rows.contiguous(), weight.transpose(1, 2), offs=offsets[1:])
        else:
            y = rows.new_empty(rows.shape[0], weight.shape[1])
            for e, span in enumerate(_spans(offsets)):
                torch.mm(rows[span], weight[e].T, out=y[span])
        return zero_past_end_(y, offsets)


_grouped_linear = torch.library.custom_op("kmeans_route::grouped_linear", _grouped_linear_body, mutates_args=())


@_grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, _offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _grouped_linear_bwd_body(dy: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    with no_autocast(rows):
        dy = dy.contiguous()
        if _one_call(rows, weight):
            d_rows = F.grouped_mm(dy, weight, offs=offsets[1:])
            d_weight = F.grouped_mm(dy.T, rows.contiguous(), offs=offsets[1:])
        else:
            d_rows, d_weight = rows.new_empty(rows.shape), weight.new_empty(weight.shape)
            for e, span in enumerate(_spans(offsets)):
                torch.mm(dy[span], weight[e], out=d_rows[span])
                torch.mm(dy[span].T, rows[span], out=d_weight[e])
        return zero_past_end_(d_rows, offsets), d_weight


_grouped_linear_bwd = torch.library.custom_op(
    "kmeans_route::grouped_linear_bwd", _grouped_linear_bwd_body, mutates_args=()
)
_grouped_linear_bwd_call = direct_in_backward(_grouped_linear_bwd, _grouped_linear_bwd_body)


@_grouped_linear_bwd.register_fake
def _(dy: Tensor, rows: Tensor, weight: Tensor, _offsets: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_grouped_linear_bwd_call(dy, *ctx.saved_tensors), None


_grouped_linear.register_autograd(_backward, setup_context=_setup)
_grouped_linear_call = direct(_grouped_linear, _grouped_linear_body, _setup, _backward)
