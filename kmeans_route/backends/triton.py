"""Backend "triton": the fused kernels (`kmeans_route.kernels`), with the signatures of a backend.

The kernels are imported at the first call, so that nothing here asks for Triton.
"""

from typing import Any

import torch
from torch import Tensor

from kmeans_route.backends import torch as plain
from kmeans_route.backends.whitening import whitened as whitened
from kmeans_route.types import (
    CommitOptions,
    Dispatch,
    PendingStatistics,
    Routed,
    RouteInputs,
    RouteOptions,
    RouterState,
    RoutingGrads,
    SavedRouting,
    Statistics,
    Wanted,
)

NAME, PLAIN, FUSED = "triton", False, True


def directions(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit rows of weight (E, D) in `dtype`: one launch."""
    if weight.dtype != torch.float32:
        return plain.directions(weight, dtype)
    from kmeans_route.kernels.directions import directions as launch

    return launch(weight, dtype)


def route_fwd(inputs: RouteInputs, options: RouteOptions, wanted: Wanted) -> Routed:
    """One routing, with its statistics: two launches."""
    return _route(inputs, options, wanted, want_rank=False)[0]


def _route(inputs: RouteInputs, options: RouteOptions, wanted: Wanted, *, want_rank: bool) -> tuple[Routed, Any]:
    """The routing, and what the launcher left of it for dispatch."""
    from kmeans_route.kernels.route import route_fwd as launch

    x, directions, expert_bias, mask, count_mask, indices = inputs
    scores, std, hist = wanted
    r = launch(
        *(x, directions, expert_bias, mask, indices, options),
        count_mask=count_mask,
        want_scores=scores,
        want_std=std,
        want_hist=hist,
        want_rank=want_rank,
    )
    counted = None
    if count_mask is not None:
        counted = plain.count_among(r.indices, r.valid & count_mask, directions.shape[0])
    choice = (r.indices, r.weights, r.selected, r.scores, r.candidates, r.counts, r.inv_norm, r.valid)
    return Routed(*choice, counted, r.score_std, r.margin_hist, r.dropped), r


def route_dispatch_fwd(
    inputs: RouteInputs, options: RouteOptions, wanted: Wanted, accumulate: str
) -> tuple[Routed, Dispatch, Tensor | None]:
    """route, then dispatch and centroid sums (S, E, D) in one more pass over x. accumulate: "unit", "raw" or ""."""
    from kmeans_route.kernels.dispatch import Ranks, dispatch_fwd

    x, directions, count_mask = inputs.x, inputs.directions, inputs.count_mask
    routed, r = _route(inputs, options, wanted, want_rank=True)
    factor = r.inv_norm if accumulate == "unit" else None
    if count_mask is not None:  # copies go to all valid tokens, so what does not count gets a factor of 0
        factor = count_mask.to(r.inv_norm.dtype) if factor is None else torch.where(count_mask, factor, 0.0)
    ranks = Ranks(r.rank, r.block_counts, r.offsets, r.block)
    num_experts = directions.shape[0]
    sent = dispatch_fwd(x, r.indices, r.valid, num_experts, ranks, factor, want_sums=bool(accumulate))
    return routed, Dispatch(sent.x_sorted, sent.positions, sent.token_of_row, r.offsets), sent.partials


def num_partials(x: Tensor, num_experts: int, top_k: int) -> int:
    """S of `route_dispatch_fwd`: over how many parts the centroid sums come."""
    from kmeans_route.kernels.dispatch import row_splits

    num_tokens, hidden_size = x.shape
    return row_splits(num_tokens, hidden_size, num_experts, top_k)


def route_bwd(
    x: Tensor,
    directions: Tensor,
    saved: SavedRouting,
    grads: RoutingGrads,
    d_x_sorted: Tensor | None,
    positions: Tensor | None,
    options: RouteOptions,
) -> Tensor:
    """dx of the routing and, where d_x_sorted is given, of the dispatch: one launch.

    A gradient over all experts is a dense product, which a GPU's own library does best.
    """
    if grads.scores is not None or (options.over_all and grads.weights is not None):
        dx = plain.route_bwd(x, directions, saved, grads, None, None, options)
        if d_x_sorted is not None:
            assert positions is not None
            dx += combine_fwd(d_x_sorted, positions, None, saved.valid)
        return dx
    from kmeans_route.kernels.route_bwd import route_bwd as launch

    routed = (saved.indices, saved.selected_scores, saved.inv_norm, saved.valid)
    gates = (options.gate, options.tau, options.normalize, options.scaling)
    return launch(x, directions, *routed, grads.weights, grads.selected_scores, d_x_sorted, positions, *gates)


def dispatch_fwd(x: Tensor, indices: Tensor, counts: Tensor, valid: Tensor, *, copies: bool) -> Dispatch:
    """Rows in expert order: three launches."""
    from kmeans_route.kernels import dispatch as kernels

    num_experts, indices = counts.shape[0], indices.contiguous()
    ranks = kernels.rank(indices, valid, num_experts)
    sent = kernels.dispatch_fwd(x, indices, valid, num_experts, ranks, copies=copies)
    return Dispatch(sent.x_sorted, sent.positions, sent.token_of_row, ranks.offsets)


def combine_fwd(rows: Tensor, positions: Tensor, weights: Tensor | None, valid: Tensor) -> Tensor:
    """Weighted sum of each token's rows, in token order: one launch."""
    from kmeans_route.kernels.combine import combine_fwd as launch

    return launch(rows, positions, weights, valid)


def combine_bwd(
    dy: Tensor,
    y_sorted: Tensor,
    weights: Tensor,
    positions: Tensor,
    token_of_row: Tensor,
    offsets: Tensor,
    valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """d y_sorted (T*K, D), zero at offsets[E] and after, and d weights (T, K): one launch."""
    from kmeans_route.kernels.combine import combine_bwd as launch

    return launch(dy, y_sorted, weights, positions, valid)


def centroid_sums(x: Tensor, indices: Tensor, factor: Tensor | None, valid: Tensor, num_experts: int) -> Tensor:
    """(S, E, D) fp32: sums of factor_t x_t over valid tokens, or of x_t without a factor, in parts: one launch."""
    from kmeans_route.kernels.dispatch import dispatch_fwd as launch

    sums = launch(x, indices.contiguous(), valid, num_experts, None, factor, want_sums=True).partials
    assert sums is not None, "asked for"
    return sums


def accumulate(
    x: Tensor,
    indices: Tensor,
    factor: Tensor | None,
    valid: Tensor,
    partials: Tensor | None,
    batch: Statistics,
    pending: PendingStatistics,
    pairs: Tensor | None,
) -> None:
    """Add a batch to what is pending, in place: one launch, two where its centroid sums are still to be taken."""
    from kmeans_route.kernels.accumulate import accumulate as launch

    if partials is None:
        partials = centroid_sums(x, indices, factor, valid, batch.counts.shape[0])
    launch(partials, batch.counts, batch.score_std, batch.num_dropped, batch.margin_hist, indices.shape[1], *pending)
    if pairs is not None:
        plain.count_pairs_(pairs, indices, valid)


def commit(state: RouterState, pending: PendingStatistics, skip: Tensor | None, options: CommitOptions) -> None:
    """Fold what is pending into the state and empty it, in place: one launch."""
    from kmeans_route.kernels.commit import commit as launch

    launch(*state, *pending, skip, options.top_k, options.decay, options.balance, options.bias_rate, options.directions)
