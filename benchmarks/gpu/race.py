"""Races and determinism: what only a GPU can show. Each function raises AssertionError, or returns figures.

`tests/kernels/test_gpu.py` and the GPU run call the same functions. On a CPU they take the same path without streams,
graphs and the device's own order of things, so that a dry run can execute them.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.checks import TAU, Problem, check_dispatch, check_routing
from benchmarks.gpu.measure import Outcome
from benchmarks.harness.truth import assert_close_to_truth
from kmeans_route import KMeansRouter, MoE, attach, dispatch, route
from kmeans_route.bench.clock import Clock
from kmeans_route.bench.truth import score_tolerance
from kmeans_route.kernels.route import route_fwd
from kmeans_route.types import Routing

ROUTED = ("indices", "weights", "selected_scores", "tokens_per_expert", "inv_norm")


def same_bits(make: Callable[[], Iterable[Tensor]], repeats: int) -> list[int]:
    """How many of `repeats` more calls differ from the first, for each tensor; nothing is read back in between."""
    first = tuple(make())
    differing = [torch.zeros((), dtype=torch.int64, device=tensor.device) for tensor in first]
    for _ in range(repeats):
        for count, one, other in zip(differing, make(), first, strict=True):
            count += (one != other).any()
    return [int(count) for count in differing]


def race(cell: Cell, clock: Clock, repeats: int = 200) -> Outcome:
    """Routing of x that lies in L2 against fp64, and its bits again and again.

    Alone, as a training forward launches it, and, a tenth as often, in whole training forwards, whose copies push x out
    of L2.
    """
    p = Problem(cell, clock.device, hot=True)
    directions, bias, x = p.directions, p.ours.expert_bias, p.x.detach()

    def trained() -> list[Tensor]:
        out = route_fwd(x, directions, bias, None, None, p.ours.options, want_std=True, want_rank=True)
        return [out.indices, out.weights, out.selected, out.counts, out.inv_norm, out.score_std, out.rank, out.offsets]

    def whole() -> list[Tensor]:
        p.ours.pending.clear_()
        routing, sent = p.forward(p.ours)
        pending = (p.ours.pending.sums, p.ours.pending.counts, p.ours.pending.std_sum)
        return [*fields(routing), sent.x_sorted.detach(), sent.positions, *(tensor.clone() for tensor in pending)]

    with torch.no_grad():
        routing = route_at(p)
        differing = {
            "eval": same_bits(lambda: fields(route_at(p)), repeats),
            "training": same_bits(trained, repeats),
        }
    differing["forward"] = same_bits(whole, max(2, repeats // 10))
    wrong = {name: counts for name, counts in differing.items() if any(counts)}
    assert not wrong, f"of {repeats} repeats so many differ, tensor by tensor: {wrong}"
    return {"repeats": repeats, **check_routing(p, routing)}


def route_at(p: Problem, backend: str = "triton") -> Routing:
    """Routing alone with the directions at hand. A router's own would be made anew inside of every graph."""
    return route(p.x, p.centroids, p.cell.top_k, p.bias, tau=TAU, directions=p.directions, backend=backend)


def fields(routing: Routing) -> list[Tensor]:
    """What must have the same bits every time."""
    return [getattr(routing, name).detach() for name in ROUTED]


def assert_same(one: Routing, other: Routing, what: str) -> None:
    """Bit for bit."""
    for name, a, b in zip(ROUTED, fields(one), fields(other), strict=True):
        assert torch.equal(a, b), f"{what}: {name} differs"


@torch.no_grad()
def streams(cell: Cell, clock: Clock, rounds: int = 50) -> Outcome:
    """Four streams beside each other: each has counters of its own."""
    problems = [Problem(cell, clock.device) for _ in range(4)]
    for seed, p in enumerate(problems):
        p.draw(seed)
    want = [route_at(p) for p in problems]
    lanes = [torch.cuda.Stream(clock.device) if clock.on_gpu else None for _ in problems]
    clock.wait()
    for _ in range(rounds):
        got = []
        for lane, p in zip(lanes, problems, strict=True):
            with nullcontext() if lane is None else torch.cuda.stream(lane):
                got.append(route_at(p))
        clock.wait()
        for one, other in zip(got, want, strict=True):
            assert_same(one, other, "streams beside each other")
    return {"rounds": rounds}


@torch.no_grad()
def graph_replay(cell: Cell, clock: Clock, rounds: int = 5) -> Outcome:
    """A captured routing and dispatch give the eager ones' bits, for new values in the same memory, beside eager
    calls."""
    p, held = Problem(cell, clock.device), dict[str, Any]()

    def run() -> None:
        held["routing"] = route_at(p)
        held["sent"] = dispatch(p.x, held["routing"], backend="triton")

    run()  # compiles, and makes the counters
    replay = captured(clock, run)
    for seed in range(rounds):
        p.draw(seed)
        want = route_at(p)
        replay()
        clock.wait()
        assert_same(held["routing"], want, "graph replay")
        check_dispatch(p, held["routing"], held["sent"])
    return {"rounds": rounds}


