"""Contestants timed in turn within one run, so that whatever else the machine does falls on all of them alike.

No time is shown unless correctness was asserted first: a contest that was not verified refuses to run and to tell.
"""

import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

from kmeans_route.bench.clock import Clock, nothing


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


class NotVerifiedError(RuntimeError):
    """A contest was run or asked for times though correctness was not asserted, or the assertion failed."""


class ClockedContest:
    """Several ways to do one thing, by different names, timed by the `Clock` of the device that they run on.

    baselines: names of those the ratio refers to; the one with the least median counts. method: contestant -> how it
    was timed. peak_bytes: contestant -> most memory that a call allocates, on a GPU.
    """

    def __init__(self, clock: Clock, title: str, contestants: list[Contestant], baselines: list[str]) -> None:
        self.clock, self.title, self.contestants, self.baselines = clock, title, contestants, baselines
        self.times_ms: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
        self.method: dict[str, str] = {}
        self.peak_bytes: dict[str, int | None] = {}
        self._timed: dict[str, Callable[[], object]] = {}
        self._verified = False

    def verify(self, check: Callable[[], object]) -> None:
        """Run `check`, which raises AssertionError where a contestant is wrong; only then may the contest go on."""
        self._verified = False
        if not __debug__:
            raise NotVerifiedError(f"{self.title}: python -O leaves assertions out, so nothing is checked: run without")
        check()
        self._verified = True

    def warm_up(self) -> None:
        """Call everyone until all is compiled, and make the graphs."""
        self._check_verified()
        with self.clock.scope():
            for name, step, reset in self.contestants:
                self.peak_bytes[name] = self.clock.warm_up(step, reset)
                self._timed[name], self.method[name] = self.clock.captured(step)

    def round(self) -> None:
        """One step of each contestant, timed.

        The order is drawn anew for each round, the same in every run: a step costs 10% more or less by what ran before
        it.
        """
        self._check_verified()
        if not self._timed:
            raise NotVerifiedError(f"{self.title}: call warm_up() before the first round")
        shuffled = list(self.contestants)
        random.Random(len(self.times_ms[shuffled[0].name])).shuffle(shuffled)
        with self.clock.scope():
            for name, _, reset in shuffled:
                (time_us,) = self.clock.samples_us(self._timed[name], reset)
                self.times_ms[name].append(time_us / 1e3)

    def baseline(self) -> str:
        """Name of the quickest of the baselines, by median."""
        self._check_verified()
        if not self.times_ms[self.baselines[0]]:
            raise ValueError(f"{self.title}: no round has been run: call round() first")
        return min(self.baselines, key=lambda name: statistics.median(self.times_ms[name]))

    def timings(self) -> dict[str, Timing]:
        """Statistics of every contestant."""
        base_ms = self.times_ms[self.baseline()]
        return {name: _timing(times_ms, base_ms) for name, times_ms in self.times_ms.items()}

    def _check_verified(self) -> None:
        if not self._verified:
            raise NotVerifiedError(f"{self.title}: correctness was not asserted, so no time may be taken or shown")


def _timing(times_ms: list[float], base_ms: list[float]) -> Timing:
    median_ms = statistics.median(times_ms)
    q1_ms, _, q3_ms = statistics.quantiles(times_ms, n=4, method="inclusive") if len(times_ms) > 1 else [median_ms] * 3
    paired = statistics.median(one / base for one, base in zip(times_ms, base_ms, strict=True))
    ratio = median_ms / statistics.median(base_ms)
    return Timing(median_ms, q1_ms, q3_ms, min(times_ms), ratio, paired, len(times_ms))
