"""Predicted time of every launch on an H200, from compiled code: no GPU is needed, and none was asked.

    python -m benchmarks.predict [--shape OLMoE ...] [--kernel REGEX] [--tokens 1 64 ...] [--json] [--results FILE]

Each launch is compiled for sm_90, and the machine code of one program is walked (`benchmarks.sass`): what its warps
execute, phase by phase, and how long a warp takes alone. The bytes are those of `offline.work_of`, spread over the
phases as the code asks for them. A phase, with r programs on each multiprocessor, takes the longest of

    latency                       one warp alone, by the compiler's schedule and the latencies of memory
    issue                         warp instructions, over 4 a clock
    compare, multiply, special    what only 16, 16 or 32 and 4 lanes of a scheduler do, over that rate
    load/store                    shared memory, shuffles, memory accesses, over 32 lanes or 128 bytes a clock
    matrix                        FLOP over the tensor cores' rate
    L2, HBM                       bytes of all programs that run, over the device's rate

A program goes through its phases one after another; where several share a multiprocessor, the phases of one hide under
those of another. So r programs take the busiest unit's total and 1/r of what the sum of the phases is above that.
Programs come in waves, of which the last is as full as it is; stages follow each other; a launch adds START_US.

What is kept under build/predict makes a second run fast. Legend: T tokens, D hidden size, E experts, K top_k.
"""

import argparse
import datetime
import gzip
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from benchmarks import integers, offline, sass
from benchmarks.compiled import Compiled, build, cuobjdump
from benchmarks.offline import Launch, Work
from kmeans_route.bench.results import command_line
from kmeans_route.kernels import configs
from kmeans_route.testing import MODEL_SHAPES, ModelShape

KEPT = Path(__file__).resolve().parent.parent / "build" / "predict"
TOKENS = (1, 64, 512, 4096, 16384)
START_US = 1.0
"""What a launch takes beside its programs, in a CUDA graph: a round figure."""
MOST_PROGRAMS, SM_BYTES = 32, 64  # programs at once on a multiprocessor; bytes that come in a clock
UNITS = {
    "issue": ("issue", 0.25), "alu": ("compare", 0.25), "fma": ("multiply", 0.25), "special": ("special", 0.25),
    "load_store": ("load/store", 1.0), "tensor": ("matrix", 1.0),
}  # fmt: skip


class Device(NamedTuple):
    """Rates. copy: 0.9 of the data sheet's peak. L2: 5.5 TB/s were measured on an H100 of 114 multiprocessors
    (chipsandcheese.com, "Funny L2, and Tons of Bandwidth", 2023). clock: NVIDIA's 989.4 TFLOP/s in bf16, over what 132
    multiprocessors do in a clock."""

    name: str
    copy_bytes_per_s: float
    l2_bytes_per_s: float = 5.5e12 * 132 / 114
    multiprocessors: int = 132
    clock_hz: float = 989.4e12 / 132 / sass.TENSOR_FLOP

    def floor_us(self, work: Work) -> float:
        """The larger of HBM bytes over the copy rate and FLOP over the matrix rate."""
        flop_per_s = self.multiprocessors * sass.TENSOR_FLOP * self.clock_hz
        return 1e6 * max(work.hbm / self.copy_bytes_per_s, work.flop / flop_per_s)


H200, H100 = Device("H200", 4.3e12), Device("H100", 3.0e12)


class Prediction(NamedTuple):
    """Of a launch: its time; how much of that each term bounds; and what was read from the code: waves of programs,
    resident programs, registers, and of one warp instructions, barriers, loads, shared bytes and its time alone."""

    time_us: float
    terms_us: dict[str, float]
    code: dict[str, float]

    @property
    def bound(self) -> str:
        """What bounds most of the time."""
        return max(self.terms_us, key=self.terms_us.__getitem__)


def kept(name: str, key: str, make: Callable[[], Any]) -> Any:
    """What an earlier run has left under this key, else made and left there."""
    path = KEPT / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json.gz"
    if not path.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")  # whole or not at all
        part.write_bytes(gzip.compress(json.dumps(make()).encode()))
        part.replace(path)
    return json.loads(gzip.decompress(path.read_bytes()))


def code_of(launch: Launch) -> tuple[str, int, int]:
    """What it becomes on sm_90: machine code, registers a thread, bytes of shared memory."""
    source, text = launch.source()

    def make() -> tuple[str, int, int]:
        compiled, _ = build(source, offline.TARGETS["sm_90"], launch.options)
        found = re.search(r"REG:(\d+)", cuobjdump(compiled, "-res-usage"))
        assert found is not None, "cuobjdump says nothing of registers"
        return cuobjdump(compiled, "-sass"), int(found[1]), compiled.metadata.shared

    code, registers, shared = kept(launch.name, f"{triton.__version__} {launch.kernel.cache_key} {text}", make)
    return code, registers, shared


