"""What comes once per optimizer step: a router's commit, against the optimizer step of a learned router's weight.

T does not enter; the pending statistics are of a few tokens an expert.
"""

from functools import partial

from benchmarks.conftest import Bench
from benchmarks.harness import commits, rivals, steps
from benchmarks.harness.contest import Contest
from benchmarks.harness.shapes import CPU_BENCH_SHAPES
from kmeans_route.bench.contest import Contestant
from kmeans_route.bench.problem import Problem
from kmeans_route.reference import commit_reference
from kmeans_route.testing import MODEL_SHAPES, BenchShape

TOKENS_PER_EXPERT = 8
SHAPES = {name: s._replace(num_tokens=TOKENS_PER_EXPERT * s.num_experts) for name, s in CPU_BENCH_SHAPES.items()}
SHAPES |= {name: BenchShape(TOKENS_PER_EXPERT * s.num_experts, *s) for name, s in MODEL_SHAPES.items()}
ADAMW = {"AdamW, the learned weight": False, "AdamW, the learned weight, fused": True}


def commit_contest(shape: BenchShape, *, compiles: bool) -> Contest:
    """All contestants at one shape, verified."""
    problem = Problem(shape)
    router = steps.make_kmeans_router(problem)
    router(problem.x)
    given = commits.gathered(router)
    apart = steps.make_kmeans_router(problem, directions="whitened")
    apart(problem.x)
    whitened = commits.gathered(apart)
    arguments = given.arguments()
    functions = {"reference": commit_reference}
    not_run: dict[str, str] = {}
    compiled = rivals.compile_or_reason(commit_reference, lambda made: made(*arguments), compiles=compiles)
    rivals.enter("reference, compiled", compiled, functions, not_run)
    optimizers = {name: commits.make_adamw(problem, fused=fused) for name, fused in ADAMW.items()}
    contest = Contest(
        f"commit, E{shape.num_experts} D{shape.hidden_size}",
        [
            commits.commit_step("kmeans_route", given),
            commits.commit_step("kmeans_route, whitened", whitened),
            *(Contestant(name, partial(function, *arguments)) for name, function in functions.items()),
            *(Contestant(name, optimizer.step) for name, optimizer in optimizers.items()),
        ],
        baselines=list(ADAMW),
        note="the reference makes the new state and stores it nowhere",
        not_run=not_run,
    )

    def check() -> None:
        commits.check_commit("kmeans_route", lambda: commits.package_commit(given), given)
        commits.check_whitened("kmeans_route, whitened", whitened)
        for name, function in functions.items():
            commits.check_commit(name, partial(function, *arguments), given)
        for name, fused in ADAMW.items():
            commits.check_adamw(name, commits.make_adamw(problem, fused=fused))

    contest.verify(check)
    return contest


def test_commit(shape: BenchShape, bench: Bench) -> None:
    num_bytes = 6 * shape.num_experts * shape.hidden_size * 4
    bench.run(commit_contest(shape, compiles=bench.compiles), {"shape": shape._asdict(), "floor_num_bytes": num_bytes})
