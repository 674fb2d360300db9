"""route_fwd: norms, cosine scores, top-k and gates from one read of the hidden states.

    s_te = (x_t . d_e) / ||x_t||;  sel_t = the K largest of s_te + b_e;  g_te = gate of s over sel_t

`_route_fwd_kernel` reads x (T, D) once, block by block; the directions (E, D) come from L2 once a block of BT tokens.
The dot products run on the tensor cores and the squared norm is summed beside them from the same tile, so x is never
normalised in memory. Where blocks are few, programs share the experts and the columns of D too. Dots and squares go
through memory, mostly L2, to `_route_select_kernel`, which adds the splits in their order and selects. Its programs
are one warp with a few whole rows: as many run at once as fit, and no round of a selection has a barrier. Selecting in
the products' own program left the multiprocessor to one tile at a time. `_route_rank_kernel` ranks copies for dispatch.

Bytes from HBM: T D B of x; from L2: E D B ceil(T / BT) of directions, 2 S T E 4 of dots; written: T (16 K + 5).

Legend: T tokens, D hidden size, E experts, K top_k, NB blocks of BT tokens, S splits of D, RT tokens that are selected
for together.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kmeans_route.kernels import tune
from kmeans_route.kernels.common import NUM_MARGIN_BINS, popcount, publish_totals, rows_of
from kmeans_route.kernels.configs import (
    Config,
    all_registers,
    architecture,
    ceil_div,
    dot_precision,
    padded_experts,
    power_of_2,
    product_experts,
    ranked_tokens,
    route_config,
    selected_experts,
    selected_rows,
    waits_for_products,
)
from kmeans_route.kernels.select import MOST_SPLITS, select_and_store
from kmeans_route.kernels.workspace import counters

Options = tuple[int, str, float, bool, float, int, int, str]
BATCH_SCORES = 4096  # of all splits that are asked for at once: 128 registers a thread
PROGRAMS = 128  # wanted at least: about the multiprocessors of one GPU


@triton.jit
def _dots_and_squares(
    x_rows, d_rows, in_batch, first, size, end, last,
    PRECISION: tl.constexpr, WAIT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):
    """x . d (BT, BE) and the squared norms of x (BT,) over `size` columns from `first`, those below `end`, in fp32.
    last: experts that there are.

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
        d = tl.load(d_rows + column[None, :], mask=(experts < last)[:, None] & (column < end)[None, :], other=0.0)
        x_fp32 = x.to(tl.float32)
        squares += x_fp32 * x_fp32
        dots = tl.dot(x, tl.trans(d), dots, input_precision=PRECISION)
        # Always true, and not dead: reading the product makes each step wait for its own. Without that the compiler
        # leaves it in flight, and, x having a second use, refills the tile that it still reads (triton#6691).
        if WAIT:
            dots = tl.where(start >= 0, dots, 0.0)
    return dots, tl.sum(squares, axis=1)


