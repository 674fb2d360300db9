"""Dispatch alone, and with combine and identity experts between, forward and backward, against plain PyTorch."""

import torch

from benchmarks.conftest import Bench
from benchmarks.harness import checks, peers, rivals, steps
from benchmarks.harness.contest import Contest
from benchmarks.harness.shapes import CPU_BENCH_SHAPES
from kmeans_route import route
from kmeans_route.bench.problem import Problem
from kmeans_route.testing import MODEL_SHAPES, BenchShape, make_hidden_states

TOKENS_SHARE = 4  # x_sorted is K times x: a quarter of the tokens keeps a round short
MODEL_TOKENS = 512
SHAPES = {
    **{name: s._replace(num_tokens=s.num_tokens // TOKENS_SHARE) for name, s in CPU_BENCH_SHAPES.items()},
    **{f"{name}-T{MODEL_TOKENS}": BenchShape(MODEL_TOKENS, *shape) for name, shape in MODEL_SHAPES.items()},
}


def make_exchange(shape: BenchShape, dtype: torch.dtype = torch.float32) -> steps.Exchange:
    """One routing for all contestants; x and its gate weights are leaves."""
    problem = Problem(shape, dtype)
    routing = route(problem.x.detach(), problem.weight, shape.top_k)
    routing = routing._replace(weights=routing.weights.detach().requires_grad_())
    return steps.Exchange(
        problem.x, routing, make_hidden_states(shape.num_tokens, shape.hidden_size, seed=3, dtype=dtype)
    )


def exchange_contest(shape: BenchShape) -> Contest:
    """All contestants of dispatch and combine at one shape, verified."""
    exchange = make_exchange(shape)
    functions = {
        "kmeans_route": steps.package_exchange,
        "index + gather": steps.plain_exchange(rivals.gather_combine),
        "index + scatter": steps.plain_exchange(rivals.scatter_combine),
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


def dispatch_contest(shape: BenchShape, dtype: torch.dtype = torch.float32, *, compiles: bool = False) -> Contest:
    """All contestants of dispatch at one shape, verified."""
    exchange = make_exchange(shape, dtype)
    d_sorted = make_hidden_states(shape.num_tokens * shape.top_k, shape.hidden_size, seed=4, dtype=dtype)
    functions = {"kmeans_route": steps.package_dispatch, "index": steps.plain_dispatch}
    _, not_run, versions = peers.split(peers.permutations())

    def try_out(function: steps.ExchangeFunction) -> None:
        torch.autograd.backward(function(exchange), d_sorted)
        steps.clear(exchange.x)

    compiled = rivals.compile_or_reason(steps.plain_dispatch, try_out, compiles=compiles)
    rivals.enter("index, compiled", compiled, functions, not_run)
    contest = Contest(
        f"dispatch, {shape}, {dtype}",
        [steps.dispatch_step(name, function, exchange, d_sorted) for name, function in functions.items()],
        baselines=["index"],
        note="plain PyTorch makes no positions, counts or offsets",
        not_run=not_run,
        versions=versions,
    )

    def check() -> None:
        for name, function in functions.items():
            checks.check_dispatch(name, function, exchange, d_sorted)

    contest.verify(check)
    return contest


def test_dispatch(shape: BenchShape, dtype: torch.dtype, bench: Bench) -> None:
    num_bytes = dtype.itemsize * shape.num_tokens * shape.hidden_size * (1 + shape.top_k) * 2
    contest = dispatch_contest(shape, dtype, compiles=bench.compiles)
    bench.run(contest, {"shape": shape._asdict(), "dtype": str(dtype), "floor_num_bytes": num_bytes})


def test_dispatch_and_combine(shape: BenchShape, bench: Bench) -> None:
    num_bytes = 4 * shape.num_tokens * shape.hidden_size * ((1 + shape.top_k) * 3 + (1 + 2 * shape.top_k))
    bench.run(exchange_contest(shape), {"shape": shape._asdict(), "floor_num_bytes": num_bytes})
