"""Every kernel compiled without a GPU: registers, spills, instructions, launches, bytes and floors of every config.

    python -m benchmarks.offline [--json] [--arch sm_90 ...] [--shape OLMoE ...]

The launchers run on meta tensors at the named shapes, with the kernels replaced by recorders. So what is compiled,
counted and weighed is what a GPU would get: argument types, alignment, constants, grid. Legend: T tokens, D hidden
size, E experts, K top_k.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.compiled import Compiled, compile_source
from kmeans_route.bench.results import command_line
from kmeans_route.checks import check_route_options
from kmeans_route.kernels import accumulate, combine, commit, configs, directions, dispatch, route, route_bwd
from kmeans_route.testing import MODEL_SHAPES, ModelShape

MODULES: tuple[ModuleType, ...] = (route, dispatch, accumulate, combine, route_bwd, commit, directions)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_CORES = {"sm_80": ("HMMA",), "sm_90": ("HGMMA", "HMMA"), "sm_100": ("UTCHMMA", "HMMA"), "gfx942": ("v_mfma",)}
WIDE_READS = ("LDGSTS", "LDG.E.128", "UTMALDG", "global_load_dwordx4", "buffer_load_dwordx4")
ROWS = ("x_ptr", "y_sorted_ptr", "dx_sorted_ptr", "weight_ptr")
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
REGIMES = {"decode": 64, "prefill": 16384, "training": 16384}
"""Regime -> T. Prefill and decode are routing alone, training is every kernel of a step."""
H100 = {"HBM": 3.0e12, "L2": 5.5e12, "FLOP": 800e12}
"""Round figures of an H100 SXM for the floors, bytes and bf16 FLOP a second; on a GPU they are measured."""


@dataclass
class Launch:
    """One recorded launch: kernel, what it was given, and its grid."""

    kernel: Any
    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def source(self) -> tuple[ASTSource, str]:
        """What the compiler gets, and a text that is equal for equal sources."""
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(self.kernel.arg_names):
            value = self.arguments[name]
            if isinstance(value, Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(place,)] = [["tt.divisibility", 16]]
            elif self.kernel.params[place].is_constexpr or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1 and not self.kernel.params[place].do_not_specialize:
                signature[name], constants[name] = "constexpr", 1  # as the just-in-time compiler does
            else:
                signature[name] = "i32"
                if value % 16 == 0 and not self.kernel.params[place].do_not_specialize:
                    attributes[(place,)] = [["tt.divisibility", 16]]
        key = f"{self.name} {signature} {constants} {sorted(attributes)} {self.options}"
        return ASTSource(self.kernel, signature, constants, attributes), key

    def reads_rows(self) -> bool:
        """Whether it reads rows of hidden states, or of centroids, whose length allows 128 bits at a time."""
        rows = [self.arguments.get(name) for name in ROWS]
        return self.arguments.get("D", 1) % 16 == 0 and any(row is not None for row in rows)


class _Recorder:
    def __init__(self, kernel: Any, name: str, launches: list[Launch]) -> None:
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in kwargs}
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            missing = set(self.kernel.arg_names) - set(arguments)
            assert not missing, f"{self.name} lacks {missing}"
            assert len(arguments) == len(self.kernel.arg_names), f"{self.name} got too much"
            self.launches.append(Launch(self.kernel, self.name, tuple(grid), arguments, options))

        return launch


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block no kernel runs; the list fills with the launches."""
    launches: list[Launch] = []
    before = [
        (module, name, kernel)
        for module in MODULES
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    ]
    for module, name, kernel in before:
        setattr(module, name, _Recorder(kernel, name.strip("_").removesuffix("_kernel"), launches))
    try:
        yield launches
    finally:
        for module, name, kernel in before:
            setattr(module, name, kernel)


def eval_launches(shape: ModelShape, num_tokens: int, dtype: torch.dtype) -> list[Launch]:
    """Routing alone."""
    x, d, bias = _inputs(shape, num_tokens, dtype)
    with recorded() as launches:
        route.route_fwd(x, d, bias, None, None, check_route_options(shape.num_experts, shape.top_k))
    return launches


