"""One kernel by itself: its time, what it moves and computes, and what bounds it.

    python -m benchmarks.profile --kernel route_fwd --shape OLMoE --tokens 4096 [--training] [--json]
    python -m benchmarks.profile --kernel route_fwd --dry     # a tiny shape on a CPU, in Triton's interpreter

The package's own launch is taken as it comes, with its arguments, and launched again: by ncu for the bytes that really
moved, where ncu is there and allowed, and as a graph with a cold L2 between CUDA events in any case. Beside it stand
the device's rates, measured in the same run. Nothing is timed before the shape's results were found right.

Exit code: 0; 1 where a result is wrong or the kernel is not launched at this shape; 2 where it cannot start.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# torch, Triton and kmeans_route are imported later: Triton's interpreter is chosen as the kernels are imported.

ROOT = Path(__file__).resolve().parent.parent
MUTATING = ("accumulate", "commit")
LEVELS = {"HBM": "copy_bytes_per_s", "L2": "l2_bytes_per_s", "matrix": "bf16_flop_per_s"}
"""Bound -> the measured rate that it is held against."""
Record = dict[str, Any]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", required=True, help="route_fwd, route_split, dispatch_fwd, combine_fwd, ...")
    parser.add_argument("--shape", default="OLMoE", help="a named shape (OLMoE)")
    parser.add_argument("--tokens", type=int, default=4096, help="T (4096)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--training", action="store_true", help="the training forward's launch, where eval has one too")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--dry", action="store_true", help="on the CPU, at one tiny shape; its times mean nothing")
    parser.add_argument("--launch-only", action="store_true", help=argparse.SUPPRESS)  # what ncu runs
    return parser.parse_args(argv)


class Seen:
    """One launch that happened: `again` repeats it, `restore` puts back what it changed, `launch` says what it was."""

    def __init__(self, kernel: Any, name: str, grid: tuple[int, ...], args: Any, kwargs: Any) -> None:
        from benchmarks.offline import Launch

        options = {key: value for key, value in kwargs.items() if key in ("num_warps", "num_stages")}
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        self.launch = Launch(kernel, name, tuple(grid), {k: v for k, v in named.items() if k not in options}, options)
        self.again: Callable[[], Any] = lambda: kernel[grid](*args, **kwargs)
        tensors = [value for value in named.values() if hasattr(value, "data_ptr")] if name in MUTATING else []
        self.before = [(tensor, tensor.clone()) for tensor in tensors]

    def restore(self) -> None:
        """The arguments as they were before the first launch; nothing to do for kernels that only write results."""
        for tensor, value in self.before:
            tensor.copy_(value)


@contextmanager
def watched() -> Iterator[list[Seen]]:
    """Within the block every launch of the package happens and is kept."""
    from benchmarks.offline import MODULES

    seen: list[Seen] = []
    kernels = [(m, name, kernel) for m in MODULES for name, kernel in vars(m).items() if name.endswith("_kernel")]
    for module, name, kernel in kernels:
        setattr(module, name, _Watcher(kernel, name.strip("_").removesuffix("_kernel"), seen))
    try:
        yield seen
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


class _Watcher:
    def __init__(self, kernel: Any, name: str, seen: list[Seen]) -> None:
        self.kernel, self.name, self.seen = kernel, name, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.seen.append(Seen(self.kernel, self.name, grid, args, kwargs))
            self.kernel[grid](*args, **kwargs)

        return launch


def launches(p: Any) -> tuple[list[Seen], list[Seen]]:
    """Those of routing alone, and those of a training step with the exchange of one layer."""
    import torch

    from benchmarks.gpu_checks import gate_leaf
    from kmeans_route import combine

    p.ours.pending.clear_()
    p.ours._cached = None
    with torch.no_grad(), watched() as routing_alone:
        p.ours.route(p.x)
    with watched() as step:
        routing, sent = p.forward(p.ours)
        p.backward((routing.weights, sent.x_sorted), (p.x,))
        leaf, routing = gate_leaf(p, routing)
        y = combine(leaf, routing, sent, backend="triton")
        torch.autograd.grad(y, (leaf, routing.weights), p.dy)
        p.ours.commit()
    return routing_alone, step


def find(name: str, p: Any, *, training: bool) -> Seen:
    """The launch to look at.

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


def measured(args: argparse.Namespace, p: Any, seen: Seen, clock: Any) -> Record:
    """The record of one launch."""
    import torch

    from benchmarks import ncu
    from benchmarks.gpu_peaks import peaks
    from benchmarks.offline import work_of

    rates = peaks(clock)
    events = clock.measure(seen.again, seen.restore)
    torch.cuda.empty_cache()
    command = [sys.executable, "-m", "benchmarks.profile", "--launch-only", *sys_arguments(args)]
    moved: Record
    try:
        if args.dry:
            raise ncu.NcuError("not asked in a dry run")
        moved = ncu.profile(f"_{args.kernel}_kernel", command, cwd=str(ROOT), env=dict(os.environ))
    except ncu.NcuError as error:
        moved = {"error": str(error)}
    counted = moved if "time_us" in moved else None
    time_us = moved.get("time_us", events["median_us"])
    table = levels(work_of(seen.launch), time_us, rates, counted)
    bound = max(table, key=lambda level: table[level]["floor_us"])
    return {
        "kernel": args.kernel, **p.cell._asdict(), "grid": list(seen.launch.grid), "options": seen.launch.options,
        "events": events, "ncu": moved, "levels": table, "bound": bound,
        "percent_of_floor": 100 * table[bound]["floor_us"] / time_us, "peaks": rates,
    }  # fmt: skip


def sys_arguments(args: argparse.Namespace) -> list[str]:
    """The arguments that say which launch."""
    words = ["--kernel", args.kernel, "--shape", args.shape, "--tokens", str(args.tokens), "--dtype", args.dtype]
    return words + ["--training"] * args.training


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
    from benchmarks.gpu_checks import Cell, Problem, verify
    from benchmarks.ncu import WARM_UPS
    from kmeans_route.bench.clock import Clock
    from kmeans_route.testing import MODEL_SHAPES

    if args.shape not in MODEL_SHAPES or args.tokens < 1:
        print(f"--shape must be among {', '.join(MODEL_SHAPES)} and --tokens at least 1", file=sys.stderr)
        return 2
    shape = Cell(args.shape, args.tokens, *MODEL_SHAPES[args.shape], args.dtype)
    width = 64 if args.kernel == "route_split" else 32  # one tile of columns cannot be split
    cell = Cell("tiny", 32, width, 8, 2, "float32") if args.dry else shape
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
            record = measured(args, p, find(args.kernel, p, training=args.training), clock)
        except LookupError as error:
            print(error.args[0], file=sys.stderr)
            return 1
    print(json.dumps(record) if args.json else text_of(record))
    if args.dry:
        print("a dry run: its times are those of an interpreter and mean nothing", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
