"""Add a batch to what is pending: centroid sums in the order of their splits, counts, scalars and histogram.

    sums += sum over s of partials_s;  counts, num_tokens, num_dropped, std_sum, margin_hist += those of the batch

No float atomics: each element is added up by one program, in a fixed order. The sums of an expert that the batch gave
no token are zeros, and not read: (S + 2) D 4 bytes for each of the others.
Legend: T tokens, D hidden size, E experts, S splits.
"""

import triton
import triton.language as tl
from torch import Tensor

from kmeans_route.kernels.configs import all_registers, architecture, ceil_div, padded_experts

BLOCK = 1024


@triton.jit(do_not_specialize=["num_splits", "num_std"])
def _accumulate_kernel(
    partials_ptr, sums_ptr,
    batch_counts_ptr, counts_ptr,
    batch_std_ptr, std_sum_ptr,
    num_tokens_ptr,
    dropped_ptr, num_dropped_ptr,
    batch_hist_ptr, hist_ptr,
    D, num_splits, num_std, num_bins, K,
    E: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr, STD_BLOCK: tl.constexpr,
):
    """pending += batch. Grid (1 + E, ceil(max(D, bins) / BLOCK)): counts and scalars, then each expert's row."""
    expert = tl.program_id(0) - 1
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if expert >= 0:
        if partials_ptr is not None:
            where = expert.to(tl.int64) * D + column
            if tl.load(batch_counts_ptr + expert) > 0:
                total = tl.load(sums_ptr + where, mask=column < D, other=0.0)
                for first in range(0, num_splits, 4):
                    split = first + tl.arange(0, 4)
                    partial = partials_ptr + split.to(tl.int64)[:, None] * E * D + where[None, :]
                    inside = (split < num_splits)[:, None] & (column < D)[None, :]
                    total += tl.sum(tl.load(partial, mask=inside, other=0.0), axis=0)
                tl.store(sums_ptr + where, total, mask=column < D)
        if batch_hist_ptr is not None:
            where = expert.to(tl.int64) * num_bins + column
            bins = tl.load(hist_ptr + where, mask=column < num_bins, other=0)
            bins += tl.load(batch_hist_ptr + where, mask=column < num_bins, other=0)
            tl.store(hist_ptr + where, bins, mask=column < num_bins)
    elif tl.program_id(1) == 0:
        experts = tl.arange(0, BE)
        batch = tl.load(batch_counts_ptr + experts, mask=experts < E, other=0)
        counts = batch + tl.load(counts_ptr + experts, mask=experts < E, other=0)
        tl.store(counts_ptr + experts, counts, mask=experts < E)
        std = tl.zeros([STD_BLOCK], dtype=tl.float32)
        for start in range(0, num_std, STD_BLOCK):
            part = start + tl.arange(0, STD_BLOCK)
            std += tl.load(batch_std_ptr + part, mask=part < num_std, other=0.0)
        tl.store(std_sum_ptr, tl.load(std_sum_ptr) + tl.sum(std, axis=0))
        num_valid = tl.sum(batch, axis=0) // K
        tl.store(num_tokens_ptr, tl.load(num_tokens_ptr) + num_valid)
        tl.store(num_dropped_ptr, tl.load(num_dropped_ptr) + tl.load(dropped_ptr))


def accumulate(
    partials: Tensor,
    batch_counts: Tensor,
    batch_std: Tensor,
    dropped: Tensor,
    batch_hist: Tensor | None,
    top_k: int,
    sums: Tensor,
    counts: Tensor,
    std_sum: Tensor,
    num_tokens: Tensor,
    num_dropped: Tensor,
    margin_hist: Tensor,
) -> None:
    """One launch of `_accumulate_kernel`: add a batch to the pending state, in place."""
    num_experts, hidden_size = counts.shape[0], sums.shape[1] if partials.numel() else 0
    num_bins = margin_hist.shape[1] if margin_hist.numel() else 0
    blocks = ceil_div(max(hidden_size, num_bins), BLOCK)
    _accumulate_kernel[(1 + num_experts, blocks) if blocks else (1, 1)](
        partials if hidden_size else None, sums,
        batch_counts, counts, batch_std, std_sum, num_tokens, dropped, num_dropped,
        batch_hist if num_bins else None, margin_hist,
        hidden_size, partials.shape[0], batch_std.numel(), num_bins, top_k,
        E=num_experts, BE=padded_experts(num_experts), BLOCK=BLOCK, STD_BLOCK=4 * BLOCK,
        num_warps=4, **all_registers(4, architecture(counts.device)),
    )