def training_launches(
    shape: ModelShape, num_tokens: int, dtype: torch.dtype, *, copies: bool = True
) -> dict[str, list[Launch]]:
    """The launches of one training step of a layer: forward, combine, combine_bwd, backward, commit, directions.

    copies=False: the index mode, in which grouped products gather their rows themselves.
    """
    x, d, bias = _inputs(shape, num_tokens, dtype)
    (_, hidden_size), (num_experts, top_k) = x.shape, (shape.num_experts, shape.top_k)
    pending, no_hist = _pending(shape), x.new_empty(0, 1024, dtype=torch.int32)
    parts: dict[str, list[Launch]] = {}
    with recorded() as parts["forward"]:
        r = route.route_fwd(
            x, d, bias, None, None, check_route_options(num_experts, top_k), want_std=True, want_rank=True
        )
        ranks = dispatch.Ranks(r.rank, r.block_counts, r.offsets, r.block)
        sent = dispatch.dispatch_fwd(
            x, r.indices, r.valid, num_experts, ranks, r.inv_norm, copies=copies, want_sums=True
        )
        accumulate.accumulate(sent.partials, r.counts, r.score_std, r.dropped, None, top_k, *pending.values(), no_hist)
    y_sorted = x.new_empty(num_tokens * top_k, hidden_size)
    with recorded() as parts["combine"]:
        combine.combine_fwd(y_sorted, sent.positions, r.weights, r.valid)
    with recorded() as parts["combine_bwd"]:
        combine.combine_bwd(x, y_sorted, r.weights, sent.positions, r.valid)
    with recorded() as parts["backward"]:
        route_bwd.route_bwd(
            x, d, r.indices, r.selected, r.inv_norm, r.valid, r.weights, None, y_sorted if copies else None,
            sent.positions, "softmax", 0.05, True, 1.0,
        )  # fmt: skip
    parts["commit"] = commit_launches(shape)
    with recorded() as parts["directions"]:
        directions.directions(torch.empty_like(pending["sums"]), dtype)
    return parts


def commit_launches(shape: ModelShape, rule: str = "centroids") -> list[Launch]:
    """Those of one commit; rule: of its directions."""
    pending = _pending(shape)
    weight, scalar, turn = torch.empty_like(pending["sums"]), pending["std_sum"], pending["sums"][:2]
    bias, no_hist = scalar.new_empty(shape.num_experts), scalar.new_empty(0, 1024, dtype=torch.int32)
    with recorded() as launches:
        commit.commit(
            weight, weight, bias, scalar, pending["num_tokens"], None, pending["num_dropped"], pending["counts"], turn,
            *pending.values(), no_hist, None, shape.top_k, 0.999, "proportional", 0.05, rule,
        )  # fmt: skip
    return launches


def _pending(shape: ModelShape) -> dict[str, Tensor]:
    number = torch.empty((), dtype=torch.int64, device="meta")
    return {
        "sums": torch.empty(shape.num_experts, shape.hidden_size, device="meta"),
        "counts": number.new_empty(shape.num_experts),
        "std_sum": torch.empty((), device="meta"),
        "num_tokens": number,
        "num_dropped": torch.empty_like(number),
    }


