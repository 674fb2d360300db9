"""Dispatch and combine with identity experts between them, forward and backward, against plain PyTorch."""

import pytest

from benchmarks.conftest import Bench
from kmeans_route import route
from kmeans_route.bench import baselines, checks, steps
from kmeans_route.bench.contest import Contest
from kmeans_route.testing import CPU_BENCH_SHAPES, BenchShape, make_hidden_states

TOKENS_SHARE = 4  # x_sorted is K times x: a quarter of the tokens keeps a round short


def dispatch_contest(shape: BenchShape) -> Contest:
    """All contestants at one shape, verified."""
    problem = steps.make_problem(shape)
    routing = route(problem.x.detach(), problem.weight, shape.top_k)
    routing = routing._replace(weights=routing.weights.detach().requires_grad_())
    dy = make_hidden_states(shape.num_tokens, shape.hidden_size, seed=3)
    exchange = steps.Exchange(problem.x, routing, dy)
    functions = {
        "kmeans_route": steps.package_exchange,
        "index + gather": steps.plain_exchange(baselines.gather_combine),
        "index + scatter": steps.plain_exchange(baselines.scatter_combine),
    }
    contest = Contest(
        f"dispatch and combine, {shape}",
        [steps.exchange_step(name, function, exchange) for name, function in functions.items()],
        baselines=["index + gather", "index + scatter"],
    )

    def check() -> None:
        for name, function in functions.items():
            checks.check_exchange(name, function, exchange)

    contest.verify(check)
    return contest


@pytest.mark.parametrize("shape", CPU_BENCH_SHAPES.values(), ids=CPU_BENCH_SHAPES.keys())
def test_dispatch_and_combine(shape: BenchShape, bench: Bench) -> None:
    shape = shape._replace(num_tokens=shape.num_tokens // TOKENS_SHARE)
    num_bytes = 4 * shape.num_tokens * shape.hidden_size * ((1 + shape.top_k) * 3 + (1 + 2 * shape.top_k))
    bench.run(dispatch_contest(shape), {"shape": shape._asdict(), "floor_num_bytes": num_bytes})
