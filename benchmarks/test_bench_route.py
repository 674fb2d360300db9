"""Routing: a K-Means training step against a learned router's, and routing alone against its own parts.

The claim: forward, backward and the adding of statistics, with all its checks for ties, masks and bad tokens, take no
longer than the training step of a learned softmax router, in plain PyTorch on the same threads. With auxiliary loss
the quicker of two eager orders counts; without it the goal is the same and the aim 0.85. Routing alone should take at
most the product, the norms and the top-k that it consists of, and aims at 1.35 of the product.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import Bench
from benchmarks.harness import checks, peers, rivals, steps
from benchmarks.harness.contest import Contest, Goal
from benchmarks.harness.shapes import CPU_BENCH_SHAPES
from kmeans_route import KMeansRouter, directions
from kmeans_route.bench import baselines
from kmeans_route.bench.contest import Contestant
from kmeans_route.bench.problem import Problem
from kmeans_route.testing import MODEL_SHAPES, BenchShape

MODEL_TOKENS = 1024  # few for a training step, enough to be no decoding: DeepSeek-V3's takes a second
SHAPES = {
    **CPU_BENCH_SHAPES,
    **{f"{name}-T{MODEL_TOKENS}": BenchShape(MODEL_TOKENS, *shape) for name, shape in MODEL_SHAPES.items()},
}
WITH_LOSS = ["softmax + aux", "softmax + aux, topk first"]
WITHOUT_LOSS = "softmax, no aux"
PRODUCT, NORM, TOPK = "the product x W^T", "one vector_norm", "one topk"
EVAL_GOALS = [Goal("kmeans_route", (PRODUCT, NORM, TOPK), 1.0), Goal("kmeans_route", (PRODUCT,), 1.35)]
Routed = Callable[[], tuple[Tensor, Tensor]]


def training_contest(shape: BenchShape, *, compiles: bool) -> Contest:
    """All contestants of the training step at one shape, verified."""
    problem = Problem(shape)
    router = steps.make_kmeans_router(problem)
    running, not_run, versions = peers.split(peers.routers(shape))
    learned = dict(rivals.LEARNED)
    routers = {"kmeans_route": router}

    def try_out(function: baselines.LearnedFunction) -> None:
        step = steps.learned_step("", function, problem)
        step.step()
        step.reset()

    for name, function in rivals.LEARNED.items():
        compiled = rivals.compile_or_reason(function, try_out, compiles=compiles)
        rivals.enter(f"{name}, compiled", compiled, learned, not_run)
    reference = compiled_reference(router, problem, compiles=compiles)
    rivals.enter("reference, compiled", reference, routers, not_run)
    learned_steps = {**learned, **{name: peer.function for name, peer in running.items() if peer.function}}
    contest = Contest(
        f"training step, {shape}",
        [
            *(steps.kmeans_step(problem, one, name) for name, one in routers.items()),
            *(steps.learned_step(name, function, problem) for name, function in learned_steps.items()),
            steps.textbook_step(problem, router),
            steps.commit_step(problem),
        ],
        baselines=WITH_LOSS,
        note="ratios refer to the quicker of the two eager orders of the learned router with auxiliary loss; "
        "transformers' routers have none here",
        goals=[*(Goal("kmeans_route", (name,), 1.0) for name in WITH_LOSS),
               Goal("kmeans_route", (WITHOUT_LOSS,), 1.0, aim=0.85)],
        not_run=not_run,
        versions=versions,
    )  # fmt: skip

    def check() -> None:
        for one in routers.values():
            checks.check_kmeans(one, problem)
        checks.check_textbook(router, problem)
        for name, function in learned_steps.items():
            peer = running.get(name)
            if peer and peer.kind == "sigmoid":
                checks.check_sigmoid(name, function, problem, peer.groups)
            else:
                checks.check_learned(name, function, problem)

    contest.verify(check)
    return contest


def compiled_reference(router: KMeansRouter, problem: Problem, *, compiles: bool) -> KMeansRouter | str:
    """The router on the backend "reference" under torch.compile, forward and backward, or why it is not."""

    def try_out(module: KMeansRouter) -> None:
        torch.autograd.backward(module(problem.x).weights, problem.d_weights)
        steps.clear(problem.x)

    return rivals.compile_or_reason(steps.make_reference_router(router), try_out, compiles=compiles)


@torch.no_grad()
def compiled_eval(function: Callable[..., Any], *args: Any, compiles: bool) -> Routed | str:
    """Gates and ids of `function` under torch.compile, or why there are none."""
    compiled = rivals.compile_or_reason(function, lambda made: made(*args), compiles=compiles)
    return compiled if isinstance(compiled, str) else partial(first_two, compiled, *args)


def first_two(function: Callable[..., Any], *args: Any) -> tuple[Tensor, Tensor]:
    """Gates and ids of what `function` returns."""
    gates, indices = function(*args)[:2]
    return gates, indices


def eval_contest(shape: BenchShape, dtype: torch.dtype = torch.float32, *, compiles: bool = False) -> Contest:
    """Routing without gradient at one shape, verified; to be run with gradients off.

    The router makes its directions anew in each call, which shows where T is small. A frozen one, which keeps them, has
    a row of its own.
    """
    router = steps.make_kmeans_router(Problem(shape)).eval()
    problem = Problem(shape, dtype)
    x, weight, top_k = problem.x.detach(), problem.weight, shape.top_k
    unit = directions(router.weight, dtype)
    scores = F.linear(x, unit)
    running, not_run, versions = peers.split(peers.routers(shape))
    textbook = baselines.TextbookKMeansRouter(router.weight.to(dtype), top_k)
    cosine: dict[str, Routed] = {
        "kmeans_route": partial(first_two, router, x),
        "kmeans_route, frozen": partial(first_two, copy.deepcopy(router).freeze(), x),
        "textbook K-Means": lambda: textbook(x, update=False),
    }
    learned: dict[str, Routed] = {WITHOUT_LOSS: partial(first_two, baselines.softmax_plain, x, weight, top_k)}
    for name, peer in running.items():
        assert peer.function
        learned[name] = partial(first_two, peer.function, x, weight, top_k)
    for name, kind, function, given in (
        ("reference, compiled", cosine, steps.reference_route, (x, router, unit)),
        (f"{WITHOUT_LOSS}, compiled", learned, baselines.softmax_plain, (x, weight, top_k)),
    ):
        rivals.enter(name, compiled_eval(function, *given, compiles=compiles), kind, not_run)
    parts: dict[str, Callable[[], Tensor]] = {
        PRODUCT: lambda: F.linear(x, unit),
        NORM: lambda: torch.linalg.vector_norm(x, dim=1),
        TOPK: lambda: scores.topk(top_k, dim=1)[0],
        "one copy of x": x.clone,
    }
    contest = Contest(
        f"routing alone, {shape}, {dtype}",
        [Contestant(name, step) for name, step in {**cosine, **learned, **parts}.items()],
        baselines=[WITHOUT_LOSS],
        note="the learned router needs neither norms nor exact ties",
        goals=EVAL_GOALS if dtype == torch.float32 else [],  # a 16-bit product is slower than fp32 on many CPUs
        not_run=not_run,
        versions=versions,
    )

    def check() -> None:
        cosines = F.normalize(x.double()) @ unit.double().T
        plain = F.linear(F.normalize(x), unit)
        error, allowed = (
            float((values.double() - cosines).abs().max())
            for values in (parts[PRODUCT]().double() / parts[NORM]()[:, None], plain)
        )
        allowed = 2 * allowed + 4 * torch.finfo(dtype).eps
        assert error <= allowed, f"product over norm is off by {error:.3e}, allowed {allowed:.3e}"
        assert torch.equal(parts[TOPK](), scores.sort(dim=1, descending=True).values[:, :top_k])
        for name, routed in cosine.items():
            checks.check_routed(name, *routed(), cosines, router.options.tau, plain)
        logits = x.double() @ weight.double().T
        for name, routed in learned.items():
            if name not in running or running[name].kind == "softmax":
                checks.check_routed(name, *routed(), logits, 1.0, F.linear(x, weight))
        for name, peer in running.items():
            if peer.kind == "sigmoid" and peer.function:
                checks.check_sigmoid(name, peer.function, problem, peer.groups)

    contest.verify(check)
    return contest


def test_training_step(shape: BenchShape, bench: Bench) -> None:
    contest = training_contest(shape, compiles=bench.compiles)
    bench.run(contest, {"shape": shape._asdict(), "max_ratio": bench.max_ratio})
    if bench.max_ratio:
        assert contest.ratio("kmeans_route") <= bench.max_ratio, f"slower than the learned router:\n{contest.table()}"


def test_eval(shape: BenchShape, dtype: torch.dtype, bench: Bench) -> None:
    contest = eval_contest(shape, dtype, compiles=bench.compiles)
    with torch.no_grad():
        bench.run(contest, {"shape": shape._asdict(), "dtype": str(dtype), "floor_num_bytes": eval_bytes(shape, dtype)})


def eval_bytes(shape: BenchShape, dtype: torch.dtype) -> int:
    """What routing alone cannot do without: one read of x and of the directions."""
    return (shape.num_tokens + shape.num_experts) * shape.hidden_size * dtype.itemsize
