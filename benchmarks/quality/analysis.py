"""The study's tables and pictures from its result file: `python -m benchmarks.quality.analysis`.

Means over seeds with the sample standard deviation; `tables.py` says how two contestants are compared.
"""

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import final
from benchmarks.quality.studies import CENTROIDS, CHANGED_BY, CHANGES, FINAL, MAIN_SEEDS, OFFSET, SIZES, STUDIES
from benchmarks.quality.sweep import ROOT, Record, read_results
from benchmarks.quality.tables import (
    Column,
    Difference,
    Group,
    Measure,
    at_the_end,
    bits,
    cell,
    difference,
    markdown,
    max_vio,
    max_vio_trained,
    mean_text,
    measure,
    paired,
    values,
)

RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"
README, SUMMARY, APPENDIX = ROOT / "README.md", ROOT / "docs" / "quality.md", ROOT / "docs" / "quality-appendix.md"
BEGIN, END = "<!-- make quality -->", "<!-- end of make quality -->"
LEARNED = ("softmax", "sigmoid")
GOALS = "The two goals (95% over equal seeds, bold: resolved; MaxVio: means over the seeds, to be 2 or more):"
TABLE: tuple[Column, ...] = (
    ("bits per byte", 3, bits),
    ("MaxVio, held-out text", 3, max_vio),
    ("MaxVio, training text", 3, max_vio_trained),
    ("MaxVio, training batches", 3, measure("max_vio_train")),
    ("load std", 4, measure("load_std")),
    ("dead", 1, measure("dead_experts")),
)
GEOMETRY: tuple[Column, ...] = (
    ("cosine of directions", 3, at_the_end("cosine")),
    ("score and output norm", 2, at_the_end("coupling")),
    ("score and inner activation", 2, at_the_end("coupling_neurons")),
    ("alignment, own expert", 3, at_the_end("matched")),
    ("others", 3, at_the_end("unmatched")),
    ("churn", 3, at_the_end("churn")),
    ("effective experts", 1, at_the_end("effective_experts")),
)


def groups(records: Sequence[Record], studies: Sequence[str]) -> dict[tuple[str, int], Group]:
    """(size, steps) -> contestant -> its runs by seed, sizes and contestants in the order of the studies.

    Of the main study's contestants those with its own seeds.
    """
    order, sizes = [name for study in studies for name in STUDIES[study]], list(SIZES)
    found: dict[tuple[str, int], Group] = {}
    chosen = [
        record
        for record in records
        if record["contestant"] in order
        and (record["contestant"] not in STUDIES["main"] or record["config"]["seed"] < MAIN_SEEDS)
    ]
    for record in sorted(
        chosen,
        key=lambda r: (sizes.index(r["size"]), r["config"]["steps"], order.index(r["contestant"]), r["config"]["seed"]),
    ):
        of_size = found.setdefault((record["size"], record["config"]["steps"]), {})
        of_size.setdefault(record["contestant"], []).append(record)
    return found


def usual_length(records: Sequence[Record]) -> list[Record]:
    """Without the runs that are longer or shorter than most of the main study's at their size."""
    lengths: dict[str, Counter[int]] = {}
    for (size, steps), contestants in groups(records, ["main"]).items():
        lengths.setdefault(size, Counter())[steps] += sum(map(len, contestants.values()))
    usual = {size: count.most_common(1)[0][0] for size, count in lengths.items()}
    return [record for record in records if record["config"]["steps"] == usual.get(record["size"])]


def table(contestants: Group, columns: Sequence[Column]) -> str:
    """One size."""
    head = ["router", *(label for label, _, _ in columns), "seeds"]
    rows = [
        [name, *(cell(values(runs, get), digits) for _, digits, get in columns), str(len(runs))]
        for name, runs in contestants.items()
    ]
    return markdown(head, rows)


