"""Pure routing functions: they check, choose a backend and call it.

Backends: "torch" runs anywhere and is tuned for CPU; "triton" runs the fused kernels on a GPU; "reference" is the
definition, slow and plain. "auto" takes "triton" on a GPU where Triton is installed, for at most 1024 experts in fp32,
fp16 or bf16, else "torch".
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from kmeans_route import ops, reference
from kmeans_route.checks import (
    ACCUMULATES,
    BACKENDS,
    DEFAULT_TAU,
    TRITON_MAX_EXPERTS,
    RouteOptions,
    check_choice,
    check_device,
    check_index_values,
    check_indices,
    check_route_options,
    flatten_hidden_states,
    flatten_mask,
)
from kmeans_route.types import Dispatch, Routing

TRITON_INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype = torch.float32, num_experts: int = 1) -> str:
    """The backend that runs: "reference", "torch" or "triton".

    Raises:
        ValueError: an unknown name, or "triton" for more experts than it takes. RuntimeError: "triton" where it cannot
        run: it is not installed, or the tensor is not on a GPU (and TRITON_INTERPRET is not set). TypeError: "triton"
        for a dtype that it does not take.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        able = device.type == "cuda" and dtype in TRITON_DTYPES and num_experts <= TRITON_MAX_EXPERTS
        return "triton" if TRITON_INSTALLED and able else "torch"
    if backend == "triton":
        _check_triton(device, dtype, num_experts)
    return backend


def _check_triton(device: torch.device, dtype: torch.dtype, num_experts: int) -> None:
    if not TRITON_INSTALLED:
        raise RuntimeError(
            "backend must be one whose library is installed, got 'triton' without Triton: "
            'pip install "kmeans_route[triton]", or use backend="auto"'
        )
    if device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"backend='triton' must get tensors on a GPU, got one on {device}: move the tensors, or use backend='auto' "
            "(TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
        )
    if dtype not in TRITON_DTYPES:
        raise TypeError(
            f"backend='triton' must get float32, float16 or bfloat16, got {dtype}: cast the tensor, or use "
            "backend='auto'"
        )
    if num_experts > TRITON_MAX_EXPERTS:
        raise ValueError(
            f"num_experts must be at most {TRITON_MAX_EXPERTS} for backend='triton', got {num_experts}: use "
            "backend='auto', which takes the torch backend for more"
        )


def directions(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit rows of the centroids, rounded to the dtype of the hidden states.

    Args:
        weight: (E, D) centroids, floating point, any scale.
        dtype: dtype of the hidden states that will be scored.

    Returns:
        (E, D) in `dtype`: c_e / ||c_e||, or 0 where ||c_e|| < 1e-12 or not finite. No gradient.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight must be a floating point (E, D) matrix, got {weight.dtype} {tuple(weight.shape)}: "
            "pass one centroid a row"
        )
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}: pass the dtype of the hidden states")
    return directions_for(choose_backend("auto", weight.device, dtype), weight, dtype)