@triton.jit(do_not_specialize=["T", "num_splits"])
def _route_fwd_kernel(
    x_ptr, x_stride_t,
    d_ptr,
    dots_ptr, squares_ptr,
    T, D, num_splits, split_size,
    E: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, EB: tl.constexpr,
):
    """dots (S, NB BT, BE) and squares (S, NB BT), fp32. Grid (NB S BE / EB,): EB experts a program, neighbours read the
    same x. One axis, since the others stop at 65535 programs."""
    PARTS: tl.constexpr = BE // EB
    part = tl.program_id(0) % PARTS
    split = (tl.program_id(0) // PARTS % num_splits).to(tl.int64)
    block = (tl.program_id(0) // PARTS // num_splits).to(tl.int64)
    num_rows = (tl.num_programs(0) // PARTS // num_splits).to(tl.int64) * BT
    tokens = block * BT + tl.arange(0, BT)
    first_expert = part * EB
    x_rows = x_ptr + tokens[:, None] * x_stride_t
    d_rows = d_ptr + first_expert * D + tl.arange(0, EB)[:, None] * D
    first = split * split_size
    end = tl.minimum(first + split_size, D)
    dots, squares = _dots_and_squares(
        x_rows, d_rows, tokens < T, first, split_size, end, E - first_expert, PRECISION, WAIT, BT, BD, EB
    )
    # 32 bits from a base of 64: half the registers of 64-bit addresses
    rows = tl.arange(0, BT)
    own_row = split * num_rows + block * BT
    tl.store(dots_ptr + own_row * BE + first_expert + rows[:, None] * BE + tl.arange(0, EB)[None, :], dots)
    if part == 0:
        tl.store(squares_ptr + own_row + rows, squares)


@triton.jit(do_not_specialize=["T", "num_splits", "num_rows"])
def _route_select_kernel(
    dots_ptr, squares_ptr,
    bias_ptr, mask_ptr, count_mask_ptr, given_ptr,
    ids_ptr, weights_ptr, selected_ptr,
    scores_ptr, candidates_ptr,
    inv_norm_ptr, valid_ptr,
    totals_ptr, ticket_ptr,
    counts_ptr, offsets_ptr, dropped_ptr,
    std_ptr, hist_ptr,
    T, num_rows, num_splits, tau, scaling,
    E: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
    NG: tl.constexpr, KG: tl.constexpr, NGP: tl.constexpr, TOP2: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, ROW: tl.constexpr, KP: tl.constexpr, RT: tl.constexpr, BATCH: tl.constexpr,
):
    """Grid (ceil(T / BT),): a program selects for BT tokens, RT at a time. One warp, so that nothing waits for another.
    """
    first = tl.program_id(0).to(tl.int64) * BT
    slots = tl.arange(0, KP)
    num_dropped = 0
    for part in range(BT // RT):
        own = first + part * RT
        ids, valid, dropped = select_and_store(
            dots_ptr, squares_ptr, own, num_rows.to(tl.int64), num_splits, T,
            bias_ptr, mask_ptr, count_mask_ptr, given_ptr,
            ids_ptr, weights_ptr, selected_ptr, scores_ptr, candidates_ptr, inv_norm_ptr, valid_ptr, std_ptr, hist_ptr,
            tau, scaling, E, K, GATE, NORMALIZE, NG, KG, NGP, TOP2, RT, BE, ROW, KP, BATCH,
        )
        chosen = tl.where(valid[:, None], ids, E)
        inside = (own + tl.arange(0, RT) < T)[:, None] & (slots < K)[None, :]
        tl.atomic_add(totals_ptr + chosen, 1, mask=inside, sem="relaxed")
        num_dropped += tl.sum(dropped.to(tl.int32), axis=0)
    tl.atomic_add(totals_ptr + E + 1, num_dropped, mask=num_dropped > 0, sem="relaxed")
    publish_totals(totals_ptr, ticket_ptr, tl.num_programs(0), counts_ptr, offsets_ptr, dropped_ptr, E, BE)


@triton.jit(do_not_specialize=["T"])
def _route_rank_kernel(
    ids_ptr, valid_ptr,
    bits_ptr, rank_ptr, block_counts_ptr,
    T,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, KP: tl.constexpr,
):
    """Row NB of block_counts (NB, E+2) and rank (T, K) of a block of BT tokens. Grid (ceil(T / BT),).

    Which of 32 tokens chose an expert are the bits of one integer of bits (T / 32, E+1), set by atomic ORs, whose order
    does not matter. Tokens that are not valid queue as if at an expert E, K rows each.
    """
    WORDS: tl.constexpr = BT // 32
    block = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BE)
    slots = tl.arange(0, KP)
    rows = tl.arange(0, BT)
    tokens = block * BT + rows
    write = (tokens < T)[:, None] & (slots < K)[None, :]
    out = tokens[:, None] * K + slots[None, :]
    table_ptr = bits_ptr + block * WORDS * (E + 1)
    for word in tl.static_range(WORDS):
        tl.store(table_ptr + word * (E + 1) + experts, 0, mask=experts < E)
        tl.store(table_ptr + word * (E + 1) + E, 0)
    valid = tl.load(valid_ptr + tokens, mask=tokens < T, other=0) != 0
    ids = tl.load(ids_ptr + out, mask=write, other=0).to(tl.int32)
    chosen = tl.where(valid[:, None], ids, E)
    tl.debug_barrier()  # every word is 0
    word = (rows // 32)[:, None]
    bit = tl.zeros([BT, KP], dtype=tl.int32) + (1 << rows % 32)[:, None]
    tl.atomic_or(table_ptr + word * (E + 1) + chosen, bit, mask=write, sem="relaxed")
    tl.debug_barrier()  # every bit is set
    counts = tl.zeros([BE], dtype=tl.int32)
    outside = 0
    before = tl.zeros([BT, KP], dtype=tl.int32)
    for other in tl.static_range(WORDS):  # past L1, which may hold what was there before
        row = table_ptr + other * (E + 1)
        counts += popcount(tl.load(row + experts, mask=experts < E, other=0, cache_modifier=".cg"))
        outside += popcount(tl.load(row + E, cache_modifier=".cg"))
        bits = tl.load(row + chosen, mask=write & (other <= word), other=0, cache_modifier=".cg")
        before += popcount(tl.where(other == word, bits & (bit - 1), bits))
    tl.store(rank_ptr + out, tl.where(valid[:, None], before, before * K + slots[None, :]), mask=write)
    row = block_counts_ptr + block * (E + 2)
    tl.store(row + experts, counts, mask=experts < E)
    tl.store(row + E, outside * K)
    tl.store(row + E + 1, 0)


class RouteResult(NamedTuple):
    """What a launch leaves: the fields of `Routing`, and what dispatch and accumulate go on with.

    dropped: () int64, tokens that the mask let in and that are not valid. offsets: (E+1,) int32. Where they are wanted,
    else None: scores, candidates: (T, E); score_std: (T,) fp32; margin_hist: (E, 1024) int32; rank: (T, K) int32 and
    block_counts: (blocks, E+2) int32, of which the last column is 0. block: their tokens.
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
    """Two launches, `_route_fwd_kernel` and `_route_select_kernel`; with want_rank `_route_rank_kernel` too.

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
    over_all = gate == "softmax" and not normalize
    plan = _plan(c, num_tokens, hidden_size, num_experts, options, want_hist or indices is not None, dtype, arch)
    ranked = ranked_tokens(num_tokens)
    out = _empty_result(
        x, num_experts, top_k, ranked, want_scores or over_all, over_all, want_std, want_hist, want_rank
    )
    if num_tokens == 0:
        for empty in (out.counts, out.offsets, out.dropped):
            empty.zero_()
        return out
    x, directions = rows_of(x), directions.contiguous()
    num_blocks, splits = ceil_div(num_tokens, c.BT), plan.num_splits
    rows = num_blocks * c.BT
    dots = x.new_empty(splits, rows, plan.experts, dtype=torch.float32)
    squares = x.new_empty(splits, rows, dtype=torch.float32)
    _route_fwd_kernel[(num_blocks * splits * plan.parts,)](
        x, x.stride(0), directions, dots, squares, num_tokens, hidden_size, splits, plan.split_size, **plan.products
    )
    _route_select_kernel[(ceil_div(num_tokens, plan.block),)](
        dots, squares,
        None if expert_bias is None else expert_bias.float().contiguous(),
        None if mask is None else mask.contiguous(), None if count_mask is None else count_mask.contiguous(),
        None if indices is None else indices.contiguous(),
        out.indices, out.weights, out.selected, out.scores, out.candidates, out.inv_norm, out.valid,
        *counters(x.device, num_experts + 2, 1),
        out.counts, out.offsets, out.dropped, out.score_std, out.margin_hist,
        num_tokens, rows, splits, tau, scaling, **plan.select,
    )
    if want_rank:
        bits = x.new_empty(ceil_div(num_tokens, ranked) * ranked // 32, num_experts + 1, dtype=torch.int32)
        _route_rank_kernel[(ceil_div(num_tokens, ranked),)](
            out.indices, out.valid, bits, out.rank, out.block_counts, num_tokens,
            E=num_experts, K=top_k, BT=ranked, BE=plan.experts, KP=power_of_2(top_k),
            num_warps=4 if top_k <= 8 else 8,
        )
    return out


class _Plan(NamedTuple):
    """How a routing is launched. block: tokens a program selects for. num_splits, split_size: of D. experts: as padded;
    parts: programs that share them. products, select: what the kernels are compiled for; not to be changed."""

    block: int
    num_splits: int
    split_size: int
    experts: int
    parts: int
    products: dict[str, Any]
    select: dict[str, Any]


@lru_cache(maxsize=1024)
def _plan(
    c: Config, num_tokens: int, hidden_size: int, num_experts: int, options: Options, keeps_more: bool,
    dtype: torch.dtype, arch: str,
) -> _Plan:
    """keeps_more: for a histogram, or for replay."""
    top_k, gate, _tau, normalize, _scaling, n_group, topk_group, group_score = options
    be = padded_experts(num_experts)
    per_program = product_experts(c, num_experts, dtype, arch)
    tiles = max(1, ceil_div(num_tokens, c.BT)) * (be // per_program)
    num_splits, split_size = column_splits(hidden_size, tiles, c.BD, most_splits(c))
    long = keeps_more or topk_group < n_group or (gate == "softmax" and not normalize)
    block, rows = selected_rows(num_tokens, num_experts, long=long)
    batch = split_batch(c, num_splits, rows, num_experts, long=long)
    scores = rows * selected_experts(num_experts)
    warps = 2 if long and scores > 512 else 1  # of all tiles that it keeps, one warp's registers hold half
    # Where ptxas spilled, as for 384 experts in tiles of 512; more often would cost programs side by side.
    masked = rows < block and 256 < num_experts < 512
    crowded = batch * scores >= BATCH_SCORES or (long and scores >= 512) or masked
    return _Plan(block, num_splits, split_size, be, be // per_program, {
        "E": num_experts, "PRECISION": dot_precision(dtype, arch), "WAIT": waits_for_products(arch),
        "BT": c.BT, "BD": c.BD, "BE": be, "EB": per_program, **c.launch, **all_registers(c.num_warps, arch),
    }, {
        "E": num_experts, "K": top_k, "GATE": gate, "NORMALIZE": normalize,
        "NG": n_group, "KG": topk_group, "NGP": power_of_2(n_group), "TOP2": group_score == "top2",
        "BT": block, "BE": selected_experts(num_experts), "ROW": be, "KP": power_of_2(top_k), "RT": rows,
        "BATCH": batch, "num_warps": warps, "num_stages": 1,  # more stages would copy splits through shared memory
        **(all_registers(warps, arch) if crowded or arch == "sm_100" else {}),
    })


def _empty_result(
    x: Tensor, num_experts: int, top_k: int, block: int,
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
        block_counts=made(ceil_div(num_tokens, block), num_experts + 2, dtype=int32) if want_rank else None,
        score_std=made(num_tokens, dtype=fp32) if want_std else None,
        margin_hist=x.new_zeros(num_experts, NUM_MARGIN_BINS.value, dtype=int32) if want_hist else None,
        block=block,
    )


def most_splits(c: Config) -> int:
    """For few tokens as few programs add the splits, so there are fewer."""
    return int(MOST_SPLITS.value) // (1 if c.BT > 16 else 2)


def column_splits(hidden_size: int, num_tiles: int, columns: int, most: int) -> tuple[int, int]:
    """Splits of D and the columns of each, a multiple of a tile: PROGRAMS in all, and at most `most`.

    It does not look at the device, so that the order of the sums, and the bits, do not depend on it.
    """
    tiles = ceil_div(hidden_size, columns)
    splits = max(1, min(tiles, most, PROGRAMS // num_tiles))
    size = ceil_div(tiles, splits) * columns
    return ceil_div(hidden_size, size), size


def split_batch(c: Config, num_splits: int, rows: int, num_experts: int, *, long: bool) -> int:
    """BATCH: splits that selection asks for at once, as far as registers hold them.

    It knows no more of their number, so that few kernels are compiled: a mask leaves out those that there are not.
    Where a program has several rows there are many programs, which hide latency, and few splits.
    long: as in `selected_rows`.
    """
    most, held = (most_splits(c), BATCH_SCORES // (1 + long)) if rows == 1 else (4, BATCH_SCORES // 2)
    return 1 if num_splits == 1 else min(most, max(2, held // (rows * selected_experts(num_experts))))
