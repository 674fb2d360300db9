"""The rates that a device reaches, measured in the same run as what is held against them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu.measure import measure
from kmeans_route.bench.clock import Clock

PIECE = 1024
L2_READS = 64  # the first comes from HBM


@triton.jit
def _read_again_kernel(x_ptr, out_ptr, PIECES: tl.constexpr, READS: tl.constexpr, PIECE: tl.constexpr):
    """Program p reads PIECES pieces of x, READS times over, from L2 alone: .cg passes L1 by, and each time another
    program's pieces come."""
    p, programs = tl.program_id(0), tl.num_programs(0)
    lanes = tl.arange(0, PIECE)
    total = tl.zeros([PIECE], tl.float32)
    for turn in range(PIECES * READS):
        place = ((p + 7 * (turn // PIECES)) % programs) * PIECES + turn % PIECES
        total += tl.load(x_ptr + place * PIECE + lanes, cache_modifier=".cg")
    tl.store(out_ptr + p * PIECE + lanes, total)


def read_again(x: Tensor, out: Tensor, num_programs: int) -> None:
    """Read x, fp32 of num_programs * n * PIECE elements, L2_READS times; out (num_programs, PIECE) gets the sums."""
    pieces = x.numel() // (num_programs * PIECE)
    _read_again_kernel[(num_programs,)](x, out, PIECES=pieces, READS=L2_READS, PIECE=PIECE, num_warps=8)


def l2_bytes_per_s(clock: Clock) -> float:
    """Rate of reads from an L2 that holds what is read. A quarter of it: one half lies near to each half of an H100."""
    device, num_programs, pieces = clock.device, 2, 2
    if clock.on_gpu:
        num_programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count
        pieces = max(1, (clock.l2_bytes or 16 << 20) // 4 // (num_programs * PIECE * 4))
    x = torch.ones(num_programs * pieces * PIECE, device=device)
    out = torch.empty(num_programs, PIECE, device=device)
    median_us = measure(clock, lambda: read_again(x, out, num_programs))["median_us"]
    assert bool((out == pieces * L2_READS).all()), "the kernel that reads from L2 did not read all"
    return 1e6 * x.numel() * 4 * L2_READS / median_us


def peaks(clock: Clock) -> dict[str, float]:
    """Measured on this device: bytes/s of a large copy (read and written), of reads from L2, FLOP/s in bf16, and the
    time of a graph of one tiny kernel in microseconds, which every timing includes."""
    device, large = clock.device, (1 << 30) if clock.on_gpu else 1 << 20
    size = 8192 if clock.on_gpu else 64
    with clock.scope():
        source, target = (torch.zeros(large, dtype=torch.uint8, device=device) for _ in range(2))
        copy = measure(clock, lambda: target.copy_(source))["median_us"]
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        product = measure(clock, lambda: a @ b)["median_us"]
        one = torch.zeros(1, device=device)
        return {
            "copy_bytes_per_s": 2e6 * large / copy,
            "l2_bytes_per_s": l2_bytes_per_s(clock),
            "bf16_flop_per_s": 2e6 * size**3 / product,
            "empty_graph_us": measure(clock, lambda: one.add_(1))["median_us"],
        }
