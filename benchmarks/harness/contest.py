"""The contests of the suites: on a CPU, with goals, with those who cannot run here, and a table for people."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from kmeans_route.bench.clock import Clock
from kmeans_route.bench.contest import ClockedContest, Contestant


class Goal(NamedTuple):
    """A ratio that one run is read for: the median of `name` over the sum of the medians of `over`, at most `at_most`.

    aim: what is striven for beyond the goal, or None.
    """

    name: str
    over: tuple[str, ...]
    at_most: float
    aim: float | None = None


class Contest(ClockedContest):
    """Several ways to do one thing on a CPU, by the `method` of its `Clock`.

    Args:
        title, contestants, baselines: as of `ClockedContest`.
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
        super().__init__(Clock(torch.device("cpu")), title, contestants, baselines)
        self.note, self.goals = note, list(goals)
        self.not_run, self.versions = dict(not_run or {}), dict(versions or {})
        self._timed = {contestant.name: contestant.step for contestant in contestants}
        names = [contestant.name for contestant in contestants]
        if len({*names, *self.not_run}) != len(names) + len(self.not_run):
            raise ValueError(f"contestants must have different names, got {[*names, *self.not_run]}")
        if not baselines or not set(baselines) <= set(names):
            raise ValueError(f"baselines must be among {names}, got {baselines}")
        unknown = {name for goal in self.goals for name in (goal.name, *goal.over)} - set(names)
        unknown |= set(self.versions) - {*names, *self.not_run}
        if unknown:
            raise ValueError(f"goals and versions must name contestants, got {sorted(unknown)}")

    def run(self, repeats: int, warm_up: int = 2) -> None:
        """`warm_up` rounds that are not counted, then `repeats` that are."""
        self.warm_up(warm_up)
        for _ in range(repeats):
            self.round()

    def warm_up(self, rounds: int = 1) -> None:
        """Rounds that are not counted."""
        self._check_verified()
        for _ in range(rounds):
            for contestant in self.contestants:
                contestant.reset()
                contestant.step()

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
