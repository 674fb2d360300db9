"""Options and results of the routing functions; each field of a result is defined by an equation.

Legend: T tokens, D hidden size, E experts, K top_k. A token is *valid* when its mask is true and
1e-30 <= sum of x_t^2 <= the largest fp32. The compute dtype is fp32, or fp64 when x is fp64.
"""

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree


class RouteOptions(NamedTuple):
    """The options of one routing, checked. Without groups, n_group = topk_group = 1."""

    top_k: int
    gate: str
    tau: float
    normalize: bool
    scaling: float
    n_group: int
    topk_group: int
    group_score: str

    @property
    def grouped(self) -> bool:
        """Whether selection is limited to some of the groups."""
        return self.topk_group < self.n_group

    @property
    def over_all(self) -> bool:
        """Whether the gates look at the scores of all candidates, and not at those of the selected experts alone."""
        return self.gate == "softmax" and not self.normalize


class Wanted(NamedTuple):
    """What a routing gives beside the choice: all scores (T, E); their spread; the histogram of margins."""

    scores: bool = False
    std: bool = False
    hist: bool = False


class CommitOptions(NamedTuple):
    """Options of a commit, checked by the router: see `KMeansRouter`."""

    top_k: int
    decay: float
    average: str
    balance: str
    bias_rate: float
    directions: str = "centroids"


class Tokens(NamedTuple):
    """Hidden states that have been checked: where they entered, the backend was chosen, once.

    x: (T, D). mask, count_mask: (T,) bool or None. indices: (T, K) int64 to replay, or None. backend: a module of
    `kmeans_route.backends`.
    """

    x: Tensor
    mask: Tensor | None
    count_mask: Tensor | None
    indices: Tensor | None
    backend: Any


class Replay(NamedTuple):
    """What a router is to use in place of its choice: see `kmeans_route.replay`.

    ids: (T, K) int64, rows of -1 are routed. counts: whether such forwards count in the statistics.
    """

    ids: Tensor
    counts: bool


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


class Routed(NamedTuple):
    """What a backend makes of one routing: the fields of `Routing`, and what backward and statistics go on with.

    scores: (T, E), where somebody needs them. candidates: (T, E) bool, what a softmax over all candidates runs over.
    counted: (E,) int64, `tokens_per_expert` of the tokens inside count_mask, where one was given.
    score_std: (T,) population standard deviation over e of s_te, 0 where a token is not valid or not counted.
    margin_hist: (E, 1024) int32, margins of the counted tokens.
    num_dropped: () int64, tokens that the masks let in and that are not valid.

    What nobody asked for is None, and empty where an operator returned it.
    """

    indices: Tensor
    weights: Tensor
    selected_scores: Tensor
    scores: Tensor | None
    candidates: Tensor | None
    tokens_per_expert: Tensor
    inv_norm: Tensor
    valid: Tensor
    counted: Tensor | None
    score_std: Tensor | None
    margin_hist: Tensor | None
    num_dropped: Tensor

    def routing(self, *, want_scores: bool) -> Routing:
        """What the caller gets."""
        return Routing(
            self.indices,
            self.weights,
            self.selected_scores,
            self.scores if want_scores else None,
            self.tokens_per_expert,
            self.inv_norm.detach(),
            self.valid,
        )


class RouteInputs(NamedTuple):
    """What a backend routes: x (T, D) by directions (E, D) in its dtype.

    expert_bias: (E,). mask, count_mask: (T,) bool. indices: (T, K) int64 to replay. Each of these may be None.
    """

    x: Tensor
    directions: Tensor
    expert_bias: Tensor | None
    mask: Tensor | None
    count_mask: Tensor | None
    indices: Tensor | None


class SavedRouting(NamedTuple):
    """What the backward of a routing needs of it: fields of `Routed`."""

    indices: Tensor
    selected_scores: Tensor
    inv_norm: Tensor
    valid: Tensor
    scores: Tensor
    candidates: Tensor


class RoutingGrads(NamedTuple):
    """What came back to a routing: the gradients of gates (T, K), selected scores (T, K) and all scores (T, E)."""

    weights: Tensor | None
    selected_scores: Tensor | None
    scores: Tensor | None


class Statistics(NamedTuple):
    """What one routing adds to the pending state, beside the centroid sums: loads, spread, margins, dropped tokens.

    counts: (E,) int64. score_std: (T,) or (0,). margin_hist: (E, 1024) int32 where it is gathered. num_dropped: ()
    int64.
    """

    counts: Tensor
    score_std: Tensor
    margin_hist: Tensor | None
    num_dropped: Tensor


class PendingStatistics(NamedTuple):
    """Where they are added: the fields of `routing.pending.Pending` that a commit folds into the state."""

    sums: Tensor
    counts: Tensor
    std_sum: Tensor
    num_tokens: Tensor
    num_dropped: Tensor
    margin_hist: Tensor


class RouterState(NamedTuple):
    """What a commit changes, in place: see `routing.kmeans.KMeansRouter` for the buffers of these names.

    tokens_per_expert: (E,) int64, the loads of the step. turn: (2, E) fp32, how far each direction turned: the angle is
    2 atan2(turn[0], turn[1]).
    """

    weight: Tensor
    centroids: Tensor
    expert_bias: Tensor
    score_std: Tensor
    steps: Tensor
    tokens_seen: Tensor | None
    dropped_total: Tensor
    tokens_per_expert: Tensor
    turn: Tensor


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