def summary(records: Sequence[Record]) -> str:
    """All contestants: for each size bits per byte; MaxVio on held-out / training text; how many seeds, where not as
    many as most have."""
    found = with_seeds(records)
    usual = Counter(len(runs) for contestants in found.values() for runs in contestants.values()).most_common(1)[0][0]
    rows = [
        [name, *(_brief(contestants.get(name, []), usual) for contestants in found.values())]
        for name in STUDIES["main"]
    ]  # fmt: skip
    return markdown([f"router ({_seeds(usual)})", *(f"{size}, {steps} steps" for size, steps in found)], rows)


def with_seeds(records: Sequence[Record]) -> dict[tuple[str, int], Group]:
    """The main study at its usual length, without the sizes of which nothing has a second seed, unless all are so."""
    found = groups(usual_length(records), ["main"])
    return _repeated(found) or found


def _repeated(found: dict[tuple[str, int], Group]) -> dict[tuple[str, int], Group]:
    return {where: contestants for where, contestants in found.items() if max(map(len, contestants.values())) > 1}


def _brief(runs: Sequence[Record], usual: int) -> str:
    if not runs:
        return "not run"
    held_out, trained = (mean_text(values(runs, get), 2) for get in (max_vio, max_vio_trained))
    text = f"{cell(values(runs, bits), 3)}; {held_out} / {trained}"
    return text if len(runs) == usual else f"{text} ({_seeds(len(runs))})"


def _seeds(count: int) -> str:
    return f"{count} seeds" if count > 1 else "1 seed"


def best(contestants: Group, kinds: str | tuple[str, ...], get: Measure) -> str | None:
    """The contestant of these kinds with the least mean, among those with the most seeds; None where none has run."""
    most = max(len(runs) for runs in contestants.values())
    means = {
        name: statistics.fmean(values(runs, get))
        for name, runs in contestants.items()
        if name.startswith(kinds) and len(runs) == most
    }
    means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    return min(means, key=lambda name: means[name]) if means else None


def goals(records: Sequence[Record]) -> str:
    """The two goals, a row a size: how far centroids, and they with a learned offset, lie above the best learned
    router, and the MaxVio of the most even one over theirs. Of learned routers those with the most seeds."""
    rows = []
    for (size, steps), contestants in groups(records, ["main"]).items():
        theirs = best(contestants, LEARNED, bits)
        if theirs is None or CENTROIDS not in contestants:
            continue
        rival = contestants[theirs]
        above = [_short(difference(contestants.get(name, []), rival)) for name in (CENTROIDS, OFFSET)]
        factors = [_factor(contestants, get) for get in (max_vio, max_vio_trained)]
        rows.append([f"{size}, {steps} steps", f"{theirs} ({cell(values(rival, bits), 3)})", *above, *factors])
    head = ["size", "best learned router, bits per byte", "centroids above it", "with a learned offset"]
    return markdown([*head, "most even learned router: MaxVio over that of centroids, held-out", "training text"], rows)


def _factor(contestants: Group, get: Measure) -> str:
    theirs = best(contestants, LEARNED, get)
    if theirs is None:
        return "n/a"
    other, own = (statistics.fmean(values(contestants[name], get)) for name in (theirs, CENTROIDS))
    return f"{theirs}: {other:.3f} / {own:.3f} = {other / own:.1f}"


def compared(one: Sequence[Record], other: Sequence[Record]) -> str:
    """Their difference in words."""
    found = difference(one, other)
    if found is None:
        return "no seed in common"
    if found.pairs == 1:
        return f"{found.mean:+.3f}, one seed decides nothing"
    word = "resolved" if found.resolved else "not resolved"
    return f"{found.mean:+.3f} ± {found.half:.3f} (95%, {found.pairs} pairs), {word}"


def pooled(records: Sequence[Record], base: str = CENTROIDS) -> str:
    """Every contestant of the main study against `base`, all sizes and seeds together, runs of the usual length."""
    records = usual_length(records)
    runs = {name: [record for record in records if record["contestant"] == name] for name in STUDIES["main"]}
    rows = []
    for name in STUDIES["main"]:
        pairs = paired(runs[name], runs[base])
        if name == base or not pairs:
            continue
        rows.append(
            [name, compared(runs[name], runs[base]), *(_ratio(pairs, get) for get in (max_vio, max_vio_trained))]
        )
    return markdown(["router", f"bits per byte above {base}", "MaxVio, held-out text, ratio", "training text"], rows)


