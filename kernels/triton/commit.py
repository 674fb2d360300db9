"""The commit of one optimizer step, in one launch.

    c_e = beta c_e + (1 - beta) sums_e / counts_e;  beta = min(decay, steps / (steps + 1));  weight_e = c_e / ||c_e||
    b_e by its balance rule

`_commit_kernel` gives each expert a program, which moves its centroid, writes its direction and empties its pending
sums; the last program to arrive does what needs all experts: scale of the scores, bias, counters.
`reference.commit_reference` is the definition. Bytes: weight, c and sums read and written, 24 E D, and all three once
more from L2.

Legend: D hidden size, E experts, K top_k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kmeans_route.kernels.common import MARGIN_RANGE, MIN_CENTROID_NORM, NUM_MARGIN_BINS, as_mask
from kmeans_route.kernels.configs import all_registers, architecture, padded_experts
from kmeans_route.kernels.workspace import counters

BLOCK = 1024
GIVEN_TOKENS: tl.constexpr = tl.constexpr(10_000_000)  # as in `reference`; a test compares them


@triton.jit
def _order_statistic(below, own, place, bins):
    """The value at `place` of a margin histogram, at its even place inside its bin. fp64 throughout."""
    index = tl.minimum(tl.sum((below <= place).to(tl.int32), axis=0), NUM_MARGIN_BINS - 1)
    inside = tl.sum(tl.where(bins == index, own, 0), axis=0).to(tl.float64)
    through = tl.sum(tl.where(bins == index, below, 0), axis=0).to(tl.float64)
    inside = tl.maximum(inside, 1.0)
    fraction = (place - (through - inside) + 0.5) / inside
    fraction = tl.minimum(tl.maximum(fraction, 0.0), 1.0)
    return (index.to(tl.float64) + fraction) * (2 * MARGIN_RANGE / NUM_MARGIN_BINS) - MARGIN_RANGE


@triton.jit
def _take_quantile(hist_row, keep, E: tl.constexpr, K: tl.constexpr):
    """The K/E quantile of an expert's margins, linear between order statistics; the row is emptied unless `keep`."""
    bins = tl.arange(0, NUM_MARGIN_BINS)
    own = tl.load(hist_row + bins)
    below = tl.cumsum(own.to(tl.int64), axis=0)
    num_margins = tl.sum(own.to(tl.int64), axis=0).to(tl.float64)
    rank = tl.maximum(num_margins - 1.0, 0.0) * K / E
    low = _order_statistic(below, own, tl.floor(rank), bins)
    high = _order_statistic(below, own, tl.ceil(rank), bins)
    tl.store(hist_row + bins, tl.where(keep, own, 0))
    return (low + (high - low) * (rank - tl.floor(rank))).to(tl.float32)


