"""Pure routing functions: they check, choose a backend (`kmeans_route.backends`) once, and call it."""

import torch
from torch import Tensor

from kmeans_route import backends, ops
from kmeans_route.checks import (
    ACCUMULATES,
    DEFAULT_TAU,
    check_bias,
    check_centroids,
    check_choice,
    check_device,
    check_indices,
    check_plain,
    check_route_options,
    flatten_hidden_states,
    flatten_mask,
)
from kmeans_route.types import Dispatch, Routing, Tokens, Wanted


def enter(
    x: Tensor,
    mask: Tensor | None,
    count_mask: Tensor | None,
    indices: Tensor | None,
    *,
    centroids: Tensor,
    owner: str,
    top_k: int,
    backend: str,
) -> Tokens:
    """Check hidden states (..., D) and what comes with them, flatten them, and choose the backend.

    Args:
        centroids: (E, D), on the device where x must be. owner: whose they are, for the message.
    """
    ops.tell_flop_counters()
    check_plain(owner, centroids, state=True)
    num_experts, hidden_size = centroids.shape
    x_TD = flatten_hidden_states(x, hidden_size)
    check_device("x", x, centroids.device, owner)
    return Tokens(
        x_TD,
        None if mask is None else flatten_mask(mask, x),
        None if count_mask is None else flatten_mask(count_mask, x, "count_mask"),
        None if indices is None else check_indices(indices, x, top_k),
        backends.choose(backend, x.device, x.dtype, num_experts),
    )


