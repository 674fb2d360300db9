"""route_fwd: norms, cosine scores, top-k and gates in one pass over the hidden states.

    s_te = (x_t . d_e) / ||x_t||;  sel_t = the K largest of s_te + b_e;  g_te = gate of s over sel_t

x (T, D) is read once, block by block; the directions (E, D) come from L2 once a block of BT tokens. The dot products
run on the tensor cores and the squared norm is summed beside them from the same tile, so x is never normalised in
memory. Bytes from HBM: T D B of x; from L2: E D B ceil(T / BT) of directions; written: T (16 K + 5).

Few tokens do not fill a machine that way: below about 100 blocks, `_route_split_kernel` splits D over programs too. The
last program of a block to arrive adds the partial products in the order of the splits and selects, a few rows at a
time. With one split the same kernel serves where a whole block's scores, and what selection keeps beside them, would
spill: from 128 experts on, and for the longer selections. Then T BE 4 bytes are written and read again, mostly in L2.
One launch either way, also for a single token.

Legend: T tokens, D hidden size, E experts, K top_k, NB blocks of BT tokens, S splits of D, RT tokens that are selected
for, and ranked, together.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kmeans_route.kernels import tune
from kmeans_route.kernels.common import NUM_MARGIN_BINS, publish_totals, rows_of
from kmeans_route.kernels.configs import (
    Config,
    all_registers,
    architecture,
    ceil_div,
    dot_precision,
    padded_experts,
    power_of_2,
    route_config,
    selected_rows,
    selects_at_once,
    waits_for_products,
)
from kmeans_route.kernels.select import select_and_store
from kmeans_route.kernels.workspace import counters

Options = tuple[int, str, float, bool, float, int, int, str]
PROGRAMS = 128  # wanted at least: about the multiprocessors of one GPU


@triton.jit
def _dots_and_squares(
    x_rows, d_rows, in_batch, first, size, end,
    E: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):
    """x . d (BT, BE) and the squared norms of x (BT,) over `size` columns from `first`, those below `end`, in fp32.

    One stream over D. Squares are kept by column and summed at the end: a sum across threads in every step would cost
    more than the registers, and breaks the compiler's pass for tensor memory on sm_100 (Triton 3.7.1).
    """
    experts = tl.arange(0, BE)
    columns = tl.arange(0, BD)
    dots = tl.zeros([BT, BE], dtype=tl.float32)
    squares = tl.zeros([BT, BD], dtype=tl.float32)
    for start in range(0, size, BD):
        column = first + start + columns
        x = tl.load(x_rows + column[None, :], mask=in_batch[:, None] & (column < end)[None, :], other=0.0)
        d = tl.load(d_rows + column[None, :], mask=(experts < E)[:, None] & (column < end)[None, :], other=0.0)
        x_fp32 = x.to(tl.float32)
        squares += x_fp32 * x_fp32
        dots = tl.dot(x, tl.trans(d), dots, input_precision=PRECISION)
        # Always true, and not dead: reading the product makes each step wait for its own. Without that the compiler
        # leaves it in flight, and, x having a second use, refills the tile that it still reads (triton#6691).
        if WAIT:
            dots = tl.where(start >= 0, dots, 0.0)
    return dots, tl.sum(squares, axis=1)


@triton.jit(do_not_specialize=["T"])
def _route_fwd_kernel(
    x_ptr, x_stride_t,
    d_ptr,
    bias_ptr, mask_ptr, count_mask_ptr, given_ptr,
    ids_ptr, weights_ptr, selected_ptr,
    scores_ptr, candidates_ptr,
    inv_norm_ptr, valid_ptr,
    rank_ptr, block_counts_ptr, totals_ptr, ticket_ptr,
    counts_ptr, offsets_ptr, dropped_ptr,
    std_ptr, hist_ptr,
    T, D, tau, scaling,
    E: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
    NG: tl.constexpr, KG: tl.constexpr, NGP: tl.constexpr, TOP2: tl.constexpr,
    PRECISION: tl.constexpr, WAIT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, KP: tl.constexpr,
):
    """Grid (ceil(T / BT),)."""
    block = tl.program_id(0).to(tl.int64)
    tokens = block * BT + tl.arange(0, BT)
    x_rows = x_ptr + tokens[:, None] * x_stride_t
    d_rows = d_ptr + tl.arange(0, BE)[:, None] * D
    dots, squares = _dots_and_squares(x_rows, d_rows, tokens < T, 0, D, D, E, PRECISION, WAIT, BT, BD, BE)
    select_and_store(
        dots, squares, block, T,
        bias_ptr, mask_ptr, count_mask_ptr, given_ptr, ids_ptr, weights_ptr, selected_ptr, scores_ptr, candidates_ptr,
        inv_norm_ptr, valid_ptr, rank_ptr, block_counts_ptr, totals_ptr, std_ptr, hist_ptr,
        tau, scaling, E, K, GATE, NORMALIZE, NG, KG, NGP, TOP2, BT, BE, KP,
    )
    publish_totals(totals_ptr, ticket_ptr, tl.num_programs(0), counts_ptr, offsets_ptr, dropped_ptr, E, BE)


@triton.jit(do_not_specialize=["T", "num_splits"])
def _route_split_kernel(
    x_ptr, x_stride_t,
    d_ptr,
    dots_ptr, squares_ptr, block_tickets_ptr,
    bias_ptr, mask_ptr, count_mask_ptr, given_ptr,
    ids_ptr, weights_ptr, selected_ptr,
    scores_ptr, candidates_ptr,
    inv_norm_ptr, valid_ptr,
    rank_ptr, block_counts_ptr, totals_ptr, ticket_ptr,
    counts_ptr, offsets_ptr, dropped_ptr,
    std_ptr, hist_ptr,
    T, D, num_splits, split_size, tau, scaling,
    E: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
    NG: tl.constexpr, KG: tl.constexpr, NGP: tl.constexpr, TOP2: tl.constexpr,
    PRECISION: tl.constexpr, WAIT: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, KP: tl.constexpr, RT: tl.constexpr,
):
    """Grid (S NB,), the splits of a block together. dots (S, NB BT, BE) and squares (S, NB BT) hold their partial
    results. One axis, since the others stop at 65535 programs.

    The last program of a block selects for RT tokens at a time, since a block's whole tile beside what selection needs
    would spill where experts are many.
    """
    split = (tl.program_id(0) % num_splits).to(tl.int64)
    block = (tl.program_id(0) // num_splits).to(tl.int64)
    num_blocks = tl.num_programs(0) // num_splits
    num_rows = num_blocks.to(tl.int64) * BT
    tokens = block * BT + tl.arange(0, BT)
    experts = tl.arange(0, BE)
    x_rows = x_ptr + tokens[:, None] * x_stride_t
    d_rows = d_ptr + experts[:, None] * D
    end = tl.minimum((split + 1) * split_size, D)
    dots, squares = _dots_and_squares(
        x_rows, d_rows, tokens < T, split * split_size, split_size, end, E, PRECISION, WAIT, BT, BD, BE
    )

    # 32 bits from a base of 64: half the registers of 64-bit addresses
    block_rows = tl.arange(0, BT)
    own_row = split * num_rows + block * BT
    tl.store(dots_ptr + own_row * BE + block_rows[:, None] * BE + experts[None, :], dots)
    tl.store(squares_ptr + own_row + block_rows, squares)
    tl.debug_barrier()  # every thread's partials come before this program's arrival
    if tl.atomic_add(block_tickets_ptr + block, 1, sem="acq_rel") == num_splits - 1:
        tl.debug_barrier()
        rows = tl.arange(0, RT)
        for part in range(BT // RT):
            group = block * (BT // RT) + part
            all_dots = tl.zeros([RT, BE], dtype=tl.float32)
            all_squares = tl.zeros([RT], dtype=tl.float32)
            for other in range(num_splits):  # past L1, which may hold what was there before
                first_row = other * num_rows + group * RT
                tile = dots_ptr + first_row * BE + rows[:, None] * BE + experts[None, :]
                all_dots += tl.load(tile, cache_modifier=".cg")
                all_squares += tl.load(squares_ptr + first_row + rows, cache_modifier=".cg")
            select_and_store(
                all_dots, all_squares, group, T,
                bias_ptr, mask_ptr, count_mask_ptr, given_ptr,
                ids_ptr, weights_ptr, selected_ptr, scores_ptr, candidates_ptr,
                inv_norm_ptr, valid_ptr, rank_ptr, block_counts_ptr, totals_ptr, std_ptr, hist_ptr,
                tau, scaling, E, K, GATE, NORMALIZE, NG, KG, NGP, TOP2, RT, BE, KP,
            )
        tl.atomic_and(block_tickets_ptr + block, 0, sem="relaxed")
        publish_totals(totals_ptr, ticket_ptr, num_blocks, counts_ptr, offsets_ptr, dropped_ptr, E, BE)


class RouteResult(NamedTuple):
    """What a launch leaves: the fields of `Routing`, and what dispatch and accumulate go on with.

    dropped: () int64, tokens that the mask let in and that are not valid. offsets: (E+1,) int32. Where they are wanted,
    else None: scores, candidates: (T, E); score_std: (T,) fp32; margin_hist: (E, 1024) int32; rank: (T, K) int32 and
    block_counts: (blocks, E+2) int32. block: their tokens, BT or RT.
    """

    indices: Tensor
    weights: Tensor
    selected: Tensor
    scores: Tensor | None
    candidates: Tensor | None
    counts: Tensor
    inv_norm: Tensor
    valid: Tensor
    score_std: Tensor | None
    margin_hist: Tensor | None
    dropped: Tensor
    offsets: Tensor
    rank: Tensor | None
    block_counts: Tensor | None
    block: int


def route_fwd(
    x: Tensor,
    directions: Tensor,
    expert_bias: Tensor | None,
    mask: Tensor | None,
    indices: Tensor | None,
    options: Options,
    *,
    count_mask: Tensor | None = None,
    want_scores: bool = False,
    want_std: bool = False,
    want_hist: bool = False,
    want_rank: bool = False,
    config: Config | None = None,
) -> RouteResult:
    """One launch of `_route_fwd_kernel`, or of `_route_split_kernel` where D is split or selection stands apart.

    Args:
        x: (T, D) fp32, fp16 or bf16. directions: (E, D) in x's dtype.
        expert_bias: (E,) or None. mask: (T,) bool or None. indices: (T, K) int64 to replay, or None.
        options: the fields of `kmeans_route.types.RouteOptions`.
        count_mask: (T,) bool or None; tokens outside have no part in score_std, margin_hist and dropped.
        want_scores, want_std, want_hist: fill scores, score_std, margin_hist. want_rank: fill rank and block_counts.
        config: instead of the table's.
    """
    (num_tokens, hidden_size), num_experts = x.shape, directions.shape[0]
    top_k, gate, tau, normalize, scaling, *_ = options
    arch, dtype = architecture(x.device), x.dtype
    c = config or route_config(num_tokens, num_experts, dtype, arch, hidden_size % 16 == 0)
    if config is None and tune.ENABLED:
        c = tune.tuned("route_config", (num_tokens, num_experts, dtype), x.device, c, lambda config: route_fwd(
            x, directions, expert_bias, mask, indices, options, count_mask=count_mask, want_scores=want_scores,
            want_std=want_std, want_hist=want_hist, want_rank=want_rank, config=config,
        ))
    num_blocks, over_all = ceil_div(num_tokens, c.BT), gate == "softmax" and not normalize
    keeps_more = want_hist or indices is not None
    plan = _plan(c, num_blocks, hidden_size, num_experts, options, keeps_more, dtype, arch, PROGRAMS)
    out = _empty_result(
        x, num_experts, top_k, plan.block, num_blocks * (c.BT // plan.block),
        want_scores or over_all, over_all, want_std, want_hist, want_rank,
    )
    if num_tokens == 0:
        for empty in (out.counts, out.offsets, out.dropped):
            empty.zero_()
        return out
    x, directions = rows_of(x), directions.contiguous()
    totals, ticket, *block_tickets = counters(x.device, num_experts + 2, 1, *(() if plan.stream else (num_blocks,)))
    pointers = (
        None if expert_bias is None else expert_bias.float().contiguous(),
        None if mask is None else mask.contiguous(), None if count_mask is None else count_mask.contiguous(),
        None if indices is None else indices.contiguous(),
        out.indices, out.weights, out.selected, out.scores, out.candidates, out.inv_norm, out.valid,
        out.rank, out.block_counts, totals, ticket,
        out.counts, out.offsets, out.dropped, out.score_std, out.margin_hist,
    )
    if plan.stream:
        _route_fwd_kernel[(num_blocks,)](
            x, x.stride(0), directions, *pointers, num_tokens, hidden_size, tau, scaling, **plan.constants
        )
        return out
    rows, splits = num_blocks * c.BT, plan.num_splits
    partial_dots = x.new_empty(splits, rows, padded_experts(num_experts), dtype=torch.float32)
    partial_squares = x.new_empty(splits, rows, dtype=torch.float32)
    _route_split_kernel[(splits * num_blocks,)](
        x, x.stride(0), directions, partial_dots, partial_squares, *block_tickets, *pointers,
        num_tokens, hidden_size, splits, plan.split_size, tau, scaling, **plan.constants,
    )
    return out


class _Plan(NamedTuple):
    """How a routing is launched. stream: by `_route_fwd_kernel`. block: tokens that are selected for, and ranked,
    together. num_splits, split_size: of D. constants: what the kernel is compiled for; not to be changed."""

    stream: bool
    block: int
    num_splits: int
    split_size: int
    constants: dict[str, Any]


@lru_cache(maxsize=1024)
def _plan(
    c: Config, num_blocks: int, hidden_size: int, num_experts: int, options: Options, keeps_more: bool,
    dtype: torch.dtype, arch: str, programs: int,
) -> _Plan:
    """keeps_more: for a histogram, or for replay."""
    top_k, gate, _tau, normalize, _scaling, n_group, topk_group, group_score = options
    num_splits, split_size = column_splits(hidden_size, max(1, num_blocks), c.BD, programs)
    long = keeps_more or topk_group < n_group or (gate == "softmax" and not normalize)
    stream = num_splits == 1 and selects_at_once(c, num_experts, long=long)
    block = c.BT if stream else min(c.BT, selected_rows(num_experts, long=long))
    return _Plan(stream, block, num_splits, split_size, {
        "E": num_experts, "K": top_k, "GATE": gate, "NORMALIZE": normalize,
        "NG": n_group, "KG": topk_group, "NGP": power_of_2(n_group), "TOP2": group_score == "top2",
        "PRECISION": dot_precision(dtype, arch), "WAIT": waits_for_products(arch),
        "BT": c.BT, "BD": c.BD, "BE": padded_experts(num_experts), "KP": power_of_2(top_k),
        **({} if stream else {"RT": block}), **c.launch, **all_registers(c.num_warps, arch),
    })


def _empty_result(
    x: Tensor, num_experts: int, top_k: int, block: int, num_ranked: int,
    want_scores: bool, want_candidates: bool, want_std: bool, want_hist: bool, want_rank: bool,
) -> RouteResult:
    """What a launch fills. Allocations are half of a launcher's time, so what is not wanted is not made; each is of its
    own memory, since views of one take as long to make."""
    made, num_tokens, fp32, int32, int64 = x.new_empty, x.shape[0], torch.float32, torch.int32, torch.int64
    return RouteResult(
        indices=made(num_tokens, top_k, dtype=int64),
        weights=made(num_tokens, top_k, dtype=fp32),
        selected=made(num_tokens, top_k, dtype=fp32),
        scores=made(num_tokens, num_experts, dtype=fp32) if want_scores else None,
        candidates=made(num_tokens, num_experts, dtype=torch.bool) if want_candidates else None,
        counts=made(num_experts, dtype=int64),
        inv_norm=made(num_tokens, dtype=fp32),
        valid=made(num_tokens, dtype=torch.bool),
        offsets=made(num_experts + 1, dtype=int32),
        dropped=made((), dtype=int64),
        rank=made(num_tokens, top_k, dtype=int32) if want_rank else None,
        block_counts=made(num_ranked, num_experts + 2, dtype=int32) if want_rank else None,
        score_std=made(num_tokens, dtype=fp32) if want_std else None,
        margin_hist=x.new_zeros(num_experts, NUM_MARGIN_BINS.value, dtype=int32) if want_hist else None,
        block=block,
    )


def column_splits(
    hidden_size: int, num_blocks: int, columns: int, programs: int = PROGRAMS
) -> tuple[int, int]:
    """Splits of D and the columns of each, a multiple of a tile: at least `programs` in all, at most 32 splits.

    It does not look at the device, so that the order of the sums, and the bits, do not depend on it.
    """
    tiles = ceil_div(hidden_size, columns)
    splits = max(1, min(tiles, 32, programs // num_blocks))
    size = ceil_div(tiles, splits) * columns
    return ceil_div(hidden_size, size), size
