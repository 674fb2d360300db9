"""Device code that routing ends with: from dot products and squared norms to ids, gates and counts.

    s_te = (x_t . d_e) / ||x_t||;  sel_t = the K largest of s_te + b_e;  g_te = gate of s over sel_t

Selection takes K rounds of (largest, lowest id among equals): two plain reductions, no packed keys, exact ties; in two
steps where experts are many. One (BT, BE) tile stays in registers through them: the score of a taken expert is its
s + b less its b, and the expert becomes -inf. A program is one warp, so no round waits for another warp.
Source of the method: arXiv 2605.12476.

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
    TAKEN,
    as_mask,
    at_expert,
    at_slot,
    finite_bias,
    log_sigmoid,
    ordered,
    softmax_rows,
    take_best,
    unordered,
)

MOST_SPLITS: tl.constexpr = tl.constexpr(16)  # more would make more to read than they save
GROUP: tl.constexpr = tl.constexpr(4)  # neighbours that a thread reads at once
LEAST_IN_GROUPS: tl.constexpr = tl.constexpr(128)  # experts, for which to choose groups before their members


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
        best, best_id = take_best(ordered(own), experts[None, :], BE)
        best = unordered(best)
        if TOP2 and SIZE > 1:
            own = tl.where(experts[None, :] == best_id[:, None], float("-inf"), own)
            best += tl.max(own, axis=1)
        group_score = tl.where((groups == g)[None, :], best[:, None], group_score)
    kept = tl.zeros([ranking.shape[0], BE], dtype=tl.int32)
    left = ordered(group_score)
    for _ in range(KG):
        _, group = take_best(left, groups[None, :], NGP)
        left = tl.where(groups[None, :] == group[:, None], TAKEN, left)
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
def _gates(selected, scores, candidates, inside, tau, GATE: tl.constexpr, NORMALIZE: tl.constexpr, K: tl.constexpr):
    """Gate weights (BT, KP) before `scaling`, as `reference.gates_reference` defines them."""
    if GATE == "softmax":
        if NORMALIZE:
            gates = softmax_rows(selected / tau, inside)
        else:
            z = tl.where(candidates, scores / tau, float("-inf"))
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
def _dots_of(dots_ptr, offsets, there, num_rows, num_splits, ROW: tl.constexpr, BATCH: tl.constexpr):
    """What lies at `offsets`, where `there`, in each of the splits, added in their order, BATCH of which are asked for
    at once. BATCH 1: there is one."""
    if BATCH == 1:
        dots = tl.load(dots_ptr + offsets, mask=there, other=0.0)
    else:
        dots = tl.zeros(offsets.shape, dtype=tl.float32)
        for begin in range(0, num_splits, BATCH):
            for i in tl.static_range(BATCH):
                split = dots_ptr + (begin + i) * num_rows * ROW
                dots += tl.load(split + offsets, mask=there & as_mask(begin + i < num_splits), other=0.0)
    return dots


@triton.jit
def _squares_of(squares_ptr, rows, num_rows, num_splits, BATCH: tl.constexpr):
    """Squared norms (BT, splits), of all splits at once, of which there are at most MOST_SPLITS."""
    MOST: tl.constexpr = 1 if BATCH == 1 else MOST_SPLITS
    splits = tl.arange(0, MOST)[None, :]
    return tl.load(squares_ptr + splits * num_rows + rows[:, None], mask=splits < num_splits, other=0.0)


@triton.jit
def _validity(squares, tokens, in_batch, mask_ptr, count_mask_ptr):
    """1 / ||x|| (BT,), and which tokens are valid, which of them count, and which count as dropped."""
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
    return inv_norm, valid, counted, dropped


@triton.jit
def _scores(dots, inv_norm):
    """s from x . d and 1 / ||x||, which is 0 where x is not valid; 0 where it is not finite."""
    scores = dots * inv_norm
    return tl.where((tl.abs(scores) < float("inf")) & (inv_norm > 0), scores, 0.0)  # NaN fails the comparison


@triton.jit
def _bias_at(bias_ptr, experts, E: tl.constexpr):
    """The bias of these experts, to be made finite; 0 without one."""
    bias = tl.zeros(experts.shape, dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + experts, mask=experts < E, other=0.0)
    return bias


@triton.jit
def _biased(scores, bias, experts, E: tl.constexpr, BE: tl.constexpr):
    """s + b. A padded expert's s is 0, and becomes NOT_A_CANDIDATE."""
    shift = finite_bias(bias)
    if E < BE:
        shift = tl.where(experts < E, shift, NOT_A_CANDIDATE)
    return scores + shift


@triton.jit
def _deviation(scores, real, E: tl.constexpr):
    """Population standard deviation of each row. Padded columns are 0: their directions were loaded as 0."""
    mean = tl.sum(scores, axis=1) / E
    centered = tl.where(real, scores - mean[:, None], 0.0)
    return tl.sqrt(tl.sum(centered * centered, axis=1) / E)


