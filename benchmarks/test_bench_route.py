"""Routing: a K-Means training step against a learned router's, and routing alone.

The claim: forward, backward and the adding of statistics, with all its checks for ties, masks and bad tokens, take no
longer than the training step of a learned softmax router with auxiliary loss, in plain PyTorch on the same threads.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.conftest import Bench
from kmeans_route.bench import baselines, checks, steps
from kmeans_route.bench.contest import Contest, Contestant
from kmeans_route.testing import CPU_BENCH_SHAPES, BenchShape

SHAPES = pytest.mark.parametrize("shape", CPU_BENCH_SHAPES.values(), ids=CPU_BENCH_SHAPES.keys())
WITH_LOSS = ["softmax + aux", "softmax + aux, topk first"]


def training_contest(shape: BenchShape, *, compiles: bool) -> Contest:
    """All contestants of the training step at one shape, verified."""
    problem = steps.make_problem(shape)
    router = steps.make_kmeans_router(problem)
    learned = dict(baselines.LEARNED)
    notes = ["ratios refer to the quicker of the two eager orders of the learned router with auxiliary loss"]
    for name in list(learned) if compiles else []:
        compiled = baselines.compile_learned(
            learned[name], problem.x, problem.weight.clone().requires_grad_(), shape.top_k
        )
        if callable(compiled):
            learned[f"{name}, compiled"] = compiled
        else:
            notes.append(f"{name}, compiled: did not run: {compiled}")
    contest = Contest(
        f"training step, {shape}",
        [
            steps.kmeans_step(problem, router),
            *(steps.learned_step(name, function, problem) for name, function in learned.items()),
            steps.textbook_step(problem, router),
            steps.commit_step(problem),
        ],
        baselines=WITH_LOSS,
        note="\n".join(notes),
    )

    def check() -> None:
        checks.check_kmeans(router, problem)
        checks.check_textbook(router, problem)
        for name, function in learned.items():
            checks.check_learned(name, function, problem)

    contest.verify(check)
    return contest


def eval_contest(shape: BenchShape) -> Contest:
    """Routing without gradient at one shape, verified."""
    problem = steps.make_problem(shape)
    router = steps.make_kmeans_router(problem).eval()
    x, weight = problem.x.detach(), problem.weight
    textbook = baselines.TextbookKMeansRouter(router.weight.clone(), shape.top_k)
    contest = Contest(
        f"routing alone, {shape}",
        [
            Contestant("kmeans_route", lambda: router(x)),
            Contestant("softmax, no aux", lambda: baselines.softmax_plain(x, weight, shape.top_k)),
            Contestant("textbook K-Means", lambda: textbook(x, update=False)),
            Contestant("the product x W^T alone", lambda: F.linear(x, weight)),
            Contestant("one copy of x", x.clone),
        ],
        baselines=["softmax, no aux"],
        note="the learned router needs neither norms nor exact ties",
    )
    contest.verify(lambda: checks.check_textbook(router, problem))
    return contest


@SHAPES
def test_training_step(shape: BenchShape, bench: Bench) -> None:
    contest = training_contest(shape, compiles=bench.compiles)
    ratio = {"shape": shape._asdict(), "max_ratio": bench.max_ratio}
    bench.run(contest, ratio)
    if bench.max_ratio:
        assert contest.ratio("kmeans_route") <= bench.max_ratio, f"slower than the learned router:\n{contest.table()}"


@SHAPES
def test_eval(shape: BenchShape, bench: Bench) -> None:
    contest = eval_contest(shape)
    with torch.inference_mode():
        bench.run(contest, {"shape": shape._asdict()})
