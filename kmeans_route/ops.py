"""torch.library operators: schema, body, fake and autograd of each, side by side.

Each takes the backend that `functional.choose_backend` chose: "torch" (`torch_backend.py`) or "triton"
(`kmeans_route.kernels`, imported at the first such call). The bodies are opaque to torch.compile, so they may branch on
data. The operators that mutate pending state carry no autograd, and they do nothing while a backward pass runs:
whatever activation checkpointing recomputes there has been counted already.

Legend: T tokens, D hidden size, E experts, K top_k, S splits. An absent result is an empty tensor.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kmeans_route import torch_backend as body
from kmeans_route.checks import RouteOptions, check_index_values
from kmeans_route.reference import NUM_MARGIN_BINS, compute_dtype
from kmeans_route.reservoir import keep_smallest_hashes_
from kmeans_route.types import Dispatch, Routing


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, so that a forward here is a recomputation.

    The call is private to PyTorch; this is its only use, and a test holds it for each version claimed.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def exporting() -> bool:
    """Whether torch.export is at work, seen from inside torch.compile too.

    `torch.compiler.is_exporting` is true within every torch.compile in torch 2.11. The flag that later versions read
    there is private to PyTorch; this is its only use, and a test holds it for each version claimed.
    """
    return bool(torch.compiler._is_exporting_flag)


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


class Statistics(NamedTuple):
    """What a routing leaves for the pending state.

    score_std: (T,) population standard deviation over e of s_te, 0 where not valid; or (0,).
    margin_hist: (E, 1024) int32 or (0, 1024). num_dropped: () int64, tokens that the mask let in and are not valid.
    """

    score_std: Tensor
    margin_hist: Tensor
    num_dropped: Tensor


def _route_body(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = RouteOptions(top_k, gate, tau, normalize, scaling, n_group, topk_group, group_score)
    if indices is not None:
        check_index_values(indices, directions.shape[0])
    with _no_autocast(x):
        if backend == "triton":
            from kmeans_route.kernels.route import route_fwd

            return route_fwd(
                x, directions, expert_bias, mask, indices, options,
                want_scores=want_scores, want_std=want_std, want_hist=want_hist,
            )[:11]  # fmt: skip
        return body.route_fwd(
            x, directions, expert_bias, mask, indices, options,
            want_scores=want_scores, want_std=want_std, want_hist=want_hist,
        )  # fmt: skip


_route = torch.library.custom_op("kmeans_route::route", _route_body, mutates_args=())


def _recorded(x: Tensor) -> bool:
    """Whether autograd, a compiler or a tensor of another kind has to see the operator; it costs 0.15 ms on a CPU."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor


@_route.register_fake
def _route_fake(x: Tensor, directions: Tensor, *args: Any) -> tuple[Tensor, ...]:
    top_k, gate, _tau, normalize = args[3:7]
    want_scores, want_std, want_hist, _backend = args[-4:]
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
        x.new_empty(num_tokens if want_std else 0, dtype=dtype),
        x.new_empty((num_experts if want_hist else 0, NUM_MARGIN_BINS), dtype=torch.int32),
        x.new_empty((), dtype=torch.int64),
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
    d_x_sorted: Tensor | None,
    positions: Tensor | None,
    top_k: int,
    gate: str,
    tau: float,
    normalize: bool,
    scaling: float,
    backend: str,
) -> Tensor:
    """dx of the routing, plus, where d_x_sorted is given, of the dispatch."""
    options = RouteOptions(top_k, gate, tau, normalize, scaling, 1, 1, "top2")
    over_all = gate == "softmax" and not normalize and d_weights is not None
    with _no_autocast(x):
        if backend == "triton" and not over_all and d_scores is None:
            from kmeans_route.kernels.combine import route_bwd

            return route_bwd(
                x, directions, indices, selected, inv_norm, valid, d_weights, d_selected, d_x_sorted, positions,
                gate, tau, normalize, scaling,
            )  # fmt: skip
        # A gradient over all experts is a dense product, which a GPU's own library does best.
        dx = body.route_bwd(
            x, directions, indices, selected, inv_norm, valid, scores, candidates,
            d_weights, d_selected, d_scores, options,
        )  # fmt: skip
        if d_x_sorted is not None:
            assert positions is not None
            dx += _gather_sum(d_x_sorted, positions, None, valid, backend)
        return dx