def constants_of(launch: Launch) -> tuple[dict[int, int], dict[int, int]]:
    """Words of constant bank 0 on sm_90: threads, programs, and arguments from 0x210 on. Pointers only differ.

    And words of memory, where a loop goes through an expert's rows: the first row of each, of whom all get as many.
    """
    words = {0: 32 * launch.options["num_warps"], 4: 1, 8: 1}
    words |= {0xC + 4 * i: size for i, size in enumerate((*launch.grid, 1, 1)[:3])}
    signature, offset, table = launch.source()[0].signature, 0x210, {}
    for name in launch.kernel.arg_names:
        kind = signature[name]
        if kind == "constexpr":
            continue
        size = 8 if kind.startswith("*") else 4
        offset = -(-offset // size) * size
        if size == 8:
            words |= {offset: offset << 22 & 0xFFFFFFFF, offset + 4: offset}
            if launch.name == "dispatch_fwd" and name == "offsets_ptr":
                num_rows, experts = launch.arguments["num_rows"], launch.arguments["num_experts"]
                table = {words[offset] + 4 * e: num_rows * e // experts for e in range(experts + 1)}
        elif kind == "i32":
            words[offset] = launch.arguments[name]
        offset += size
    return words, table


READERS = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (sass, integers))


def stages_of(
    code: str, constants: dict[int, int], table: dict[int, int], program: tuple[int, ...], warm: bool
) -> list[list[sass.Phase]]:
    """`sass.walk`, as kept."""
    arguments = (sorted(constants.items()), sorted(table.items()), program, warm)

    def make() -> list[list[tuple[str, float, dict[str, float]]]]:
        stages = sass.walk(code, constants, program, warm=warm, table=table)
        return [[(phase.name, phase.clk, phase.units) for phase in stage] for stage in stages]

    found = kept("walk", f"{READERS} {code} {arguments}", make)
    return [[sass.Phase(*phase) for phase in stage] for stage in found]


def wave_clk(phases: list[sass.Phase], loads: list[tuple[float, float]], warps: int, r: int) -> dict[str, float]:
    """Clocks of r programs on each multiprocessor, by what bounds them. loads: of each phase, L2's and HBM's clocks."""
    total: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for phase, (l2, hbm) in zip(phases, loads, strict=True):
        taken = {name: r * warps * share * phase.units[unit] for unit, (name, share) in UNITS.items()}
        taken |= {"L2": l2, "HBM": hbm, "latency": phase.clk}
        bound = max(taken, key=taken.__getitem__)
        bounds[bound] = bounds.get(bound, 0.0) + taken[bound]
        total = {name: total.get(name, 0.0) + clk for name, clk in taken.items()}
    busiest, apart = max(total.values()), sum(bounds.values())
    scale = (busiest + (apart - busiest) / r) / apart
    return {name: clk * scale for name, clk in bounds.items()}


def time_us(
    stages: list[list[sass.Phase]], programs: list[int], warps: int, resident: int, work: Work, device: Device
) -> dict[str, float]:
    """Microseconds of a launch, by what bounds them.

    Args:
        stages: of a program. programs: how many go through each.
        warps: of a program. resident: programs that fit on a multiprocessor.
        work: bytes of HBM and L2 of the whole launch.
    """
    asked = [
        [count * phase.units["global_bytes"] for phase in phases]
        for phases, count in zip(stages, programs, strict=True)
    ]
    terms_us = {"start": START_US}
    for phases, count, parts in zip(stages, programs, asked, strict=True):
        left = count
        while left:
            now = min(left, device.multiprocessors * resident)
            waves = left // now
            share = now / count / (sum(map(sum, asked)) or 1) * device.clock_hz
            most = min(device.l2_bytes_per_s, min(now, device.multiprocessors) * SM_BYTES * device.clock_hz)
            loads = [
                (part * share * work.l2 / most, part * share * work.hbm / device.copy_bytes_per_s) for part in parts
            ]
            for name, clk in wave_clk(phases, loads, warps, -(-now // device.multiprocessors)).items():
                terms_us[name] = terms_us.get(name, 0.0) + waves * clk / device.clock_hz * 1e6
            left -= waves * now
    return terms_us


def programs_of(launch: Launch, num_stages: int) -> list[int]:
    """How many programs go through each stage: behind the ticket of a block one of its splits, behind the last one."""
    a, total = launch.arguments, math.prod(launch.grid)
    behind = [1] * ("ticket_ptr" in a)
    assert num_stages == 1 + len(behind), f"{launch.name}: {num_stages} stages in its code, {len(behind)} tickets"
    return [total, *behind]


def predict(launch: Launch, work: Work | None = None, device: Device = H200, *, warm: bool = False) -> Prediction:
    """Compile, walk, and predict a launch.

    One program in the middle stands for all. If the first takes longer by itself than all of that, as where it alone
    adds up scalars, the launch takes as long as the first. work: of `offline`, or given. warm: rows lie in L2.
    """
    code, registers, shared = code_of(launch)
    warps, (constants, table) = launch.options["num_warps"], constants_of(launch)
    fit = Compiled(registers, 0, shared).programs(warps, "sm_90", configs.SHARED_BYTES["sm_90"])
    resident = max(1, min(fit, MOST_PROGRAMS))
    middle = tuple(size // 2 for size in launch.grid)
    stages = stages_of(code, constants, table, middle, warm)
    terms = time_us(stages, programs_of(launch, len(stages)), warps, resident, work or offline.work_of(launch), device)
    alone = stages_of(code, constants, table, (0,) * len(middle), warm)
    first = time_us(alone, [1] * len(alone), warps, 1, Work(0, 0, 0), device)
    terms = max(terms, first, key=lambda each: sum(each.values()))
    phases = [phase for stage in stages for phase in stage]
    figures = {name: sum(phase.units[unit] for phase in phases) for name, unit in (
        ("instructions", "issue"), ("barriers", "barriers"), ("loads", "loads"), ("shared_bytes", "shared_bytes"),
    )}  # fmt: skip
    figures |= {"alone_us": sum(phase.clk for phase in phases) / device.clock_hz * 1e6, "registers": registers}
    figures |= {"resident": resident, "waves": math.prod(launch.grid) / (resident * device.multiprocessors)}
    return Prediction(sum(terms.values()), terms, figures)


def launches_of(shape: ModelShape, num_tokens: int) -> Iterator[tuple[str, Launch]]:
    """(part, launch) of an evaluation and of a training step, in bf16."""
    yield from (("eval", launch) for launch in offline.eval_launches(shape, num_tokens, torch.bfloat16))
    for part, launches in offline.training_launches(shape, num_tokens, torch.bfloat16).items():
        yield from ((part, launch) for launch in launches)


def rows(shapes: list[str], tokens: list[int], kernel: str, progress: bool = False) -> Iterator[dict[str, Any]]:
    """The table, a row a launch."""
    configs.assumed_architecture = "sm_90"
    for shape in shapes:
        for num_tokens in tokens:
            for part, launch in launches_of(MODEL_SHAPES[shape], num_tokens):
                if not re.search(kernel, launch.name):
                    continue
                if progress:
                    print(f"\r{shape} T={num_tokens} {launch.name}".ljust(60), end="", file=sys.stderr, flush=True)
                found, work = predict(launch), offline.work_of(launch)
                yield {
                    "shape": shape, "num_tokens": num_tokens, "part": part, "kernel": launch.name,
                    "grid": launch.grid, "num_warps": launch.options["num_warps"],
                    "time_us": round(found.time_us, 2), "floor_us": round(H200.floor_us(work), 2), "bound": found.bound,
                    "terms_us": {name: round(us, 2) for name, us in found.terms_us.items()},
                    "hbm_bytes": work.hbm, "l2_bytes": work.l2, "flop": work.flop,
                    "code": {name: round(figure, 2) for name, figure in found.code.items()},
                }  # fmt: skip
    if progress:
        print(file=sys.stderr)


def main() -> None:
    """Parse, predict, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=list(MODEL_SHAPES), choices=list(MODEL_SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--kernel", default="", metavar="REGEX", help="of names such as route_fwd")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--results", type=Path, help="write the JSON document there too")
    args = parser.parse_args()
    progress = sys.stderr.isatty() and not os.environ.get("CI")
    found = list(rows(args.shape, args.tokens, args.kernel, progress))
    document = {
        "command": command_line("python -m benchmarks.predict", sys.argv[1:]), "triton": triton.__version__,
        "torch": torch.__version__, "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": H200._asdict(), "start_us": START_US, "rows": found,
    }  # fmt: skip
    text = json.dumps(document)
    if args.results:
        args.results.write_text(text.replace('{"shape"', '\n{"shape"') + "\n", encoding="utf-8")
    if args.json:
        print(text)
        return
    print(f"{'shape':14}{'T':>6} {'part':12}{'kernel':13}{'us':>9}{'floor':>9} {'waves':>7}  bound by")
    for row in found:
        parts = sorted(row["terms_us"].items(), key=lambda term: -term[1])[:3]
        print(
            f"{row['shape']:14}{row['num_tokens']:6} {row['part']:12}{row['kernel']:13}{row['time_us']:9.1f}"
            f"{row['floor_us']:9.1f} {row['code']['waves']:7.2f}  "
            + ", ".join(f"{name} {us:.1f}" for name, us in parts)
        )
    print("predicted, not measured; docs/gpu.md says how far such a prediction was off where a time is published")


if __name__ == "__main__":
    main()
