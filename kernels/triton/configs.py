"""Launch configurations: one default a kernel, size and architecture, chosen from the offline figures.

`python -m benchmarks.gate` compiles whatever these rows can reach, and says what spills or races: nothing may. What it
has been run on stands in `benchmarks/results/gate-*.json`. Other architectures take the row of the one they are most
like, and so does the interpreter. A config decides the order of no sum over K or E, but D is summed in tiles of BD and
splits of it, so the last bits of a score may differ between architectures.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Shared memory that one program may use."""
assumed_architecture = "sm_90"
"""What a tensor on no GPU is taken for: in the interpreter, and on the meta device for offline compiling."""
FEW_COPIES = 4096
"""Of combine's backward: up to so many, each gets a program of its own."""


class Config(NamedTuple):
    """BT tokens and BD columns a tile; warps a program; stages of the software pipeline."""

    BT: int
    BD: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch that are no kernel parameters."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def architecture(device: torch.device) -> str:
    """Which of ARCHITECTURES the device is, or is most like."""
    return _architecture(device.index) if device.type == "cuda" else assumed_architecture


@lru_cache
def _architecture(index: int | None) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(index)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def ceil_div(number: int, size: int) -> int:
    """Pieces of `size` that cover `number`. Triton's own took 16 us a call on the host (3.7.1)."""
    return -(-number // size)


def power_of_2(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def padded_experts(num_experts: int) -> int:
    """BE: experts padded to a power of two of at least 16, the least that tl.dot takes."""
    return max(16, power_of_2(num_experts))


def dot_precision(dtype: torch.dtype, arch: str) -> str:
    """fp32 stays fp32: three TF32 products on the tensor cores where NVIDIA has them, else plain FMA."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm") else "ieee"


def waits_for_products(arch: str) -> bool:
    """Whether each step of a pipelined loop must read its own product, and so wait for it: see `_dots_and_squares`.

    For wgmma alone. On sm_100 such a read breaks the compiler's pass for tensor memory (Triton 3.7.1).
    """
    return arch == "sm_90"


@lru_cache(maxsize=1024)
def route_config(num_tokens: int, num_experts: int, dtype: torch.dtype, arch: str, aligned: bool = True) -> Config:
    """Of `_route_fwd_kernel`.

    Each block reads all directions from L2, so blocks are as large as their products fit in registers where there are
    tokens for it. For decoding they are small, so that many programs share the D of few tokens. aligned: rows can be
    read 16 bytes at a time; others pass through registers element by element, and get narrow tiles.
    """
    be, columns = padded_experts(num_experts), 64 if dtype.itemsize == 2 else 32
    stages = {"sm_90": 4, "gfx942": 2}.get(arch, 3)
    if not aligned:
        return Config(16, 16, 4, 2)
    if num_tokens <= 256:
        if arch == "sm_90":  # fewer steps, all asked for at once
            columns *= 2
        return Config(16, columns, 2 if arch == "gfx942" else 4, stages)
    if dtype == torch.float32:  # three products take three times the operands
        # Chained through tensor memory they came out wrong on sm_103 with more rows (triton#10821).
        return Config(32 if arch == "sm_100" else 64, columns, 4 if be < 64 else 8, min(stages, 3))
    if arch == "sm_100":
        return Config(128 if be < 64 else 64, columns, 8, stages)
    if num_tokens < 2048 and be <= 128:
        return Config(64, columns, 4, stages)
    if arch == "sm_90" and be == 128 and num_tokens >= 16384:  # with D in two, half the reads of directions
        return Config(256, columns, 16, 3)
    return Config(128, columns, 8, stages)


def product_experts(config: Config, num_experts: int, dtype: torch.dtype, arch: str) -> int:
    """EB: experts a program of `_route_fwd_kernel`; more share the reads of x."""
    most = 64 if config.BT <= 16 else 256 if arch == "sm_90" and config.BT == 128 else 128
    return min(padded_experts(num_experts), most)


def selected_experts(num_experts: int) -> int:
    """BE of `_route_select_kernel`: from 33 experts on at least the 128 that 32 lanes read 16 bytes at a time, so that
    the largest of a row is one instruction of a warp."""
    be = padded_experts(num_experts)
    return max(be, 128) if be > 32 else be


def selected_rows(num_tokens: int, num_experts: int, *, long: bool) -> tuple[int, int]:
    """BT, RT of `_route_select_kernel`: tokens a program, and of those together. long: a selection that keeps more
    tiles than one, for replay, groups, histogram or a softmax over all."""
    be, block = selected_experts(num_experts), 1 if num_tokens <= 1024 else 2 if num_tokens <= 8192 else 8
    rows = max(1, min(block, 512 // be)) if long else min(block, 2 if be >= 512 else 8)
    return block, rows


def ranked_tokens(num_tokens: int) -> int:
    """BT of `_route_rank_kernel`: small ones, but up to 8192 tokens no more than the 64 blocks that need no prefix."""
    return 32 if num_tokens <= 2048 else 64 if num_tokens <= 4096 else 128


def all_registers(num_warps: int, arch: str) -> dict[str, int]:
    """Leave to use all registers: else ptxas spills a few bytes to fit one more program."""
    return {"maxnreg": 255} if arch.startswith("sm") and num_warps <= 8 else {}


def launch_options(config: Config, arch: str) -> dict[str, int]:
    """`config.launch`, with all registers on sm_100 alone: elsewhere nothing spills, and fewer let more programs in."""
    return config.launch | (all_registers(config.num_warps, arch) if arch == "sm_100" else {})


@lru_cache(maxsize=1024)
def dispatch_config(num_tokens: int, dtype: torch.dtype, aligned: bool = True) -> Config:
    """Of `_dispatch_fwd_kernel`: rows and columns of a step. aligned: as in `route_config`.

    BD columns of all tokens take some 8 MiB, to stay in L2 while the experts take their turns; 256 bytes at the least.
    """
    if not aligned:
        return Config(16, 64, 4, 1)
    row_bytes = max(256, min(1024, power_of_2((8 << 20) // max(1, num_tokens) + 1) // 2))
    columns = row_bytes // dtype.itemsize
    return Config(4096 // columns, columns, 4, 1)


@lru_cache
def row_config(dtype: torch.dtype) -> Config:
    """Of the kernels that move rows: combine, its backward, and the fused backward."""
    return Config(4, 512 if dtype.itemsize == 2 else 256, 4, 2)


@lru_cache(maxsize=1024)
def copies_config(num_copies: int, hidden_size: int, dtype: torch.dtype) -> Config:
    """Of combine's backward: where there are few copies, as much of a row as can be on its way at once; of many, copies
    of one token side by side, which share their reads of dy."""
    row_bytes, tile_bytes = (8192, 8192) if num_copies <= FEW_COPIES else (512, 4096)
    columns = min(power_of_2(max(1, hidden_size)), row_bytes // dtype.itemsize)
    return Config(tile_bytes // dtype.itemsize // columns, columns, 4, 1)
