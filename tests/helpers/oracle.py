"""The judge: K-Means routing token by token and expert by expert in NumPy fp64, in the order of the definition.

Nothing here imports the package. Slow on purpose: every line should be comparable with the formula beside it.

Letters: T tokens, D hidden size, E experts, K top_k; t a token, e an expert, k a place among the selected.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MIN_SUM_SQ = np.float32(1e-30)
MIN_NORM = 1e-12
NUM_BINS = 1024
MARGIN_RANGE = 2.0
BIAS_RANGE = 2.0


class Options(NamedTuple):
    """The arguments of `route` that change a number."""

    gate: str = "softmax"
    tau: float = 0.2
    normalize: bool = True
    scaling: float = 1.0
    n_group: int | None = None
    topk_group: int | None = None
    group_score: str = "top2"


class OracleRouting(NamedTuple):
    """What `route` must return, all in fp64, with the candidates of group-limited selection beside it."""

    indices: Ints  # (T, K)
    weights: Array  # (T, K)
    selected_scores: Array  # (T, K)
    scores: Array  # (T, E), 0 in rows that are not valid
    tokens_per_expert: Ints  # (E,)
    inv_norm: Array  # (T,), 0 in rows that are not valid
    valid: Bools  # (T,)
    candidates: Bools  # (T, E)


class OracleDispatch(NamedTuple):
    """What `dispatch` must return."""

    x_sorted: Array  # (T * K, D)
    positions: Ints  # (T, K)
    token_of_row: Ints  # (T * K,)
    offsets: Ints  # (E + 1,)


def directions(weight: npt.ArrayLike) -> Array:
    """Unit rows of `weight`, before they are rounded to the dtype of x; 0 where the norm is below 1e-12."""
    weight = np.asarray(weight, dtype=np.float64)
    out = np.zeros_like(weight)
    for e, row in enumerate(weight):
        norm = math.sqrt(math.fsum(float(c) ** 2 for c in row))
        if norm >= MIN_NORM:
            out[e] = row / norm
    return out


def is_valid(row: npt.NDArray[np.float64], mask: bool) -> bool:
    """True mask and 1e-30 <= sum of squares < inf, the sum taken in fp32."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        row32 = row.astype(np.float32)
        total = np.sum(row32 * row32, dtype=np.float32)
        return bool(mask and total >= MIN_SUM_SQ and total < np.float32(np.inf))


