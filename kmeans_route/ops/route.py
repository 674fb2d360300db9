"""route, and route_dispatch: routing and dispatch under one autograd node, for backends that have both in one.

Source of the method: arXiv 2605.12476.
"""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from kmeans_route import backends
from kmeans_route.backends.torch import directions_bwd
from kmeans_route.checks import check_index_values
from kmeans_route.ops.dispatch import dispatch
from kmeans_route.ops.schema import (
    OPTIONS,
    arguments,
    direct,
    direct_in_backward,
    looked_at,
    no_autocast,
    results,
    take,
)
from kmeans_route.reference import NUM_MARGIN_BINS, compute_dtype
from kmeans_route.types import Dispatch, Routed, RouteInputs, RouteOptions, RoutingGrads, SavedRouting, Tokens, Wanted


def route(
    tokens: Tokens, directions: Tensor, expert_bias: Tensor | None, options: RouteOptions, wanted: Wanted
) -> Routed:
    """The routing of tokens by directions (E, D) in their dtype, differentiable in both."""
    inputs = RouteInputs(tokens.x, directions, expert_bias, tokens.mask, tokens.count_mask, tokens.indices)
    call = _route_body if tokens.backend.PLAIN else _route_call
    return Routed(*call(tokens.x, directions, inputs, options, wanted, tokens.backend))


def _route_body(
    _x: Tensor, _directions: Tensor, inputs: RouteInputs, options: RouteOptions, wanted: Wanted, backend: Any
) -> Routed:
    """Tensors that autograd is to know come first, and once more among `inputs`."""
    if inputs.indices is not None and not backends.by_definition():
        check_index_values(inputs.indices, inputs.directions.shape[0])
    with no_autocast(inputs.x):
        routed: Routed = backend.route_fwd(inputs, options, wanted)
        return routed


def _split(flat: tuple[Any, ...]) -> tuple[RouteInputs, RouteOptions, Wanted, list[Any]]:
    """The arguments of an operator by name, and those after them."""
    values = iter(flat)
    return take(RouteInputs, values), take(RouteOptions, values), take(Wanted, values), list(values)


def _route_by_name(*flat: Any) -> tuple[Tensor, ...]:
    inputs, options, wanted, (name,) = _split(flat)
    return _present(_route_body(*inputs[:2], inputs, options, wanted, backends.get(name)), inputs)


_route = torch.library.custom_op(
    "kmeans_route::route",
    _route_by_name,
    mutates_args=(),
    schema=f"({arguments(RouteInputs)}, {OPTIONS}, str backend) -> {results(Routed)}",
)


def _empty(inputs: RouteInputs, options: RouteOptions, wanted: Wanted) -> tuple[Any, ...]:
    """The shapes and dtypes of a routing."""
    x, num_experts, over_all = inputs.x, inputs.directions.shape[0], options.over_all
    num_tokens, dtype = x.shape[0], compute_dtype(x.dtype)
    by_slot, by_expert = (num_tokens, options.top_k), (num_tokens, num_experts)
    routed = Routed(
        indices=x.new_empty(by_slot, dtype=torch.int64),
        weights=x.new_empty(by_slot, dtype=dtype),
        selected_scores=x.new_empty(by_slot, dtype=dtype),
        scores=x.new_empty(by_expert, dtype=dtype) if wanted.scores or over_all else None,
        candidates=x.new_empty(by_expert, dtype=torch.bool) if over_all else None,
        tokens_per_expert=x.new_empty(num_experts, dtype=torch.int64),
        inv_norm=x.new_empty(num_tokens, dtype=dtype),
        valid=x.new_empty(num_tokens, dtype=torch.bool),
        counted=None if inputs.count_mask is None else x.new_empty(num_experts, dtype=torch.int64),
        score_std=x.new_empty(num_tokens, dtype=dtype) if wanted.std else None,
        margin_hist=x.new_empty((num_experts, NUM_MARGIN_BINS), dtype=torch.int32) if wanted.hist else None,
        num_dropped=x.new_empty((), dtype=torch.int64),
    )
    return _present(routed, inputs)


def _present(routed: Routed, inputs: RouteInputs) -> tuple[Any, ...]:
    """As an operator returns it, which returns tensors alone: absent results are empty ones."""
    x, num_experts, dtype = inputs.x, inputs.directions.shape[0], compute_dtype(inputs.x.dtype)

    def present(result: Tensor | None, *shape: int, dtype: torch.dtype) -> Tensor:
        return x.new_empty(shape, dtype=dtype) if result is None else result

    return routed._replace(
        scores=present(routed.scores, 0, num_experts, dtype=dtype),
        candidates=present(routed.candidates, 0, num_experts, dtype=torch.bool),
        counted=present(routed.counted, 0, dtype=torch.int64),
        score_std=present(routed.score_std, 0, dtype=dtype),
        margin_hist=present(routed.margin_hist, 0, NUM_MARGIN_BINS, dtype=torch.int32),
    )