def size_by_size(records: Sequence[Record], base: str = CENTROIDS) -> str:
    """The same for each size by itself; bold where it is resolved."""
    found = {where: contestants for where, contestants in groups(records, ["main"]).items() if base in contestants}
    rows = []
    for name in STUDIES["main"]:
        if name != base:
            cells = [difference(contestants.get(name, []), contestants[base]) for contestants in found.values()]
            rows.append([name, *map(_short, cells)])
    return markdown(["router", *(f"{size}, {steps} steps" for size, steps in found)], rows)


def _short(found: Difference | None) -> str:
    if found is None:
        return "not run"
    if found.pairs == 1:
        return f"{found.mean:+.3f} (1 seed)"
    text = f"{found.mean:+.3f} ± {found.half:.3f}" + (" (2 seeds)" if found.pairs == 2 else "")
    return f"**{text}**" if found.resolved else text


def _ratio(pairs: Sequence[tuple[Record, Record]], get: Measure) -> str:
    known = [(one, other) for a, b in pairs if (one := get(a)) and (other := get(b))]
    return f"{statistics.geometric_mean(one / other for one, other in known):.2f}" if known else "n/a"


def against(contestants: Group, main: Group) -> str:
    """A study's tries, each with its difference from the contestant of the main study that it changes."""
    rows = []
    for name, runs in contestants.items():
        base = CHANGED_BY[name]
        difference = compared(runs, main.get(base, []))
        violation = " / ".join(mean_text(values(runs, get), 3) for get in (max_vio, max_vio_trained))
        experts = mean_text(values(runs, at_the_end("effective_experts")), 1)
        rows.append([name, cell(values(runs, bits), 3), base, difference, violation, experts])
    head = ["try", "bits per byte", "what it changes", "difference from that", "MaxVio, held-out / training text"]
    return markdown([*head, "effective experts"], rows)


def stability(contestants: Group) -> str:
    """How the order of the contestants at each validation agrees with the last one's: Kendall's tau."""
    curves = curves_above(contestants)[1].values()
    last = [curve[-1][1] for curve in curves]
    points = zip(*curves, strict=True)
    return ", ".join(f"step {at[0][0]}: {kendall([above for _, above in at], last):.2f}" for at in points)


def kendall(one: Sequence[float], other: Sequence[float]) -> float:
    """(concordant - discordant pairs) / pairs."""
    pairs = [(i, j) for i in range(len(one)) for j in range(i)]
    signs = [(one[i] > one[j]) == (other[i] > other[j]) for i, j in pairs]
    return (2 * sum(signs) - len(signs)) / len(signs) if signs else math.nan


def curves_above(contestants: Group) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """(centroids, or the first where it has not run; contestant -> (step, bits per byte above it) over the seeds that
    both have). Seeds differ more than routers do, so means over unequal seeds would not compare them."""
    base = CENTROIDS if CENTROIDS in contestants else next(iter(contestants))
    curves = {}
    for name, runs in contestants.items():
        pairs = [(one["validation"], other["validation"]) for one, other in paired(runs, contestants[base])]
        if pairs:
            steps = [step for step, _ in pairs[0][0]]
            above = [statistics.fmean(one[i][1] - other[i][1] for one, other in pairs) for i in range(len(steps))]
            curves[name] = list(zip(steps, above, strict=True))
    return base, curves


def changes(records: Sequence[Record]) -> list[str]:
    """One table a size and kind of change."""
    parts = []
    for change in CHANGES:
        for (size, steps), contestants in groups(records, [change]).items():
            rows = [[name.removesuffix(f"; {change}"), *_around(runs)] for name, runs in contestants.items()]
            head = ["router", "MaxVio before", "highest after", "at the end", "dead, most after", "seeds"]
            title = f"### {size}, {steps} steps, after half of them {CHANGES[change]}"
            parts.append(f"{title}\n\n{markdown(head, rows)}")
    return parts