def captured(clock: Clock, run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a graph; it must be one on a GPU."""
    replay, method = clock.captured(run)
    assert method == "graph" or not clock.on_gpu, method
    return replay


def graph_follows_centroids(cell: Cell, clock: Clock, rounds: int = 3) -> Outcome:
    """A captured forward routes by the centroids of its replay, not by those of its capture."""
    p, held = Problem(cell, clock.device), dict[str, Any]()
    router, x = p.ours, p.x.detach()

    def run() -> None:
        held["output"] = router(x)

    with torch.no_grad():
        router.eval()
        run()
        replay = captured(clock, run)
        for seed in range(rounds):
            router.train()
            with torch.enable_grad():
                p.draw(seed)
                p.forward(router)
            router.commit()
            router.eval()
            want = router(x)
            replay()
            clock.wait()
            for name in ("indices", "weights"):
                assert torch.equal(getattr(held["output"], name), getattr(want, name)), f"{name} of a replay differ"
    return {"rounds": rounds}


def same_sums(cell: Cell, clock: Clock, repeats: int = 100) -> Outcome:
    """Centroid sums, counts and score spread of whole training forwards have the same bits every time."""
    p = Problem(cell, clock.device)

    def run() -> list[Tensor]:
        p.ours.pending.clear_()
        p.forward(p.ours)
        return [t.clone() for t in (p.ours.pending.sums, p.ours.pending.counts, p.ours.pending.std_sum)]

    differing = same_bits(run, repeats)
    assert not any(differing), f"sums, counts, spread: so many of {repeats} differ: {differing}"
    return {"repeats": repeats}


def make_layer(cell: Cell, clock: Clock, backend: str, dtype: torch.dtype | None = None) -> MoE:
    """A mixture layer of that cell's router; half as wide inside. Equal weights for equal cells."""
    torch.manual_seed(1)
    layer = MoE(
        cell.hidden_size, cell.hidden_size // 2, cell.num_experts, cell.top_k, "kmeans", backend=backend, init="normal"
    )
    layer = layer.to(device=clock.device, dtype=getattr(torch, cell.dtype))
    return layer if dtype is None else layer.to(dtype)


def no_sync(cell: Cell, clock: Clock) -> Outcome:
    """Training steps of a layer, its commits included, make the host wait for nothing."""
    layer = make_layer(cell, clock, "triton")
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    attach(layer, optimizer)
    x = torch.randn(cell.num_tokens, cell.hidden_size, device=clock.device, dtype=getattr(torch, cell.dtype))
    for step in range(4):
        with clock.no_sync() if step > 1 else nullcontext():
            layer(x).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert isinstance(layer.router, KMeansRouter)
    assert int(layer.router.steps) == 4, "the layer did not commit each step"
    return {}


def layer_against_torch(cell: Cell, clock: Clock) -> Outcome:
    """A mixture layer's output, gradients and centroid sums: no further from fp64 than the plain PyTorch backend's.

    All three send tokens to the experts that the kernels choose; whether those are right is checked elsewhere. What a
    score may be off, a gate is off by twice that over tau, and every result in proportion.
    """
    dtype = getattr(torch, cell.dtype)
    x = torch.randn(cell.num_tokens, cell.hidden_size, device=clock.device, dtype=dtype)
    routing = make_layer(cell, clock, "triton").router.route(x)
    gates_off = 2 * score_tolerance(cell.hidden_size, routing.selected_scores) / TAU
    results = []
    for backend, kind in (("triton", dtype), ("torch", dtype), ("torch", torch.float64)):
        layer, leaf = make_layer(cell, clock, backend, kind), x.to(kind).detach().requires_grad_()
        layer.router.commit()  # nothing is pending: it only says that commits are made by hand
        y = layer(leaf, indices=None if backend == "triton" else routing.indices)
        (y if kind == torch.float64 else y.float()).square().sum().backward()
        assert isinstance(layer.router, KMeansRouter)
        results.append([y, leaf.grad, layer.experts.gate_up.grad, layer.experts.down.grad, layer.router.pending.sums])
    for name, ours, plain, exact in zip(("y", "dx", "d gate_up", "d down", "sums"), *results, strict=True):
        exact = exact.detach().double()
        tolerance = (2 * torch.finfo(ours.dtype).eps + gates_off) * float(exact.abs().max())
        assert_close_to_truth(ours, exact, plain, tolerance=tolerance, name=name)
    return {}