def _inputs(shape: ModelShape, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.empty(num_tokens, shape.hidden_size, dtype=dtype, device="meta")
    d = torch.empty(shape.num_experts, shape.hidden_size, dtype=dtype, device="meta")
    return x, d, torch.empty(shape.num_experts, device="meta")


@dataclass
class Work:
    """What a launch must move and compute at the least: bytes of HBM, bytes through L2, FLOP on the matrix units."""

    hbm: int
    l2: int
    flop: int

    def floors_us(self) -> dict[str, float]:
        """Microseconds that each of the three takes on an H100 by its round figures."""
        amounts = {"HBM": self.hbm, "L2": self.l2, "FLOP": self.flop}
        return {name: amount / H100[name] * 1e6 for name, amount in amounts.items()}


def work_of(launch: Launch) -> Work:
    """From the launch's own arguments. Tables of T K entries are counted, block counts and scalars are not."""
    a = launch.arguments
    if launch.name in ("prefix", "positions"):
        counts = a["block_counts_ptr"].numel() * 4
        first = 0 if a["first_row_ptr"] is None else a["first_row_ptr"].numel() * 4
        if launch.name == "prefix":
            return Work(counts + first, counts + first, 0)
        table = a["T"] * (28 * a["K"] + 1) + counts + first
        return Work(table, table + (0 if first else counts * (launch.grid[0] - 1) // 2), 0)
    if launch.name == "accumulate":
        experts = min(a["E"], a["num_std"] * a["K"])  # that a batch of so many tokens can reach
        num_bytes = 4 * (experts * a["D"] * (a["num_splits"] + 2) + 2 * a["E"] * a["num_bins"] + a["num_std"])
        return Work(num_bytes, num_bytes, 0)
    if launch.name in ("commit", "directions"):
        num_bytes = a["weight_ptr"].numel() * 4
        copy = num_bytes * 6 if launch.name == "commit" else num_bytes + a["d_ptr"].numel() * a["d_ptr"].element_size()
        again = 3 if launch.name == "commit" else 2
        return Work(copy, copy + again * num_bytes, 0)
    if launch.name == "route_select":
        table, partial = a["T"] * (16 * a["K"] + 5), (a["dots_ptr"].numel() + a["squares_ptr"].numel()) * 4
        return Work(table, table + partial, 0)
    if launch.name == "route_rank":
        table, bits = a["T"] * (12 * a["K"] + 1), 3 * a["bits_ptr"].numel() * 4
        return Work(table, table + bits, 0)
    if launch.name == "dispatch_fwd":
        a = a | {"T": a["x_ptr"].shape[0], "K": a["num_rows"] // a["x_ptr"].shape[0]}
    num_tokens, hidden_size = a["T"], a["D"]
    element = next(v.element_size() for k, v in a.items() if k in ("x_ptr", "y_sorted_ptr"))
    row = num_tokens * hidden_size * element
    if launch.name == "route_fwd":
        parts, directions = a["BE"] // a["EB"], a["d_ptr"].numel() * element
        partial = (a["dots_ptr"].numel() + a["squares_ptr"].numel()) * 4
        reads = directions * (launch.grid[0] // a["num_splits"] // parts)
        return Work(row + directions, row * parts + reads + partial, 2 * num_tokens * hidden_size * a["BE"])
    top_k = a["K"]
    table = num_tokens * top_k * 12
    if launch.name == "dispatch_fwd":
        copies = 0 if a["x_sorted_ptr"] is None else top_k * row
        partials = 0 if a["partials_ptr"] is None else a["partials_ptr"].numel() * 4
        blocks = -(-hidden_size // a["BD"])  # of columns; HBM gives x once while a block of all tokens fits into L2
        return Work(row + copies + partials + table, top_k * row + copies + partials + table * blocks, 0)
    if launch.name == "combine_fwd":
        return Work((1 + top_k) * row + table, (1 + top_k) * row + table, 0)
    if launch.name == "combine_bwd":
        return Work((1 + 2 * top_k) * row + table, 3 * top_k * row + table, 0)
    assert launch.name == "route_bwd", launch.name
    copies = 0 if a["dx_sorted_ptr"] is None else top_k * row
    return Work(2 * row + copies + table, (2 + top_k) * row + copies + table, 0)


@dataclass
class Row:
    """One kernel, shape, regime and target of the table."""

    arch: str
    shape: str
    regime: str
    kernel: str
    grid: tuple[int, ...]
    config: dict[str, int]
    compiled: Compiled
    work: Work
    programs: int
    problems: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the floors and what bounds the kernel."""
        floors = self.work.floors_us()
        return {**asdict(self), "floors_us": floors, "bound": max(floors, key=floors.__getitem__)}


def problems_of(launch: Launch, compiled: Compiled, arch: str) -> list[str]:
    """What a shipped config must not show: spills, races, serialised products, no tensor cores for 16-bit inputs,
    narrow reads of x, too much shared memory."""
    found, i = list(compiled.races), compiled.instructions
    if compiled.serialised:
        found.append("ptxas serialises the products")
    if compiled.spills:
        found.append(f"{compiled.spills} bytes spilled")
    if compiled.shared > configs.SHARED_BYTES[arch]:
        found.append(f"{compiled.shared} bytes of shared memory, the device has {configs.SHARED_BYTES[arch]}")
    products = launch.name == "route_fwd"
    if products and not any(i.get(name) for name in TENSOR_CORES[arch]):
        found.append("no tensor cores")
    if launch.reads_rows() and not any(i.get(name) for name in WIDE_READS):
        found.append("no 128-bit read")
    return found


def launches_of(shape: ModelShape, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """(regime, launch) of everything the package does at a shape."""
    for regime, num_tokens in REGIMES.items():
        if regime != "training":
            yield from ((regime, launch) for launch in eval_launches(shape, num_tokens, dtype))
            continue
        for launches in training_launches(shape, num_tokens, dtype).values():
            yield from ((regime, launch) for launch in launches)
        index = training_launches(shape, num_tokens, dtype, copies=False)
        yield from (("index mode", launch) for launch in index["forward"] if launch.name == "dispatch_fwd")


def table(archs: list[str], shapes: list[str], dtype: torch.dtype, progress: bool = False) -> list[Row]:
    """Compile everything, equal sources once."""
    rows: list[Row] = []
    for arch in archs:
        configs.assumed_architecture = arch
        seen: dict[str, Compiled] = {}
        for shape in shapes:
            for regime, launch in launches_of(MODEL_SHAPES[shape], dtype):
                key = launch.source()[1]
                if key not in seen:
                    if progress:
                        print(f"\r{arch} {shape} {launch.name}".ljust(60), end="", file=sys.stderr, flush=True)
                    seen[key] = compile_source(launch.source()[0], TARGETS[arch], launch.options)
                c = seen[key]
                rows.append(
                    Row(
                        arch,
                        shape,
                        regime,
                        launch.name,
                        launch.grid,
                        launch.options,
                        c,
                        work_of(launch),
                        c.programs(launch.options["num_warps"], arch, configs.SHARED_BYTES[arch]),
                        problems_of(launch, c, arch),
                    )
                )
    if progress:
        print(file=sys.stderr)
    return rows


def _print(rows: list[Row]) -> None:
    head = (
        "arch",
        "shape",
        "regime",
        "kernel",
        "grid",
        "warps",
        "regs",
        "spill",
        "shared",
        "/SM",
        "MiB",
        "floor us",
        "by",
    )
    lines = [head]
    for row in rows:
        floors = row.work.floors_us()
        bound = max(floors, key=floors.__getitem__)
        lines.append(
            (
                row.arch,
                row.shape,
                row.regime,
                row.kernel,
                "x".join(map(str, row.grid)),
                str(row.config["num_warps"]),
                str(row.compiled.registers),
                str(row.compiled.spills),
                str(row.compiled.shared),
                str(row.programs),
                f"{row.work.hbm / 2**20:.1f}",
                f"{floors[bound]:.1f}",
                bound,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print("floors: bytes and FLOP over the round figures of an H100; nothing here was timed")


def main() -> int:
    """Exit code 1 when a config has a problem."""
    parser = argparse.ArgumentParser(description="Compile every kernel without a GPU and print what came out.")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--shape", nargs="+", default=list(MODEL_SHAPES), choices=list(MODEL_SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    rows = table(arguments.arch, arguments.shape, getattr(torch, arguments.dtype), sys.stderr.isatty())
    problems = [f"{r.arch} {r.shape} {r.regime} {r.kernel}: {p}" for r in rows for p in r.problems]
    if arguments.json:
        command = command_line("python -m benchmarks.offline", sys.argv[1:])
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        versions["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
        rows_json = [row.as_json() for row in rows]
        print(json.dumps({"command": command, **versions, "rows": rows_json, "problems": problems}))
    else:
        _print(rows)
        for problem in problems:
            print("PROBLEM", problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
