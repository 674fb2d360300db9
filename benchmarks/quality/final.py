"""The tables that decide: the five of `studies.FINAL` and three floors, each at the learning rate chosen for it.

The rate of a contestant at a size is the one with the fewest bits per byte on seed 0, which no other figure uses: the
means, intervals and pairs are of the other seeds. Rates rise until one is worse than the one before.
"""

import math
import statistics
from collections.abc import Sequence

from benchmarks.quality.studies import (
    CENTROIDS,
    DENSE,
    FINAL,
    FLOORS,
    RATES,
    SIZES,
    STEPS,
    WHITENED,
    WHITENED_OFFSET,
    at_rate,
)
from benchmarks.quality.sweep import Record
from benchmarks.quality.tables import (
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
    values,
)

ALL_RATES = (0.003, *RATES)
WHERE = [name for name, sizes in SIZES.items() if name.startswith("D64") and sizes["experts"] > 1]
"""The four sizes."""
TITLES = {
    WHITENED: "K-Means (whitened)",
    WHITENED_OFFSET: "K-Means, whitened, learned offset",
    CENTROIDS: "K-Means, centroids (the paper's)",
    "sigmoid, sign 0.01": "sigmoid, loss-free",
    "softmax, aux 0.01": "softmax, auxiliary loss",
    **{name: name for name in FLOORS},
    "dense": "dense, of equal active width",
}
"""Who decides, as the pages call them; at most eight."""
EARLY_WINDOWS = 4
"""Of the curves, 50 steps each."""


class Runs:
    """What has been run, by contestant, size and learning rate."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = [record for record in records if record["config"]["steps"] == STEPS]

    def at(self, name: str, size: str, rate: float) -> list[Record]:
        """Of all seeds."""
        size = "D64-E1-K1" if name in DENSE else size
        wanted = (size, at_rate(name, rate))
        return [record for record in self._records if (record["size"], record["contestant"]) == wanted]

    def rate(self, name: str, size: str) -> float | None:
        """The one chosen on seed 0; None until what it needs has run there."""
        best, fewest = None, math.inf
        for rate in ALL_RATES:
            run = next((r for r in self.at(name, size, rate) if r["config"]["seed"] == 0), None)
            if run is None:
                return None
            got = bits(run)
            if got is None or got >= fewest:  # a run may have no finite loss
                break
            best, fewest = rate, got
        return best

    def final(self, name: str, size: str) -> list[Record]:
        """At the chosen rate, without seed 0."""
        rate = self.rate(name, size)
        return [] if rate is None else [r for r in self.at(name, size, rate) if r["config"]["seed"] != 0]

    def everywhere(self, name: str, sizes: Sequence[str] = WHERE) -> list[Record]:
        """`final` of several sizes."""
        return [record for size in sizes for record in self.final(name, size)]


def decision(records: Sequence[Record]) -> str:
    """A row a contestant: bits per byte at each size, whitened's difference from it, effective experts, MaxVio."""
    runs = Runs(records)
    rows = []
    for name in TITLES:
        found = runs.everywhere(name)
        if not found:
            continue
        by_size = [_with_seeds(runs.final(name, size), bits) for size in WHERE]
        apart = difference(runs.everywhere(WHITENED), found) if name != WHITENED and name not in DENSE else None
        text = f"{apart.mean:+.3f} ± {apart.half:.3f} ({apart.pairs} pairs)" if apart and apart.pairs > 1 else ""
        kept = [_share(runs.final(name, size)) for size in WHERE if size.endswith("K8")]
        loads = [mean_text(values(found, get), 2) for get in (measure("max_vio_train"), max_vio_trained, max_vio)]
        rows.append(
            [
                TITLES[name],
                *by_size,
                f"**{text}**" if apart and apart.resolved else text,
                " / ".join(kept),
                " / ".join(loads),
            ]
        )
    head = ["router", *(size.removeprefix("D64-") for size in WHERE), "whitened minus it (95%)"]
    more = ["effective experts of E, E16-K8 / E64-K8", "MaxVio: batches / training text / held-out"]
    return markdown([*head, *more], rows)


def front(records: Sequence[Record]) -> str:
    """The same of routers for those in a hurry: means alone, and of the loads those on the text trained on."""
    runs = Runs(records)
    rows = []
    for name in TITLES:
        found = runs.everywhere(name)
        if found and name not in DENSE:
            by_size = [mean_text(values(runs.final(name, size), bits), 3) for size in WHERE]
            kept = [_share(runs.final(name, size)) for size in WHERE if size.endswith("K8")]
            rows.append([TITLES[name], *by_size, " / ".join(kept), mean_text(values(found, max_vio_trained), 2)])
    sizes = [size.removeprefix("D64-") for size in WHERE]
    return markdown(["router", *sizes, "effective", "MaxVio"], rows)


def _with_seeds(runs: Sequence[Record], get: Measure) -> str:
    return f"{cell(values(runs, get), 3)} ({len(runs)})" if runs else "not run"


def _share(runs: Sequence[Record]) -> str:
    effective = values(runs, at_the_end("effective_experts"))
    return mean_text([value / run["config"]["experts"] for value, run in zip(effective, runs, strict=True)], 2)


def rates(records: Sequence[Record]) -> str:
    """Bits per byte on seed 0 at each learning rate, the chosen one in bold."""
    runs = Runs(records)
    rows = []
    for name in TITLES:
        cells = [_rates_of(runs, name, size) for size in WHERE]
        if any(cells):
            rows.append([name, *(text or "not run" for text in cells)])
    rates_text = " / ".join(f"{rate:g}" for rate in ALL_RATES)
    return markdown([f"router, at {rates_text}", *(size.removeprefix("D64-") for size in WHERE)], rows)


def _rates_of(runs: Runs, name: str, size: str) -> str:
    chosen, parts = runs.rate(name, size), []
    for rate in ALL_RATES:
        found = [r for r in runs.at(name, size, rate) if r["config"]["seed"] == 0]
        text = mean_text(values(found, bits), 3) if found else "-"
        parts.append(f"**{text}**" if rate == chosen else text)
    return " / ".join(parts) if set(parts) != {"-"} else ""


def early(records: Sequence[Record]) -> str:
    """MaxVio of training batches over the first 200 steps, which the text makes uneven whatever the rule."""
    runs = Runs(records)
    rows = []
    for name in (*FINAL, *FLOORS):
        found = [runs.everywhere(name, [size]) for size in WHERE]
        if any(found):
            rows.append([name, *(mean_text([_early(r) for r in each], 2) if each else "not run" for each in found)])
    return markdown(["router", *(size.removeprefix("D64-") for size in WHERE)], rows)


def _early(record: Record) -> float:
    return statistics.fmean(record["curve"]["max_vio"][:EARLY_WINDOWS])


def report(records: Sequence[Record]) -> str:
    """All of them, in Markdown."""
    parts = [
        "## The decision",
        "Bits per byte on seed 0 at each peak learning rate; bold: chosen. Rates rise until one is worse.",
        rates(records),
    ]
    if any(Runs(records).everywhere(name) for name in FINAL):
        parts += [
            "Bits per byte (seeds), mean over the four sizes where a column names none; the other seeds at that rate:",
            decision(records),
            "MaxVio of training batches, first 200 steps:",
            early(records),
        ]
    return "\n\n".join(parts)
