"""Rows back in token order, and the gradients of that.

    y_t = sum over k of g_tk y_sorted[p_tk];  d y_sorted[p_tk] = g_tk dy_t;  d g_tk = dy_t . y_sorted[p_tk]

Without weights the first is the backward of dispatch. Rows of tokens that are not valid are skipped, never multiplied:
a grouped product leaves them uninitialised. So are rows that are out of range. Every sum runs over k in order, in fp32.
Bytes: forward (1 + K) T D B, backward (1 + 2 K) T D B.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kmeans_route.kernels.common import rows_of
from kmeans_route.kernels.configs import all_registers, architecture, ceil_div, copies_config, row_config


@triton.jit(do_not_specialize=["T"])
def _combine_fwd_kernel(
    y_sorted_ptr, y_sorted_stride,
    weights_ptr, positions_ptr, valid_ptr,
    y_ptr,
    T, D,
    K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """Grid (ceil(T / BT), ceil(D / BD)). weights None: a plain sum."""
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    in_batch = tokens < T
    valid = tl.load(valid_ptr + tokens, mask=in_batch, other=0) != 0
    inside = in_batch[:, None] & (column < D)[None, :]
    num_rows = T.to(tl.int64) * K
    total = tl.zeros([BT, BD], dtype=tl.float32)
    for k in range(K):
        row = tl.load(positions_ptr + tokens * K + k, mask=in_batch, other=0)
        there = valid & (row >= 0) & (row < num_rows)
        source = y_sorted_ptr + row[:, None] * y_sorted_stride + column[None, :]
        y = tl.load(source, mask=inside & there[:, None], other=0.0).to(tl.float32)
        if weights_ptr is not None:
            y *= tl.load(weights_ptr + tokens * K + k, mask=in_batch, other=0.0)[:, None]
        total += y
    tl.store(y_ptr + tokens[:, None] * D + column[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _combine_bwd_kernel(
    dy_ptr, dy_stride_t,
    y_sorted_ptr, y_sorted_stride,
    weights_ptr, positions_ptr, valid_ptr,
    d_rows_ptr, d_weights_ptr,
    T, D,
    K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """Grid (ceil(T K / BT),): copies in the order of their tokens. dy comes from HBM for the first copy of a token and
    from cache for the others."""
    copy = tl.program_id(0) * BT + tl.arange(0, BT)
    token, columns = (copy // K).to(tl.int64), tl.arange(0, BD)
    in_batch = token < T
    valid = tl.load(valid_ptr + token, mask=in_batch, other=0) != 0
    row = tl.load(positions_ptr + copy, mask=in_batch, other=0)
    weight = tl.load(weights_ptr + copy, mask=in_batch & valid, other=0.0)
    there = in_batch & (row >= 0) & (row < T.to(tl.int64) * K)
    products = tl.zeros([BT, BD], dtype=tl.float32)
    for start in range(0, D, BD):
        column = start + columns
        inside = there[:, None] & (column < D)[None, :]
        read = inside & valid[:, None]
        dy = tl.load(dy_ptr + token[:, None] * dy_stride_t + column[None, :], mask=read, other=0.0).to(tl.float32)
        y = tl.load(y_sorted_ptr + row[:, None] * y_sorted_stride + column[None, :], mask=read, other=0.0)
        products += dy * y.to(tl.float32)
        d_row = (dy * weight[:, None]).to(d_rows_ptr.dtype.element_ty)
        tl.store(d_rows_ptr + row[:, None] * D + column[None, :], d_row, mask=inside)
    tl.store(d_weights_ptr + copy, tl.sum(products, axis=1), mask=in_batch)


def combine_fwd(rows: Tensor, positions: Tensor, weights: Tensor | None, valid: Tensor) -> Tensor:
    """y_t = sum over k of weights_tk rows[positions_tk], (T, D), 0 where not valid; a plain sum without weights."""
    (num_tokens, top_k), hidden_size = positions.shape, rows.shape[1]
    c, y = row_config(rows.dtype), rows.new_empty(num_tokens, hidden_size)
    if y.numel():
        rows = rows_of(rows)
        _combine_fwd_kernel[(ceil_div(num_tokens, c.BT), ceil_div(hidden_size, c.BD))](
            rows, rows.stride(0), None if weights is None else weights.contiguous(), positions, valid, y,
            num_tokens, hidden_size, K=top_k, BT=c.BT, BD=c.BD, **c.launch,
        )
    return y


def combine_bwd(
    dy: Tensor, y_sorted: Tensor, weights: Tensor, positions: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """d y_sorted (T*K, D), zero in the rows of tokens that are not valid, and d weights (T, K). One launch."""
    (num_tokens, top_k), hidden_size = positions.shape, y_sorted.shape[1]
    c = copies_config(num_tokens * top_k, hidden_size, y_sorted.dtype)
    d_rows = torch.empty_like(y_sorted, memory_format=torch.contiguous_format)
    d_weights = torch.zeros_like(weights) if not hidden_size else torch.empty_like(weights.contiguous())
    if num_tokens:
        dy, y_sorted = rows_of(dy), rows_of(y_sorted)
        _combine_bwd_kernel[(ceil_div(num_tokens * top_k, c.BT),)](
            dy, dy.stride(0), y_sorted, y_sorted.stride(0), weights.contiguous(), positions, valid, d_rows, d_weights,
            num_tokens, hidden_size, K=top_k, BT=c.BT, BD=c.BD,
            **c.launch, **all_registers(c.num_warps, architecture(dy.device)),
        )
    return d_rows, d_weights
