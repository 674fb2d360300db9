"""What tokens are scored with: unit rows of the centroids, in the dtype of the hidden states.

    d_e = c_e / ||c_e||, or 0 where ||c_e|| < 1e-12 or not finite

`reference.directions_reference` is the definition. Bytes: E D 4 read, three times but from L2 after the first, and
E D B written. Legend: D hidden size, E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kmeans_route.kernels.common import MIN_CENTROID_NORM, rows_of

BLOCK = 1024


@triton.jit
def _directions_kernel(weight_ptr, weight_stride_e, d_ptr, D, BD: tl.constexpr):
    """Unit rows of weight (E, D), 0 where a row is shorter than 1e-12 or not finite. Grid (E,)."""
    expert = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    row = weight_ptr + expert * weight_stride_e
    largest = tl.zeros([BD], dtype=tl.float32)
    for start in range(0, D, BD):
        column = start + columns
        largest = tl.maximum(largest, tl.abs(tl.load(row + column, mask=column < D, other=0.0)))
    scale = tl.max(largest, axis=0)
    scale = tl.where(scale > 0, scale, 1.0)  # so that squares neither overflow nor vanish
    squares = tl.zeros([BD], dtype=tl.float32)
    for start in range(0, D, BD):
        column = start + columns
        c = tl.load(row + column, mask=column < D, other=0.0) / scale
        squares += c * c
    norm = tl.sqrt(tl.sum(squares, axis=0))
    usable = (norm * scale >= MIN_CENTROID_NORM) & (norm < float("inf"))  # NaN fails both
    for start in range(0, D, BD):
        column = start + columns
        c = tl.load(row + column, mask=column < D, other=0.0) / scale
        d = tl.where(usable, c / tl.where(usable, norm, 1.0), 0.0)
        tl.store(d_ptr + expert * D + column, d.to(d_ptr.dtype.element_ty), mask=column < D)


def directions(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit rows of weight (E, D) fp32, rounded to `dtype`. One launch."""
    weight = rows_of(weight.detach())
    d = weight.new_empty(*weight.shape, dtype=dtype)
    if d.numel():
        _directions_kernel[(weight.shape[0],)](weight, weight.stride(0), d, weight.shape[1], BD=BLOCK, num_warps=4)
    return d