@_route.register_fake
def _(*flat: Any) -> tuple[Tensor, ...]:
    inputs, options, wanted, _ = _split(flat)
    return _empty(inputs, options, wanted)


_saved_fields = attrgetter(*SavedRouting._fields)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Of the operators."""
    given, options, wanted, (*_, name) = _split(inputs)
    _setup_direct(ctx, (*given[:2], given, options, wanted, backends.get(name)), output)
    ctx.num_inputs = len(inputs)


def _setup_direct(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, directions, _given, ctx.options, ctx.wanted, *_accumulate, backend = inputs
    results = iter(output)
    routed, rest = take(Routed, results), tuple(results)
    positions = take(Dispatch, iter(rest)).positions if rest else None
    ctx.save_for_backward(x, directions, *_saved_fields(routed), positions)
    ctx.backend, ctx.num_inputs = backend.NAME, len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """dx and the gradient of the directions, each where it is wanted and anything came for it."""
    x, directions, *saved, positions = ctx.saved_tensors
    came = iter(grads)
    routed, rest = take(Routed, came), tuple(came)
    scores = routed.scores if ctx.wanted.scores else None
    back = RoutingGrads(routed.weights, routed.selected_scores, scores)
    d_x_sorted = take(Dispatch, iter(rest)).x_sorted if rest else None
    through_routing = any(each is not None for each in back)
    dx = d_directions = None
    if ctx.needs_input_grad[0] and (through_routing or d_x_sorted is not None):
        dx = _route_bwd_call(x, directions, SavedRouting(*saved), back, d_x_sorted, positions, ctx.options, ctx.backend)
    if ctx.needs_input_grad[1] and through_routing:
        d_directions = _directions_bwd_call(x, directions, SavedRouting(*saved), back, ctx.options)
    return dx, d_directions, *(None,) * (ctx.num_inputs - 2)


_route.register_autograd(_backward, setup_context=_setup)
_route_call = direct(
    lambda _x, _directions, inputs, options, wanted, backend: _route(*inputs, *options, *wanted, backend.NAME),
    _route_body,
    _setup_direct,
    _backward,
)

BACK = f"Tensor x, Tensor directions, {arguments(SavedRouting)}, {arguments(RoutingGrads, 'd_')}"


def split_back(flat: tuple[Any, ...]) -> tuple[Tensor, Tensor, SavedRouting, RoutingGrads, list[Any]]:
    """The arguments of an operator of the backward by name, and those after them."""
    values = iter(flat)
    return next(values), next(values), take(SavedRouting, values), take(RoutingGrads, values), list(values)


def _route_bwd_body(
    x: Tensor,
    directions: Tensor,
    saved: SavedRouting,
    grads: RoutingGrads,
    d_x_sorted: Tensor | None,
    positions: Tensor | None,
    options: RouteOptions,
    name: str,
) -> Tensor:
    """dx of the routing, plus, where d_x_sorted is given, of the dispatch."""
    with no_autocast(x):
        dx: Tensor = backends.get(name).route_bwd(x, directions, saved, grads, d_x_sorted, positions, options)
        return dx


def _route_bwd_by_name(*flat: Any) -> Tensor:
    x, directions, saved, grads, (d_x_sorted, positions, *options, name) = split_back(flat)
    return _route_bwd_body(x, directions, saved, grads, d_x_sorted, positions, RouteOptions(*options), name)


_route_bwd = torch.library.custom_op(
    "kmeans_route::route_bwd",
    _route_bwd_by_name,
    mutates_args=(),
    schema=f"({BACK}, Tensor? d_x_sorted, Tensor? positions, {arguments(RouteOptions)}, str backend) -> Tensor",
)


_route_bwd_call = direct_in_backward(
    lambda x, directions, saved, grads, d_x_sorted, positions, options, name: _route_bwd(
        x, directions, *saved, *grads, d_x_sorted, positions, *options, name
    ),
    _route_bwd_body,
)


@_route_bwd.register_fake
def _(x: Tensor, *_flat: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _directions_bwd_body(
    x: Tensor, directions: Tensor, saved: SavedRouting, grads: RoutingGrads, options: RouteOptions
) -> Tensor:
    """The gradient of the directions (E, D), for those that are learned in part. The same on every backend."""
    with no_autocast(x):
        return directions_bwd(x, directions.shape[0], saved, grads, options)


def _directions_bwd_by_name(*flat: Any) -> Tensor:
    x, directions, saved, grads, options = split_back(flat)
    return _directions_bwd_body(x, directions, saved, grads, RouteOptions(*options))


_directions_bwd = torch.library.custom_op(
    "kmeans_route::directions_bwd",
    _directions_bwd_by_name,
    mutates_args=(),
    schema=f"({BACK}, {arguments(RouteOptions)}) -> Tensor",
)


_directions_bwd_call = direct_in_backward(
    lambda x, directions, saved, grads, options: _directions_bwd(x, directions, *saved, *grads, *options),
    _directions_bwd_body,
)


@_directions_bwd.register_fake
def _(x: Tensor, directions: Tensor, *_flat: Any) -> Tensor:
    return directions.new_empty(directions.shape)


def route_dispatch(
    tokens: Tokens,
    directions: Tensor,
    expert_bias: Tensor | None,
    options: RouteOptions,
    wanted: Wanted,
    accumulate: str,
) -> tuple[Routed, Dispatch, Tensor | None]:
    """Routing, copies in expert order, and where a backend has both in one pass the centroid sums in parts (S, E, D).

    accumulate: which sums, "unit" or "raw", or "" for none.
    """
    backend = tokens.backend
    if not backend.FUSED:
        routed = route(tokens, directions, expert_bias, options, wanted)
        return routed, dispatch(tokens.x, routed.indices, routed.tokens_per_expert, routed.valid, backend), None
    inputs = RouteInputs(tokens.x, directions, expert_bias, tokens.mask, tokens.count_mask, tokens.indices)
    values = iter(_route_dispatch_call(tokens.x, directions, inputs, options, wanted, accumulate, backend))
    return take(Routed, values), take(Dispatch, values), next(values)


def _route_dispatch_body(
    _x: Tensor,
    _directions: Tensor,
    inputs: RouteInputs,
    options: RouteOptions,
    wanted: Wanted,
    accumulate: str,
    backend: Any,
) -> tuple[Any, ...]:
    if inputs.indices is not None:
        check_index_values(inputs.indices, inputs.directions.shape[0])
    with no_autocast(inputs.x):
        routed, sent, partials = backend.route_dispatch_fwd(inputs, options, wanted, accumulate)
        return *routed, *sent, partials


def _route_dispatch_by_name(*flat: Any) -> tuple[Tensor, ...]:
    inputs, options, wanted, (accumulate, name) = _split(flat)
    values = iter(_route_dispatch_body(*inputs[:2], inputs, options, wanted, accumulate, backends.get(name)))
    routed, sent, partials = take(Routed, values), take(Dispatch, values), next(values)
    if partials is None:
        partials = inputs.x.new_empty(0, *inputs.directions.shape, dtype=torch.float32)
    return *_present(routed, inputs), *sent, partials


_route_dispatch = torch.library.custom_op(
    "kmeans_route::route_dispatch",
    _route_dispatch_by_name,
    mutates_args=(),
    schema=f"({arguments(RouteInputs)}, {OPTIONS}, str accumulate, str backend) -> {results(Routed, Dispatch, more=1)}",
)


@_route_dispatch.register_fake
def _(*flat: Any) -> tuple[Tensor, ...]:
    inputs, options, wanted, (accumulate, name) = _split(flat)
    x, num_experts = inputs.x, inputs.directions.shape[0]
    num_tokens, hidden_size = x.shape
    rows = num_tokens * options.top_k
    sent = Dispatch(
        x_sorted=x.new_empty(rows, hidden_size),
        positions=x.new_empty(num_tokens, options.top_k, dtype=torch.int64),
        token_of_row=x.new_empty(rows, dtype=torch.int64),
        offsets=x.new_empty(num_experts + 1, dtype=torch.int32),
    )
    num_partials = backends.get(name).num_partials(x, num_experts, options.top_k) if accumulate else 0
    partials = x.new_empty(num_partials, num_experts, hidden_size, dtype=torch.float32)
    return *_empty(inputs, options, wanted), *sent, partials


_route_dispatch.register_autograd(_backward, setup_context=_setup)
_route_dispatch_call = direct(
    lambda _x, _directions, inputs, options, wanted, accumulate, backend: _route_dispatch(
        *inputs, *options, *wanted, accumulate, backend.NAME
    ),
    _route_dispatch_body,
    _setup_direct,
    _backward,
)


def directions(weight: Tensor, dtype: torch.dtype, backend: Any) -> Tensor:
    """Unit rows of weight (E, D) in `dtype`, without a gradient; one operator to whoever traces, so that compiled and
    eager routing have the same bits."""
    if backend.PLAIN or not looked_at(weight):
        unit: Tensor = backend.directions(weight, dtype)
    else:
        unit = _directions(weight, dtype, backend.NAME)
    return unit


def _directions_by_name(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    unit: Tensor = backends.get(name).directions(weight, dtype)
    return unit


_directions = torch.library.custom_op(
    "kmeans_route::directions",
    _directions_by_name,
    mutates_args=(),
    schema="(Tensor weight, ScalarType dtype, str backend) -> Tensor",
)


@_directions.register_fake
def _(weight: Tensor, dtype: torch.dtype, _name: str) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)
