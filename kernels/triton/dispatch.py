"""Sorted copies of the hidden states and their centroid sums, in one more pass over x.

    x_sorted[positions_tk] = x_t;  sums_e = sum of x_t / ||x_t|| over valid t with e in sel_t

route_fwd (or `_rank_kernel`, from given ids) leaves the counts of each block and the rank of each copy in its block.
`_prefix_kernel` turns the counts into the first row of each (block, expert). `_dispatch_fwd_kernel` then reads each
tile of x once: it writes the tile's K copies to their rows and multiplies the tile by its one-hot expert matrix on the
tensor cores; that product is its share of the centroid sums. Partial sums, one a token split, are added in the order of
the splits by `accumulate`: no float atomics anywhere, the same bits every time.

The one-hot factor is exact in 16 bits. The unit vectors are not, so each goes in as a high and a low part, which keeps
the sums at 16 bits of mantissa (22 in fp16, and in fp32, whose parts are TF32) for two products instead of one. Each
part has an accumulator of its own: two products chained through one in a loop were seen to come out wrong on sm_103
(triton#10821). Bytes: (1 + K) T D B, or T D B without copies, and partials 2 S E D 4.

Legend: T tokens, D hidden size, E experts, K top_k, NB blocks of RT tokens, S splits of the tokens.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kmeans_route.kernels import tune
from kmeans_route.kernels.common import count_and_rank, publish_totals, rows_of
from kmeans_route.kernels.configs import (
    Config,
    all_registers,
    architecture,
    ceil_div,
    dispatch_config,
    dispatch_experts,
    launch_options,
    one_hot_precision,
    padded_experts,
    power_of_2,
    waits_for_products,
)
from kmeans_route.kernels.workspace import counters

MAX_PARTIAL_BYTES = 64 << 20
PREFIX_COLUMNS, PREFIX_ROWS = 16, 64
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


@triton.jit(do_not_specialize=["NB"])
def _prefix_kernel(
    block_counts_ptr, offsets_ptr, first_row_ptr,
    NB,
    E: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):
    """first_row (NB, E+1) int32: offsets_e plus the rows of expert e in earlier blocks; column E is the tail.
    Grid (ceil((E+1) / BC),)."""
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    rows = tl.arange(0, BN)
    first = tl.load(offsets_ptr + columns, mask=columns <= E, other=0)
    for n in range(0, NB, BN):
        row = (n + rows).to(tl.int64)
        inside = (row < NB)[:, None] & (columns <= E)[None, :]
        own = tl.load(block_counts_ptr + row[:, None] * (E + 2) + columns[None, :], mask=inside, other=0)
        through = tl.cumsum(own, axis=0)
        tl.store(first_row_ptr + row[:, None] * (E + 1) + columns[None, :], first[None, :] + through - own, mask=inside)
        first += tl.sum(own, axis=0)


@triton.jit
def _high_part(rows, dtype: tl.constexpr):
    """fp32 rows rounded to 16 bits; for fp32 cut to TF32, whose 10 bits of mantissa a product keeps exactly."""
    if dtype == tl.float32:
        high = (rows.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    else:
        high = rows.to(dtype)
    return high


@triton.jit(do_not_specialize=["T", "tiles_per_split"])
def _dispatch_fwd_kernel(
    x_ptr, x_stride_t,
    ids_ptr, valid_ptr, inv_norm_ptr,
    rank_ptr, first_row_ptr,
    x_sorted_ptr, positions_ptr, token_of_row_ptr,
    partials_ptr,
    T, D, tiles_per_split,
    E: tl.constexpr, K: tl.constexpr, RT: tl.constexpr, PRECISION: tl.constexpr, TWO_PARTS: tl.constexpr,
    WAIT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, EB: tl.constexpr,
):
    """Grid (BE / EB ceil(D / BD) S,): EB experts a program; neighbours read the same x, the first of them copies it.

    One axis, since the others stop at 65535 programs.
    inv_norm None: raw sums. x_sorted None: no copies. first_row None: sums alone.
    """
    PARTS: tl.constexpr = BE // EB
    programs_a_split = tl.cdiv(D, BD) * PARTS
    place = tl.program_id(0) % programs_a_split
    split = (tl.program_id(0) // programs_a_split).to(tl.int64)
    part = place % PARTS
    column = place // PARTS * BD + tl.arange(0, BD)
    experts = part * EB + tl.arange(0, EB)
    in_row = column < D
    sums = tl.zeros([EB, BD], dtype=tl.float32)
    low_sums = tl.zeros([EB, BD], dtype=tl.float32)
    for step in range(tiles_per_split):
        tokens = (split * tiles_per_split + step) * BT + tl.arange(0, BT)
        in_batch = tokens < T
        valid = tl.load(valid_ptr + tokens, mask=in_batch, other=0) != 0
        inside = in_batch[:, None] & in_row[None, :]
        x = tl.load(x_ptr + tokens[:, None] * x_stride_t + column[None, :], mask=inside & valid[:, None], other=0.0)
        taken = tl.zeros([EB, BT], dtype=tl.int32)
        for k in range(K):
            expert = tl.load(ids_ptr + tokens * K + k, mask=in_batch, other=0)
            expert = tl.minimum(tl.maximum(expert, 0), E - 1).to(tl.int32)
            key = tl.where(valid, expert, E)
            if first_row_ptr is not None:
                row = tl.load(first_row_ptr + (tokens // RT) * (E + 1) + key, mask=in_batch, other=0)
                row = (row + tl.load(rank_ptr + tokens * K + k, mask=in_batch, other=0)).to(tl.int64)
                first_program = place == 0
                tl.store(positions_ptr + tokens * K + k, row, mask=in_batch & first_program)
                tl.store(token_of_row_ptr + row, tokens, mask=in_batch & first_program)
                if x_sorted_ptr is not None:
                    tl.store(x_sorted_ptr + row[:, None] * D + column[None, :], x, mask=inside & (part == 0))
            taken += (experts[:, None] == key[None, :]).to(tl.int32)
        if partials_ptr is not None:
            member = taken.to(x.dtype)
            if TWO_PARTS:
                rows = x.to(tl.float32)
                if inv_norm_ptr is not None:  # times 256, else the low parts would be subnormal in fp16
                    rows *= (tl.load(inv_norm_ptr + tokens, mask=in_batch, other=0.0) * 256.0)[:, None]
                high = _high_part(rows, x.dtype)
                low = (rows - high.to(tl.float32)).to(x.dtype)
                sums = tl.dot(member, high, sums, input_precision=PRECISION)
                low_sums = tl.dot(member, low, low_sums, input_precision=PRECISION)
                if WAIT:
                    low_sums = tl.where(step >= 0, low_sums, 0.0)
            else:
                sums = tl.dot(member, x, sums, input_precision=PRECISION)
            if WAIT:  # for the products of this step: see `_dots_and_squares`
                sums = tl.where(step >= 0, sums, 0.0)
    if partials_ptr is not None:
        if TWO_PARTS:
            sums += low_sums
        if inv_norm_ptr is not None:
            sums *= 1.0 / 256.0
        where = (split * E + experts)[:, None] * D + column[None, :]
        tl.store(partials_ptr + where, sums, mask=(experts < E)[:, None] & in_row[None, :])


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


def token_splits(num_tokens: int, hidden_size: int, num_experts: int, config: Config) -> tuple[int, int]:
    """Splits of the tokens and the tiles of each: about 264 programs in all, partials of at most 64 MiB.

    It does not look at the device, so that the order of the sums, and the bits, do not depend on it.
    """
    tiles = ceil_div(num_tokens, config.BT)
    wanted = ceil_div(264, ceil_div(hidden_size, config.BD))
    splits = max(1, min(tiles, wanted, MAX_PARTIAL_BYTES // (num_experts * hidden_size * 4)))
    per_split = max(1, ceil_div(tiles, splits))
    return max(1, ceil_div(tiles, per_split)), per_split


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
    """Launches `_prefix_kernel` and `_dispatch_fwd_kernel`.

    Args:
        x: (T, D). indices: (T, K). valid: (T,).
        ranks: from route_fwd or `rank`; None for the centroid sums alone, in one launch.
        inv_norm: (T,) for sums of unit vectors; None for raw sums.
        copies: write x_sorted. want_sums: give the partial centroid sums.
    """
    (num_tokens, hidden_size), top_k = x.shape, indices.shape[1]
    arch, dtype = architecture(x.device), x.dtype
    if config is None and tune.ENABLED:
        config = tune.tuned(
            "dispatch_config", (num_experts, dtype), x.device,
            dispatch_config(num_experts, dtype, arch, hidden_size % 16 == 0),
            lambda c: dispatch_fwd(
                x, indices, valid, num_experts, ranks, inv_norm, copies=copies, want_sums=want_sums, config=c
            ),
        )
    plan = _plan(
        config, num_tokens, hidden_size, num_experts, top_k, 1 if ranks is None else ranks.block,
        inv_norm is not None or dtype == torch.float32, want_sums, dtype, arch,
    )
    num_rows = num_tokens * top_k if ranks is not None else 0
    out = DispatchResult(
        x.new_empty(num_rows if copies else 0, hidden_size),
        indices.new_empty(num_tokens if ranks is not None else 0, top_k),
        indices.new_empty(num_rows),
        x.new_empty(plan.num_splits, num_experts, hidden_size, dtype=torch.float32) if want_sums else None,
    )
    if num_tokens == 0:
        if out.partials is not None:
            out.partials.zero_()
        return out
    first_row = None
    if ranks is not None:
        num_blocks = ranks.block_counts.shape[0]
        first_row = indices.new_empty(num_blocks, num_experts + 1, dtype=torch.int32)
        _prefix_kernel[(ceil_div(num_experts + 1, PREFIX_COLUMNS),)](
            ranks.block_counts, ranks.offsets, first_row, num_blocks,
            E=num_experts, BC=PREFIX_COLUMNS, BN=PREFIX_ROWS, num_warps=4,
        )
    x = rows_of(x)
    _dispatch_fwd_kernel[plan.grid](
        x, x.stride(0), indices, valid, inv_norm,
        None if ranks is None else ranks.rank, first_row,
        out.x_sorted if copies and ranks is not None else None, out.positions, out.token_of_row, out.partials,
        num_tokens, hidden_size, plan.tiles_per_split, **plan.constants,
    )
    return out


class _Plan(NamedTuple):
    """How a dispatch is launched. num_splits, tiles_per_split: of the tokens. constants: what the kernel is compiled
    for; not to be changed."""

    grid: tuple[int]
    num_splits: int
    tiles_per_split: int
    constants: dict[str, Any]


@lru_cache(maxsize=1024)
def _plan(
    config: Config | None, num_tokens: int, hidden_size: int, num_experts: int, top_k: int, ranked: int,
    two_parts: bool, want_sums: bool, dtype: torch.dtype, arch: str,
) -> _Plan:
    """config: None for the table's. ranked: tokens that were ranked together."""
    be, c = padded_experts(num_experts), config or dispatch_config(num_experts, dtype, arch, hidden_size % 16 == 0)
    if want_sums:
        splits, per_split, eb = *token_splits(num_tokens, hidden_size, num_experts, c), dispatch_experts(num_experts)
    else:  # nothing to add up: one tile a program
        splits, per_split, eb = ceil_div(num_tokens, c.BT), 1, be
    return _Plan((be // eb * ceil_div(hidden_size, c.BD) * splits,), splits, per_split, {
        "E": num_experts, "K": top_k, "RT": ranked, "PRECISION": one_hot_precision(dtype, arch),
        "TWO_PARTS": two_parts, "WAIT": waits_for_products(arch),
        "BT": c.BT, "BD": c.BD, "BE": be, "EB": eb, **launch_options(c, arch),
    })