@_route_bwd.register_fake
def _(x: Tensor, *_args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("kmeans_route::directions_bwd", mutates_args=())
def _directions_bwd(
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
    """The gradient of the directions (E, D), for those that are learned in part. The same on every backend."""
    options = RouteOptions(top_k, gate, tau, normalize, scaling, 1, 1, "top2")
    with _no_autocast(x):
        ds = body.score_grads(indices, selected, scores, candidates, d_weights, d_selected, d_scores, options)
        return body.directions_bwd(x, indices, inv_norm, valid, *ds, directions.shape[0])


@_directions_bwd.register_fake
def _(x: Tensor, directions: Tensor, *_args: Any) -> Tensor:
    return directions.new_empty(directions.shape)


def _route_grads(
    ctx: Any, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], *through_dispatch: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """dx and the gradient of the directions, each where it is wanted and anything came for it."""
    wants_x, wants_directions = ctx.needs_input_grad[:2]
    d_routing = (grads[1], grads[2], grads[3] if ctx.want_scores else None)
    routed = any(grad is not None for grad in d_routing)
    dx = d_directions = None
    if wants_x and (routed or through_dispatch[0] is not None):
        dx = _route_bwd(*saved, *d_routing, *through_dispatch, *ctx.options)
    if wants_directions and routed:
        d_directions = _directions_bwd(*saved, *d_routing, *ctx.options[:-1])
    return dx, d_directions


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, directions, _bias, _mask, _indices, *options = inputs
    indices, _weights, selected, scores, candidates, _counts, inv_norm, valid = output[:8]
    ctx.save_for_backward(x, directions, indices, selected, inv_norm, valid, scores, candidates)
    ctx.options = (*options[:5], options[-1])
    ctx.want_scores = options[8]
    ctx.set_materialize_grads(False)


def _route_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_route_grads(ctx, ctx.saved_tensors, grads, None, None), *(None,) * 15


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
    backend: str,
) -> tuple[Routing, Statistics]:
    """The routing of x (T, D), and what it leaves for the pending state."""
    call = _route if _recorded(x) else _route_body
    out = call(x, directions, expert_bias, mask, indices, *options, want_scores, want_std, want_hist, backend)
    return _as_routing(out[:8], want_scores), Statistics(out[8].detach(), *out[9:])


def _as_routing(fields: tuple[Tensor, ...], want_scores: bool) -> Routing:
    indices, weights, selected, scores, _candidates, counts, inv_norm, valid = fields
    return Routing(indices, weights, selected, scores if want_scores else None, counts, inv_norm.detach(), valid)


@torch.library.custom_op("kmeans_route::dispatch", mutates_args=())
def dispatch(
    x: Tensor, indices: Tensor, counts: Tensor, valid: Tensor, copies: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton":
        from kmeans_route.kernels.dispatch import dispatch_fwd, rank_of_ids

        num_experts, indices = counts.shape[0], indices.contiguous()
        ranks = rank_of_ids(indices, valid, num_experts)
        out = dispatch_fwd(x, indices, valid, num_experts, ranks, copies=copies)
        return out.x_sorted, out.positions, out.token_of_row, ranks.offsets
    return body.dispatch_fwd(x, indices, counts, valid, copies=copies)


@dispatch.register_fake
def _(x: Tensor, indices: Tensor, counts: Tensor, valid: Tensor, copies: bool, backend: str) -> tuple[Tensor, ...]:
    rows = indices.numel()
    return (
        x.new_empty(rows if copies else 0, x.shape[1]),
        torch.empty_like(indices, memory_format=torch.contiguous_format),
        indices.new_empty(rows),
        indices.new_empty(counts.shape[0] + 1, dtype=torch.int32),
    )


@torch.library.custom_op("kmeans_route::gather_sum", mutates_args=())
def _gather_sum(rows: Tensor, positions: Tensor, weights: Tensor | None, valid: Tensor, backend: str) -> Tensor:
    return _gather_sum_body(rows, positions, weights, valid, backend)


def _gather_sum_body(rows: Tensor, positions: Tensor, weights: Tensor | None, valid: Tensor, backend: str) -> Tensor:
    with _no_autocast(rows):
        if backend == "triton":
            from kmeans_route.kernels.combine import gather_sum

            return gather_sum(rows, positions, weights, valid)
        return body.gather_sum(rows, positions, weights, valid)


@_gather_sum.register_fake
def _(rows: Tensor, positions: Tensor, weights: Tensor | None, valid: Tensor, backend: str) -> Tensor:
    return rows.new_empty(positions.shape[0], rows.shape[1])


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], inputs[3])
    ctx.copies, ctx.backend = inputs[4:]
    ctx.set_materialize_grads(False)