@triton.jit
def _take_top_k(
    ranking, given, replayed, valid, experts, slots,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, KP: tl.constexpr,
):
    """ids (BT, KP), their s + b, and the keys (BT, BE) left, TAKEN at what was taken. given None: no replay."""
    left = ordered(ranking)
    ids = tl.zeros([BT, KP], dtype=tl.int32) + slots[None, :]
    keys = tl.zeros([BT, KP], dtype=tl.int32)
    for k in range(K):
        best, best_id = take_best(left, experts[None, :], BE)
        if given is not None:
            best_id = tl.where(replayed, at_slot(given, slots, k), best_id)
            best = at_expert(left, experts, best_id)
        best_id = tl.where(valid, best_id, k)
        left = tl.where(experts[None, :] == best_id[:, None], TAKEN, left)
        ids = tl.where((slots == k)[None, :], best_id[:, None], ids)
        keys = tl.where((slots == k)[None, :], best[:, None], keys)
    return ids, unordered(keys), left


@triton.jit
def _best_groups(ranking, slots, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, KP: tl.constexpr):
    """The K groups of GROUP neighbours whose best is largest, (BT, KP).

    The K best experts lie in them: an expert of another group has K better ones. A tie of groups goes to the lower
    one, whose ids are lower.
    """
    NUM: tl.constexpr = BE // GROUP
    groups = tl.arange(0, NUM)[None, :]
    left = ordered(tl.max(tl.reshape(ranking, [BT, NUM, GROUP]), axis=2))
    chosen = tl.zeros([BT, KP], dtype=tl.int32)
    for k in range(K):
        _, group = take_best(left, groups, NUM)
        left = tl.where(groups == group[:, None], TAKEN, left)
        chosen = tl.where((slots == k)[None, :], group[:, None], chosen)
    return chosen


@triton.jit
def _take_top_k_among(
    ranking, member, valid, slots, K: tl.constexpr, BT: tl.constexpr, KP: tl.constexpr, LAST: tl.constexpr,
):
    """ids (BT, KP) and their s + b, as `_take_top_k` finds them, among the members (BT, n) of the first K groups, ids
    below LAST."""
    left = tl.where((tl.arange(0, member.shape[1]) < K * GROUP)[None, :], ordered(ranking), TAKEN)
    ids = tl.zeros([BT, KP], dtype=tl.int32) + slots[None, :]
    keys = tl.zeros([BT, KP], dtype=tl.int32)
    for k in range(K):
        best, best_id = take_best(left, member, LAST)
        left = tl.where(member == best_id[:, None], TAKEN, left)
        ids = tl.where((slots == k)[None, :] & valid[:, None], best_id[:, None], ids)
        keys = tl.where((slots == k)[None, :], best[:, None], keys)
    return ids, unordered(keys)


@triton.jit
def _take_top_k_of_groups(
    dots_ptr, bias_ptr, num_rows, num_splits, ranking, inv_norm, valid, slots,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, ROW: tl.constexpr, KP: tl.constexpr,
    BATCH: tl.constexpr,
):
    """What `_take_top_k` finds, by `_best_groups`, whose dots are read once more: K rounds over BE / GROUP and K over
    K GROUP, where every round over BE is as long as both."""
    KC: tl.constexpr = KP if KP * GROUP > 32 else 32 // GROUP  # at least a warp's lanes of members
    chosen = _best_groups(ranking, tl.arange(0, KC), K, BT, BE, KC)
    member = tl.reshape(chosen[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :], [BT, KC * GROUP])
    bias = _bias_at(bias_ptr, member, E)
    tile = tl.arange(0, BT)[:, None] * ROW + member
    dots = _dots_of(dots_ptr, tile, member < ROW, num_rows, num_splits, ROW, BATCH)
    among = _biased(_scores(dots, inv_norm[:, None]), bias, member, E, BE)
    return _take_top_k_among(among, member, valid, slots, K, BT, KP, BE)


@triton.jit
def _add_margins(hist_ptr, ranking, rest, counted, experts, E: tl.constexpr):
    """Histogram of alpha_t - (s_te + b_e), alpha_t the largest of `rest`; who is no candidate goes to the last bin.

    Integer adds commute, so it has the same bits every time: T E adds over E x NUM_MARGIN_BINS addresses.
    """
    alpha = unordered(tl.max(rest, axis=1))
    margin = tl.where(ranking > NOT_A_CANDIDATE, alpha[:, None] - ranking, 2 * MARGIN_RANGE)
    bins = tl.floor((margin + MARGIN_RANGE) * (NUM_MARGIN_BINS / (2 * MARGIN_RANGE)))
    bins = tl.minimum(tl.maximum(bins, 0.0), NUM_MARGIN_BINS - 1.0).to(tl.int32)
    inside = counted[:, None] & (experts < E)[None, :]
    tl.atomic_add(hist_ptr + experts[None, :] * NUM_MARGIN_BINS + bins, 1, mask=inside, sem="relaxed")


