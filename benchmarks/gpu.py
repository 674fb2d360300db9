"""One command on a machine with a GPU: its tests, then every cell checked and timed, a JSON line for each.

    python -m benchmarks.gpu [--out DIR] [--seconds 420] [--full] [--json] [--no-tests] [--shape OLMoE ...]
    python -m benchmarks.gpu --dry        # the same path on a CPU, in Triton's interpreter, at one tiny shape

It needs the repository, torch and Triton. Exit code: 0; 1 where a result was wrong or a test failed; 2 where it
cannot start: no GPU, no Triton, an unknown shape.

GB/s divides the bytes that the part cannot do without (the byte floor) by the median. A part has three floors, each in
microseconds: HBM bytes over the copy rate, L2 bytes over the rate of a copy that stays in L2, and FLOPs over the bf16
matrix rate, all three rates measured in the same run; the largest is named. The HBM floor, unlike GB/s, also has what
a cold L2 adds: the directions, and the partial centroid sums. Every time includes what the graph of one tiny kernel
takes, which is measured too.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_sanitize import sanitize
from benchmarks.gpu_table import Record, cell_table, readme_table

# torch, Triton and kmeans_route are imported later: Triton's interpreter is chosen as the kernels are imported.

ROOT = Path(__file__).resolve().parent.parent
TEST_SECONDS = 120
FULL_SANITIZE_SECONDS = 600
GRACE_SECONDS = 30  # for the cell that runs as --seconds end: no contestant of it starts after that
FIRST_SHAPES, FIRST_TOKENS = ("OLMoE", "DeepSeek-V3"), (1, 4096, 65536)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the result file (benchmarks/results; dry: build/gpu-dry)")
    parser.add_argument("--seconds", type=float, default=420, help="start no cell after this long (420)")
    parser.add_argument("--full", action="store_true", help="ignore --seconds")
    parser.add_argument("--json", action="store_true", help="print the JSON lines instead of the table")
    parser.add_argument("--no-tests", action="store_true", help="leave GPU tests and sanitizer out")
    parser.add_argument("--dry", action="store_true", help="on the CPU, at one tiny shape; its times mean nothing")
    parser.add_argument("--shape", nargs="+", metavar="NAME", help="only these shapes")
    return parser.parse_args(argv)


def ordered_cells(
    shapes: dict[str, Any], token_counts: tuple[int, ...], only: list[str] | None
) -> list[tuple[str, int]]:
    """(shape, T): what decides first, then the other T of those shapes, then the other shapes."""
    unknown = set(only or ()) - set(shapes)
    if unknown:
        raise ValueError(f"--shape must be among {', '.join(shapes)}, got {', '.join(sorted(unknown))}")

    def rank(cell: tuple[str, int]) -> tuple[bool, bool]:
        return cell[0] not in FIRST_SHAPES, cell[0] in FIRST_SHAPES and cell[1] not in FIRST_TOKENS

    names = sorted(only or shapes, key=lambda name: name not in FIRST_SHAPES)
    return sorted(((name, tokens) for name in names for tokens in token_counts), key=rank)


def output_of(*command: str) -> str | None:
    """First line that a command prints, or None where it cannot be run or fails."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip().splitlines()[0] if run.stdout.strip() else None


def header(args: argparse.Namespace, device: Any) -> Record:
    """Device, driver, versions, date, command, commit: without paths of the machine."""
    import torch
    import triton

    import kmeans_route
    from kmeans_route.bench.results import processor_name

    gpu, commit = device.type == "cuda", output_of("git", "rev-parse", "HEAD")
    changes = output_of("git", "status", "--porcelain", "--untracked-files=no")
    shown = [f"--{name}" for name in ("full", "json", "no-tests", "dry") if getattr(args, name.replace("-", "_"))]
    shown += [f"--seconds {args.seconds:g}"] + (["--shape", *args.shape] if args.shape else [])
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None
    return {
        "kind": "header",
        "device": torch.cuda.get_device_name(device) if gpu else f"dry run on {processor_name()}",
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if gpu else None,
        "driver": driver,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "kmeans_route": kmeans_route.__version__,
        "commit": commit,
        "uncommitted_changes": None if commit is None else changes is not None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.gpu", *shown]),
    }