def _dispatch_backward(ctx: Any, d_x_sorted: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_x_sorted is None or not ctx.copies:
        return (None,) * 6
    positions, valid = ctx.saved_tensors
    return _gather_sum(d_x_sorted, positions, None, valid, ctx.backend), *(None,) * 5


dispatch.register_autograd(_dispatch_backward, setup_context=_dispatch_setup)


@torch.library.custom_op("kmeans_route::route_dispatch", mutates_args=())
def _route_dispatch(
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
    accumulate: str,
    backend: str,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """route, then dispatch, under one autograd node. accumulate: "unit", "raw", or "" for no centroid sums.

    The last five results: x_sorted, positions, token_of_row, offsets, partial centroid sums (S, E, D).
    """
    options = RouteOptions(top_k, gate, tau, normalize, scaling, n_group, topk_group, group_score)
    num_experts = directions.shape[0]
    if indices is not None:
        check_index_values(indices, directions.shape[0])
    with _no_autocast(x):
        if backend == "triton":
            from kmeans_route.kernels.dispatch import Ranks, dispatch_fwd
            from kmeans_route.kernels.route import route_fwd

            r = route_fwd(
                x, directions, expert_bias, mask, indices, options,
                want_scores=want_scores, want_std=want_std, want_hist=want_hist, want_rank=True,
            )  # fmt: skip
            factor = r.inv_norm if accumulate == "unit" else None
            ranks = Ranks(r.rank, r.block_counts, r.offsets, r.block)
            sent = dispatch_fwd(x, r.indices, r.valid, num_experts, ranks, factor, want_sums=bool(accumulate))
            return *r[:11], sent.x_sorted, sent.positions, sent.token_of_row, r.offsets, sent.partials
        routed = body.route_fwd(
            x, directions, expert_bias, mask, indices, options,
            want_scores=want_scores, want_std=want_std, want_hist=want_hist,
        )  # fmt: skip
        ids, counts, inv_norm, valid = routed[0], routed[5], routed[6], routed[7]
        partials = x.new_zeros(1 if accumulate else 0, num_experts, x.shape[1], dtype=compute_dtype(x.dtype))
        if accumulate:
            body.add_centroid_sums_(partials[0], x, ids, inv_norm, valid, accumulate)
        return *routed, *body.dispatch_fwd(x, ids, counts, valid), partials


@_route_dispatch.register_fake
def _(x: Tensor, directions: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *route_args, accumulate, backend = args
    (num_tokens, hidden_size), (num_experts, top_k) = x.shape, (directions.shape[0], args[3])
    if backend == "triton" and accumulate:
        from kmeans_route.kernels.configs import architecture, dispatch_config
        from kmeans_route.kernels.dispatch import token_splits

        config = dispatch_config(num_experts, x.dtype, architecture(x.device), hidden_size % 16 == 0)
        num_splits = token_splits(num_tokens, hidden_size, num_experts, config)[0]
    else:
        num_splits = 1 if accumulate else 0
    rows = num_tokens * top_k
    dtype = torch.float32 if backend == "triton" else compute_dtype(x.dtype)
    return (
        *_route_fake(x, directions, *route_args, backend),
        x.new_empty(rows, hidden_size),
        x.new_empty(num_tokens, top_k, dtype=torch.int64),
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(num_experts + 1, dtype=torch.int32),
        x.new_empty(num_splits, num_experts, hidden_size, dtype=dtype),
    )


def _route_dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, directions, _bias, _mask, _indices, *options = inputs
    indices, _weights, selected, scores, candidates, _counts, inv_norm, valid = output[:8]
    ctx.save_for_backward(x, directions, indices, selected, inv_norm, valid, scores, candidates, output[12])
    ctx.options = (*options[:5], options[-1])
    ctx.want_scores = options[8]
    ctx.set_materialize_grads(False)


def _route_dispatch_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, positions = ctx.saved_tensors
    return *_route_grads(ctx, saved, grads, grads[11], positions), *(None,) * 16


_route_dispatch.register_autograd(_route_dispatch_backward, setup_context=_route_dispatch_setup)


def route_dispatch(
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
    accumulate: str,
    backend: str,
) -> tuple[Routing, Dispatch, Statistics, Tensor]:
    """Routing and dispatch of x (T, D) under one autograd node, statistics, and centroid sums in parts (S, E, D)."""
    out = _route_dispatch(
        x, directions, expert_bias, mask, indices, *options, want_scores, want_std, want_hist, accumulate, backend
    )
    routing, stats = _as_routing(out[:8], want_scores), Statistics(out[8].detach(), *out[9:11])
    return routing, Dispatch(*out[11:15]), stats, out[15].detach()


@torch.library.custom_op("kmeans_route::combine", mutates_args=())
def combine(
    y_sorted: Tensor,
    weights: Tensor,
    positions: Tensor,
    token_of_row: Tensor,
    offsets: Tensor,
    valid: Tensor,
    backend: str,
) -> Tensor:
    return _gather_sum_body(y_sorted, positions, weights, valid, backend)


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
    backend: str,
) -> tuple[Tensor, Tensor]:
    with _no_autocast(dy):
        if backend == "triton":
            from kmeans_route.kernels.combine import combine_bwd

            return combine_bwd(dy, y_sorted, weights, positions, valid)
        return body.combine_bwd(dy, y_sorted, weights, positions, token_of_row, offsets, valid)


@_combine_bwd.register_fake
def _(dy: Tensor, y_sorted: Tensor, weights: Tensor, *_args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y_sorted, memory_format=torch.contiguous_format), torch.empty_like(
        weights, memory_format=torch.contiguous_format
    )


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _combine_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    d_rows, d_weights = _combine_bwd(dy, *ctx.saved_tensors, ctx.backend)
    return d_rows, d_weights, *(None,) * 5


combine.register_autograd(_combine_backward, setup_context=_combine_setup)


@torch.library.custom_op("kmeans_route::centroid_sums", mutates_args=())
def centroid_sums(
    x: Tensor, indices: Tensor, inv_norm: Tensor, valid: Tensor, num_experts: int, accumulate: str, backend: str
) -> Tensor:
    sums = x.new_zeros(num_experts, x.shape[1], dtype=compute_dtype(x.dtype))
    with _no_autocast(x):
        if backend == "triton":
            return _partial_sums(x, indices, inv_norm, valid, num_experts, accumulate).sum(0)
        return body.add_centroid_sums_(sums, x, indices, inv_norm, valid, accumulate)


def _partial_sums(
    x: Tensor, indices: Tensor, inv_norm: Tensor, valid: Tensor, num_experts: int, accumulate: str
) -> Tensor:
    """Centroid sums in parts (S, E, D) fp32, in one launch."""
    from kmeans_route.kernels.dispatch import dispatch_fwd

    factor = inv_norm if accumulate == "unit" else None
    return dispatch_fwd(x, indices.contiguous(), valid, num_experts, None, factor, want_sums=True).partials


@centroid_sums.register_fake
def _(
    x: Tensor, indices: Tensor, inv_norm: Tensor, valid: Tensor, num_experts: int, accumulate: str, backend: str
) -> Tensor:
    return x.new_empty(num_experts, x.shape[1], dtype=compute_dtype(x.dtype))


@torch.library.custom_op(
    "kmeans_route::accumulate", mutates_args=("sums", "counts", "std_sum", "num_tokens", "num_dropped", "margin_hist")
)
def accumulate(
    x: Tensor,
    indices: Tensor,
    inv_norm: Tensor,
    valid: Tensor,
    partials: Tensor | None,
    batch_counts: Tensor,
    batch_std: Tensor,
    batch_hist: Tensor,
    batch_dropped: Tensor,
    accumulate: str,
    sums: Tensor,
    counts: Tensor,
    std_sum: Tensor,
    num_tokens: Tensor,
    num_dropped: Tensor,
    margin_hist: Tensor,
    backend: str,
) -> None:
    """Add a batch to the pending state. partials: its centroid sums in parts (S, E, D); None: taken from x here."""
    if in_backward():
        return
    top_k = indices.shape[1]
    with _no_autocast(x):
        if backend == "triton":
            from kmeans_route.kernels import dispatch as kernels

            if partials is None:
                partials = _partial_sums(x, indices, inv_norm, valid, counts.shape[0], accumulate)
            kernels.accumulate(
                partials, batch_counts, batch_std, batch_dropped, batch_hist, top_k,
                sums, counts, std_sum, num_tokens, num_dropped, margin_hist,
            )  # fmt: skip
            return
        if sums.numel() and partials is not None:
            sums.add_(partials.sum(0))
        elif sums.numel():
            body.add_centroid_sums_(sums, x, indices, inv_norm, valid, accumulate)
        counts.add_(batch_counts)
        std_sum.add_(batch_std.sum())
        num_tokens.add_(valid.sum())
        num_dropped.add_(batch_dropped)
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
