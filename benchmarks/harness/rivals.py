"""Rivals in plain PyTorch that only the suites time: learned routers by name, dispatch, combine; compiled forms.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from kmeans_route.bench.baselines import (
    LearnedFunction,
    LearnedResult,
    softmax_aux,
    softmax_aux_topk_first,
    softmax_plain,
)
from kmeans_route.bench.clock import reason

Compilable = TypeVar("Compilable", bound=Callable[..., object])
LEARNED: dict[str, LearnedFunction] = {
    "softmax + aux": softmax_aux,
    "softmax + aux, topk first": softmax_aux_topk_first,
    "softmax, no aux": softmax_plain,
}


def learned_backward(result: LearnedResult, gradient: Tensor) -> None:
    """Backward of a training step: `gradient` (T, K) reaches the gate weights, and the loss, if any, adds its own."""
    if result.aux_loss is None:
        torch.autograd.backward(result.weights, gradient)
    else:
        torch.autograd.backward([result.weights, result.aux_loss], [gradient, None])


CombineFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def index_dispatch(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch dispatch: x_sorted (T*K, D) and the sorting permutation (T*K,), by a stable sort and an index."""
    order = indices.flatten().argsort(stable=True)
    return x[order // indices.shape[1]], order


def scatter_combine(y_sorted: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """Combine by index_add_: the weighted rows are added into (T, D), one copy of y_sorted for the products."""
    num_tokens, top_k = weights.shape
    weighted = y_sorted * weights.flatten()[order].unsqueeze(1)
    return y_sorted.new_zeros(num_tokens, y_sorted.shape[1]).index_add_(0, order // top_k, weighted)


def gather_combine(y_sorted: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """Combine by the inverse permutation: rows back in token order, then one product a token."""
    num_tokens, top_k = weights.shape
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    rows = y_sorted.index_select(0, inverse).view(num_tokens, top_k, -1)
    return torch.bmm(weights.unsqueeze(1), rows).squeeze(1)


def compile_or_reason(
    function: Compilable, try_out: Callable[[Compilable], object], *, compiles: bool
) -> Compilable | str:
    """`function` under torch.compile for fixed shapes, compiled by `try_out`, or the reason why it is not.

    compiles: false where the command line leaves it out.
    """
    if not compiles:
        return "left out by --no-compile"
    try:
        compiled: Compilable = torch.compile(function, dynamic=False, fullgraph=True)  # type: ignore[assignment]
        try_out(compiled)
    except Exception as error:
        return reason(error)
    return compiled


def enter(name: str, made: Compilable | str, functions: dict[str, Compilable], not_run: dict[str, str]) -> None:
    """Put what was made among the functions, or, where it is a reason, among those not run."""
    if isinstance(made, str):
        not_run[name] = made
    else:
        functions[name] = made
