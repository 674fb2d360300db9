"""One kernel by itself: its time, what it moves and computes, and what bounds it.

    python -m benchmarks.gpu.profile --kernel route_fwd --shape OLMoE --tokens 4096 [--training] [--json]
    python -m benchmarks.gpu.profile --kernel route_fwd --dry     # a tiny shape on a CPU, in Triton's interpreter

The package's own launch is taken as it comes, with its arguments, and launched again: by ncu for the bytes that really
moved, where ncu is there and allowed, and as a graph with a cold L2 between CUDA events in any case. Beside it stand
the device's rates, measured in the same run. Nothing is timed before the shape's results were found right.

Exit code: 0; 1 where a result is wrong or the kernel is not launched at this shape; 2 where it cannot start.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# torch, Triton and kmeans_route are imported later: Triton's interpreter is chosen as the kernels are imported.

ROOT = Path(__file__).resolve().parent.parent.parent
LEVELS = {"HBM": "copy_bytes_per_s", "L2": "l2_bytes_per_s", "matrix": "bf16_flop_per_s"}
"""Bound -> the measured rate that it is held against."""
DRY = "not asked in a dry run"
Record = dict[str, Any]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.profile", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--kernel", required=True, help="route_fwd, route_select, dispatch_fwd, combine_fwd, ...")
    parser.add_argument("--shape", default="OLMoE", help="a named shape (OLMoE)")
    parser.add_argument("--tokens", type=int, default=4096, help="T (4096)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--training", action="store_true", help="the training forward's launch, where eval has one too")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--dry", action="store_true", help="on the CPU, at one tiny shape; its times mean nothing")
    parser.add_argument("--launch-only", action="store_true", help=argparse.SUPPRESS)  # what ncu runs
    return parser.parse_args(argv)


def launches(p: Any) -> tuple[list[Any], list[Any]]:
    """Those of routing alone, and those of a training step with the exchange of one layer."""
    from benchmarks.gpu.checks import routing_alone, training_step
    from benchmarks.gpu.launches import watched

    alone: list[Any] = []
    step: list[Any] = []
    with watched(alone.append):
        routing_alone(p)
    with watched(step.append):
        training_step(p)
    return alone, step


def find(name: str, p: Any, *, training: bool) -> Any:
    """The launch to look at, as `launches.Seen`.

    Raises:
        LookupError: it does not happen at this shape.
    """
    routing_alone, step = launches(p)
    order = step + routing_alone if training else routing_alone + step
    for seen in order:
        if seen.launch.name == name:
            return seen
    names = ", ".join(dict.fromkeys(seen.launch.name for seen in order))
    raise LookupError(f"{name} is not launched at {p.cell.shape} T={p.cell.num_tokens}: launched are {names}")


def levels(work: Any, time_us: float, peaks: Record, moved: dict[str, float] | None = None) -> dict[str, Record]:
    """Bound -> what must move or be computed, its floor, the rate it gives, and percent of the measured peak.

    moved: hbm_bytes and l2_bytes that ncu counted; the rate is then that of the bytes that really moved.
    """
    amounts = {"HBM": work.hbm, "L2": work.l2, "matrix": work.flop}
    counted = {"HBM": moved["hbm_bytes"], "L2": moved["l2_bytes"]} if moved else {}
    table = {}
    for level, amount in amounts.items():
        peak, real = peaks[LEVELS[level]], counted.get(level, amount)
        rate = 1e6 * real / time_us
        table[level] = {
            "least": amount, "counted": counted.get(level), "floor_us": 1e6 * amount / peak,
            "per_s": rate, "peak_per_s": peak, "percent_of_peak": 100 * rate / peak,
        }  # fmt: skip
    return table


def text_of(record: Record) -> str:
    """For people."""
    head = (
        f"{record['kernel']}, {record['shape']} T={record['num_tokens']} D={record['hidden_size']} "
        f"E={record['num_experts']} K={record['top_k']} {record['dtype']}, grid {record['grid']}, {record['options']}"
    )
    events = record["events"]
    said = record["ncu"].get("error") or f"{record['ncu']['time_us']:.1f} us"
    lines = [
        head,
        f"  {events['method']}: {events['median_us']:.1f} us, quartiles {events['q1_us']:.1f} .. {events['q3_us']:.1f}",
        f"  ncu: {said}",
        f"  {'bound':8}{'at least':>14}{'counted':>14}{'floor us':>10}{'rate /s':>12}{'peak /s':>12}{'% peak':>8}",
    ]
    for level, row in record["levels"].items():
        counted = "" if row["counted"] is None else f"{row['counted']:.4g}"
        lines.append(
            f"  {level:8}{row['least']:>14.4g}{counted:>14}{row['floor_us']:>10.2f}{row['per_s']:>12.3g}"
            f"{row['peak_per_s']:>12.3g}{row['percent_of_peak']:>8.1f}"
        )
    lines.append(f"  bound by {record['bound']}: {record['percent_of_floor']:.0f}% of the largest floor")
    return "\n".join(lines)


def measured(
    kernel: str, p: Any, clock: Any, rates: Record, *, training: bool = False, no_ncu: str = "", seconds: float = 300
) -> Record:
    """The record of one launch. rates: of `peaks`. no_ncu: why ncu is not asked. seconds: that it may take.

    Raises:
        LookupError: the kernel is not launched at this shape.
    """
    import torch

    from benchmarks.gpu import ncu
    from benchmarks.gpu.measure import measure
    from benchmarks.offline import work_of

    seen = find(kernel, p, training=training)
    events = measure(clock, seen.again, seen.restore)
    torch.cuda.empty_cache()
    words = ["--kernel", kernel, "--shape", p.cell.shape, "--tokens", str(p.cell.num_tokens), "--dtype", p.cell.dtype]
    command = [sys.executable, "-m", "benchmarks.gpu.profile", "--launch-only", *words] + ["--training"] * training
    moved: Record
    try:
        if no_ncu:
            raise ncu.NcuError(no_ncu)
        moved = ncu.profile(f"_{kernel}_kernel", command, cwd=str(ROOT), env=dict(os.environ), seconds=seconds)
    except ncu.NcuError as error:
        moved = {"error": str(error)}
    counted = moved if "time_us" in moved else None
    time_us = moved.get("time_us", events["median_us"])
    table = levels(work_of(seen.launch), time_us, rates, counted)
    bound = max(table, key=lambda level: table[level]["floor_us"])
    return {
        "kernel": kernel, **p.cell._asdict(), "grid": list(seen.launch.grid), "options": seen.launch.options,
        "events": events, "ncu": moved, "levels": table, "bound": bound,
        "percent_of_floor": 100 * table[bound]["floor_us"] / time_us, "peaks": rates,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The whole run; returns the exit code."""
    args = arguments(argv)
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    import torch

    if not args.dry and not torch.cuda.is_available():
        print("no CUDA or ROCm device that torch can use: --dry runs without one", file=sys.stderr)
        return 2
    from benchmarks.gpu.cells import Cell
    from benchmarks.gpu.checks import Problem, verify
    from benchmarks.gpu.ncu import WARM_UPS
    from benchmarks.gpu.peaks import peaks
    from kmeans_route.bench.clock import Clock
    from kmeans_route.testing import MODEL_SHAPES

    if args.shape not in MODEL_SHAPES or args.tokens < 1:
        print(f"--shape must be among {', '.join(MODEL_SHAPES)} and --tokens at least 1", file=sys.stderr)
        return 2
    shape = Cell(args.shape, args.tokens, *MODEL_SHAPES[args.shape], args.dtype)
    cell = Cell("tiny", 32, 32, 8, 2, "float32") if args.dry else shape
    clock = Clock(torch.device("cpu") if args.dry else torch.device("cuda", torch.cuda.current_device()))
    with clock.scope():
        p = Problem(cell, clock.device)
        try:
            if args.launch_only:
                seen = find(args.kernel, p, training=args.training)
                seen.restore()
                for _ in range(WARM_UPS + 1):
                    seen.again()
                clock.wait()
                return 0
            wrong = {name: check["message"] for name, check in verify(p).items() if not check["ok"]}
            if wrong:
                print(f"WRONG, not timed: {wrong}", file=sys.stderr)
                return 1
            no_ncu = DRY if args.dry else ""
            record = measured(args.kernel, p, clock, peaks(clock), training=args.training, no_ncu=no_ncu)
        except LookupError as error:
            print(error.args[0], file=sys.stderr)
            return 1
    print(json.dumps(record) if args.json else text_of(record))
    if args.dry:
        print("a dry run: its times are those of an interpreter and mean nothing", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