@triton.jit
def _finite(value):
    """The value, or 0 for NaN and Inf, which only somebody else can have written into the state."""
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit
def _move_centroid(w_row, c_row, s_row, count, beta, go, keep, D, FOLLOW: tl.constexpr, BD: tl.constexpr):
    """Where `go`, c = beta c + (1 - beta) s / count if anything was counted, with beta 0 where c is 0, and with FOLLOW
    w = c / ||c|| if c has a direction; s is emptied unless `keep`. Gives ||u - v|| and ||u + v|| of the old and the new
    direction."""
    columns = tl.arange(0, BD)
    share = tl.maximum(count, 1).to(tl.float32)
    before = tl.zeros([BD], dtype=tl.float32)
    after = tl.zeros([BD], dtype=tl.float32)
    alone = tl.zeros([BD], dtype=tl.float32)
    some = tl.zeros([BD], dtype=tl.int32)
    for start in range(0, D, BD):
        column = start + columns
        w = tl.load(w_row + column, mask=column < D, other=0.0)
        c = _finite(tl.load(c_row + column, mask=column < D, other=0.0))
        mean = tl.load(s_row + column, mask=column < D, other=0.0) / share
        new = tl.where(count > 0, beta * c + (1.0 - beta) * mean, c)
        before += w * w
        after += new * new
        alone += mean * mean
        some |= (c != 0).to(tl.int32)
    first = (tl.max(some, axis=0) == 0) & (count > 0)
    beta = tl.where(first, 0.0, beta)
    norm_before = tl.sqrt(tl.sum(before, axis=0))
    norm_after = tl.sqrt(tl.where(first, tl.sum(alone, axis=0), tl.sum(after, axis=0)))
    had_direction = (norm_before >= MIN_CENTROID_NORM) & (norm_before < float("inf"))  # NaN fails both
    scale_before = 1.0 / tl.where(had_direction, norm_before, 1.0)
    has_direction = FOLLOW & go & (norm_after >= MIN_CENTROID_NORM) & (norm_after < float("inf"))
    scale_after = 1.0 / tl.where(has_direction, norm_after, 1.0)
    apart = tl.zeros([BD], dtype=tl.float32)
    along = tl.zeros([BD], dtype=tl.float32)
    for start in range(0, D, BD):
        column = start + columns
        w = tl.load(w_row + column, mask=column < D, other=0.0)
        old = tl.load(c_row + column, mask=column < D, other=0.0)
        s = tl.load(s_row + column, mask=column < D, other=0.0)
        c = _finite(old)
        new = tl.where(count > 0, beta * c + (1.0 - beta) * (s / share), c)
        u = tl.where(had_direction, w * scale_before, 0.0)
        v = tl.where(has_direction, new * scale_after, u)
        apart += (u - v) * (u - v)
        along += (u + v) * (u + v)
        tl.store(w_row + column, tl.where(has_direction, v, w), mask=column < D)
        tl.store(c_row + column, tl.where(go, new, old), mask=column < D)
        tl.store(s_row + column, tl.where(keep, s, 0.0), mask=column < D)
    return tl.sqrt(tl.sum(apart, axis=0)), tl.sqrt(tl.sum(along, axis=0))


@triton.jit
def _moved_bias(bias, counts, quantile, sigma, bias_rate, real, E: tl.constexpr, RULE: tl.constexpr):
    """The bias after one step of its rule, centred and clamped: `reference.balance_bias`."""
    total = tl.sum(counts, axis=0)
    if RULE == "proportional":
        load = counts.to(tl.float32) * (E / tl.maximum(total, 1).to(tl.float32))
        moved = bias + bias_rate * sigma * tl.minimum(tl.maximum(1.0 - load, -1.0), 1.0)
    elif RULE == "sign":
        excess = total - counts * E
        moved = bias + bias_rate * ((excess > 0).to(tl.float32) - (excess < 0).to(tl.float32))
    else:
        moved = (1.0 - bias_rate) * bias + bias_rate * (bias + quantile)
    mean = tl.sum(tl.where(real, moved, 0.0), axis=0) / E
    return tl.minimum(tl.maximum(moved - mean, -2.0), 2.0)


