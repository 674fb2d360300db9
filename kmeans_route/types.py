"""Results of the routing functions, each field defined by an equation.

Legend: T tokens, D hidden size, E experts, K top_k. A token is *valid* when its mask is true and
1e-30 <= sum of x_t^2 <= the largest fp32. The compute dtype is fp32, or fp64 when x is fp64.
"""

from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree


class Routing(NamedTuple):
    """Where each token goes and with what weight.

    indices: (T, K) int64, the K experts with the largest s_te + b_e, by decreasing s + b, ties to the lower id;
        0..K-1 for a token that is not valid.
    weights: (T, K) compute dtype, the gate g_te of each selected expert; 0 for a token that is not valid.
    selected_scores: (T, K) compute dtype, s_te = (x_t . d_e) / ||x_t|| at `indices`; 0 for a token that is not valid.
    scores: (T, E) compute dtype, s_te for all experts, or None when not asked for.
    tokens_per_expert: (E,) int64, the number of valid tokens t with e in indices_t; sums to K times the valid tokens.
    inv_norm: (T,) compute dtype, 1 / ||x_t||; 0 for a token that is not valid.
    valid: (T,) bool.
    """

    indices: Tensor
    weights: Tensor
    selected_scores: Tensor
    scores: Tensor | None
    tokens_per_expert: Tensor
    inv_norm: Tensor
    valid: Tensor


class Dispatch(NamedTuple):
    """Hidden states in expert order.

    x_sorted: (T*K, D), x_sorted[positions[t, k]] = x_t; rows of tokens that are not valid lie at offsets[E] and
        after, and are 0.
    positions: (T, K) int64, the row of token t's k-th copy; rows of one expert keep the order of (t, k).
    token_of_row: (T*K,) int64, token_of_row[positions[t, k]] = t.
    offsets: (E+1,) int32, expert e owns rows offsets[e] to offsets[e+1] - 1; offsets[E] = K times the valid tokens.
    """

    x_sorted: Tensor
    positions: Tensor
    token_of_row: Tensor
    offsets: Tensor


class RouterOutput(NamedTuple):
    """What a router module returns.

    weights: (T, K) gate weights, differentiable in x.
    indices: (T, K) int64 expert ids.
    scores: (T, E) cosines (K-Means) or logits (learned), or None unless the router has return_scores=True.
    """

    weights: Tensor
    indices: Tensor
    scores: Tensor | None


class MoEDetails(NamedTuple):
    """One MoE forward laid open, for metrics: no gradient, nothing accumulated.

    routing, dispatch: as above.
    y_sorted: (T*K, D) outputs of the experts before the gate weights; rows at offsets[E] and after are 0.
    y: the layer's output, in the shape of x.
    """

    routing: Routing
    dispatch: Dispatch
    y_sorted: Tensor
    y: Tensor


# So that torch.export.save can write down a program that returns one. The call is private to PyTorch, but the only one
# there is for named tuples; without it everything else works.
if hasattr(_pytree, "_register_namedtuple"):
    for _result in (Routing, Dispatch, RouterOutput, MoEDetails):
        _pytree._register_namedtuple(_result, serialized_type_name=f"kmeans_route.{_result.__name__}")
