"""How time and memory grow: a training step and routing alone over T, D, E and K, the other three fixed.

All sizes of one axis are contestants of one contest, so that a slow spell of the machine falls on all of them. The
exponent is the slope of log(median) over log(size), by least squares. Every token costs the same, so the exponent of T
must lie between 0.9 and 1.1; the others are reported.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.conftest import Bench
from benchmarks.harness import checks, memory, steps
from benchmarks.harness.contest import Contest
from benchmarks.harness.scaling import fit_power
from kmeans_route.bench.contest import Contestant
from kmeans_route.bench.problem import Problem
from kmeans_route.testing import BenchShape

BASE = BenchShape(num_tokens=16384, hidden_size=256, num_experts=64, top_k=4)
AXES = {
    "num_tokens": [8192 << i for i in range(6)],
    "hidden_size": [128 << i for i in range(5)],
    "num_experts": [8 << i for i in range(6)],
    "top_k": [1 << i for i in range(5)],
}
QUICK_BASE = BenchShape(num_tokens=128, hidden_size=24, num_experts=8, top_k=2)
QUICK_AXES = {"num_tokens": [64, 128, 256], "hidden_size": [24, 48], "num_experts": [4, 8], "top_k": [1, 2]}
LINEAR_IN_TOKENS = (0.9, 1.1)
CHECKED_TOKENS = 16384  # of each size: what fp64 copies of 256 times 1024 tokens would take is left to others


def warmed(contestant: Contestant) -> Contestant:
    """Each timed step follows one of its own size: after a larger one a small step finds neither cache nor memory."""

    def reset() -> None:
        contestant.reset()
        contestant.step()
        contestant.reset()

    return contestant._replace(reset=reset)


def scaling_contest(axis: str, sizes: Sequence[int], base: BenchShape, *, training: bool) -> Contest:
    """One contestant a size of `axis`, all verified."""
    contestants, verifications = [], []
    for size in sizes:
        problem = Problem(base._replace(**{axis: size}))
        router = steps.make_kmeans_router(problem)
        verifications.append((router, problem))
        if training:
            contestants.append(warmed(steps.kmeans_step(problem, router, str(size))))
        else:
            contestants.append(warmed(Contestant(str(size), partial(router, problem.x.detach()))))
    fixed = ", ".join(f"{name}={value}" for name, value in base._asdict().items() if name != axis)
    what = "training step" if training else "routing alone"
    contest = Contest(f"{what} over {axis}, {fixed}", contestants, baselines=[str(sizes[0])])

    def check() -> None:
        for router, problem in verifications:
            checks.check_kmeans(router, steps.first_tokens(problem, CHECKED_TOKENS))
            router.pending.clear_()
            router(problem.x)
            assert int(router.pending.counts.sum()) == problem.shape.num_tokens * problem.shape.top_k
            router.train(training)

    contest.verify(check)
    return contest


def growth(contest: Contest, axis: str, sizes: Sequence[int]) -> dict[str, Any]:
    """Medians, peak extra memory, and the exponents of both."""
    timings = contest.timings()
    median_ms = [timings[str(size)].median_ms for size in sizes]
    peaks = []
    for contestant in contest.contestants:
        contestant.reset()
        peaks.append(memory.peak_extra_bytes(contestant.step))
        contestant.reset()
    return {
        "axis": axis,
        "sizes": list(sizes),
        "median_ms": median_ms,
        "time": fit_power(sizes, median_ms)._asdict(),
        "peak_extra_num_bytes": peaks,
        "memory": fit_power(sizes, peaks)._asdict(),
    }


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("axis", list(AXES))
def test_scaling(axis: str, training: bool, bench: Bench) -> None:
    base, sizes = (QUICK_BASE, QUICK_AXES[axis]) if bench.quick else (BASE, AXES[axis])
    contest = scaling_contest(axis, sizes, base, training=training)
    with torch.set_grad_enabled(training):
        bench.start(contest)
        found = growth(contest, axis, sizes)
    low, high = LINEAR_IN_TOKENS
    bounds = [low, high] if axis == "num_tokens" and not bench.quick else None
    exponent = found["time"]["exponent"]
    contest.note = f"time ~ {axis}^{exponent:.2f}, peak extra memory ~ {axis}^{found['memory']['exponent']:.2f}"
    bench.keep(contest, {"base": base._asdict(), "growth": found, "exponent_bounds": bounds})
    if bounds:
        assert low <= exponent <= high, f"the exponent of T must be in [{low}, {high}]:\n{contest.table()}"