def _around(runs: Sequence[Record]) -> list[str]:
    half = len(runs[0]["curve"]["step"]) // 2
    curves = [run["curve"] for run in runs]
    tail = max(1, half // 10)
    return [
        cell([statistics.fmean(curve["max_vio_pooled"][half - tail : half]) for curve in curves], 2),
        cell([max(curve["max_vio_pooled"][half:]) for curve in curves], 2),
        cell([statistics.fmean(curve["max_vio_pooled"][-tail:]) for curve in curves], 2),
        cell([max(curve["dead_experts"][half:]) for curve in curves], 2),
        str(len(runs)),
    ]


def report(records: Sequence[Record]) -> str:
    """All tables, in Markdown."""
    parts = [final.report(records), "## Bits per byte, MaxVio", summary(records)]
    parts.append(GOALS)
    parts.append(goals(records))
    parts.append(f"Each against {CENTROIDS}, all sizes and seeds together (MaxVio: geometric mean):")
    parts.append(pooled(records))
    parts.append("Each size by itself, bits per byte above it (95%, over the seeds that both have, bold: resolved):")
    parts.append(size_by_size(records))
    main = groups(records, ["main"])
    for (size, steps), contestants in main.items():
        lines = [f"### {size}, {steps} steps", table(contestants, TABLE)]
        order = "Order of the contestants over equal seeds against that of the last step, Kendall's tau"
        if len(contestants) > 1:
            lines.append(f"{order}: {stability(contestants)}.")
        lines.append("Routers and experts:\n\n" + table(contestants, GEOMETRY))
        parts.extend(line for line in lines if line)
    bases = groups(records, ["main", "rates"])
    for (size, steps), contestants in groups(records, ["tries"]).items():
        parts.append(f"### Tries, {size}, {steps} steps")
        parts.append(against(contestants, bases.get((size, steps), {})))
    return "\n\n".join([*parts, *changes(records)])


def pages(records: Sequence[Record]) -> dict[Path, str]:
    """Page -> the tables between its two marks."""
    return {
        README: final.front(records),
        SUMMARY: final.decision(records),
        APPENDIX: report(records),
    }


LINES, MARKERS = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3))), "osD^P*X"
COLOURS = {"softmax": "C1", "sigmoid": "C0", "K-Means": "C3", "random": "0.6", "hash": "0.3"}