def run_tests(args: argparse.Namespace) -> Record:
    """Outcome of the GPU tests: "passed", "failed", or in words why they tell nothing."""
    record: Record = {"kind": "tests"}
    if args.no_tests or args.dry:
        return record | {"outcome": "not run", "detail": "--no-tests" if args.no_tests else "--dry"}
    if importlib.util.find_spec("pytest") is None:
        return record | {"outcome": "not run", "detail": "pytest is not installed"}
    import kmeans_route
    from kmeans_route.bench.clock import without_paths

    # The package as it was imported here comes before the repository, whose kmeans_route/ has no kernels, and the
    # project's own pythonpath setting would turn that around.
    paths = dict.fromkeys([str(Path(kmeans_route.__file__).resolve().parent.parent), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    environment["KMEANS_ROUTE_GPU_TESTS"] = "1"  # see tests/conftest.py
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "tests",
        "-q",
        "-o",
        "pythonpath=",
        "-p",
        "no:cacheprovider",
    ]
    try:
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TEST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return record | {"outcome": "not finished", "detail": f"stopped after {TEST_SECONDS} s"}
    lines = [line for line in without_paths(run.stdout + run.stderr).splitlines() if line.strip()]
    known = {0: "passed", 1: "failed", 5: "no GPU tests found"}
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return record | {
        "outcome": known.get(run.returncode, f"could not run, pytest's exit code {run.returncode}"),
        "detail": lines[-1] if lines else "",
        "failed": failed[:50],
    }


def work(part: str, r: Record, size: int) -> dict[str, float]:
    """What a part of the cell `r` moves and computes: bytes (the byte floor), hbm, l2 (bytes), flop.

    size: bytes an element of the hidden states. Each block of `block_tokens` tokens reads all directions from L2. The
    centroid sums of 16-bit hidden states take two products, one a half of the unit vectors' mantissa.
    """
    num_tokens, num_experts, top_k = r["num_tokens"], r["num_experts"], r["top_k"]
    x, table = num_tokens * r["hidden_size"] * size, num_experts * r["hidden_size"]
    d, product = table * size, 2 * num_tokens * r["hidden_size"] * num_experts
    again = -(-num_tokens // r["block_tokens"]) * d
    if part in ("forward_backward", "step"):
        parts = ["forward", "backward"] + ["commit"] * (part == "step")
        works = [work(each, r, size) for each in parts]
        return {key: sum(each[key] for each in works) for key in works[0]}
    bytes_, more, l2, flop = {
        "eval": (x, d, again, product),
        "assignment": (x, d, again, product),
        "forward": (
            (2 + top_k) * x,
            2 * d + 4 * table + 8 * r["splits"] * table,
            again,
            product * (3 if size == 2 else 2),
        ),
        "backward": ((2 + top_k) * x, d, top_k * x, 4 * top_k * num_tokens * r["hidden_size"]),
        "combine": ((1 + top_k) * x, 0, 0, 2 * top_k * num_tokens * r["hidden_size"]),
        "combine_backward": ((1 + 2 * top_k) * x, 0, 0, 3 * top_k * num_tokens * r["hidden_size"]),
        "commit": (20 * table, 0, 0, 0),
    }[part]
    return {"bytes": bytes_, "hbm": bytes_ + more, "l2": bytes_ + more + l2, "flop": flop}


def weigh(r: Record, peaks: Record, size: int) -> None:
    """Add to each part its floors in microseconds, and to each timing GB/s and percentages, in place."""
    rates = {"hbm": "copy_bytes_per_s", "l2": "l2_bytes_per_s", "flop": "bf16_flop_per_s"}
    r["floors"] = {}
    for part, contestants in r.get("parts", {}).items():
        w = work(part, r, size)
        floors = {name: 1e6 * w[name] / peaks[rate] for name, rate in rates.items()}
        largest = max(floors, key=lambda name: floors[name])
        r["floors"][part] = {"bytes": w["bytes"], **{f"{name}_us": floors[name] for name in floors}, "largest": largest}
        for timing in contestants.values():
            if "median_us" in timing:
                rate = 1e6 * w["bytes"] / timing["median_us"]
                timing["gb_per_s"] = rate / 1e9
                timing["percent_of_copy"] = 100 * rate / peaks["copy_bytes_per_s"]
                timing["percent_of_floor"] = 100 * floors[largest] / timing["median_us"]


class Report:
    """The result file and the screen: every record goes to both as it is made."""

    def __init__(self, folder: Path, device: str, *, as_json: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        stem, number = f"{slug}-{datetime.date.today().isoformat()}", 1
        while (path := folder / f"{stem}{'' if number == 1 else f'-{number}'}.jsonl").exists():
            number += 1
        self.path, self.as_json = path, as_json
        self.records: list[Record] = []

    def add(self, record: Record, text: str) -> None:
        """Append a line and show it."""
        self.records.append(record)
        line = json.dumps(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line if self.as_json else text, file=sys.stdout, flush=True)


def planned_cells(args: argparse.Namespace) -> list[Any]:
    """The cells of this run, as gpu_checks.Cell."""
    from benchmarks.gpu_checks import Cell
    from kmeans_route.testing import MODEL_SHAPES, TOKEN_COUNTS

    if args.dry:
        return [Cell("tiny", 32, 64, 8, 2, "float32")]
    order = ordered_cells(MODEL_SHAPES, TOKEN_COUNTS, args.shape)
    return [Cell(name, tokens, *MODEL_SHAPES[name]) for name, tokens in order]


def name_of(cell: Any) -> str:
    """Shape and T."""
    return f"{cell.shape} T={cell.num_tokens}"


def measure(
    args: argparse.Namespace, cells: list[Any], device: Any, report: Report, start: float
) -> tuple[bool, list[str]]:
    """All cells in order. Whether all that ran were right, and the names of those left."""
    import torch

    from benchmarks import gpu_cells, gpu_peaks
    from kmeans_route.bench.clock import Clock, reason

    clock = Clock(device)
    compiler = gpu_cells.Compiler("eager" if args.dry else "inductor")
    peaks = {"kind": "peaks", **gpu_peaks.peaks(clock)}
    rates = ", ".join(f"{name} {value:.3g}" for name, value in peaks.items() if name != "kind")
    report.add(peaks, f"measured: {rates}; torch.compile backend {compiler.backend}")
    all_right, unfinished = True, []

    def late(grace: float) -> bool:
        return not args.full and time.perf_counter() - start > args.seconds + grace

    for number, cell in enumerate(cells):
        if late(0.0):
            return all_right, unfinished + [name_of(each) for each in cells[number:]]
        began = time.perf_counter()
        try:
            record = gpu_cells.run_cell(cell, clock, compiler, lambda: late(GRACE_SECONDS))
            weigh(record, peaks, getattr(torch, cell.dtype).itemsize)
        except torch.OutOfMemoryError as error:
            record = {"kind": "cell", **cell._asdict(), "skipped": reason(error)}
        except Exception as error:
            record = {"kind": "cell", **cell._asdict(), "correct": False, "error": reason(error)}
        record["seconds"] = round(time.perf_counter() - began, 1)
        report.add(record, cell_table(record))
        all_right &= record.get("correct", True)
        skipped = [t.get("skipped") for part in record.get("parts", {}).values() for t in part.values()]
        if gpu_cells.NO_TIME in skipped:
            unfinished.append(f"{name_of(cell)} (partly)")
        try:
            clock.wait()
        except Exception:  # the device does not survive every error
            return False, unfinished + [name_of(each) for each in cells[number + 1 :]]
    return all_right, unfinished


def main(argv: list[str] | None = None) -> int:
    """The whole run; returns the exit code."""
    start, args = time.perf_counter(), arguments(argv)
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    import torch

    if not args.dry and not torch.cuda.is_available():
        print("no CUDA or ROCm device that torch can use: --dry runs without one", file=sys.stderr)
        return 2
    try:
        cells = planned_cells(args)
    except (ImportError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    device = torch.device("cpu") if args.dry else torch.device("cuda", torch.cuda.current_device())
    first = header(args, device)
    folder = args.out or ROOT / ("build/gpu-dry" if args.dry else "benchmarks/results")
    report = Report(folder, first["device"], as_json=args.json)
    report.add(first, "\n".join(f"{name}: {value}" for name, value in first.items() if name != "kind"))
    tests = run_tests(args)
    report.add(tests, f"GPU tests: {tests['outcome']} ({tests['detail']})")
    all_right, left = measure(args, cells, device, report, start)
    if not args.dry and not args.no_tests:
        found = sanitize(FULL_SANITIZE_SECONDS if args.full else args.seconds - (time.perf_counter() - start))
        report.add(found, "\n".join(f"{tool}: {said}" for tool, said in found.items() if tool != "kind"))
        all_right &= not any(said.startswith("FOUND") for said in found.values())
    code = 0 if all_right and tests["outcome"] != "failed" else 1
    seconds = round(time.perf_counter() - start)
    end = {"kind": "end", "seconds": seconds, "left": left, "exit_code": code}
    if args.dry:
        print("a dry run: its times are those of an interpreter and mean nothing", file=sys.stderr)
    text = f"left after {seconds} s: {', '.join(left)}" if left else f"all cells done in {seconds} s"
    markdown = readme_table([*report.records, end])
    report.path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    report.add(end, f"\n{markdown}\n{text}\nwritten to {report.path} and, for the README, {report.path.stem}.md")
    return code


if __name__ == "__main__":
    sys.exit(main())
