"""The study's tables and pictures from its result file: `python -m benchmarks.quality.analysis`.

Means over seeds with the sample standard deviation. A difference of two means counts as resolved where it is more than
twice the standard error of the difference.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.studies import STUDIES
from benchmarks.quality.sweep import ROOT, Record, read_results

COLUMNS = {
    "bits_per_byte": ("bits per byte", 3),
    "max_vio_validation": ("MaxVio, validation", 3),
    "max_vio_train": ("MaxVio, training", 3),
    "dead_experts": ("dead", 1),
    "coupling": ("coupling", 2),
    "direction_cosine": ("cosine of directions", 2),
}
LEARNED = ("softmax", "sigmoid")


def value(record: Record, key: str) -> float:
    """A column's figure of one run."""
    if key == "direction_cosine":
        return statistics.fmean(record["layers"]["direction_cosine"])
    measured = record["measures"][key]
    return math.nan if measured is None else float(measured)


def groups(records: Sequence[Record]) -> dict[tuple[str, int], dict[str, list[Record]]]:
    """(size, steps) -> contestant -> its runs, in the order of the studies."""
    order = [name for study in STUDIES.values() for name in study]
    found: dict[tuple[str, int], dict[str, list[Record]]] = {}
    for record in sorted(records, key=lambda r: (r["size"], r["config"]["steps"], order.index(r["contestant"]))):
        of_size = found.setdefault((record["size"], record["config"]["steps"]), {})
        of_size.setdefault(record["contestant"], []).append(record)
    return found


def cell(values: Sequence[float], digits: int) -> str:
    """mean ± standard deviation."""
    mean = statistics.fmean(values)
    if not math.isfinite(mean):
        return "n/a"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def table(contestants: dict[str, list[Record]]) -> str:
    """One size in Markdown."""
    head = ["contestant", *(label for label, _ in COLUMNS.values()), "seeds"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for name, runs in contestants.items():
        cells = [cell([value(run, key) for run in runs], digits) for key, (_, digits) in COLUMNS.items()]
        lines.append("| " + " | ".join([name, *cells, str(len(runs))]) + " |")
    return "\n".join(lines)


def verdict(contestants: dict[str, list[Record]]) -> list[str]:
    """The two questions of the study, for one size: the best K-Means router against the best learned one."""
    bits = {name: [value(run, "bits_per_byte") for run in runs] for name, runs in contestants.items()}
    ours = {name: v for name, v in bits.items() if name.startswith("K-Means")}
    theirs = {name: v for name, v in bits.items() if name.startswith(LEARNED)}
    if not ours or not theirs:
        return []
    best, rival = (min(group, key=lambda name: statistics.fmean(group[name])) for group in (ours, theirs))
    gap = statistics.fmean(ours[best]) - statistics.fmean(theirs[rival])
    lines = [f"bits per byte: {best} {gap:+.3f} against {rival}; {resolved(ours[best], theirs[rival])}"]
    calm = {
        name: statistics.fmean(value(run, "max_vio_validation") for run in runs) for name, runs in contestants.items()
    }
    least, next_ = (min(group, key=lambda name: calm[name]) for group in (ours, theirs))
    lines.append(
        f"validation MaxVio: {least} {calm[least]:.3f}, {calm[next_] / calm[least]:.1f} times less than {next_} "
        f"({calm[next_]:.3f})"
    )
    return lines


def resolved(one: Sequence[float], other: Sequence[float]) -> str:
    """In words, whether two means differ by more than twice the standard error of their difference."""
    if min(len(one), len(other)) < 2:
        return "one seed decides nothing"
    error = math.sqrt(statistics.variance(one) / len(one) + statistics.variance(other) / len(other))
    difference = abs(statistics.fmean(one) - statistics.fmean(other))
    return f"{'resolved' if difference > 2 * error else 'not resolved'}, standard error {error:.3f}"


def draw(size: str, contestants: dict[str, list[Record]], path: Path) -> None:
    """Validation curves, and bits per byte against MaxVio, one point a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves, plane = figure.subplots(1, 2)
    styles = ["-", "--", ":", "-."]
    for number, (name, runs) in enumerate(contestants.items()):
        style: dict[str, Any] = {"color": f"C{number % 10}", "label": name}
        steps = [step for step, _ in runs[0]["validation"]]
        means = [statistics.fmean(run["validation"][i][1] for run in runs) for i in range(len(steps))]
        curves.plot(steps, means, styles[number // 10], **style)
        points = [(value(run, "max_vio_validation"), value(run, "bits_per_byte")) for run in runs]
        plane.scatter(*zip(*points, strict=True), marker="osD^"[number // 10], **style)
    curves.set(xlabel="optimizer step", ylabel="validation bits per byte", title=f"{size}: mean over seeds")
    plane.set(xlabel="validation MaxVio (0: even)", ylabel="validation bits per byte", title="last step, each seed")
    plane.set_xscale("log")
    for axes in (curves, plane):
        axes.grid(alpha=0.3)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def report(records: Sequence[Record]) -> str:
    """All tables with their verdicts, in Markdown."""
    parts = []
    for (size, steps), contestants in groups(records).items():
        lines = [f"### {size}, {steps} steps", "", table(contestants), ""]
        parts.append("\n".join([*lines, *(f"- {line}" for line in verdict(contestants))]))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Print the tables, draw the pictures. Exit code: 0; 1 where there is nothing to show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.analysis", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "quality.jsonl")
    parser.add_argument("--out", type=Path, help="folder of the pictures (beside the results)")
    parser.add_argument("--json", action="store_true", help="means and deviations as JSON")
    args = parser.parse_args(argv)
    records = read_results(args.results)
    if not records:
        print(f"{args.results} holds no runs: python -m benchmarks.quality.sweep makes them", file=sys.stderr)
        return 1
    if args.json:
        document = {
            f"{size}, {steps} steps": {
                name: {key: [value(run, key) for run in runs] for key in COLUMNS} for name, runs in contestants.items()
            }
            for (size, steps), contestants in groups(records).items()
        }
        print(json.dumps(document, indent=2))
        return 0
    print(report(records))
    folder = args.out or args.results.parent
    folder.mkdir(parents=True, exist_ok=True)
    for (size, steps), contestants in groups(records).items():
        path = folder / f"quality-{size}-{steps}.png"
        draw(f"{size}, {steps} steps", contestants, path)
        print(f"\npicture: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
