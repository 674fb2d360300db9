"""The main loop of the routing kernels as it was: x has a second use beside the product, and nothing waits for that.

Compiled for sm_90 it refills a tile of x that a product in flight still reads. Kept so that the check which found it
can be seen to fail.
"""

import triton
import triton.language as tl


@triton.jit
def racing_kernel(
    x_ptr, d_ptr, out_ptr, D, BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, WAIT: tl.constexpr
):  # fmt: skip
    """x . d over D, and the squares of x. WAIT: read the product in each step, as the kernels do now."""
    tokens, experts, columns = tl.arange(0, BT), tl.arange(0, BE), tl.arange(0, BD)
    dots = tl.zeros([BT, BE], dtype=tl.float32)
    squares = tl.zeros([BT, BD], dtype=tl.float32)
    for start in range(0, D, BD):
        column = start + columns
        x = tl.load(x_ptr + tokens[:, None] * D + column[None, :], mask=(column < D)[None, :], other=0.0)
        d = tl.load(d_ptr + experts[:, None] * D + column[None, :], mask=(column < D)[None, :], other=0.0)
        x_fp32 = x.to(tl.float32)
        squares += x_fp32 * x_fp32
        dots = tl.dot(x, tl.trans(d), dots)
        if WAIT:
            dots = tl.where(start >= 0, dots, 0.0)
    tl.store(out_ptr + tokens[:, None] * BE + experts[None, :], dots + tl.sum(squares, axis=1)[:, None])