def directions(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit rows of the centroids, rounded to the dtype of the hidden states.

    Args:
        weight: (E, D) centroids, floating point, any scale.
        dtype: dtype of the hidden states that will be scored.

    Returns:
        (E, D) in `dtype`: c_e / ||c_e||, or 0 where ||c_e|| < 1e-12 or not finite. No gradient.
    """
    check_centroids(weight)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}: pass the dtype of the hidden states")
    return ops.directions(weight, dtype, backends.choose("auto", weight.device, dtype))


def route(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    expert_bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    indices: Tensor | None = None,
    directions: Tensor | None = None,
    gate: str = "softmax",
    tau: float = DEFAULT_TAU,
    normalize: bool = True,
    scaling: float = 1.0,
    n_group: int | None = None,
    topk_group: int | None = None,
    group_score: str = "top2",
    return_scores: bool = False,
    backend: str = "auto",
) -> Routing:
    """Choose the top_k experts whose centroids have the largest cosine with each hidden state.

    The method is arXiv 2605.12476. The gradient reaches x through `weights`, `selected_scores` and `scores`, and
    `directions` where they are given and require one; none reaches the centroids or the bias.

    Args:
        x: hidden states (..., D), floating point; T is the product of the leading dimensions. A token has a direction,
            and is valid, where the sum of its squares is at least 1e-30 (a norm of 1e-15) and finite in fp32; any other
            gets weights 0 and is not counted.
        weight: centroids (E, D), any scale; only their directions matter.
        top_k: experts a token, in [1, E].
        expert_bias: (E,) added to the scores for selection only, never for the gates; None for 0. Values beyond
            +-1024 count as that, NaN as -1024.
        mask: bool, shape x.shape[:-1]; false leaves a token out (weights 0, no gradient, not counted).
        indices: (T, K) int64 ids to replay instead of choosing, in [0, E), distinct in each row; a row of -1 is
            routed as if none had been given. So is, on a GPU, where looking at them would stall the device, any row
            that is neither.
        directions: (E, D) in x's dtype, finite, what `directions(weight, x.dtype)` returns, to save that step.
        gate: "softmax", "sigmoid", "cosine" or "uniform" over the selected scores.
        tau: temperature of the softmax and sigmoid gates, at least 1e-6, in units of cosine.
        normalize: True: gates sum to `scaling` over the selected experts. False: softmax over all candidates, the
            others without the division.
        scaling: factor on the gates, in [1e-30, 1e30).
        n_group, topk_group: choose from the `topk_group` best of `n_group` equal groups of experts; None for all.
        group_score: a group's score: "top2", the sum of its two largest s + b, or "max".
        return_scores: also return all scores (T, E).
        backend: "auto", "torch", "triton" or "reference".

    Returns:
        Routing, flattened to T rows; weights and scores in fp32 (fp64 for fp64 x).

    Raises:
        ValueError: a shape or a value is out of range. TypeError: a wrong dtype. RuntimeError: tensors on different
            devices, or a backend that is not there.

    Example:
        >>> import torch, kmeans_route
        >>> x, centroids = torch.eye(4)[:3], torch.eye(4)
        >>> kmeans_route.route(x, centroids, top_k=1).indices.flatten().tolist()
        [0, 1, 2]
    """
    check_centroids(weight)
    num_experts = weight.shape[0]
    options = check_route_options(
        num_experts,
        top_k,
        gate=gate,
        tau=tau,
        normalize=normalize,
        scaling=scaling,
        n_group=n_group,
        topk_group=topk_group,
        group_score=group_score,
    )
    tokens = enter(x, mask, None, indices, centroids=weight, owner="weight", top_k=top_k, backend=backend)
    if expert_bias is not None:
        check_plain("expert_bias", expert_bias)
        check_bias(expert_bias, num_experts, x.device, "x")
    if directions is None:
        directions = ops.directions(weight, x.dtype, tokens.backend)
    elif directions.shape != weight.shape or directions.dtype != x.dtype:
        raise ValueError(
            f"directions must be {tuple(weight.shape)} in {x.dtype}, got {tuple(directions.shape)} in "
            f"{directions.dtype}: pass kmeans_route.directions(weight, x.dtype)"
        )
    check_device("directions", directions, x.device, "x")
    routed = ops.route(tokens, directions, expert_bias, options, Wanted(scores=return_scores))
    return routed.routing(want_scores=return_scores)


def _check_given(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        made_by = kind.__name__.lower().replace("routing", "route")
        raise TypeError(
            f"{name} must be a {kind.__name__}, got {type(value).__name__}: pass what kmeans_route.{made_by} returns"
        )


def _check_routing(x: Tensor, routing: Routing) -> Tensor:
    _check_given("routing", routing, Routing)
    x_TD = flatten_hidden_states(x, x.shape[-1] if isinstance(x, Tensor) and x.dim() else 0)
    if x_TD.shape[0] != routing.indices.shape[0]:
        raise ValueError(
            f"x must have the {routing.indices.shape[0]} tokens of the routing, got {x_TD.shape[0]}: "
            "pass the hidden states that were routed"
        )
    check_device("x", x, routing.indices.device, "the routing")
    return x_TD


def dispatch(x: Tensor, routing: Routing, *, copies: bool = True, backend: str = "auto") -> Dispatch:
    """Copy each token to the rows of its experts, so that each expert's rows are contiguous.

    Args:
        x: (..., D) hidden states, the same tokens as `routing`, any floating dtype.
        routing: from `route`.
        copies: False leaves x_sorted empty, (0, D), for a grouped product that gathers rows by token_of_row itself.
        backend: "auto", "torch", "triton" or "reference".

    Returns:
        Dispatch: x_sorted (T*K, D) in x's dtype, differentiable in x; positions (T, K); token_of_row (T*K,);
        offsets (E+1,) int32. Rows of tokens that are not valid lie after offsets[E] and are zero.

    Raises:
        ValueError: x has another number of tokens than the routing. RuntimeError: another device.
    """
    x_TD = _check_routing(x, routing)
    chosen = backends.choose(backend, x.device, x.dtype, routing.tokens_per_expert.shape[0])
    return ops.dispatch(x_TD, routing.indices, routing.tokens_per_expert, routing.valid, chosen, copies=copies)


def combine(y_sorted: Tensor, routing: Routing, dispatch: Dispatch, *, backend: str = "auto") -> Tensor:
    """Weighted sum of each token's expert outputs, back in token order.

    Args:
        y_sorted: (T*K, D) expert outputs in the order of `dispatch.x_sorted`; rows at offsets[E] and after are never
            read, whatever they hold.
        routing: from `route`; its weights get a gradient.
        dispatch: from `dispatch`.
        backend: "auto", "torch", "triton" or "reference".

    Returns:
        (T, D) in y_sorted's dtype: y_t = sum over k of g_tk y_sorted[positions_tk], accumulated in fp32; 0 for tokens
        that are not valid.

    Raises:
        ValueError: y_sorted has not T*K rows. RuntimeError: another device.
    """
    _check_given("routing", routing, Routing)
    _check_given("dispatch", dispatch, Dispatch)
    rows = routing.indices.numel()
    check_plain("y_sorted", y_sorted)
    if y_sorted.dim() != 2 or y_sorted.shape[0] != rows:
        raise ValueError(
            f"y_sorted must have shape ({rows}, D), got {tuple(y_sorted.shape)}: one row for each row of x_sorted"
        )
    check_device("y_sorted", y_sorted, routing.indices.device, "the routing")
    chosen = backends.choose(backend, y_sorted.device, y_sorted.dtype)
    return ops.combine(y_sorted, routing.weights, dispatch, routing.valid, chosen)


def centroid_sums(
    x: Tensor, routing: Routing, *, accumulate: str = "unit", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Sum of the hidden states routed to each expert, and how many they are.

    Args:
        x: (..., D) hidden states, the same tokens as `routing`.
        routing: from `route`.
        accumulate: "unit" sums x_t / ||x_t||, "raw" sums x_t.
        backend: "auto", "torch", "triton" or "reference".

    Returns:
        sums (E, D) fp32 (fp64 for fp64 x), no gradient; counts (E,) int64. Tokens that are not valid add nothing.
        The same input gives the same bits.

    Raises:
        ValueError: an unknown `accumulate`, or x has another number of tokens than the routing.
    """
    check_choice("accumulate", accumulate, ACCUMULATES)
    x_TD = _check_routing(x, routing)
    num_experts = routing.tokens_per_expert.shape[0]
    chosen = backends.choose(backend, x.device, x.dtype, num_experts)
    factor = routing.inv_norm if accumulate == "unit" else None
    sums = ops.centroid_sums(x_TD.detach(), routing.indices, factor, routing.valid, num_experts, chosen)
    return sums, routing.tokens_per_expert
