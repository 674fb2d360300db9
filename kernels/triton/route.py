"""route_fwd: norms, cosine scores, top-k and gates in one pass over the hidden states.

    s_te = (x_t . d_e) / ||x_t||;  sel_t = the K largest of s_te + b_e;  g_te = gate of s over sel_t

x (T, D) is read once, block by block; the directions (E, D) come from L2 once a block of BT tokens. The dot products
run on the tensor cores and the squared norm is summed beside them from the same tile, so x is never normalised in
memory. Bytes from HBM: T D B of x; from L2: E D B ceil(T / BT) of directions; written: T (16 K + 5).

Few tokens do not fill a machine that way: below about 100 blocks, `_route_split_kernel` splits D over programs too. The
last program of a block to arrive adds the partial products in the order of the splits and selects. One launch either
way, also for a single token.

Legend: T tokens, D hidden size, E experts, K top_k, NB blocks of BT tokens, S splits of D.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kmeans_route.kernels.common import publish_totals
from kmeans_route.kernels.configs import Config, architecture, dot_precision, padded_experts, route_config
from kmeans_route.kernels.select import select_and_store
from kmeans_route.kernels.tune import tuned
from kmeans_route.kernels.workspace import counters

PROGRAMS = 128  # wanted at least: about the multiprocessors of one GPU
NUM_MARGIN_BINS = 1024


@triton.jit(do_not_specialize=["T"])
def _route_fwd_kernel(
    x_ptr, x_stride_t,
    d_ptr,
    bias_ptr, mask_ptr, given_ptr,
    ids_ptr, weights_ptr, selected_ptr,
    scores_ptr, candidates_ptr,
    inv_norm_ptr, valid_ptr,
    rank_ptr, block_counts_ptr, totals_ptr, ticket_ptr,
    counts_ptr, offsets_ptr, dropped_ptr,
    std_ptr, hist_ptr,
    T, D, tau, scaling,
    E: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
    NG: tl.constexpr, KG: tl.constexpr, NGP: tl.constexpr, TOP2: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(T / BT),)."""
    block = tl.program_id(0).to(tl.int64)
    tokens = block * BT + tl.arange(0, BT)
    experts = tl.arange(0, BE)
    columns = tl.arange(0, BD)
    in_batch = tokens < T

    # One stream over D. Squares are kept by column and summed at the end: a sum across threads in every step would
    # cost more than the registers, and breaks the compiler's pass for tensor memory on sm_100 (Triton 3.7.1).
    dots = tl.zeros([BT, BE], dtype=tl.float32)
    squares = tl.zeros([BT, BD], dtype=tl.float32)
    x_rows = x_ptr + tokens[:, None] * x_stride_t
    d_rows = d_ptr + experts[:, None] * D
    for start in range(0, D, BD):
        column = start + columns
        x = tl.load(x_rows + column[None, :], mask=in_batch[:, None] & (column < D)[None, :], other=0.0)
        d = tl.load(d_rows + column[None, :], mask=(experts < E)[:, None] & (column < D)[None, :], other=0.0)
        x_fp32 = x.to(tl.float32)
        squares += x_fp32 * x_fp32
        dots = tl.dot(x, tl.trans(d), dots, input_precision=PRECISION)

    select_and_store(
        dots, tl.sum(squares, axis=1), block, T,
        bias_ptr, mask_ptr, given_ptr, ids_ptr, weights_ptr, selected_ptr, scores_ptr, candidates_ptr,
        inv_norm_ptr, valid_ptr, rank_ptr, block_counts_ptr, totals_ptr, std_ptr, hist_ptr,
        tau, scaling, E, K, GATE, NORMALIZE, NG, KG, NGP, TOP2, BT, BE, KP,
    )  # fmt: skip
    publish_totals(totals_ptr, ticket_ptr, tl.num_programs(0), counts_ptr, offsets_ptr, dropped_ptr, E, BE)


