"""Device code that both routing kernels end with: from dot products and squared norms to ids, gates and counts.

    s_te = (x_t . d_e) / ||x_t||;  sel_t = the K largest of s_te + b_e;  g_te = gate of s over sel_t

Selection takes K rounds of (largest, lowest id among equals): two plain reductions, no packed keys, exact ties. One
(BT, BE) tile stays in registers through them: the score of a taken expert is its s + b less its b, and the expert
becomes -inf. Source of the method: arXiv 2605.12476.

Legend: T tokens, E experts, K top_k; BT tokens a block, BE experts, KP top_k and NGP groups padded to a power of two.
"""

import triton
import triton.language as tl

from kmeans_route.kernels.common import (
    MARGIN_RANGE,
    MAX_SQUARED_NORM,
    MIN_COSINE_GATE,
    MIN_SQUARED_NORM,
    NOT_A_CANDIDATE,
    NUM_MARGIN_BINS,
    at_expert,
    at_slot,
    count_and_rank,
    finite_bias,
    log_sigmoid,
    softmax_rows,
    take_best,
)


@triton.jit
def _keep_best_groups(
    ranking, experts, E: tl.constexpr, BE: tl.constexpr,
    NG: tl.constexpr, KG: tl.constexpr, NGP: tl.constexpr, TOP2: tl.constexpr,
):
    """`ranking` with the experts outside the KG best of NG groups at NOT_A_CANDIDATE; ties to the lower group."""
    SIZE: tl.constexpr = E // NG
    groups = tl.arange(0, NGP)
    group_score = tl.full([ranking.shape[0], NGP], float("-inf"), dtype=tl.float32)
    for g in range(NG):
        inside = (experts // SIZE == g) & (experts < E)
        own = tl.where(inside[None, :], ranking, float("-inf"))
        best, best_id = take_best(own, experts, BE)
        if TOP2 and SIZE > 1:
            own = tl.where(experts[None, :] == best_id[:, None], float("-inf"), own)
            best += tl.max(own, axis=1)
        group_score = tl.where((groups == g)[None, :], best[:, None], group_score)
    kept = tl.zeros([ranking.shape[0], BE], dtype=tl.int32)
    for _ in range(KG):
        best, group = take_best(group_score, groups, NGP)
        group_score = tl.where(groups[None, :] == group[:, None], float("-inf"), group_score)
        kept += ((experts // SIZE)[None, :] == group[:, None]).to(tl.int32)
    return tl.where(kept > 0, ranking, NOT_A_CANDIDATE)


@triton.jit
def _may_replay(given, slots, E: tl.constexpr, K: tl.constexpr):
    """Given ids (BT, KP) int64 as int32, and which rows may be replayed: all ids in [0, E), none twice. (BT,)."""
    inside = (slots < K)[None, :]
    in_range = (given >= 0) & (given < E)  # before narrowing, which would make 2^40 a 0
    ids = tl.where(in_range, given, 0).to(tl.int32)
    faults = (inside & (in_range == 0)).to(tl.int32)
    for k in range(K):
        faults += ((ids == at_slot(ids, slots, k)[:, None]) & inside & (slots > k)[None, :]).to(tl.int32)
    return ids, tl.sum(faults, axis=1) == 0


@triton.jit
def _gates(selected, scores, left, inside, tau, GATE: tl.constexpr, NORMALIZE: tl.constexpr, K: tl.constexpr):
    """Gate weights (BT, KP) before `scaling`, as `reference.gates_reference` defines them."""
    if GATE == "softmax":
        if NORMALIZE:
            gates = softmax_rows(selected / tau, inside)
        else:  # over all candidates: those left, and those taken, which are at -inf
            z = tl.where((left > NOT_A_CANDIDATE) | (left == float("-inf")), scores / tau, float("-inf"))
            top = tl.max(z, axis=1)
            total = tl.sum(tl.exp(z - top[:, None]), axis=1)
            gates = tl.exp(selected / tau - top[:, None]) / total[:, None]
    elif GATE == "sigmoid":
        if NORMALIZE:
            gates = softmax_rows(log_sigmoid(selected / tau), inside)
        else:
            gates = 1.0 / (1.0 + tl.exp(-selected / tau))
    elif GATE == "cosine":
        gates = tl.where(inside, tl.maximum(selected, MIN_COSINE_GATE), 0.0)
        if NORMALIZE:
            gates = gates / tl.sum(gates, axis=1)[:, None]
    else:
        gates = tl.full([selected.shape[0], selected.shape[1]], 1.0 / K, dtype=tl.float32)
    return gates


@triton.jit
def _scores(dots, squares, tokens, in_batch, mask_ptr, count_mask_ptr):
    """s (BT, BE), 1 / ||x|| (BT,), and which tokens are valid, which of them count, and which count as dropped."""
    wanted = in_batch
    if mask_ptr is not None:
        wanted = wanted & (tl.load(mask_ptr + tokens, mask=in_batch, other=0) != 0)
    # NaN fails both comparisons, Inf and overflow the second, zero and subnormal rows the first.
    valid = wanted & (squares >= MIN_SQUARED_NORM) & (squares <= MAX_SQUARED_NORM)
    inv_norm = tl.where(valid, 1.0 / tl.sqrt(tl.where(valid, squares, 1.0)), 0.0)
    counted, dropped = valid, wanted & (valid == 0)
    if count_mask_ptr is not None:
        counts = tl.load(count_mask_ptr + tokens, mask=in_batch, other=0) != 0
        counted, dropped = valid & counts, dropped & counts
    scores = dots * inv_norm[:, None]
    scores = tl.where(valid[:, None] & (tl.abs(scores) < float("inf")), scores, 0.0)  # NaN fails the comparison
    return scores, inv_norm, valid, counted, dropped


@triton.jit
def _take_top_k(
    left, given, replayed, valid, experts, slots,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, KP: tl.constexpr,
):
    """ids (BT, KP) and their s + b, and `left` (BT, BE) with what was taken at -inf. given None: no replay."""
    ids = tl.zeros([BT, KP], dtype=tl.int32) + slots[None, :]
    ranked = tl.zeros([BT, KP], dtype=tl.float32)
    for k in range(K):
        best, best_id = take_best(left, experts, BE)
        if given is not None:
            best_id = tl.where(replayed, at_slot(given, slots, k), best_id)
            best = at_expert(left, experts, best_id)
        best_id = tl.where(valid, best_id, k)
        left = tl.where(experts[None, :] == best_id[:, None], float("-inf"), left)
        ids = tl.where((slots == k)[None, :], best_id[:, None], ids)
        ranked = tl.where((slots == k)[None, :], best[:, None], ranked)
    return ids, ranked, left


@triton.jit
def _add_margins(hist_ptr, ranking, rest, counted, experts, E: tl.constexpr):
    """Histogram of alpha_t - (s_te + b_e), alpha_t the largest of `rest`; who is no candidate goes to the last bin.

    Integer adds commute, so it has the same bits every time: T E adds over E x NUM_MARGIN_BINS addresses.
    """
    alpha = tl.max(rest, axis=1)
    margin = tl.where(ranking > NOT_A_CANDIDATE, alpha[:, None] - ranking, 2 * MARGIN_RANGE)
    bins = tl.floor((margin + MARGIN_RANGE) * (NUM_MARGIN_BINS / (2 * MARGIN_RANGE)))
    bins = tl.minimum(tl.maximum(bins, 0.0), NUM_MARGIN_BINS - 1.0).to(tl.int32)
    inside = counted[:, None] & (experts < E)[None, :]
    tl.atomic_add(hist_ptr + experts[None, :] * NUM_MARGIN_BINS + bins, 1, mask=inside, sem="relaxed")


@triton.jit
def select_and_store(
    dots, squares, block, T,
    bias_ptr, mask_ptr, count_mask_ptr, given_ptr,
    ids_ptr, weights_ptr, selected_ptr,
    scores_ptr, candidates_ptr, inv_norm_ptr, valid_ptr,
    rank_ptr, block_counts_ptr, totals_ptr,
    std_ptr, hist_ptr, tau, scaling,
    E: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
    NG: tl.constexpr, KG: tl.constexpr, NGP: tl.constexpr, TOP2: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, KP: tl.constexpr,
):
    """Finish block `block` of BT tokens from dots (BT, BE) and squared norms (BT,), both fp32.

    Whatever bias, directions and given ids hold, the ids of a row are distinct and in [0, E): every value that is
    ranked is finite, and a row of given ids that cannot be replayed is routed as if none had been given.
    """
    tokens = block * BT + tl.arange(0, BT)
    experts = tl.arange(0, BE)
    slots = tl.arange(0, KP)
    in_batch = tokens < T
    real = (experts < E)[None, :]
    inside = (slots < K)[None, :]
    tile_TE = tl.arange(0, BT)[:, None] * E + experts[None, :]  # 32 bits, from the block's own base
    out = tokens[:, None] * K + slots[None, :]
    write = in_batch[:, None] & inside

    scores, inv_norm, valid, counted, dropped = _scores(dots, squares, tokens, in_batch, mask_ptr, count_mask_ptr)
    tl.store(inv_norm_ptr + tokens, inv_norm, mask=in_batch)
    tl.store(valid_ptr + tokens, valid, mask=in_batch)
    if scores_ptr is not None:
        tl.store(scores_ptr + block * BT * E + tile_TE, scores, mask=in_batch[:, None] & real)
    if std_ptr is not None:
        mean = tl.sum(scores, axis=1) / E  # padded columns are 0: their directions were loaded as 0
        centered = tl.where(real, scores - mean[:, None], 0.0)
        std = tl.sqrt(tl.sum(centered * centered, axis=1) / E)
        if count_mask_ptr is not None:
            std = tl.where(counted, std, 0.0)
        tl.store(std_ptr + tokens, std, mask=in_batch)

    left = scores
    if bias_ptr is not None or E < BE:
        shift = tl.zeros([BE], dtype=tl.float32)
        if bias_ptr is not None:
            shift = finite_bias(tl.load(bias_ptr + experts, mask=experts < E, other=0.0))
        # A padded column is 0, and becomes what is added: one row to select from instead of a whole tile.
        left += tl.where(experts < E, shift, NOT_A_CANDIDATE)[None, :]
    ranking = left
    if KG < NG:
        ranking = _keep_best_groups(left, experts, E, BE, NG, KG, NGP, TOP2)
    given, replayed = None, None
    if given_ptr is None:
        left = ranking
    else:
        given, replayed = _may_replay(tl.load(given_ptr + out, mask=write, other=0), slots, E, K)
        if KG < NG:  # replayed ids may lie outside of the groups: their scores are still needed
            left = tl.where(replayed[:, None], left, ranking)
    ids, selected, left = _take_top_k(left, given, replayed, valid, experts, slots, K, BT, BE, KP)
    if bias_ptr is not None:
        selected -= finite_bias(tl.load(bias_ptr + ids, mask=inside & (ids < E), other=0.0))
    selected = tl.where(valid[:, None] & inside, selected, 0.0)
    if KG < NG and given_ptr is not None:
        left = tl.where((ranking > NOT_A_CANDIDATE) | (left == float("-inf")), left, NOT_A_CANDIDATE)

    gates = _gates(selected, scores, left, inside, tau, GATE, NORMALIZE, K)
    gates = tl.where(valid[:, None], gates * scaling, 0.0)
    tl.store(ids_ptr + out, ids.to(tl.int64), mask=write)
    tl.store(weights_ptr + out, gates, mask=write)
    tl.store(selected_ptr + out, selected, mask=write)
    if candidates_ptr is not None:
        tl.store(candidates_ptr + block * BT * E + tile_TE, (left != NOT_A_CANDIDATE), mask=in_batch[:, None] & real)

    count_and_rank(
        ids, valid, dropped, in_batch, tokens, block, rank_ptr, block_counts_ptr, totals_ptr,
        E, K, BT, BE, KP, True,
    )
    if hist_ptr is not None:
        rest = left
        if given_ptr is not None:  # what was replayed is not what the scores would have taken
            rest = _take_top_k(ranking, None, None, in_batch, experts, slots, K, BT, BE, KP)[2]
        _add_margins(hist_ptr, ranking, rest, counted, experts, E)