def look(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(line, marker) of a contestant of the main study, the same in every picture."""
    kind = next(kind for kind in COLOURS if name.startswith(kind))
    number = [other for other in STUDIES["main"] if other.startswith(kind)].index(name)
    return (
        {"color": COLOURS[kind], "linestyle": LINES[number]},
        {"color": COLOURS[kind], "marker": MARKERS[number], "linestyle": "none"},
    )


def draw_decision(records: Sequence[Record], path: Path) -> None:
    """Bits per byte against MaxVio on the text trained on, those that decide: means over the seeds with their spread, a
    panel a size."""
    from matplotlib.figure import Figure

    runs, figure = final.Runs(records), Figure(figsize=(3.4 * len(final.WHERE), 4.2), layout="constrained")
    panels = figure.subplots(1, len(final.WHERE), squeeze=False)[0]
    for axes, size in zip(panels, final.WHERE, strict=True):
        for name in FINAL:
            found = runs.final(name, size)
            if not found:
                continue
            across, up = values(found, max_vio_trained), values(found, bits)
            spread = [statistics.stdev(each) if len(found) > 1 else 0.0 for each in (across, up)]
            axes.errorbar(
                statistics.fmean(across), statistics.fmean(up), xerr=spread[0], yerr=spread[1],
                label=final.TITLES[name], elinewidth=0.7, markersize=9, **look(name)[1],
            )  # fmt: skip
        axes.set(xlabel="MaxVio, training text (0: even)", title=size.removeprefix("D64-"))
        _log_axis(axes)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation bits per byte")
    shown = max(panels, key=lambda axes: len(axes.get_legend_handles_labels()[0]))
    figure.legend(*shown.get_legend_handles_labels(), loc="outside lower center", ncols=5, title="lower left is better")
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _log_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    labelled = (1.0, 2.0, 5.0) if high < 30 * low else (1.0,)  # more of them would overlap
    axes.xaxis.set_major_locator(LogLocator(subs=labelled))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw(title: str, contestants: Group, path: Path) -> None:
    """Validation curves against those of centroids, seed by seed; bits per byte against MaxVio, one point a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    base, curves = curves_above(contestants)
    for name, runs in contestants.items():
        line, marker = look(name)
        if name in curves:
            panels[0].plot(*zip(*curves[name], strict=True), **line)
        panels[1].plot(values(runs, max_vio), values(runs, bits), label=f"{name} ({len(runs)})", **marker)
    panels[0].set(
        xlabel="optimizer step",
        ylabel=f"validation bits per byte above\n{base}",
        title=f"{title}, equal seeds",
    )
    panels[1].set(xlabel="validation MaxVio (0: even)", ylabel="validation bits per byte", title="last step, each seed")
    _log_axis(panels[1])
    for axes in panels:
        axes.grid(alpha=0.3)
    labels = panels[1].get_legend_handles_labels()
    figure.legend(*labels, loc="outside right upper", fontsize=8, title="router (seeds)")
    figure.savefig(path, dpi=130, metadata={"Software": None})


def draw_changes(title: str, change: str, contestants: Group, path: Path) -> None:
    """MaxVio and dead experts through a change."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for number, (name, runs) in enumerate(contestants.items()):
        steps = runs[0]["curve"]["step"]
        for axes, key in zip(panels, ("max_vio_pooled", "dead_experts"), strict=True):
            means = [statistics.fmean(run["curve"][key][i] for run in runs) for i in range(len(steps))]
            axes.plot(steps, means, color=f"C{number}", label=name.removesuffix(f"; {change}"), linewidth=1)
    for axes, label in zip(panels, ("MaxVio over 10 steps", "experts without a token in 10 steps"), strict=True):
        axes.axvline(runs[0]["config"]["steps"] / 2, color="0.5", linestyle=":")
        axes.set(xlabel="optimizer step", ylabel=label, title=title)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def pictures(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw those that decide, and each size and change of which something has a second seed."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "quality.png"]
    draw_decision(records, paths[0])
    for (size, steps), contestants in _repeated(groups(records, ["main"])).items():
        paths.append(folder / f"quality-{size}-{steps}.png")
        draw(f"{size}, {steps} steps", contestants, paths[-1])
    for change in CHANGES:
        for (size, steps), contestants in _repeated(groups(records, [change])).items():
            paths.append(folder / f"quality-{size}-{steps}-{change}.png")
            draw_changes(f"{size}: {CHANGES[change]}", change, contestants, paths[-1])
    return paths


def with_tables(page: str, text: str) -> str:
    """`page` with `text` between its two marks.

    Raises:
        ValueError: a page without them.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must hold {BEGIN} and then {END}, where the tables belong")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """Print the tables, draw the pictures. Exit code: 0; 1 where there is nothing to show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.analysis", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, help="folder of the pictures (beside the results)")
    parser.add_argument("--json", action="store_true", help="each run's figures as JSON, no pictures")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md and docs/quality*.md too")
    args = parser.parse_args(argv)
    records = read_results(args.results)
    if not records:
        print(f"{args.results} holds no runs: python -m benchmarks.quality.sweep makes them", file=sys.stderr)
        return 1
    if args.json:
        document = {
            f"{size}, {steps} steps": {
                name: {label: [get(run) for run in runs] for label, _, get in TABLE + GEOMETRY}
                for name, runs in contestants.items()
            }
            for (size, steps), contestants in groups(records, ["main", "tries"]).items()
        }
        print(json.dumps(document, indent=2))
        return 0
    print(report(records))
    for path in pictures(records, args.out or args.results.parent):
        print(f"\npicture: {path.name}")
    if args.write:
        for page, text in pages(records).items():
            page.write_text(with_tables(page.read_text(encoding="utf-8"), text), encoding="utf-8")
            print(f"\nwritten: {page.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