@triton.jit(do_not_specialize=["T"])
def _route_split_kernel(
    x_ptr, x_stride_t,
    d_ptr,
    dots_ptr, squares_ptr, block_tickets_ptr,
    bias_ptr, mask_ptr, given_ptr,
    ids_ptr, weights_ptr, selected_ptr,
    scores_ptr, candidates_ptr,
    inv_norm_ptr, valid_ptr,
    rank_ptr, block_counts_ptr, totals_ptr, ticket_ptr,
    counts_ptr, offsets_ptr, dropped_ptr,
    std_ptr, hist_ptr,
    T, D, split_size, tau, scaling,
    E: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
    NG: tl.constexpr, KG: tl.constexpr, NGP: tl.constexpr, TOP2: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Grid (S, NB). dots (S, NB BT, BE) and squares (S, NB BT) hold the partial results of the splits."""
    split = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    num_splits = tl.num_programs(0)
    num_rows = tl.num_programs(1).to(tl.int64) * BT
    tokens = block * BT + tl.arange(0, BT)
    experts = tl.arange(0, BE)
    columns = tl.arange(0, BD)
    in_batch = tokens < T

    dots = tl.zeros([BT, BE], dtype=tl.float32)
    squares = tl.zeros([BT, BD], dtype=tl.float32)
    x_rows = x_ptr + tokens[:, None] * x_stride_t
    d_rows = d_ptr + experts[:, None] * D
    end = tl.minimum((split + 1) * split_size, D)
    for start in range(0, split_size, BD):
        column = split * split_size + start + columns
        x = tl.load(x_rows + column[None, :], mask=in_batch[:, None] & (column < end)[None, :], other=0.0)
        d = tl.load(d_rows + column[None, :], mask=(experts < E)[:, None] & (column < end)[None, :], other=0.0)
        x_fp32 = x.to(tl.float32)
        squares += x_fp32 * x_fp32
        dots = tl.dot(x, tl.trans(d), dots, input_precision=PRECISION)

    tile = tokens[:, None] * BE + experts[None, :]
    tl.store(dots_ptr + split * num_rows * BE + tile, dots)
    tl.store(squares_ptr + split * num_rows + tokens, tl.sum(squares, axis=1))
    tl.debug_barrier()  # every thread's partials come before this program's arrival
    if tl.atomic_add(block_tickets_ptr + block, 1, sem="acq_rel") == num_splits - 1:
        tl.debug_barrier()
        dots = tl.zeros([BT, BE], dtype=tl.float32)
        total = tl.zeros([BT], dtype=tl.float32)
        for other in range(num_splits):  # past L1, which may hold what was there before
            dots += tl.load(dots_ptr + other * num_rows * BE + tile, cache_modifier=".cg")
            total += tl.load(squares_ptr + other * num_rows + tokens, cache_modifier=".cg")
        tl.atomic_and(block_tickets_ptr + block, 0, sem="relaxed")
        select_and_store(
            dots, total, block, T,
            bias_ptr, mask_ptr, given_ptr, ids_ptr, weights_ptr, selected_ptr, scores_ptr, candidates_ptr,
            inv_norm_ptr, valid_ptr, rank_ptr, block_counts_ptr, totals_ptr, std_ptr, hist_ptr,
            tau, scaling, E, K, GATE, NORMALIZE, NG, KG, NGP, TOP2, BT, BE, KP,
        )  # fmt: skip
        publish_totals(totals_ptr, ticket_ptr, tl.num_programs(1), counts_ptr, offsets_ptr, dropped_ptr, E, BE)


class RouteResult(NamedTuple):
    """What a launch leaves: the fields of `Routing`, and what dispatch and accumulate go on with.

    scores, candidates: (T, E), or (0, E) when not wanted. score_std: (T,) fp32 or (0,). margin_hist: (E, 1024) int32 or
    (0, 1024). dropped: () int64, tokens that the mask let in and that are not valid. offsets: (E+1,) int32. rank:
    (T, K) int32 and block_counts: (NB, E+2) int32, or empty. block: BT.
    """

    indices: Tensor
    weights: Tensor
    selected: Tensor
    scores: Tensor
    candidates: Tensor
    counts: Tensor
    inv_norm: Tensor
    valid: Tensor
    score_std: Tensor
    margin_hist: Tensor
    dropped: Tensor
    offsets: Tensor
    rank: Tensor
    block_counts: Tensor
    block: int


def rows_of(x: Tensor) -> Tensor:
    """x itself when its rows are contiguous, else a contiguous copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def route_fwd(
    x: Tensor,
    directions: Tensor,
    expert_bias: Tensor | None,
    mask: Tensor | None,
    indices: Tensor | None,
    options: tuple[int, str, float, bool, float, int, int, str],
    *,
    want_scores: bool = False,
    want_std: bool = False,
    want_hist: bool = False,
    want_rank: bool = False,
    config: Config | None = None,
) -> RouteResult:
    """One launch of `_route_fwd_kernel`, or of `_route_split_kernel` for few tokens.

    Args:
        x: (T, D) fp32, fp16 or bf16. directions: (E, D) in x's dtype.
        expert_bias: (E,) or None. mask: (T,) bool or None. indices: (T, K) int64 to replay, or None.
        options: the fields of `checks.RouteOptions`.
        want_scores, want_std, want_hist: fill scores, score_std, margin_hist. want_rank: fill rank and block_counts.
        config: instead of the table's.
    """
    top_k, gate, tau, normalize, scaling, n_group, topk_group, group_score = options
    (num_tokens, hidden_size), num_experts = x.shape, directions.shape[0]
    arch = architecture(x.device)
    c = config or tuned(
        "route_config", (num_tokens, num_experts, x.dtype), x.device,
        route_config(num_tokens, num_experts, x.dtype, arch),
        lambda c: route_fwd(
            x, directions, expert_bias, mask, indices, options,
            want_scores=want_scores, want_std=want_std, want_hist=want_hist, want_rank=want_rank, config=c,
        ),
    )  # fmt: skip
    num_blocks, be = triton.cdiv(num_tokens, c.BT), padded_experts(num_experts)
    over_all = gate == "softmax" and not normalize
    by_expert, by_slot = (num_tokens, num_experts), (num_tokens, top_k)

    def fp32(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    out = RouteResult(
        indices=x.new_empty(by_slot, dtype=torch.int64),
        weights=fp32(*by_slot),
        selected=fp32(*by_slot),
        scores=fp32(*by_expert) if want_scores or over_all else fp32(0, num_experts),
        candidates=x.new_empty(by_expert if over_all else (0, num_experts), dtype=torch.bool),
        counts=x.new_empty(num_experts, dtype=torch.int64),
        inv_norm=fp32(num_tokens),
        valid=x.new_empty(num_tokens, dtype=torch.bool),
        offsets=x.new_empty(num_experts + 1, dtype=torch.int32),
        dropped=x.new_empty((), dtype=torch.int64),
        rank=x.new_empty(by_slot if want_rank else (0, top_k), dtype=torch.int32),
        block_counts=x.new_empty(num_blocks if want_rank else 0, num_experts + 2, dtype=torch.int32),
        score_std=fp32(num_tokens if want_std else 0),
        margin_hist=x.new_zeros(num_experts if want_hist else 0, NUM_MARGIN_BINS, dtype=torch.int32),
        block=c.BT,
    )
    if num_tokens == 0:
        for empty in (out.counts, out.offsets, out.dropped):
            empty.zero_()
        return out
    x = rows_of(x)
    bias = None if expert_bias is None else expert_bias.float().contiguous()
    totals, ticket, block_tickets = counters(x.device, num_experts + 2, 1, num_blocks)
    results = (
        bias, None if mask is None else mask.contiguous(), None if indices is None else indices.contiguous(),
        out.indices, out.weights, out.selected,
        out.scores if out.scores.numel() else None, out.candidates if over_all else None,
        out.inv_norm, out.valid,
        out.rank if want_rank else None, out.block_counts if want_rank else None, totals, ticket,
        out.counts, out.offsets, out.dropped,
        out.score_std if want_std else None, out.margin_hist if want_hist else None,
    )  # fmt: skip
    constants = {
        "E": num_experts, "K": top_k, "GATE": gate, "NORMALIZE": normalize, "NG": n_group, "KG": topk_group,
        "NGP": triton.next_power_of_2(n_group), "TOP2": group_score == "top2",
        "PRECISION": dot_precision(x.dtype, arch), "BT": c.BT, "BD": c.BD, "BE": be,
        "KP": triton.next_power_of_2(top_k),
    }  # fmt: skip
    directions = directions.contiguous()
    num_splits, split_size = column_splits(hidden_size, num_blocks, c.BD)
    if num_splits == 1:
        _route_fwd_kernel[(num_blocks,)](
            x, x.stride(0), directions, *results, num_tokens, hidden_size, tau, scaling, **constants, **c.launch
        )
        return out
    partial_dots, partial_squares = fp32(num_splits, num_blocks * c.BT, be), fp32(num_splits, num_blocks * c.BT)
    _route_split_kernel[(num_splits, num_blocks)](
        x, x.stride(0), directions, partial_dots, partial_squares, block_tickets, *results,
        num_tokens, hidden_size, split_size, tau, scaling, **constants, **c.launch,
    )  # fmt: skip
    return out


def column_splits(hidden_size: int, num_blocks: int, columns: int) -> tuple[int, int]:
    """Splits of D and the columns of each, a multiple of a tile: at least PROGRAMS in all, at most 32 splits.

    It does not look at the device, so that the order of the sums, and the bits, do not depend on it.
    """
    tiles = triton.cdiv(hidden_size, columns)
    splits = max(1, min(tiles, 32, PROGRAMS // num_blocks))
    size = triton.cdiv(tiles, splits) * columns
    return triton.cdiv(hidden_size, size), size