@triton.jit
def _commit_kernel(
    weight_ptr, centroids_ptr, sums_ptr, counts_ptr, seen_ptr, hist_ptr, quantile_ptr,
    bias_ptr, score_std_ptr, steps_ptr, dropped_total_ptr,
    std_sum_ptr, num_tokens_ptr, num_dropped_ptr,
    load_ptr, turn_ptr, skip_ptr, ticket_ptr,
    D, decay, bias_rate, given_steps,
    E: tl.constexpr, K: tl.constexpr, RULE: tl.constexpr, FOLLOW: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):
    """Grid (E,). seen None: EMA, else cumulative means. turn (2, E): ||u - v|| and ||u + v||, old and new direction."""
    expert = tl.program_id(0)
    num_tokens = tl.load(num_tokens_ptr)
    keep = num_tokens < 0
    if skip_ptr is not None:
        keep = tl.load(skip_ptr) != 0
    go = as_mask((num_tokens > 0) & (keep == 0))
    steps = tl.load(steps_ptr)
    scale = _finite(tl.load(score_std_ptr))
    lost = (steps == 0) & (scale > 0)  # see `reference.counters_kept`
    steps = tl.where(lost, given_steps, steps)
    count = tl.load(counts_ptr + expert)
    if seen_ptr is not None:
        before = tl.load(seen_ptr + expert)
        seen = tl.where(lost & (before == 0), GIVEN_TOKENS, before)
        beta = seen.to(tl.float32) / tl.maximum(seen + count, 1).to(tl.float32)
        tl.store(seen_ptr + expert, tl.where(go, seen + count, before))
    else:
        beta = tl.minimum(steps.to(tl.float32) / (steps + 1).to(tl.float32), decay)
    row = expert.to(tl.int64) * D
    apart, along = _move_centroid(
        weight_ptr + row, centroids_ptr + row, sums_ptr + row, count, beta, go, keep, D, FOLLOW, BD
    )
    tl.store(turn_ptr + expert, apart, mask=go)
    tl.store(turn_ptr + E + expert, along, mask=go)
    if RULE == "quantile":
        hist_row = hist_ptr + expert.to(tl.int64) * NUM_MARGIN_BINS
        tl.store(quantile_ptr + expert, _take_quantile(hist_row, keep, E, K))

    tl.debug_barrier()  # every thread's loads of the counters come before this program's arrival
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == E - 1:
        experts = tl.arange(0, BE)
        real = experts < E
        counts = tl.load(counts_ptr + experts, mask=real, other=0)
        std = tl.load(std_sum_ptr)
        sd = std / tl.maximum(num_tokens, 1).to(tl.float32)
        sigma = tl.where(scale == 0, sd, 0.99 * scale + 0.01 * sd)
        tl.store(score_std_ptr, sigma, mask=go)
        bias = _finite(tl.load(bias_ptr + experts, mask=real, other=0.0))
        if RULE != "none":
            quantile = bias
            if RULE == "quantile":
                quantile = tl.load(quantile_ptr + experts, mask=real, other=0.0, cache_modifier=".cg")
            bias = _moved_bias(bias, counts, quantile, sigma, bias_rate, real, E, RULE)
        tl.store(bias_ptr + experts, bias, mask=real & go)
        tl.store(steps_ptr, steps + 1, mask=go)
        tl.store(load_ptr + experts, counts, mask=real & go)
        dropped = tl.load(num_dropped_ptr)
        tl.store(dropped_total_ptr, tl.load(dropped_total_ptr) + tl.where(keep, 0, dropped))
        tl.store(counts_ptr + experts, tl.where(keep, counts, 0), mask=real)
        tl.store(std_sum_ptr, tl.where(keep, std, 0.0))
        tl.store(num_tokens_ptr, tl.where(keep, num_tokens, 0))
        tl.store(num_dropped_ptr, tl.where(keep, dropped, 0))
        tl.atomic_and(ticket_ptr, 0, sem="relaxed")


def commit(
    weight: Tensor,
    centroids: Tensor,
    expert_bias: Tensor,
    score_std: Tensor,
    steps: Tensor,
    tokens_seen: Tensor | None,
    dropped_total: Tensor,
    tokens_per_expert: Tensor,
    turn: Tensor,
    sums: Tensor,
    counts: Tensor,
    std_sum: Tensor,
    num_tokens: Tensor,
    num_dropped: Tensor,
    margin_hist: Tensor,
    skip: Tensor | None,
    top_k: int,
    decay: float,
    balance: str,
    bias_rate: float,
    directions: str = "centroids",
) -> None:
    """One launch of `_commit_kernel`: fold the pending state (sums to margin_hist) into the state, and empty it.

    All in place. turn: (2, E) fp32, from which the angle of each centroid's turn is 2 atan2(turn[0], turn[1]).
    skip: () bool; true leaves everything as it is. directions: with "whitened" weight stays as it is, for another step.
    """
    num_experts, hidden_size = weight.shape
    rule = "none" if top_k == num_experts else balance
    quantile = torch.empty_like(expert_bias) if rule == "quantile" else None
    _commit_kernel[(num_experts,)](
        weight, centroids, sums, counts, tokens_seen, margin_hist if rule == "quantile" else None, quantile,
        expert_bias, score_std, steps, dropped_total, std_sum, num_tokens, num_dropped,
        tokens_per_expert, turn, skip, *counters(weight.device, 1), hidden_size, decay, bias_rate,
        round(decay / (1 - decay)),
        E=num_experts, K=top_k, RULE=rule, FOLLOW=directions == "centroids", BE=padded_experts(num_experts), BD=BLOCK,
        num_warps=4, **all_registers(4, architecture(weight.device)),
    )
