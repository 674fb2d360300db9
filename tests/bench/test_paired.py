"""The two routers in alternation: verified, then timed."""

from benchmarks.paired import LEARNED, OURS, contest
from kmeans_route.bench.problem import Problem
from kmeans_route.testing import BenchShape


def test_both_are_checked_and_timed() -> None:
    found = contest(Problem(BenchShape(96, 24, 8, 2)))
    found.run(2)
    timings = found.timings()
    assert set(timings) == {OURS, LEARNED}
    assert all(timing.min_ms > 0 and timing.repeats == 2 for timing in timings.values())
