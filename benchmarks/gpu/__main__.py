"""One command on a machine with a GPU: a plan of ten minutes, a JSON line for all that it finds.

    python -m benchmarks.gpu [--out DIR] [--from STEP] [--full] [--wheels DIR]
    python -m benchmarks.gpu --dry        # the same steps on a CPU, in Triton's interpreter, at tiny shapes

It needs the repository, torch and Triton, and no network. The steps and their ends stand in `steps.py`, the cells in
`cells.py`. Exit code: 0; 1 where something is wrong; 2 where it cannot start: no GPU, no torch, no Triton; 3 where
nothing is wrong and something is left, which is listed: `--from STEP` goes on there.
"""

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import ENDS, LIMIT_S, NO_START

# torch, Triton and kmeans_route are imported later: Triton's interpreter is chosen as the kernels are imported. The
# processes that compile import this file too.

STEPS = tuple(ENDS)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the result files (benchmarks/results; dry: build/gpu-dry)")
    parser.add_argument("--from", dest="first", choices=[*STEPS[1:], "full"], metavar="STEP", help=(
        f"go on with this step ({', '.join(STEPS[1:])}, full) and those after it; in the newest run of this commit and "
        "device that the folder has, only with what that left"
    ))  # fmt: skip
    parser.add_argument("--full", action="store_true", help="no time limit; then compiled and learned routers, every T")
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny shapes; its times mean nothing")
    parser.add_argument(
        "--clock-speed", type=float, default=1.0, metavar="N", help="the plan's seconds pass N times as fast"
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help=(
        "time other packages' kernels too; those that are not installed come from the wheels of this folder"
    ))  # fmt: skip
    parser.add_argument("--since", type=float, help="when the ten minutes began, in seconds since 1970 (now)")
    return parser.parse_args(argv)


def cannot_start(args: argparse.Namespace) -> str:
    """Why not, in one sentence; empty if it can."""
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"{' and '.join(missing)} cannot be imported by {Path(sys.executable).name}: choose another with PYTHON=..."
        )
    if args.wheels and not any(args.wheels.glob("*.whl")):
        return f"--wheels {args.wheels} has no wheels: `make gpu-wheels` fetches them where there is a network."
    import torch

    if args.dry or torch.cuda.is_available():
        return ""
    return "There is no CUDA or ROCm device that torch can use; --dry runs without one."


def command(args: argparse.Namespace) -> str:
    """The command line without paths of the machine."""
    flags = [f"--{name}" for name in ("full", "dry") if getattr(args, name)]
    speed = [f"--clock-speed {args.clock_speed:g}"] if args.clock_speed != 1 else []
    given = [f"--from {args.first}"] * bool(args.first) + ["--wheels DIR"] * bool(args.wheels)
    return " ".join(["python -m benchmarks.gpu", *given, *flags, *speed])


def main(argv: list[str] | None = None) -> int:
    """The whole run; returns the exit code."""
    args = arguments(argv)
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    why = cannot_start(args)
    if why:
        print(why, file=sys.stderr)
        return NO_START
    with ExitStack() as stack:
        return run(args, stack)


def device_for(args: argparse.Namespace) -> Any:
    """The CPU, or the current GPU."""
    import torch

    return torch.device("cpu") if args.dry else torch.device("cuda", torch.cuda.current_device())


def run(args: argparse.Namespace, stack: ExitStack) -> int:
    """What follows the decision between compiler and interpreter."""
    from benchmarks.gpu.launches import watched
    from benchmarks.gpu.peers import unpack
    from benchmarks.gpu.plan import Plan, Timer
    from benchmarks.gpu.report import ROOT, Report, header
    from benchmarks.gpu.steps import Session, steps
    from kmeans_route.bench.clock import Clock

    full, names, ends = args.full or args.first == "full", [*STEPS, "full"], dict(ENDS)
    timer = Timer(args.since, speed=args.clock_speed)
    if args.first:  # as if the time of the steps before it had passed, but for that of compiling
        place = names.index(args.first)
        names, ends["compile"] = ["compile", *names[place:]], ENDS[STEPS[place - 1]]
        timer.start -= (ends["compile"] - ENDS["compile"]) / timer.speed
    names, ends = (names, {}) if full else (names[:-1], ends)
    device = device_for(args)
    folder = args.out or ROOT / ("build/gpu-dry" if args.dry else "benchmarks/results")
    report = Report(folder, header(command(args), device), go_on=bool(args.first))
    if args.wheels:
        unpack(args.wheels, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    session = Session(Clock(device), names, dry=args.dry, peers=args.dry or bool(args.wheels))
    session.start_compiling(stack.enter_context(tempfile.TemporaryDirectory()) if args.dry else "")
    stack.callback(session.ahead.stop)
    plan = Plan(steps(session, ends), timer, report, session.clock.wait)
    stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.default_int_handler))
    watchdog = None if full or args.dry else plan.stop_at(LIMIT_S)
    watching: Any = watched(session.note) if args.dry else nullcontext()
    try:
        with session.clock.scope(), watching:
            plan.run(session.begin)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    if watchdog is not None:
        watchdog.cancel()
    late = session.late_record()
    report.add(late, late["text"])
    if session.unplanned:
        plan.wrong.append("launches that nobody had planned")
    if args.dry:
        print("a dry run: its times are those of an interpreter and mean nothing", file=sys.stderr)
    return plan.finish()


if __name__ == "__main__":
    sys.exit(main())
