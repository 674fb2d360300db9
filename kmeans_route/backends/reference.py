"""Backend "reference": the definition (`kmeans_route.reference`) with the signatures of a backend.

Autograd differentiates these functions, twice if need be, so no operator stands before them, and there are no backward
functions: `PLAIN`. What changes state in place is shared with the torch backend.
"""

import torch
from torch import Tensor

from kmeans_route import reference
from kmeans_route.backends.torch_statistics import accumulate as accumulate
from kmeans_route.backends.torch_statistics import commit as commit
from kmeans_route.types import Dispatch, Routed, RouteInputs, RouteOptions, Wanted

NAME, PLAIN, FUSED = "reference", True, False

combine_fwd = reference.combine_reference
directions = reference.directions_reference


def whitened(centroids: Tensor, weight: Tensor) -> Tensor:
    """Directions (L, E, D) of the centroids of L layers."""
    return torch.stack([reference.whitened_reference(*layer) for layer in zip(centroids, weight, strict=True)])


def route_fwd(inputs: RouteInputs, options: RouteOptions, wanted: Wanted) -> Routed:
    """One routing, with its statistics."""
    x, directions, expert_bias, mask, count_mask, indices = inputs
    r = reference.route_reference(x, directions, expert_bias, mask, indices, options)
    assert r.scores is not None
    counted = r.valid if count_mask is None else r.valid & count_mask
    let_in = torch.ones_like(r.valid) if mask is None else mask
    let_in = let_in if count_mask is None else let_in & count_mask
    hist = None
    if wanted.hist:
        margins = reference.margins_reference(r.scores, expert_bias, counted, options)
        hist = reference.margin_hist_reference(*margins)
    return Routed(
        *(r.indices, r.weights, r.selected_scores, r.scores),
        candidates=None,
        tokens_per_expert=r.tokens_per_expert,
        inv_norm=r.inv_norm,
        valid=r.valid,
        counted=None if count_mask is None else reference.loads_reference(r.indices, counted, directions.shape[0]),
        score_std=reference.score_std_reference(r.scores) * counted if wanted.std else None,
        margin_hist=hist,
        num_dropped=(let_in & ~r.valid).sum(),
    )


def dispatch_fwd(x: Tensor, indices: Tensor, counts: Tensor, valid: Tensor, *, copies: bool) -> Dispatch:
    """Rows in expert order."""
    sent = reference.dispatch_reference(x, indices, counts, valid)
    return sent if copies else sent._replace(x_sorted=sent.x_sorted[:0])


def centroid_sums(x: Tensor, indices: Tensor, factor: Tensor | None, valid: Tensor, num_experts: int) -> Tensor:
    """(1, E, D): sums of factor_t x_t, or of x_t, over valid tokens."""
    return reference.centroid_sums_reference(x, indices, factor, valid, num_experts)[None]
