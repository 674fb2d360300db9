"""Contestants timed in turn within one run, so that whatever else the machine does falls on all of them alike.

No time is shown unless correctness was asserted first: a contest that was not verified refuses to run and to print.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


def nothing() -> None:
    """The reset of a contestant that has nothing to clear."""


class Contestant(NamedTuple):
    """name: of the row. step: what is timed. reset: runs before each step, untimed (clears gradients)."""

    name: str
    step: Callable[[], object]
    reset: Callable[[], object] = nothing


class Timing(NamedTuple):
    """Milliseconds of one contestant over all rounds: median, quartiles, least; ratio of its median to the baseline's.

    paired_ratio is the median over the rounds of (its time / the baseline's in the same round).
    """

    median_ms: float
    q1_ms: float
    q3_ms: float
    min_ms: float
    ratio: float
    paired_ratio: float
    repeats: int


class Goal(NamedTuple):
    """A ratio that one run is read for: the median of `name` over the sum of the medians of `over`, at most `at_most`.

    aim: what is striven for beyond the goal, or None.
    """

    name: str
    over: tuple[str, ...]
    at_most: float
    aim: float | None = None


class NotVerifiedError(RuntimeError):
    """A contest was run or printed though correctness was not asserted, or the assertion failed."""


class Contest:
    """Several ways to do one thing.

    Args:
        title: heads the table.
        contestants: in the order of the rows; names must differ.
        baselines: names of those the ratio refers to; the one with the least median counts.
        note: a line under the table.
        goals: ratios to show and to keep beside the times.
        not_run: name of each contestant that cannot run here -> why; a line of the table and a record each.
        versions: name of a contestant or of one not run -> the package it comes from, with its version.

    Raises:
        ValueError: names are not all different, or a baseline, a goal or a version names nobody.
    """

    def __init__(
        self,
        title: str,
        contestants: list[Contestant],
        baselines: list[str],
        note: str = "",
        *,
        goals: Sequence[Goal] = (),
        not_run: Mapping[str, str] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self.goals, self.not_run, self.versions = list(goals), dict(not_run or {}), dict(versions or {})
        names = [contestant.name for contestant in contestants]
        if len({*names, *self.not_run}) != len(names) + len(self.not_run):
            raise ValueError(f"contestants must have different names, got {[*names, *self.not_run]}")
        if not baselines or not set(baselines) <= set(names):
            raise ValueError(f"baselines must be among {names}, got {baselines}")
        unknown = {name for goal in self.goals for name in (goal.name, *goal.over)} - set(names)
        unknown |= set(self.versions) - {*names, *self.not_run}
        if unknown:
            raise ValueError(f"goals and versions must name contestants, got {sorted(unknown)}")
        self.title, self.contestants, self.baselines, self.note = title, contestants, baselines, note
        self.times_ms: dict[str, list[float]] = {name: [] for name in names}
        self._verified = False

    def verify(self, check: Callable[[], object]) -> None:
        """Run `check`, which raises AssertionError where a contestant is wrong; only then may the contest go on."""
        self._verified = False
        check()
        self._verified = True

    def run(self, repeats: int, warm_up: int = 2) -> None:
        """`warm_up` rounds that are not counted, then `repeats` that are."""
        self.warm_up(warm_up)
        for _ in range(repeats):
            self.round()

    def warm_up(self, rounds: int) -> None:
        """Rounds that are not counted."""
        self._check_verified()
        for _ in range(rounds):
            for contestant in self.contestants:
                contestant.reset()
                contestant.step()

    def round(self) -> None:
        """One step of each contestant, timed, in the order of this round."""
        self._check_verified()
        for contestant in self.order():
            contestant.reset()
            start = time.perf_counter()
            contestant.step()
            self.times_ms[contestant.name].append((time.perf_counter() - start) * 1e3)

    def order(self) -> list[Contestant]:
        """Drawn anew for each round, the same in every run: a step costs 10% more or less by what ran before it."""
        shuffled = list(self.contestants)
        random.Random(len(self.times_ms[shuffled[0].name])).shuffle(shuffled)
        return shuffled

    def baseline(self) -> str:
        """Name of the quickest of the baselines, by median."""
        self._check_verified()
        if not self.times_ms[self.baselines[0]]:
            raise ValueError(f"{self.title}: no round has been run: call run() first")
        return min(self.baselines, key=lambda name: statistics.median(self.times_ms[name]))

    def timings(self) -> dict[str, Timing]:
        """Statistics of every contestant."""
        base_ms = self.times_ms[self.baseline()]
        return {name: _timing(times_ms, base_ms) for name, times_ms in self.times_ms.items()}

    def ratio(self, name: str) -> float:
        """Median time of `name` over that of the quickest baseline."""
        return self.timings()[name].ratio

    def outcomes(self) -> list[dict[str, Any]]:
        """Of each goal, in order: its fields, over_ms, ratio, and met, whether ratio <= at_most."""
        timings = self.timings()
        found = []
        for goal in self.goals:
            over_ms = sum(timings[name].median_ms for name in goal.over)
            ratio = timings[goal.name].median_ms / over_ms
            found.append({**goal._asdict(), "over_ms": over_ms, "ratio": ratio, "met": ratio <= goal.at_most})
        return found

    def table(self) -> str:
        """The result for people.

        Raises:
            NotVerifiedError: correctness was not asserted, or the assertion failed.
        """
        timings = self.timings()
        baseline = self.baseline()
        width = max(len("contestant"), *(len(name) + 2 for name in [*timings, *self.not_run]))
        repeats = timings[baseline].repeats
        lines = [
            f"{self.title} ({repeats} rounds)",
            f"{'contestant':{width}}  median ms  q1..q3 ms         min ms  ratio",
        ]
        for name, t in timings.items():
            label = f"{name} *" if name == baseline else name
            quartiles = f"{t.q1_ms:.2f}..{t.q3_ms:.2f}"
            lines.append(f"{label:{width}}  {t.median_ms:9.2f}  {quartiles:16}  {t.min_ms:7.2f}  {t.ratio:5.2f}")
        lines += [f"{name:{width}}  not run: {reason}" for name, reason in self.not_run.items()]
        lines.append("* the baseline of the ratios")
        for outcome in self.outcomes():
            over = " + ".join(outcome["over"])
            aim = "" if outcome["aim"] is None else f", aim {outcome['aim']:g}"
            lines.append(
                f"{outcome['name']} / ({over}, {outcome['over_ms']:.2f} ms) = {outcome['ratio']:.2f} "
                f"(goal at most {outcome['at_most']:g}{aim}: {'met' if outcome['met'] else 'not met'})"
            )
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)

    def record(self) -> dict[str, object]:
        """The result for JSON."""
        return {
            "title": self.title,
            "baseline": self.baseline(),
            "note": self.note,
            "contestants": {name: timing._asdict() for name, timing in self.timings().items()},
            "not_run": [
                {"contestant": name, "status": "not run", "reason": reason} for name, reason in self.not_run.items()
            ],
            "versions": self.versions,
            "goals": self.outcomes(),
        }

    def _check_verified(self) -> None:
        if not self._verified:
            raise NotVerifiedError(f"{self.title}: correctness was not asserted, so no time may be taken or shown")


def _timing(times_ms: list[float], base_ms: list[float]) -> Timing:
    median_ms = statistics.median(times_ms)
    q1_ms, _, q3_ms = statistics.quantiles(times_ms, n=4, method="inclusive") if len(times_ms) > 1 else [median_ms] * 3
    paired = statistics.median(one / base for one, base in zip(times_ms, base_ms, strict=True))
    ratio = median_ms / statistics.median(base_ms)
    return Timing(median_ms, q1_ms, q3_ms, min(times_ms), ratio, paired, len(times_ms))
