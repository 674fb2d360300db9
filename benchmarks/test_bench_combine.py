"""Combine alone, the weighted return of expert outputs to token order, forward and backward, against plain PyTorch."""

import torch

from benchmarks.conftest import Bench
from benchmarks.harness import checks, peers, rivals, steps
from benchmarks.harness.contest import Contest
from benchmarks.test_bench_dispatch import SHAPES as SHAPES
from benchmarks.test_bench_dispatch import make_exchange
from kmeans_route.testing import BenchShape


def combine_contest(shape: BenchShape, dtype: torch.dtype = torch.float32, *, compiles: bool = False) -> Contest:
    """All contestants at one shape, verified."""
    given = steps.make_sorted(make_exchange(shape, dtype))
    functions = {
        "kmeans_route": steps.package_combine,
        "gather": steps.plain_combine(rivals.gather_combine),
        "scatter": steps.plain_combine(rivals.scatter_combine),
    }
    _, not_run, versions = peers.split(peers.permutations())

    def try_out(function: steps.SortedFunction) -> None:
        torch.autograd.backward(function(given), given.dy)
        steps.clear(given.y_sorted, given.routing.weights)

    for name in ("gather", "scatter"):
        compiled = rivals.compile_or_reason(functions[name], try_out, compiles=compiles)
        rivals.enter(f"{name}, compiled", compiled, functions, not_run)
    contest = Contest(
        f"combine, {shape}, {dtype}",
        [steps.combine_step(name, function, given) for name, function in functions.items()],
        baselines=["gather", "scatter"],
        not_run=not_run,
        versions=versions,
    )

    def check() -> None:
        for name, function in functions.items():
            checks.check_combine(name, function, given)

    contest.verify(check)
    return contest


def test_combine(shape: BenchShape, dtype: torch.dtype, bench: Bench) -> None:
    num_bytes = dtype.itemsize * shape.num_tokens * shape.hidden_size * (1 + shape.top_k + 1 + 2 * shape.top_k)
    contest = combine_contest(shape, dtype, compiles=bench.compiles)
    bench.run(contest, {"shape": shape._asdict(), "dtype": str(dtype), "floor_num_bytes": num_bytes})