def candidates_of(select: Array, options: Options) -> list[int]:
    """Experts that selection may take: all, or those of the best groups (ties to the lower group)."""
    num_experts = len(select)
    if options.n_group is None:
        return list(range(num_experts))
    assert options.topk_group is not None
    size = num_experts // options.n_group
    group_scores = []
    for group in range(options.n_group):
        members = sorted(select[group * size : (group + 1) * size], reverse=True)
        group_scores.append(sum(members[: min(2, size)]) if options.group_score == "top2" else members[0])
    best = sorted(range(options.n_group), key=lambda group: (-group_scores[group], group))[: options.topk_group]
    return [e for e in range(num_experts) if e // size in best]


def log_sigmoid(z: float) -> float:
    """log(sigmoid(z)), finite for every finite z."""
    return -math.log1p(math.exp(-z)) if z >= 0 else z - math.log1p(math.exp(z))


def gates(s: Array, selected: list[int], candidates: list[int], options: Options) -> list[float]:
    """g over the selected experts for one token, already times `scaling`."""
    if options.gate == "uniform":
        return [options.scaling / len(selected)] * len(selected)
    if options.gate == "softmax":
        over = selected if options.normalize else candidates
        top = max(s[e] / options.tau for e in over)
        total = math.fsum(math.exp(s[e] / options.tau - top) for e in over)
        return [options.scaling * math.exp(s[e] / options.tau - top) / total for e in selected]
    if options.gate == "sigmoid":
        # p / sum p as a ratio of exponentials of log p, so that the truth survives where every p underflows.
        log_p = [log_sigmoid(s[e] / options.tau) for e in selected]
        if not options.normalize:
            return [options.scaling * math.exp(value) for value in log_p]
        top = max(log_p)
        total = math.fsum(math.exp(value - top) for value in log_p)
        return [options.scaling * math.exp(value - top) / total for value in log_p]
    assert options.gate == "cosine"
    p = [max(float(s[e]), 1e-3) for e in selected]
    total = math.fsum(p) if options.normalize else 1.0
    return [options.scaling * value / total for value in p]


def route(
    x: npt.ArrayLike,
    unit_rows: npt.ArrayLike,
    top_k: int,
    expert_bias: npt.ArrayLike | None = None,
    *,
    mask: npt.ArrayLike | None = None,
    indices: npt.ArrayLike | None = None,
    options: Options = Options(),  # noqa: B008 (an immutable NamedTuple)
) -> OracleRouting:
    """Route every row of x (T, D) by the unit rows d (E, D) that the forward used."""
    x = np.asarray(x, dtype=np.float64)
    d = np.asarray(unit_rows, dtype=np.float64)
    num_tokens, num_experts = len(x), len(d)
    bias = np.zeros(num_experts) if expert_bias is None else np.asarray(expert_bias, dtype=np.float64)
    allowed = np.ones(num_tokens, dtype=bool) if mask is None else np.asarray(mask, dtype=bool).reshape(-1)
    replay = None if indices is None else np.asarray(indices, dtype=np.int64)

    ids = np.tile(np.arange(top_k, dtype=np.int64), (num_tokens, 1))
    weights = np.zeros((num_tokens, top_k))
    selected_scores = np.zeros((num_tokens, top_k))
    scores = np.zeros((num_tokens, num_experts))
    counts = np.zeros(num_experts, dtype=np.int64)
    inv_norm = np.zeros(num_tokens)
    valid = np.zeros(num_tokens, dtype=bool)
    is_candidate = np.zeros((num_tokens, num_experts), dtype=bool)

    for t in range(num_tokens):
        if not is_valid(x[t], bool(allowed[t])):
            continue
        valid[t] = True
        inv_norm[t] = 1.0 / math.sqrt(float(np.dot(x[t], x[t])))
        for e in range(num_experts):
            scores[t, e] = float(np.dot(x[t], d[e])) * inv_norm[t]
        select = scores[t] + bias
        candidates = candidates_of(select, options)
        is_candidate[t, candidates] = True
        if replay is None:
            chosen = sorted(candidates, key=lambda e, select=select: (-select[e], e))[:top_k]
        else:
            chosen = [int(e) for e in replay[t]]
        ids[t] = chosen
        selected_scores[t] = scores[t, chosen]
        weights[t] = gates(scores[t], chosen, candidates, options)
        for e in chosen:
            counts[e] += 1
    return OracleRouting(ids, weights, selected_scores, scores, counts, inv_norm, valid, is_candidate)


def gate_backward(t: int, routing: OracleRouting, dg: Array, options: Options) -> Array:
    """ds (E,) of one token from dg (K,), by the table of gates."""
    s, chosen = routing.scores[t], [int(e) for e in routing.indices[t]]
    tau, scaling = options.tau, options.scaling
    ds = np.zeros(len(s))
    if options.gate == "uniform":
        return ds
    if options.gate == "softmax":
        candidates = [int(e) for e in np.flatnonzero(routing.candidates[t])]
        over = chosen if options.normalize else candidates
        top = max(s[e] / tau for e in over)
        total = math.fsum(math.exp(s[e] / tau - top) for e in over)
        p = {e: math.exp(s[e] / tau - top) / total for e in over}
        dg_of = {e: float(dg[k]) for k, e in enumerate(chosen)}
        mean = math.fsum(p[e] * dg_of[e] for e in chosen)
        for e in over:
            ds[e] = p[e] * (dg_of.get(e, 0.0) - mean) * scaling / tau
        return ds
    if options.gate == "sigmoid":
        # With g = p / sum p: dg_e/ds_j = g_e (1[e = j] - g_j) (1 - p_j) / tau; without: p_e (1 - p_e) / tau.
        p_of = [math.exp(log_sigmoid(s[e] / tau)) for e in chosen]
        if options.normalize:
            g = [w / scaling for w in routing.weights[t]]
            mean = math.fsum(g[k] * float(dg[k]) for k in range(len(chosen)))
            for k, e in enumerate(chosen):
                ds[e] = scaling * g[k] * (float(dg[k]) - mean) * (1 - p_of[k]) / tau
        else:
            for k, e in enumerate(chosen):
                ds[e] = scaling * p_of[k] * (1 - p_of[k]) / tau * float(dg[k])
        return ds
    p_of = [max(float(s[e]), 1e-3) for e in chosen]
    total = math.fsum(p_of) if options.normalize else 1.0
    mean = math.fsum(p_of[k] / total * float(dg[k]) for k in range(len(chosen))) if options.normalize else 0.0
    for k, e in enumerate(chosen):
        if s[e] > 1e-3:
            ds[e] = scaling * (float(dg[k]) - mean) / total
    return ds


def route_backward(
    x: npt.ArrayLike,
    unit_rows: npt.ArrayLike,
    routing: OracleRouting,
    *,
    d_weights: npt.ArrayLike | None = None,
    d_selected: npt.ArrayLike | None = None,
    d_scores: npt.ArrayLike | None = None,
    options: Options = Options(),  # noqa: B008
) -> Array:
    """dx (T, D) = inv_norm (sum ds_e d_e - x inv_norm sum ds_e s_e), 0 in rows that are not valid."""
    x = np.asarray(x, dtype=np.float64)
    d = np.asarray(unit_rows, dtype=np.float64)
    dx = np.zeros_like(x)
    for t in range(len(x)):
        if not routing.valid[t]:
            continue
        ds = np.zeros(len(d))
        if d_weights is not None:
            ds += gate_backward(t, routing, np.asarray(d_weights, dtype=np.float64)[t], options)
        if d_selected is not None:
            for k, e in enumerate(routing.indices[t]):
                ds[e] += float(np.asarray(d_selected, dtype=np.float64)[t, k])
        if d_scores is not None:
            ds += np.asarray(d_scores, dtype=np.float64)[t]
        pull = np.zeros(x.shape[1])
        along = 0.0
        for e in range(len(d)):
            if ds[e] != 0:
                pull += ds[e] * d[e]
                along += ds[e] * routing.scores[t, e]
        dx[t] = routing.inv_norm[t] * (pull - x[t] * routing.inv_norm[t] * along)
    return dx


def dispatch(x: npt.ArrayLike, routing: OracleRouting) -> OracleDispatch:
    """Rows of valid tokens grouped by expert, in the order of (token, k) within one; then the rest, zero."""
    x = np.asarray(x, dtype=np.float64)
    num_tokens, top_k = routing.indices.shape
    num_experts = len(routing.tokens_per_expert)
    rows: list[tuple[int, int]] = []
    offsets = [0]
    for e in range(num_experts):
        for t in range(num_tokens):
            for k in range(top_k):
                if routing.valid[t] and routing.indices[t, k] == e:
                    rows.append((t, k))
        offsets.append(len(rows))
    for t in range(num_tokens):
        rows.extend((t, k) for k in range(top_k) if not routing.valid[t])
    x_sorted = np.zeros((num_tokens * top_k, x.shape[1]))
    positions = np.zeros((num_tokens, top_k), dtype=np.int64)
    token_of_row = np.zeros(num_tokens * top_k, dtype=np.int64)
    for row, (t, k) in enumerate(rows):
        positions[t, k] = row
        token_of_row[row] = t
        if row < offsets[-1]:
            x_sorted[row] = x[t]
    return OracleDispatch(x_sorted, positions, token_of_row, np.asarray(offsets, dtype=np.int64))


def dispatch_backward(d_sorted: npt.ArrayLike, num_tokens: int, positions: Ints, end: int) -> Array:
    """dx (T, D): the sum of the rows of each token; rows from `end` on are never read."""
    d_sorted = np.asarray(d_sorted, dtype=np.float64)
    dx = np.zeros((num_tokens, d_sorted.shape[1]))
    for t in range(num_tokens):
        for row in positions[t]:
            if row < end:
                dx[t] += d_sorted[row]
    return dx


def combine(y_sorted: npt.ArrayLike, weights: npt.ArrayLike, positions: Ints, end: int) -> Array:
    """y (T, D): the weighted sum of the rows of each token; rows from `end` on are never read."""
    y_sorted = np.asarray(y_sorted, dtype=np.float64)
    weights = np.asarray(weights, dtype=np.float64)
    y = np.zeros((len(positions), y_sorted.shape[1]))
    for t in range(len(positions)):
        for k, row in enumerate(positions[t]):
            if row < end:
                y[t] += weights[t, k] * y_sorted[row]
    return y


def combine_backward(
    dy: npt.ArrayLike, y_sorted: npt.ArrayLike, weights: npt.ArrayLike, positions: Ints, end: int
) -> tuple[Array, Array]:
    """(d y_sorted (T * K, D), d weights (T, K)); both zero for rows from `end` on."""
    dy = np.asarray(dy, dtype=np.float64)
    y_sorted = np.asarray(y_sorted, dtype=np.float64)
    weights = np.asarray(weights, dtype=np.float64)
    d_sorted = np.zeros_like(y_sorted)
    d_weights = np.zeros_like(weights)
    for t in range(len(positions)):
        for k, row in enumerate(positions[t]):
            if row < end:
                d_sorted[row] = weights[t, k] * dy[t]
                d_weights[t, k] = float(np.dot(dy[t], y_sorted[row]))
    return d_sorted, d_weights


def centroid_sums(x: npt.ArrayLike, routing: OracleRouting, accumulate: str = "unit") -> tuple[Array, Ints]:
    """sums (E, D) of x inv_norm ("unit") or of x ("raw") over the tokens of each expert, and their counts (E,)."""
    x = np.asarray(x, dtype=np.float64)
    num_experts = len(routing.tokens_per_expert)
    sums = np.zeros((num_experts, x.shape[1]))
    counts = np.zeros(num_experts, dtype=np.int64)
    for t in range(len(x)):
        if not routing.valid[t]:
            continue
        for e in routing.indices[t]:
            sums[e] += x[t] * routing.inv_norm[t] if accumulate == "unit" else x[t]
            counts[e] += 1
    return sums, counts


def std_sum(routing: OracleRouting) -> float:
    """Population standard deviation of the scores over the experts, summed over the valid tokens."""
    return math.fsum(float(np.std(routing.scores[t])) for t in np.flatnonzero(routing.valid))


def margins(routing: OracleRouting, expert_bias: npt.ArrayLike | None, top_k: int) -> Array:
    """m (valid tokens, E) = alpha - (s + b), alpha the (K+1)-th largest s + b of the candidates; +inf outside."""
    num_experts = routing.scores.shape[1]
    bias = np.zeros(num_experts) if expert_bias is None else np.asarray(expert_bias, dtype=np.float64)
    rows = []
    for t in np.flatnonzero(routing.valid):
        select = routing.scores[t] + bias
        among = [e for e in range(num_experts) if routing.candidates[t, e]]
        ordered = sorted((float(select[e]) for e in among), reverse=True)
        alpha = ordered[top_k] if len(ordered) > top_k else -math.inf
        rows.append([alpha - float(select[e]) if e in among else math.inf for e in range(num_experts)])
    return np.asarray(rows, dtype=np.float64).reshape(-1, num_experts)


def margin_histogram(margin: Array) -> Ints:
    """hist (E, 1024): 1024 equal bins over [-2, 2], what lies outside goes into the end bins."""
    num_experts = margin.shape[1]
    hist = np.zeros((num_experts, NUM_BINS), dtype=np.int64)
    for row in margin:
        for e, value in enumerate(row):
            clipped = min(max(value, -MARGIN_RANGE), MARGIN_RANGE)
            place = math.floor((clipped + MARGIN_RANGE) / (2 * MARGIN_RANGE / NUM_BINS))
            hist[e, min(max(place, 0), NUM_BINS - 1)] += 1
    return hist


class State(NamedTuple):
    """The part of a router's state that a commit after the first data changes."""

    weight: Array  # (E, D)
    centroids: Array  # (E, D)
    expert_bias: Array  # (E,)
    score_std: float
    steps: int
    dropped_total: int


class Pending(NamedTuple):
    """What the forwards since the last commit gathered."""

    sums: Array  # (E, D)
    counts: Ints  # (E,)
    std_sum: float
    num_tokens: int
    num_dropped: int
    margin: Array  # (num_tokens, E): the margins themselves, of which a router keeps the histogram


def bias_step(state: State, pending: Pending, sigma: float, top_k: int, balance: str, rate: float) -> Array:
    """expert_bias (E,) after the rule `balance`, before it is centred and clamped."""
    num_experts = len(state.expert_bias)
    bias = state.expert_bias.copy()
    if balance == "none" or top_k == num_experts:
        return bias
    total = float(pending.counts.sum())
    for e in range(num_experts):
        share = float(pending.counts[e]) / total
        if balance == "proportional":
            bias[e] += rate * sigma * min(max(1.0 - num_experts * share, -1.0), 1.0)
        elif balance == "sign":
            bias[e] += rate * float(np.sign(int(pending.counts.sum()) - num_experts * int(pending.counts[e])))
        else:
            assert balance == "quantile"
            clipped = np.clip(pending.margin[:, e], -MARGIN_RANGE, MARGIN_RANGE)
            target = state.expert_bias[e] + float(np.quantile(clipped, top_k / num_experts))
            bias[e] = 0.9 * state.expert_bias[e] + 0.1 * target
    return bias


def commit(
    state: State,
    pending: Pending,
    top_k: int,
    *,
    decay: float = 0.999,
    balance: str = "proportional",
    bias_rate: float | None = None,
    seen: Ints | None = None,
) -> State:
    """One commit of an initialised router; `seen` (E,), the tokens so far of each, means average="cumulative"."""
    if pending.num_tokens == 0:
        return state._replace(dropped_total=state.dropped_total + pending.num_dropped)
    spread = pending.std_sum / pending.num_tokens
    # The first commit that sees tokens: `steps` cannot tell, since given centroids start it high.
    sigma = spread if state.score_std == 0 else 0.99 * state.score_std + 0.01 * spread
    weight, centroids = state.weight.copy(), state.centroids.copy()
    for e in range(len(weight)):
        if pending.counts[e] > 0:
            if seen is None:
                beta = min(decay, state.steps / (state.steps + 1))
            else:
                beta = float(seen[e]) / float(seen[e] + pending.counts[e])
            beta = beta if centroids[e].any() else 0.0
            centroids[e] = beta * centroids[e] + (1 - beta) * pending.sums[e] / pending.counts[e]
        length = math.sqrt(float((centroids[e] ** 2).sum()))
        if length > 0:
            weight[e] = centroids[e] / length
    rate = {"proportional": 0.05, "sign": 0.001}.get(balance, 0.0) if bias_rate is None else bias_rate
    bias = bias_step(state, pending, sigma, top_k, balance, rate)
    bias = np.clip(bias - bias.mean(), -BIAS_RANGE, BIAS_RANGE)
    return State(weight, centroids, bias, sigma, state.steps + 1, state.dropped_total + pending.num_dropped)
