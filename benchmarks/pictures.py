"""Every picture of the measurements, drawn from the result files and nothing else.

    python -m benchmarks.pictures [--results benchmarks/results] [--out benchmarks/results]

What pages show: a roofline from the newest GPU run; times predicted from compiled code; bars of a training step and of
a layer's step from the newest CPU run; scaling from those of its suite. What no file holds is named and left out.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import pictures
from benchmarks.harness.pictures import Bars, Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = {
    "eval": "eval routing",
    "forward": "training forward",
    "backward": "fused backward",
    "combine": "combine",
    "combine_backward": "combine backward",
    "commit": "commit",
}
STEPS = {
    "routing, eval": ("eval",),
    "training forward": ("forward", "combine"),
    "training backward": ("combine_bwd", "backward"),
}
DECODE_T = 512
BARS = ("training step", "MoE layer step")
PANELS = 3  # contests in a picture of bars, the first of their file
LETTERS = {"num_tokens": "T", "hidden_size": "D", "num_experts": "E", "top_k": "K"}
Record = dict[str, Any]


def gpu_runs(folder: Path) -> list[list[Record]]:
    """The GPU runs that have timings, the newest last; dry runs do not count."""
    runs = []
    for path in folder.glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        head = next((line for line in lines if line.get("kind") == "header"), None)
        timed = any(line.get("parts") and line.get("correct", True) for line in lines)
        if head and timed and not head["device"].startswith("dry run"):
            runs.append((head["date"], path.name, lines))
    return [lines for *_, lines in sorted(runs, key=lambda run: run[:2])]


def measured_points(run: list[Record], *, decode: bool) -> list[Point]:
    """What this package reached: of each shape the largest T, or the largest T of decoding."""
    peaks = next(line for line in run if line["kind"] == "peaks")
    right = [line for line in run if line["kind"] == "cell" and line.get("parts") and line.get("correct", True)]
    last = {(cell["shape"], cell["num_tokens"]): cell for cell in right}
    cells = [cell for cell in last.values() if (cell["num_tokens"] <= DECODE_T) == decode]
    points = []
    for cell in cells:
        if any(c["shape"] == cell["shape"] and c["num_tokens"] > cell["num_tokens"] for c in cells):
            continue
        for part, name in PARTS.items():
            time_us = cell["parts"].get(part, {}).get(pictures.OURS, {}).get("median_us")
            floors = cell["floors"].get(part)
            if time_us is not None and floors is not None:
                num_bytes = 1e-6 * floors["hbm_us"] * peaks["copy_bytes_per_s"]
                flop = 1e-6 * floors["flop_us"] * peaks["bf16_flop_per_s"]
                points.append(Point(name, f"{cell['shape']}, T={cell['num_tokens']}", num_bytes, flop, time_us))
    return points


def rooflines(folder: Path) -> Iterator[tuple[str, "Figure"]]:
    """Of the newest GPU run."""
    runs = gpu_runs(folder)
    if runs:
        run = runs[-1]
        head = next(line for line in run if line["kind"] == "header")
        peaks = next(line for line in run if line["kind"] == "peaks")
        for name, decode in (("roofline", False), ("roofline-decode", True)):
            points = measured_points(run, decode=decode)
            if points:
                yield name, pictures.roofline(
                    points, peaks["copy_bytes_per_s"], peaks["bf16_flop_per_s"],
                    title=f"Measured on {head['device']}, {head['date'][:10]}",
                    dot="bytes that must move / median time",
                    roof="rates of a copy and of a bf16 product in the same run",
                )  # fmt: skip


def predictions(folder: Path) -> Iterator[tuple[str, "Figure"]]:
    """Of the newest file of `benchmarks.predict`: what runs together is added up."""
    files = sorted(folder.glob("predict-h200-*.json"))
    if not files:
        return
    table = json.loads(files[-1].read_text(encoding="utf-8"))
    panels: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for shape in dict.fromkeys(row["shape"] for row in table["rows"]):
        for name, parts in STEPS.items():
            rows = [row for row in table["rows"] if row["shape"] == shape and row["part"] in parts]
            for num_tokens in sorted({row["num_tokens"] for row in rows}):
                of_step = [row for row in rows if row["num_tokens"] == num_tokens]
                time_us, floor_us = (sum(row[key] for row in of_step) for key in ("time_us", "floor_us"))
                panels.setdefault(shape, {}).setdefault(name, []).append((num_tokens, time_us, floor_us))
    title = f"Predicted from compiled code, not measured: {table['device']['name']}, Triton {table['triton']}"
    yield "predicted", pictures.predictions(panels, title=f"{title}\nfloor: HBM bytes or FLOP, whichever takes longer")


def results_of(folder: Path, pattern: str) -> list[Record]:
    """Result files by their date, the newest last."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))]
    kept = [file for file in files if isinstance(file, dict) and "environment" in file and "results" in file]
    return sorted(kept, key=lambda file: file["environment"]["date"])