@triton.jit
def select_and_store(
    dots_ptr, squares_ptr, first, num_rows, num_splits, T,
    bias_ptr, mask_ptr, count_mask_ptr, given_ptr,
    ids_ptr, weights_ptr, selected_ptr,
    scores_ptr, candidates_ptr, inv_norm_ptr, valid_ptr,
    std_ptr, hist_ptr, tau, scaling,
    E: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
    NG: tl.constexpr, KG: tl.constexpr, NGP: tl.constexpr, TOP2: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, ROW: tl.constexpr, KP: tl.constexpr, BATCH: tl.constexpr,
):
    """Finish BT tokens from `first` on, from dots (S, num_rows, ROW) and squared norms (S, num_rows), both fp32.

    Returns ids (BT, KP), which tokens are valid, and which count as dropped.
    Whatever bias, directions and given ids hold, the ids of a row are distinct and in [0, E): every value that is
    ranked is finite, and a row of given ids that cannot be replayed is routed as if none had been given.
    """
    rows = tl.arange(0, BT)
    tokens = first + rows
    experts = tl.arange(0, BE)
    slots = tl.arange(0, KP)
    in_batch = tokens < T
    real = (experts < E)[None, :]
    inside = (slots < K)[None, :]
    tile_TE = rows[:, None] * E + experts[None, :]  # 32 bits, from the tile's own base
    out = tokens[:, None] * K + slots[None, :]
    write = in_batch[:, None] & inside

    # Everything is asked for before anything is waited for.
    squares = _squares_of(squares_ptr + first, rows, num_rows, num_splits, BATCH)
    bias = _bias_at(bias_ptr, experts, E)
    tile = rows[:, None] * ROW + experts[None, :]
    dots = _dots_of(dots_ptr + first * ROW, tile, (experts < ROW)[None, :], num_rows, num_splits, ROW, BATCH)
    inv_norm, valid, counted, dropped = _validity(tl.sum(squares, axis=1), tokens, in_batch, mask_ptr, count_mask_ptr)
    scores = _scores(dots, inv_norm[:, None])
    tl.store(inv_norm_ptr + tokens, inv_norm, mask=in_batch)
    tl.store(valid_ptr + tokens, valid, mask=in_batch)
    if scores_ptr is not None:
        tl.store(scores_ptr + first * E + tile_TE, scores, mask=in_batch[:, None] & real)
    if std_ptr is not None:
        tl.store(std_ptr + tokens, tl.where(counted, _deviation(scores, real, E), 0.0), mask=in_batch)

    biased = _biased(scores, bias[None, :], experts[None, :], E, BE)
    ranking = biased
    if KG < NG:
        ranking = _keep_best_groups(biased, experts, E, BE, NG, KG, NGP, TOP2)
    candidates, left = None, None
    # Neighbours must be candidates together, and enough of them.
    WHOLE: tl.constexpr = KG == NG or (E // NG // GROUP * GROUP == E // NG and KG * (E // NG) >= GROUP * K)
    SMALLER: tl.constexpr = BE >= LEAST_IN_GROUPS and BE >= GROUP * KP and WHOLE
    if SMALLER and given_ptr is None and hist_ptr is None and candidates_ptr is None:
        ids, selected = _take_top_k_of_groups(
            dots_ptr + first * ROW, bias_ptr, num_rows, num_splits, ranking, inv_norm, valid, slots,
            E, K, BT, BE, ROW, KP, BATCH,
        )
    else:
        given, replayed, eligible = None, None, ranking
        if given_ptr is not None:
            given, replayed = _may_replay(tl.load(given_ptr + out, mask=write, other=0), slots, E, K)
            if KG < NG:  # replayed ids may lie outside of the groups: their scores are still needed
                eligible = tl.where(replayed[:, None], biased, ranking)
        ids, selected, left = _take_top_k(eligible, given, replayed, valid, experts, slots, K, BT, BE, KP)
        candidates = (ranking > NOT_A_CANDIDATE) | (left == TAKEN)
    if bias_ptr is not None:
        selected -= finite_bias(tl.load(bias_ptr + ids, mask=inside & (ids < E), other=0.0))
    selected = tl.where(valid[:, None] & inside, selected, 0.0)

    gates = _gates(selected, scores, candidates, inside, tau, GATE, NORMALIZE, K)
    gates = tl.where(valid[:, None], gates * scaling, 0.0)
    tl.store(ids_ptr + out, ids.to(tl.int64), mask=write)
    tl.store(weights_ptr + out, gates, mask=write)
    tl.store(selected_ptr + out, selected, mask=write)
    if candidates_ptr is not None:
        tl.store(candidates_ptr + first * E + tile_TE, candidates, mask=in_batch[:, None] & real)
    if hist_ptr is not None:
        rest = left
        if given_ptr is not None:  # what was replayed is not what the scores would have taken
            rest = _take_top_k(ranking, None, None, in_batch, experts, slots, K, BT, BE, KP)[2]
        _add_margins(hist_ptr, ranking, rest, counted, experts, E)
    return ids, valid, dropped
