"""Sorted copies of the hidden states and their centroid sums, in one more pass over x.

    x_sorted[positions_tk] = x_t;  sums_e = sum of x_t / ||x_t|| over valid t with e in sel_t

route_fwd (or `_rank_kernel`, from given ids) leaves the counts of each block and the rank of each copy in its block.
`_positions_kernel` makes the row of each copy from them, and the token of each row. `_dispatch_fwd_kernel` then goes
through the rows in their order: the rows of an expert stand together, so a program gathers its tokens, writes their
copies as they come, and adds them up in fp32. No expert is compared with an id, no product is taken, and what a program
keeps does not grow with E. Partial sums, one a split of each expert's rows, are added in the order of the splits by
`accumulate`: no float atomics anywhere, the same bits every time.

Each x_t is read K times. Programs take one block of columns after another, and a block of all tokens stays in L2, so
HBM gives x once: (1 + K) T D B, or T D B without copies, and partials 2 S E D 4. L2 moves 2 K T D B.

Legend: T tokens, D hidden size, E experts, K top_k, NB blocks of RT tokens, S splits of each expert's rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kmeans_route.kernels import tune
from kmeans_route.kernels.common import as_mask, count_and_rank, publish_totals, rows_of
from kmeans_route.kernels.configs import (
    Config,
    all_registers,
    architecture,
    ceil_div,
    dispatch_config,
    padded_experts,
    power_of_2,
)
from kmeans_route.kernels.workspace import counters

MAX_PARTIAL_BYTES = 64 << 20
PREFIX_COLUMNS, MOST_GROUPS, FEW_BLOCKS = 8, 512, 64
RANK_BLOCK = 64


@triton.jit(do_not_specialize=["T"])
def _rank_kernel(
    ids_ptr, valid_ptr, rank_ptr, block_counts_ptr, totals_ptr, ticket_ptr,
    counts_ptr, offsets_ptr, dropped_ptr,
    T,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, KP: tl.constexpr,
):
    """Ranks and block counts of given ids (T, K), as route_fwd leaves them. Grid (NB,)."""
    block = tl.program_id(0).to(tl.int64)
    tokens = block * BT + tl.arange(0, BT)
    slots = tl.arange(0, KP)
    in_batch = tokens < T
    valid = tl.load(valid_ptr + tokens, mask=in_batch, other=0) != 0
    slot = tokens[:, None] * K + slots[None, :]
    ids = tl.load(ids_ptr + slot, mask=in_batch[:, None] & (slots < K)[None, :], other=0)
    ids = tl.minimum(tl.maximum(ids, 0), E - 1).to(tl.int32)
    count_and_rank(
        ids, valid, in_batch & (valid == 0), in_batch, tokens, block, rank_ptr, block_counts_ptr, totals_ptr,
        E, K, BT, BE, KP, False,
    )
    publish_totals(totals_ptr, ticket_ptr, tl.num_programs(0), counts_ptr, offsets_ptr, dropped_ptr, E, BE)


@triton.jit(do_not_specialize=["NB", "group_size"])
def _prefix_kernel(
    block_counts_ptr, offsets_ptr, first_row_ptr,
    NB, group_size,
    E: tl.constexpr, BC: tl.constexpr, GROUPS: tl.constexpr,
):
    """first_row (groups, E+1) int32: offsets_e plus the rows of expert e in the blocks before each group of group_size;
    column E is the tail. Grid (ceil((E+1) / BC),)."""
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    groups = tl.arange(0, GROUPS)
    first = tl.load(offsets_ptr + columns, mask=columns <= E, other=0)
    own = tl.zeros([GROUPS, BC], dtype=tl.int32)
    for step in range(group_size):
        row = (groups * group_size + step).to(tl.int64)[:, None]
        counts = block_counts_ptr + row * (E + 2) + columns[None, :]
        own += tl.load(counts, mask=(row < NB) & (columns <= E)[None, :], other=0)
    before = first[None, :] + tl.cumsum(own, axis=0) - own
    inside = (groups * group_size < NB)[:, None] & (columns <= E)[None, :]
    tl.store(first_row_ptr + groups[:, None] * (E + 1) + columns[None, :], before, mask=inside)


@triton.jit(do_not_specialize=["T", "NB", "group_size"])
def _positions_kernel(
    ids_ptr, valid_ptr, rank_ptr,
    block_counts_ptr, offsets_ptr, first_row_ptr,
    positions_ptr, token_of_row_ptr,
    T, NB, group_size,
    E: tl.constexpr, K: tl.constexpr, RT: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):
    """positions (T, K), token_of_row (T*K,): first row of an expert, its rows in earlier blocks, rank in the own block.

    Tokens that are not valid queue behind all others. first_row None: each program adds up the counts of all blocks
    before its own. Grid (ceil(NB / group_size),).
    """
    group = tl.program_id(0)
    experts = tl.arange(0, BE)
    if first_row_ptr is not None:
        first_row = first_row_ptr + group * (E + 1)
    else:
        first_row = offsets_ptr
    first = tl.load(first_row + experts, mask=experts < E, other=0)
    tail = tl.load(first_row + E)
    if first_row_ptr is None:
        rows = tl.arange(0, BN)
        for n in range(0, group * group_size, BN):
            earlier = n + rows < group * group_size
            counts = block_counts_ptr + (n + rows) * (E + 2)
            own = tl.load(counts[:, None] + experts[None, :], mask=earlier[:, None] & (experts < E)[None, :], other=0)
            first += tl.sum(own, axis=0)
            tail += tl.sum(tl.load(counts + E, mask=earlier, other=0), axis=0)
    copies = tl.arange(0, BC)
    for step in range(group_size):  # past the last block there are no tokens
        block = (group * group_size + step).to(tl.int64)
        token = block * RT + copies // K
        slot = block * (RT * K) + copies
        inside = (copies < RT * K) & (token < T)
        valid = tl.load(valid_ptr + token, mask=inside, other=0) != 0
        expert = tl.load(ids_ptr + slot, mask=inside, other=0)
        expert = tl.minimum(tl.maximum(expert, 0), E - 1).to(tl.int32)
        position = tl.where(valid, tl.gather(first, expert, 0), tail)
        position += tl.load(rank_ptr + slot, mask=inside, other=0)
        position = tl.minimum(position, T * K - 1)  # whatever ids and ranks hold, nothing is written elsewhere
        tl.store(positions_ptr + slot, position.to(tl.int64), mask=inside)
        tl.store(token_of_row_ptr + position, token, mask=inside)
        counts = block_counts_ptr + block * (E + 2)
        first += tl.load(counts + experts, mask=(experts < E) & as_mask(block < NB), other=0)
        tail += tl.load(counts + E, mask=block < NB, other=0)


@triton.jit(do_not_specialize=["T", "num_rows", "num_experts", "num_splits"])
def _dispatch_fwd_kernel(
    x_ptr, x_stride_t,
    inv_norm_ptr,
    token_of_row_ptr, offsets_ptr,
    x_sorted_ptr, partials_ptr,
    T, num_rows, D, num_experts, num_splits,
    BT: tl.constexpr, BD: tl.constexpr,
):
    """Grid (E + 1, num_splits, ceil(D / BD)): a split of an expert's rows, and a block of columns.

    The rows behind those of all experts are of tokens that are not valid: zeros. Without copies: E, not E + 1.
    inv_norm None: raw sums. x_sorted None: no copies. partials None: copies alone.
    """
    expert, split = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * BD + tl.arange(0, BD)
    in_row = column < D
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < num_experts, other=num_rows)
    length = tl.cdiv(end - begin, num_splits * BT) * BT
    begin += split * length
    end = tl.minimum(begin + length, end)
    row = begin + tl.arange(0, BT)
    token = tl.load(token_of_row_ptr + row, mask=row < end, other=0)
    sums = tl.zeros([BT, BD], dtype=tl.float32)
    for _ in range(begin, end, BT):
        there = row < end
        token = tl.minimum(tl.maximum(token, 0), T - 1)  # a row that no position names holds anything
        x_row = x_ptr + token[:, None] * x_stride_t + column[None, :]
        x = tl.load(x_row, mask=(there & as_mask(expert < num_experts))[:, None] & in_row[None, :], other=0.0)
        if partials_ptr is not None:
            if inv_norm_ptr is not None:
                sums += x.to(tl.float32) * tl.load(inv_norm_ptr + token, mask=there, other=0.0)[:, None]
            else:
                sums += x.to(tl.float32)
        if x_sorted_ptr is not None:
            copy = x_sorted_ptr + row.to(tl.int64)[:, None] * D + column[None, :]
            tl.store(copy, x, mask=there[:, None] & in_row[None, :])
        row += BT
        token = tl.load(token_of_row_ptr + row, mask=row < end, other=0)
    if partials_ptr is not None:
        where = (split * num_experts + expert).to(tl.int64) * D + column
        tl.store(partials_ptr + where, tl.sum(sums, axis=0), mask=in_row & as_mask(expert < num_experts))


class Ranks(NamedTuple):
    """Where copies stand in blocks of `block` tokens, int32: rank (T, K), block_counts (NB, E+2), offsets (E+1,)."""

    rank: Tensor
    block_counts: Tensor
    offsets: Tensor
    block: int


class DispatchResult(NamedTuple):
    """x_sorted (T*K, D) or (0, D); positions (T, K), token_of_row (T*K,) int64; partials (S, E, D) fp32 or None."""

    x_sorted: Tensor
    positions: Tensor
    token_of_row: Tensor
    partials: Tensor | None


def rank(indices: Tensor, valid: Tensor, num_experts: int) -> Ranks:
    """One launch of `_rank_kernel`: what route_fwd would have left for these ids (T, K)."""
    (num_tokens, top_k), be = indices.shape, padded_experts(num_experts)
    block = RANK_BLOCK
    num_blocks = ceil_div(num_tokens, block)
    place = indices.new_empty(num_tokens, top_k, dtype=torch.int32)
    block_counts = indices.new_empty(num_blocks, num_experts + 2, dtype=torch.int32)
    offsets = indices.new_zeros(num_experts + 1, dtype=torch.int32)
    counts, dropped = indices.new_empty(num_experts), indices.new_empty(())
    if num_tokens:
        totals, ticket = counters(indices.device, num_experts + 2, 1)
        _rank_kernel[(num_blocks,)](
            indices.contiguous(), valid, place, block_counts, totals, ticket, counts, offsets, dropped, num_tokens,
            E=num_experts, K=top_k, BT=block, BE=be, KP=power_of_2(top_k),
            num_warps=8, **all_registers(8, architecture(indices.device)),
        )
    return Ranks(place, block_counts, offsets, block)


def row_splits(num_tokens: int, hidden_size: int, num_experts: int, top_k: int) -> int:
    """Splits of each expert's rows: some 32 to 256 rows each where experts get equal loads, partials of at most 64 MiB.

    It does not look at the device, so that the order of the sums, and the bits, do not depend on it.
    """
    num_rows = num_tokens * top_k
    wanted = ceil_div(num_rows, num_experts * max(32, min(num_rows // 64, 256)))
    return max(1, min(wanted, MAX_PARTIAL_BYTES // (num_experts * max(1, hidden_size) * 4)))


def dispatch_fwd(
    x: Tensor,
    indices: Tensor,
    valid: Tensor,
    num_experts: int,
    ranks: Ranks | None,
    inv_norm: Tensor | None = None,
    *,
    copies: bool = True,
    want_sums: bool = False,
    config: Config | None = None,
) -> DispatchResult:
    """Launches `_positions_kernel` and `_dispatch_fwd_kernel`; of these the first alone where nothing else is wanted.

    Args:
        x: (T, D). indices: (T, K). valid: (T,).
        ranks: from route_fwd or `rank`; None for the centroid sums alone, behind a launch of `_rank_kernel`.
        inv_norm: (T,) for sums of unit vectors; None for raw sums.
        copies: write x_sorted. want_sums: give the partial centroid sums.
    """
    (num_tokens, hidden_size), top_k = x.shape, indices.shape[1]
    if ranks is None:
        ranks, copies = rank(indices, valid, num_experts), False
    splits, num_rows = row_splits(num_tokens, hidden_size, num_experts, top_k), num_tokens * top_k
    out = DispatchResult(
        x.new_empty(num_rows if copies else 0, hidden_size),
        indices.new_empty(num_tokens, top_k),
        indices.new_empty(num_rows),
        x.new_empty(splits, num_experts, hidden_size, dtype=torch.float32) if want_sums else None,
    )
    if num_tokens == 0:
        if out.partials is not None:
            out.partials.zero_()
        return out
    _positions(indices, valid, num_experts, ranks, out)
    if copies or want_sums:
        _copies_and_sums(rows_of(x), inv_norm, ranks.offsets, out, splits, config)
    return out


def _positions(indices: Tensor, valid: Tensor, num_experts: int, ranks: Ranks, out: DispatchResult) -> None:
    """Of few blocks each program adds up those before its own, of more a launch does it for groups of them."""
    (num_tokens, top_k), num_blocks, be = indices.shape, ranks.block_counts.shape[0], padded_experts(num_experts)
    first_row, group_size = None, 1
    if num_blocks > FEW_BLOCKS:
        group_size = ceil_div(num_blocks, MOST_GROUPS)
        first_row = indices.new_empty(ceil_div(num_blocks, group_size), num_experts + 1, dtype=torch.int32)
        _prefix_kernel[(ceil_div(num_experts + 1, PREFIX_COLUMNS),)](
            ranks.block_counts, ranks.offsets, first_row, num_blocks, group_size,
            E=num_experts, BC=PREFIX_COLUMNS, GROUPS=MOST_GROUPS, num_warps=8,
        )
    _positions_kernel[(ceil_div(num_blocks, group_size),)](
        indices, valid, ranks.rank, ranks.block_counts, ranks.offsets, first_row, out.positions, out.token_of_row,
        num_tokens, num_blocks, group_size,
        E=num_experts, K=top_k, RT=ranks.block, BE=be, BN=max(4, 4096 // be), BC=power_of_2(ranks.block * top_k),
        num_warps=8,
    )


def _copies_and_sums(
    x: Tensor, inv_norm: Tensor | None, offsets: Tensor, out: DispatchResult, splits: int, config: Config | None
) -> None:
    (num_tokens, hidden_size), dtype, num_experts = x.shape, x.dtype, offsets.shape[0] - 1
    c = config or dispatch_config(num_tokens, dtype, hidden_size % 16 == 0)
    if config is None and tune.ENABLED:
        c = tune.tuned(
            "dispatch_config", (num_tokens, dtype), x.device, c,
            lambda c: _copies_and_sums(x, inv_norm, offsets, out, splits, c),
        )
    copies = out.x_sorted.shape[0] > 0
    _dispatch_fwd_kernel[(num_experts + copies, splits, ceil_div(hidden_size, c.BD))](
        x, x.stride(0), inv_norm, out.token_of_row, offsets, out.x_sorted if copies else None, out.partials,
        num_tokens, out.token_of_row.shape[0], hidden_size, num_experts, splits, BT=c.BT, BD=c.BD, **c.launch,
    )