def contests(files: list[Record]) -> dict[str, tuple[Record, list[Bars]]]:
    """Kind of contest -> the environment of its newest file, and its contests there."""
    found: dict[str, tuple[Record, list[Bars]]] = {}
    for file in files:
        kinds: dict[str, list[Bars]] = {}
        for record in file["results"]:
            if "contestants" not in record or "title" not in record or "growth" in record:
                continue
            kind, _, rest = record["title"].partition(", ")
            times = {
                name: (timing["median_ms"], timing["q1_ms"], timing["q3_ms"])
                for name, timing in record["contestants"].items()
                if "median_ms" in timing
            }
            if times:
                kinds.setdefault(kind, []).append(Bars(_shape_label(record.get("shape"), rest), times))
        found |= {kind: (file["environment"], bars) for kind, bars in kinds.items()}
    return found


def _shape_label(shape: Any, rest: str) -> str:
    if not isinstance(shape, dict):
        return rest
    return "  ".join(f"{LETTERS.get(name, name)}={value}" for name, value in shape.items())


def bars(folder: Path) -> Iterator[tuple[str, "Figure"]]:
    """A picture for each of these kinds of contest on a CPU."""
    found = contests(results_of(folder, "cpu-*.json"))
    for kind in (kind for kind in BARS if kind in found):
        where, panels = found[kind]
        note = f"{where['device']}, {where['num_threads']} threads, {where['date'][:10]}"
        name = kind.lower().replace(" ", "-")
        yield f"bars-{name}", pictures.contest_bars(panels[:PANELS], title=kind.capitalize(), note=note)


def growths(results: list[Record]) -> list[Record]:
    """The records of the scaling suite, those of one axis together, as `pictures.scaling` takes them."""
    found: dict[str, Record] = {}
    for record in results:
        growth = record.get("growth")
        if not growth:
            continue
        axis, name = growth["axis"], record["title"].partition(" over ")[0]
        fixed = {LETTERS[key]: value for key, value in record["base"].items() if key != axis}
        one = found.setdefault(
            axis, {"axis": LETTERS[axis], "values": growth["sizes"], "median_ms": {}, "exponent": {}, "fixed": fixed}
        )
        one["median_ms"][name] = growth["median_ms"]
        one["exponent"][name] = growth["time"]["exponent"]
    return list(found.values())


def scalings(folder: Path) -> Iterator[tuple[str, "Figure"]]:
    """Of the newest file that has such records."""
    for file in reversed(results_of(folder, "*.json")):
        records = growths(file["results"])
        if records:
            where = file["environment"]
            title = f"Scaling on {where['device']}, {where['num_threads']} threads, {where['date'][:10]}"
            yield "scaling", pictures.scaling(records, title=title)
            return


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 when there is nothing at all to draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--out", type=Path, default=None, help="folder of the pictures (that of the results)")
    args = parser.parse_args(argv)
    out = args.out or args.results
    out.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for what, draw in (
        ("roofline", rooflines), ("predictions", predictions), ("bars", bars), ("scaling", scalings),
    ):  # fmt: skip
        figures = list(draw(args.results))
        if not figures:
            print(f"{what}: no result file has the data, left out")
        for name, figure in figures:
            path = out / f"{name}.png"
            figure.savefig(path, dpi=110, metadata={"Software": None})
            print(f"{what}: {path.name}")
        drawn += len(figures)
    return int(drawn == 0)


if __name__ == "__main__":
    sys.exit(main())
