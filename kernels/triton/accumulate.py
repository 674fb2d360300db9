"""Add a batch to what is pending: centroid sums in the order of their splits, counts, scalars and histogram.

    sums += sum over s of partials_s;  counts, num_tokens, num_dropped, std_sum, margin_hist += those of the batch

No float atomics: each element is added up by one program, in a fixed order. Bytes: (S + 2) E D 4.
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
    size, num_splits, num_std, hist_size, K,
    E: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr,
):
    """pending += batch: sums in split order; program 0 adds the counts and scalars. Grid (ceil(max size / BLOCK),)."""
    block = tl.program_id(0).to(tl.int64)
    where = block * BLOCK + tl.arange(0, BLOCK)
    if partials_ptr is not None:
        total = tl.load(sums_ptr + where, mask=where < size, other=0.0)
        partial = partials_ptr + where
        for _ in range(num_splits):
            total += tl.load(partial, mask=where < size, other=0.0)
            partial += size
        tl.store(sums_ptr + where, total, mask=where < size)
    if batch_hist_ptr is not None:
        in_hist = where < hist_size
        bins = tl.load(hist_ptr + where, mask=in_hist, other=0) + tl.load(batch_hist_ptr + where, mask=in_hist, other=0)
        tl.store(hist_ptr + where, bins, mask=in_hist)
    if block == 0:
        experts = tl.arange(0, BE)
        batch = tl.load(batch_counts_ptr + experts, mask=experts < E, other=0)
        counts = batch + tl.load(counts_ptr + experts, mask=experts < E, other=0)
        tl.store(counts_ptr + experts, counts, mask=experts < E)
        std = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, num_std, BLOCK):
            part = start + tl.arange(0, BLOCK)
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
    num_experts = counts.shape[0]
    size = sums.numel() if partials.numel() else 0
    hist_size = margin_hist.numel()
    _accumulate_kernel[(max(1, ceil_div(max(size, hist_size), BLOCK)),)](
        partials if size else None, sums,
        batch_counts, counts, batch_std, std_sum, num_tokens, dropped, num_dropped,
        batch_hist if hist_size else None, margin_hist,
        size, partials.shape[0], batch_std.numel(), hist_size, top_k,
        E=num_experts, BE=padded_experts(num_experts), BLOCK=BLOCK,
        num_warps=4, **all_registers(4, architecture(counts.device)),
    )
