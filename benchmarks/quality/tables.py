"""What the study's tables are made of: measures of a run, means over runs, differences seed by seed, Markdown.

Two contestants are compared seed by seed, since runs of one seed share initial weights and order of the text: a
difference counts as resolved where the 95% interval of Student's t about its mean leaves out 0.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.quality.sweep import Record

Group = dict[str, list[Record]]
Measure = Callable[[Record], float | None]
Column = tuple[str, int, Measure]


def measure(key: str) -> Measure:
    """Of a run's measures."""
    return lambda record: record["measures"].get(key)


def at_the_end(key: str) -> Measure:
    """Of its geometry after the last step."""
    return lambda record: record["geometry"][-1].get(key)


bits, max_vio = measure("bits_per_byte"), measure("max_vio_validation")
max_vio_trained = measure("max_vio_training_text")
STUDENT_T = (
    12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09,
)  # fmt: skip
"""Half width of the 95% interval in standard errors, by degrees of freedom from 1 on; more have that of the last."""


def values(runs: Sequence[Record], get: Measure) -> list[float]:
    """One a run; NaN where there is none."""
    return [math.nan if (value := get(run)) is None else float(value) for run in runs]


def mean_text(found: Sequence[float], digits: int) -> str:
    """Mean of those that are known."""
    known = [value for value in found if math.isfinite(value)]
    return f"{statistics.fmean(known):.{digits}f}" if known else "n/a"


def cell(found: Sequence[float], digits: int) -> str:
    """mean ± standard deviation, of those that are known."""
    known = [value for value in found if math.isfinite(value)]
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return mean_text(found, digits) + spread


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Difference(NamedTuple):
    """In bits per byte: mean over `pairs` runs, half width of its 95% interval, which one pair does not have."""

    mean: float
    half: float
    pairs: int

    @property
    def resolved(self) -> bool:
        return abs(self.mean) > self.half


def difference(one: Sequence[Record], other: Sequence[Record]) -> Difference | None:
    """one - other over the sizes and seeds that both have; None where there are none."""
    found = [float(bits(a) or math.nan) - float(bits(b) or math.nan) for a, b in paired(one, other)]
    if len(found) < 2:
        return Difference(found[0], math.inf, 1) if found else None
    error = statistics.stdev(found) / math.sqrt(len(found))
    width = STUDENT_T[min(len(found) - 1, len(STUDENT_T)) - 1]
    return Difference(statistics.fmean(found), width * error, len(found))


def paired(one: Sequence[Record], other: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Runs of equal size, steps and seed."""
    where = [{(r["size"], r["config"]["steps"], r["config"]["seed"]): r for r in runs} for runs in (one, other)]
    return [(run, where[1][key]) for key, run in where[0].items() if key in where[1]]
