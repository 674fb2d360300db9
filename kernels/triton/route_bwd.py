"""The backward of routing, and of dispatch in the same pass.

    dx_t = inv_norm_t (sum over k of ds_tk d_e(k) - x_t inv_norm_t sum over k of ds_tk s_tk)
         + sum over k of d x_sorted[p_tk]

Rows of tokens that are not valid are skipped, never multiplied; so are experts and rows that are out of range. Bytes:
(2 + K) T D B, with each token's K direction rows from L2.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kmeans_route.kernels.common import MIN_COSINE_GATE, log_sigmoid, rows_of, softmax_rows
from kmeans_route.kernels.configs import architecture, ceil_div, launch_options, power_of_2, row_config


@triton.jit
def _d_scores(d_weights, selected, inside, tau, scaling, GATE: tl.constexpr, NORMALIZE: tl.constexpr):
    """ds (BT, KP) of the selected scores from dg (BT, KP), for the gates that look at the selected scores only."""
    dg = d_weights * scaling
    if GATE == "softmax":
        p = softmax_rows(selected / tau, inside)
        ds = p * (dg - tl.sum(p * dg, axis=1)[:, None]) / tau
    elif GATE == "sigmoid":
        z = selected / tau
        if NORMALIZE:
            p = softmax_rows(log_sigmoid(z), inside)
            ds = p * (dg - tl.sum(p * dg, axis=1)[:, None]) / (1.0 + tl.exp(z)) / tau
        else:
            q = 1.0 / (1.0 + tl.exp(-z))
            ds = dg * q * (1.0 - q) / tau
    elif GATE == "cosine":
        if NORMALIZE:
            q = tl.where(inside, tl.maximum(selected, MIN_COSINE_GATE), 0.0)
            total = tl.sum(q, axis=1)[:, None]
            dg = (dg - tl.sum(q * dg, axis=1)[:, None] / total) / total
        ds = tl.where(selected >= MIN_COSINE_GATE, dg, 0.0)
    else:
        ds = tl.zeros_like(dg)
    return tl.where(inside, ds, 0.0)


@triton.jit(do_not_specialize=["T", "E"])
def _route_bwd_kernel(
    x_ptr, x_stride_t,
    d_ptr,
    ids_ptr, selected_ptr, inv_norm_ptr, valid_ptr,
    d_weights_ptr, d_selected_ptr,
    dx_sorted_ptr, dx_sorted_stride, positions_ptr,
    dx_ptr,
    T, D, E, tau, scaling,
    K: tl.constexpr, KP: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):
    """Grid (ceil(T / BT), ceil(D / BD)). dx_sorted None: the gradient of the gates alone; d_weights and d_selected
    None: the gather alone."""
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    slots = tl.arange(0, KP)
    in_batch = tokens < T
    valid = tl.load(valid_ptr + tokens, mask=in_batch, other=0) != 0
    inside = (slots < K)[None, :] & valid[:, None]
    slot = tokens[:, None] * K + slots[None, :]
    write = in_batch[:, None] & (column < D)[None, :]
    read = write & valid[:, None]

    dx = tl.zeros([BT, BD], dtype=tl.float32)
    if d_weights_ptr is not None or d_selected_ptr is not None:
        selected = tl.load(selected_ptr + slot, mask=inside, other=0.0)
        ds = tl.zeros([BT, KP], dtype=tl.float32)
        if d_weights_ptr is not None:
            d_weights = tl.load(d_weights_ptr + slot, mask=inside, other=0.0)
            ds += _d_scores(d_weights, selected, (slots < K)[None, :], tau, scaling, GATE, NORMALIZE)
        if d_selected_ptr is not None:
            ds += tl.load(d_selected_ptr + slot, mask=inside, other=0.0)
        inv_norm = tl.load(inv_norm_ptr + tokens, mask=in_batch, other=0.0)
        along = tl.sum(ds * selected, axis=1)
        ds *= inv_norm[:, None]
        x = tl.load(x_ptr + tokens[:, None] * x_stride_t + column[None, :], mask=read, other=0.0)
        dx -= x.to(tl.float32) * (along * inv_norm * inv_norm)[:, None]
        for k in range(K):
            expert = tl.load(ids_ptr + tokens * K + k, mask=in_batch, other=0)
            there = read & ((expert >= 0) & (expert < E))[:, None]
            d = tl.load(d_ptr + expert[:, None] * D + column[None, :], mask=there, other=0.0)
            dx += tl.sum(tl.where((slots == k)[None, :], ds, 0.0), axis=1)[:, None] * d.to(tl.float32)
    if dx_sorted_ptr is not None:
        num_rows = T.to(tl.int64) * K
        for k in range(K):
            row = tl.load(positions_ptr + tokens * K + k, mask=in_batch, other=0)
            there = read & ((row >= 0) & (row < num_rows))[:, None]
            dx_row = tl.load(dx_sorted_ptr + row[:, None] * dx_sorted_stride + column[None, :], mask=there, other=0.0)
            dx += dx_row.to(tl.float32)
    dx = tl.where(valid[:, None], dx, 0.0)
    tl.store(dx_ptr + tokens[:, None] * D + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=write)


def route_bwd(
    x: Tensor,
    directions: Tensor,
    indices: Tensor,
    selected: Tensor,
    inv_norm: Tensor,
    valid: Tensor,
    d_weights: Tensor | None,
    d_selected: Tensor | None,
    d_x_sorted: Tensor | None,
    positions: Tensor | None,
    gate: str,
    tau: float,
    normalize: bool,
    scaling: float,
) -> Tensor:
    """dx (T, D) from the gradients of gates, selected scores and sorted copies, whichever are there. One launch.

    For the gates that look at the selected scores only: not the softmax over all candidates.
    """
    (num_tokens, hidden_size), top_k = x.shape, indices.shape[1]
    c, dx = row_config(x.dtype), torch.empty_like(x, memory_format=torch.contiguous_format)
    if not dx.numel():
        return dx
    x = rows_of(x)
    copies = None if d_x_sorted is None else rows_of(d_x_sorted)
    _route_bwd_kernel[(ceil_div(num_tokens, c.BT), ceil_div(hidden_size, c.BD))](
        x, x.stride(0), directions.contiguous(), indices, selected, inv_norm, valid,
        None if d_weights is None else d_weights.float().contiguous(),
        None if d_selected is None else d_selected.float().contiguous(),
        copies, 0 if copies is None else copies.stride(0), positions, dx,
        num_tokens, hidden_size, directions.shape[0], tau, scaling,
        K=top_k, KP=power_of_2(top_k), GATE=gate, NORMALIZE=normalize, BT=c.BT, BD=c.BD,
        **launch_options(c, architecture(x.device)),
    )
    return dx
