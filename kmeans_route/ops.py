"""torch.library operators: schema, body, fake and autograd of each, side by side.

The bodies are plain PyTorch (`torch_backend.py`), opaque to torch.compile, so they may branch on data. The operators
that mutate pending state carry no autograd, and they do nothing while a backward pass runs: whatever activation
checkpointing recomputes there has been counted already.

Legend: T tokens, D hidden size, E experts, K top_k. An absent (T, E) result is an empty tensor.
"""

from typing import Any

import torch
from torch import Tensor

from kmeans_route import torch_backend as body
from kmeans_route.checks import RouteOptions
from kmeans_route.reference import NUM_MARGIN_BINS, compute_dtype
from kmeans_route.reservoir import keep_smallest_hashes_
from kmeans_route.types import Routing


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, so that a forward here is a recomputation.

    The call is private to PyTorch; this is its only use, and a test holds it for each version claimed.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


@torch.library.custom_op("kmeans_route::route", mutates_args=())
def _route(
    x: Tensor,
    directions: Tensor,
    expert_bias: Tensor | None,
    mask: Tensor | None,
    indices: Tensor | None,
    top_k: int,
    gate: str,
    tau: float,
    normalize: bool,
    scaling: float,
    n_group: int,
    topk_group: int,
    group_score: str,
    want_scores: bool,
    want_std: bool,
    want_hist: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = RouteOptions(top_k, gate, tau, normalize, scaling, n_group, topk_group, group_score)
    with _no_autocast(x):
        return body.route_fwd(
            x, directions, expert_bias, mask, indices, options,
            want_scores=want_scores, want_std=want_std, want_hist=want_hist,
        )  # fmt: skip


@_route.register_fake
def _(x: Tensor, directions: Tensor, *args: Any) -> tuple[Tensor, ...]:
    top_k, gate, _tau, normalize = args[3:7]
    want_scores, _want_std, want_hist = args[-3:]
    (num_tokens, num_experts), dtype = (x.shape[0], directions.shape[0]), compute_dtype(x.dtype)
    over_all = gate == "softmax" and not normalize
    by_expert = (num_tokens, num_experts)
    return (
        x.new_empty(num_tokens, top_k, dtype=torch.int64),
        x.new_empty(num_tokens, top_k, dtype=dtype),
        x.new_empty(num_tokens, top_k, dtype=dtype),
        x.new_empty(by_expert if want_scores or over_all else (0, num_experts), dtype=dtype),
        x.new_empty(by_expert if over_all else (0, num_experts), dtype=torch.bool),
        x.new_empty(num_experts, dtype=torch.int64),
        x.new_empty(num_tokens, dtype=dtype),
        x.new_empty(num_tokens, dtype=torch.bool),
        x.new_empty((), dtype=dtype),
        x.new_empty((num_experts if want_hist else 0, NUM_MARGIN_BINS), dtype=torch.int32),
    )


@torch.library.custom_op("kmeans_route::route_bwd", mutates_args=())
def _route_bwd(
    x: Tensor,
    directions: Tensor,
    indices: Tensor,
    selected: Tensor,
    inv_norm: Tensor,
    valid: Tensor,
    scores: Tensor,
    candidates: Tensor,
    d_weights: Tensor | None,
    d_selected: Tensor | None,
    d_scores: Tensor | None,
    top_k: int,
    gate: str,
    tau: float,
    normalize: bool,
    scaling: float,
) -> Tensor:
    options = RouteOptions(top_k, gate, tau, normalize, scaling, 1, 1, "top2")
    with _no_autocast(x):
        return body.route_bwd(
            x, directions, indices, selected, inv_norm, valid, scores, candidates,
            d_weights, d_selected, d_scores, options,
        )  # fmt: skip


@_route_bwd.register_fake
def _(x: Tensor, *_args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, directions, _bias, _mask, _indices, *options = inputs
    indices, _weights, selected, scores, candidates, _counts, inv_norm, valid, _std, _hist = output
    ctx.save_for_backward(x, directions, indices, selected, inv_norm, valid, scores, candidates)
    ctx.options = options[:5]
    ctx.want_scores = options[8]
    ctx.set_materialize_grads(False)


def _route_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    d_weights, d_selected = grads[1], grads[2]
    d_scores = grads[3] if ctx.want_scores else None
    if d_weights is None and d_selected is None and d_scores is None:
        return (None,) * 16
    dx = _route_bwd(*ctx.saved_tensors, d_weights, d_selected, d_scores, *ctx.options)
    return dx, *(None,) * 15


_route.register_autograd(_route_backward, setup_context=_route_setup)


def route_with_stats(
    x: Tensor,
    directions: Tensor,
    expert_bias: Tensor | None,
    mask: Tensor | None,
    indices: Tensor | None,
    options: RouteOptions,
    *,
    want_scores: bool,
    want_std: bool,
    want_hist: bool,
) -> tuple[Routing, Tensor, Tensor]:
    """The routing of x (T, D), its score std summed over tokens (), and its margin histogram (E, 1024) or (0, 1024)."""
    indices, weights, selected, scores, _candidates, counts, inv_norm, valid, std_sum, hist = _route(
        x, directions, expert_bias, mask, indices, *options, want_scores, want_std, want_hist
    )
    routing = Routing(
        indices, weights, selected, scores if want_scores else None, counts, inv_norm.detach(), valid
    )  # fmt: skip
    return routing, std_sum.detach(), hist


@torch.library.custom_op("kmeans_route::dispatch", mutates_args=())
def dispatch(x: Tensor, indices: Tensor, counts: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return body.dispatch_fwd(x, indices, counts, valid)


@dispatch.register_fake
def _(x: Tensor, indices: Tensor, counts: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
    rows = indices.numel()
    return (
        x.new_empty(rows, x.shape[1]),
        torch.empty_like(indices, memory_format=torch.contiguous_format),
        indices.new_empty(rows),
        indices.new_empty(counts.shape[0] + 1, dtype=torch.int32),
    )


@torch.library.custom_op("kmeans_route::gather_sum", mutates_args=())
def _gather_sum(rows: Tensor, positions: Tensor, weights: Tensor | None, valid: Tensor) -> Tensor:
    with _no_autocast(rows):
        return body.gather_sum(rows, positions, weights, valid)


@_gather_sum.register_fake
def _(rows: Tensor, positions: Tensor, weights: Tensor | None, valid: Tensor) -> Tensor:
    return rows.new_empty(positions.shape[0], rows.shape[1])


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], inputs[3])
    ctx.set_materialize_grads(False)


def _dispatch_backward(ctx: Any, d_x_sorted: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_x_sorted is None:
        return None, None, None, None
    positions, valid = ctx.saved_tensors
    return _gather_sum(d_x_sorted, positions, None, valid), None, None, None


dispatch.register_autograd(_dispatch_backward, setup_context=_dispatch_setup)


@torch.library.custom_op("kmeans_route::combine", mutates_args=())
def combine(
    y_sorted: Tensor, weights: Tensor, positions: Tensor, token_of_row: Tensor, offsets: Tensor, valid: Tensor
) -> Tensor:
    with _no_autocast(y_sorted):
        return body.gather_sum(y_sorted, positions, weights, valid)


@combine.register_fake
def _(y_sorted: Tensor, weights: Tensor, positions: Tensor, *_args: Any) -> Tensor:
    return y_sorted.new_empty(positions.shape[0], y_sorted.shape[1])


@torch.library.custom_op("kmeans_route::combine_bwd", mutates_args=())
def _combine_bwd(
    dy: Tensor,
    y_sorted: Tensor,
    weights: Tensor,
    positions: Tensor,
    token_of_row: Tensor,
    offsets: Tensor,
    valid: Tensor,
) -> tuple[Tensor, Tensor]:
    with _no_autocast(dy):
        return body.combine_bwd(dy, y_sorted, weights, positions, token_of_row, offsets, valid)


@_combine_bwd.register_fake
def _(dy: Tensor, y_sorted: Tensor, weights: Tensor, *_args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y_sorted, memory_format=torch.contiguous_format), torch.empty_like(
        weights, memory_format=torch.contiguous_format
    )


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    d_rows, d_weights = _combine_bwd(dy, *ctx.saved_tensors)
    return d_rows, d_weights, None, None, None, None


combine.register_autograd(_combine_backward, setup_context=_combine_setup)


@torch.library.custom_op("kmeans_route::centroid_sums", mutates_args=())
def centroid_sums(
    x: Tensor, indices: Tensor, inv_norm: Tensor, valid: Tensor, num_experts: int, accumulate: str
) -> Tensor:
    sums = x.new_zeros(num_experts, x.shape[1], dtype=compute_dtype(x.dtype))
    with _no_autocast(x):
        return body.add_centroid_sums_(sums, x, indices, inv_norm, valid, accumulate)


@centroid_sums.register_fake
def _(x: Tensor, indices: Tensor, inv_norm: Tensor, valid: Tensor, num_experts: int, accumulate: str) -> Tensor:
    return x.new_empty(num_experts, x.shape[1], dtype=compute_dtype(x.dtype))


@torch.library.custom_op(
    "kmeans_route::accumulate", mutates_args=("sums", "counts", "std_sum", "num_tokens", "num_dropped", "margin_hist")
)
def accumulate(
    x: Tensor,
    indices: Tensor,
    inv_norm: Tensor,
    valid: Tensor,
    mask: Tensor | None,
    batch_counts: Tensor,
    batch_std_sum: Tensor,
    batch_hist: Tensor,
    accumulate: str,
    sums: Tensor,
    counts: Tensor,
    std_sum: Tensor,
    num_tokens: Tensor,
    num_dropped: Tensor,
    margin_hist: Tensor,
) -> None:
    if in_backward():
        return
    with _no_autocast(x):
        if sums.numel():
            body.add_centroid_sums_(sums, x, indices, inv_norm, valid, accumulate)
        counts.add_(batch_counts)
        std_sum.add_(batch_std_sum)
        num_valid = valid.sum()
        num_tokens.add_(num_valid)
        num_dropped.add_((valid.numel() if mask is None else mask.sum()) - num_valid)
        if margin_hist.numel():
            margin_hist.add_(batch_hist)


@accumulate.register_fake
def _(*_args: Any, **_kwargs: Any) -> None:
    return None


@torch.library.custom_op("kmeans_route::reservoir", mutates_args=("hashes", "rows"))
def reservoir(x: Tensor, inv_norm: Tensor, valid: Tensor, seed: int, hashes: Tensor, rows: Tensor) -> None:
    if not in_backward():
        with _no_autocast(x):
            keep_smallest_hashes_(x, inv_norm, valid, seed, hashes, rows)


@reservoir.register_fake
def _(*_args: Any, **_kwargs: Any) -> None:
    return None
