"""What the GPU run looks at: one table for the steps and for the compiler that is ahead of them.

A cell is one shape at one T; a job is a kind of work with its cells.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.harness.shapes import TOKEN_COUNTS
from kmeans_route.kernels.configs import Config
from kmeans_route.testing import MODEL_SHAPES


class Cell(NamedTuple):
    """One shape at one T. dtype: of the hidden states, by its name in torch."""

    shape: str
    num_tokens: int
    hidden_size: int
    num_experts: int
    top_k: int
    dtype: str = "bfloat16"

    @property
    def label(self) -> str:
        """Shape and T."""
        return f"{self.shape} T={self.num_tokens}"


class Trial(NamedTuple):
    """A kernel with another configuration than the table's; None for the table's own."""

    kernel: str
    cell: Cell
    config: Config | None = None

    @property
    def label(self) -> str:
        """Kernel, cell and configuration."""
        return f"{self.kernel} {self.cell.label} {'table' if self.config is None else '/'.join(map(str, self.config))}"


def _named(shapes: Iterable[str], token_counts: Iterable[int]) -> list[Cell]:
    shapes = list(shapes)
    return [Cell(name, num_tokens, *MODEL_SHAPES[name]) for num_tokens in token_counts for name in shapes]


FIRST = ("OLMoE", "DeepSeek-V3")
OTHERS = tuple(name for name in MODEL_SHAPES if name not in FIRST)
TIMED = (4096, 16384, 1, 64)
"""The order of T: training and prefill decide first."""
PIPELINED = [
    # By the tensor cores from a pipelined loop: D split over programs, a tile each and several; and not split.
    Cell("split", 600, 256, 64, 8),
    Cell("split-loop", 600, 2048, 64, 8),
    Cell("loop", 8300, 256, 64, 8),
]
ODD = [Cell("odd", num_tokens, 200, 13, 3, dtype) for dtype in ("bfloat16", "float32") for num_tokens in (1, 33, 600)]
LAYER = (256, 16, 2)
CELLS: dict[str, list[Cell]] = {
    "race": _named(("OLMoE", "Mixtral", "DeepSeek-V3"), (512, 4096, 16384)),
    "streams": _named(["OLMoE"], [64, 4096]),
    "graphs": _named(["OLMoE"], [1, 64, 4096]),
    "sums": _named(["OLMoE"], [20000]),
    "no sync": [Cell("layer", 512, *LAYER)],
    "shapes": _named(MODEL_SHAPES, [5000, 1, 512, 20000]) + PIPELINED + ODD,
    "layer": [Cell("layer", 3000, *LAYER)],
    "timing": _named(FIRST, TIMED) + _named(OTHERS, TIMED),
    "peers": _named(FIRST, (4096, 64)),
    "ncu": _named(FIRST, [16384]),
    "configs": _named(FIRST, [16384]),
    "sanitizer": PIPELINED + ODD,
    "full": _named(FIRST, TOKEN_COUNTS) + _named(OTHERS, TOKEN_COUNTS),
}
"""Job -> its cells, those that decide first in front."""
TINY, TINY_SPLIT = Cell("tiny", 16, 32, 8, 2, "float32"), Cell("tiny-split", 20, 64, 13, 3, "float32")
DRY_CELLS = {job: [TINY_SPLIT if job == "shapes" else TINY] for job in CELLS}
"""For Triton's interpreter: tiny, and in fp32, since it gets bf16 wrong."""
PROFILED = (("route_fwd", 0), ("route_fwd", 1), ("dispatch_fwd", 1))
"""What ncu looks at: kernel, and which cell of its job."""
DRY_CONFIGS: list[Config | None] = [Config(16, 32, 4, 2)]
ROUTE_64 = (
    (128, 64, 8, 2), (128, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 64, 8, 4), (128, 128, 8, 3),
)  # fmt: skip
ROUTE_256 = (
    (64, 64, 8, 2), (64, 64, 8, 4), (64, 128, 8, 3), (64, 32, 8, 4), (32, 64, 4, 4), (32, 64, 8, 4), (128, 64, 16, 3),
)  # fmt: skip
DISPATCH_256 = (
    (8, 256, 4, 1), (16, 256, 8, 1), (32, 256, 8, 1), (16, 128, 4, 1), (32, 128, 4, 1), (8, 512, 4, 1), (4, 1024, 4, 1),
)  # fmt: skip
CONFIGS = (("route_fwd", 0, ROUTE_64), ("route_fwd", 1, ROUTE_256), ("dispatch_fwd", 1, DISPATCH_256))
"""Kernel, which cell of its job, and the hand-picked (BT, BD, warps, stages) to try there beside the table's."""


def cells_of(job: str, *, dry: bool) -> list[Cell]:
    """The cells of a job, in order."""
    return (DRY_CELLS if dry else CELLS)[job]


def trials(*, dry: bool) -> list[Trial]:
    """What the job "configs" tries: the table's own configuration first, then the others, kernel by kernel."""
    cells, found = cells_of("configs", dry=dry), []
    for kernel, place, configs in CONFIGS:
        cell = cells[place % len(cells)]
        picked = [None, *(Config(*config) for config in configs)]
        found += [Trial(kernel, cell, config) for config in (picked[:1] + DRY_CONFIGS if dry else picked)]
    return found