def directions_for(backend: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`directions` by the chosen backend, without the checks."""
    # A compiler fuses the plain form by itself; a launch that is no operator has no place in its graph.
    if backend == "triton" and weight.dtype == torch.float32 and not torch.compiler.is_compiling():
        from kmeans_route.kernels import commit

        return commit.directions(weight, dtype)
    return reference.directions_reference(weight, dtype)


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
        x: hidden states (..., D), floating point; T is the product of the leading dimensions.
        weight: centroids (E, D), any scale; only their directions matter.
        top_k: experts a token, in [1, E].
        expert_bias: (E,) added to the scores for selection only, never for the gates; None for 0. Values beyond
            +-1024 count as that, NaN as -1024.
        mask: bool, shape x.shape[:-1]; false leaves a token out (weights 0, no gradient, not counted).
        indices: (T, K) int64 ids to replay instead of choosing, in [0, E), distinct in each row. On a GPU, where
            looking at them would stall the device, a row that is not so is routed as if none had been given.
        directions: (E, D) in x's dtype, finite, what `directions(weight, x.dtype)` returns, to save that step.
        gate: "softmax", "sigmoid", "cosine" or "uniform" over the selected scores.
        tau: temperature of the softmax and sigmoid gates, > 0, in units of cosine.
        normalize: True: gates sum to `scaling` over the selected experts. False: softmax over all candidates, the
            others without the division.
        scaling: factor on the gates, > 0.
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
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight must be a floating point (E, D) matrix, got {weight.dtype} {tuple(weight.shape)}: "
            "pass one centroid a row"
        )
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
    x_TD = flatten_hidden_states(x, weight.shape[1])
    check_device("x", x, weight.device, "weight")
    if expert_bias is not None:
        if tuple(expert_bias.shape) != (num_experts,):
            raise ValueError(
                f"expert_bias must have shape {(num_experts,)}, got {tuple(expert_bias.shape)}: one value an expert"
            )
        check_device("expert_bias", expert_bias, x.device, "x")
    chosen = choose_backend(backend, x.device, x.dtype, num_experts)
    if directions is None:
        directions = directions_for(chosen, weight, x.dtype)
    elif directions.shape != weight.shape or directions.dtype != x.dtype:
        raise ValueError(
            f"directions must be {tuple(weight.shape)} in {x.dtype}, got {tuple(directions.shape)} in "
            f"{directions.dtype}: pass kmeans_route.directions(weight, x.dtype)"
        )
    check_device("directions", directions, x.device, "x")
    return route_checked(
        x_TD,
        directions,
        expert_bias,
        flatten_mask(mask, x),
        check_indices(indices, x, top_k),
        options,
        return_scores=return_scores,
        backend=chosen,
    )


def route_checked(
    x: Tensor,
    directions: Tensor,
    expert_bias: Tensor | None,
    mask: Tensor | None,
    indices: Tensor | None,
    options: RouteOptions,
    *,
    return_scores: bool,
    backend: str,
) -> Routing:
    """`route` after its checks, for callers that have made them: x (T, D), a chosen backend."""
    if backend == "reference":
        if indices is not None:
            check_index_values(indices, directions.shape[0])
        routing = reference.route_reference(x, directions, expert_bias, mask, indices, options)
        return routing if return_scores else routing._replace(scores=None)
    return ops.route_with_stats(
        x, directions, expert_bias, mask, indices, options,
        want_scores=return_scores, want_std=False, want_hist=False, backend=backend,
    )[0]  # fmt: skip


def _check_routing(x: Tensor, routing: Routing) -> Tensor:
    x_TD = flatten_hidden_states(x, x.shape[-1] if x.dim() else 0)
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
    chosen = choose_backend(backend, x.device, x.dtype, routing.tokens_per_expert.shape[0])
    if chosen == "reference":
        sent = reference.dispatch_reference(x_TD, routing)
        return sent if copies else sent._replace(x_sorted=sent.x_sorted[:0])
    return Dispatch(*ops.dispatch(x_TD, routing.indices, routing.tokens_per_expert, routing.valid, copies, chosen))


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
    rows = routing.indices.numel()
    if y_sorted.dim() != 2 or y_sorted.shape[0] != rows:
        raise ValueError(
            f"y_sorted must have shape ({rows}, D), got {tuple(y_sorted.shape)}: one row for each row of x_sorted"
        )
    check_device("y_sorted", y_sorted, routing.indices.device, "the routing")
    chosen = choose_backend(backend, y_sorted.device, y_sorted.dtype)
    if chosen == "reference":
        return reference.combine_reference(y_sorted, routing, dispatch)
    y: Tensor = ops.combine(
        y_sorted, routing.weights, dispatch.positions, dispatch.token_of_row, dispatch.offsets, routing.valid, chosen
    )
    return y


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
    chosen = choose_backend(backend, x.device, x.dtype, num_experts)
    if chosen == "reference":
        return reference.centroid_sums_reference(x_TD, routing, accumulate)
    sums = ops.centroid_sums(
        x_TD.detach(), routing.indices, routing.inv_norm, routing.valid, num_experts, accumulate, chosen
    )
    return sums, routing.tokens_per_expert
