"""Contests of routing alone and of a training step, at any shape, in any dtype, on a CPU or a GPU.

In mode "eval" a contestant routes with what inference has at hand. In mode "train" it goes forward, gathers the
statistics or the auxiliary loss of its method, and goes backward to x and to whatever parameters it has. Everyone gets
the same x and the same (E, D) weight, and is checked against fp64 before anything is timed.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kmeans_route import Routing, centroid_sums, route
from kmeans_route.bench import baselines, truth
from kmeans_route.bench.clock import Clock, reason
from kmeans_route.bench.contest import ClockedContest, Contestant
from kmeans_route.bench.problem import Problem
from kmeans_route.checks import DEFAULT_TAU as TAU

OURS = "kmeans_route"
CONTESTANTS = {
    OURS: "a K-Means router as this package runs it",
    "eager": "the same router in plain PyTorch, an operation at a time",
    "compiled reference": "its definition under torch.compile",
    "learned": "a learned softmax router in plain PyTorch; in mode train with the auxiliary loss of Switch Transformer",
    "learned, topk first": "the same function in another order of operations, in mode train",
    "learned compiled": "the learned router under torch.compile",
    "textbook": "a first reading of the paper: K-Means whose centroids move one expert after another, in a Python loop",
}
"""Contestant -> what it is."""
RIVALS = ("eager", "compiled reference", "learned", "learned compiled", "textbook")
QUICK_RIVALS = tuple(name for name in RIVALS if "compiled" not in name)
"""Those that need no compiler."""
MODES = ("eval", "train")


class Entry(NamedTuple):
    """step: what is timed. check: raises AssertionError where the contestant is wrong."""

    step: Callable[[], object]
    check: Callable[[], None]


def routing_contest(
    title: str,
    problem: Problem,
    rivals: list[str],
    clock: Clock,
    told: Callable[[str], object] = lambda name: None,
) -> tuple[ClockedContest, dict[str, str]]:
    """The contest, verified, and rival -> reason for those that cannot run. told: called with the name of each before
    its first step, in which it may compile.

    A contestant that is wrong is an AssertionError that begins with its name; that this package cannot run, a
    RuntimeError.
    """
    entries, skipped = {}, {}
    with clock.scope():
        for name, make in makers(problem, rivals).items():
            told(name)
            try:
                entries[name] = make()
                entries[name].step()
            except Exception as error:
                entries.pop(name, None)
                if name == OURS:
                    raise RuntimeError(f"{OURS} cannot run here: {reason(error)}") from error
                skipped[name] = reason(error)
        contest = ClockedContest(
            clock, title, [Contestant(name, entry.step) for name, entry in entries.items()], [OURS]
        )

        def check() -> None:
            for name, entry in entries.items():
                try:
                    entry.check()
                except AssertionError as error:
                    raise AssertionError(f"{name}: {error}") from error

        contest.verify(check)
    return contest, skipped


def makers(s: Problem, rivals: list[str]) -> dict[str, Callable[[], Entry]]:
    """Contestant -> maker, this package first. In training "learned" brings both orders of its operations."""
    train = s.mode == "train"
    one = _training if train else _eval
    learned = baselines.softmax_aux if train else baselines.softmax_plain
    known: dict[str, Callable[[], Entry]] = {
        "eager": partial(one, s, "torch" if s.device.type == "cuda" else "reference"),  # not what "auto" runs
        "compiled reference": partial(_training_compiled, s)
        if train
        else partial(_eval, s, "reference", compiles=True),
        "learned": partial(_learned, s, learned),
        "learned compiled": partial(_learned, s, learned, compiles=True),
        "textbook": partial(_textbook, s),
    }
    made: dict[str, Callable[[], Entry]] = {OURS: partial(one, s, "auto")}
    for name in rivals:
        made[name] = known[name]
        if train and name == "learned":
            made["learned, topk first"] = partial(_learned, s, baselines.softmax_aux_topk_first)
    return made


def _eval(s: Problem, backend: str, *, compiles: bool = False) -> Entry:
    def routed(x: Tensor, centroids: Tensor, at_hand: Tensor) -> Routing:
        return route(x, centroids, s.shape.top_k, tau=TAU, directions=at_hand, backend=backend)

    step = partial(torch.compile(routed, dynamic=False) if compiles else routed, s.x, s.centroids, s.directions)
    return Entry(step, lambda: _check(s, step()))


def _training(s: Problem, backend: str) -> Entry:
    router = s.router(backend)

    def check() -> None:
        router.pending.clear_()
        seen: list[Routing] = []
        watch = router.observe(lambda _, routing: seen.append(routing))
        out = router(s.x)
        watch.remove()
        _check(s, seen[0]._replace(weights=out.weights, indices=out.indices), router.pending.sums)

    return Entry(lambda: torch.autograd.grad(router(s.x).weights, s.x, s.d_weights), check)


def _training_compiled(s: Problem) -> Entry:
    def trained(x: Tensor, centroids: Tensor) -> tuple[Routing, Tensor]:
        routing = route(x, centroids, s.shape.top_k, tau=TAU, backend="reference")
        return routing, centroid_sums(x, routing, backend="reference")[0]

    both = partial(torch.compile(trained, dynamic=False), s.x, s.centroids)
    return Entry(lambda: torch.autograd.grad(both()[0].weights, s.x, s.d_weights), lambda: _check(s, *both()))


def _learned(s: Problem, function: baselines.LearnedFunction, *, compiles: bool = False) -> Entry:
    weight = s.weight.detach().requires_grad_(s.mode == "train")
    run = partial(torch.compile(function, dynamic=False) if compiles else function, s.x, weight, s.shape.top_k)

    def gradients(result: baselines.LearnedResult) -> tuple[Tensor, ...]:
        assert result.aux_loss is not None
        return torch.autograd.grad([result.weights, result.aux_loss], [s.x, weight], [s.d_gates, None])

    def step() -> object:
        result = run()
        return result if result.aux_loss is None else gradients(result)

    def check() -> None:
        result = run()
        truth.check_learned(s.x, s.weight, result.weights, result.indices)
        if result.aux_loss is not None:
            _check_learned_gradients(s, result, gradients(result))

    return Entry(step, check)


def _textbook(s: Problem) -> Entry:
    textbook = baselines.TextbookKMeansRouter(s.centroids.to(s.x.dtype, copy=True), s.shape.top_k, tau=TAU)

    def step() -> object:
        weights, _ = textbook(s.x, update=s.mode == "train")
        return torch.autograd.grad(weights, s.x, s.d_gates) if s.mode == "train" else weights

    def check() -> None:
        textbook.centroids.copy_(s.centroids)
        weights, ids = textbook(s.x.detach(), update=False)
        for rows in truth.chunks(len(ids)):
            scores = truth.cosines(s.x.detach()[rows], s.directions)
            # It rounds the unit rows and the scores to the dtype.
            rounding = 4 * torch.finfo(s.x.dtype).eps * float(scores.abs().max())
            tolerance = truth.score_tolerance(s.shape.hidden_size, scores) + rounding
            truth.check_selection(ids[rows], weights[rows], scores, TAU, tolerance, s.x.dtype)

    return Entry(step, check)


def _check(s: Problem, routing: Routing, sums: Tensor | None = None) -> None:
    """Of one that trained, by its sums (E, D), the gradient in x too."""
    truth.check_routing(s.x, s.directions, s.bias, TAU, routing)
    if sums is None:
        return
    truth.check_sums(s.x, routing.indices, sums)
    (dx,) = torch.autograd.grad(routing.weights, s.x, s.d_weights)
    for rows in truth.chunks(len(dx)):
        exact = truth.gate_gradient(s.x[rows], s.directions, TAU, routing.indices[rows], s.d_weights[rows])
        truth.assert_near("dx", dx[rows], exact)


def _check_learned_gradients(s: Problem, result: baselines.LearnedResult, got: tuple[Tensor, ...]) -> None:
    """Gradients in x and weight of gates and auxiliary loss at the given ids, against autograd in fp64."""
    x, weight = (t.detach().double().requires_grad_() for t in (s.x, s.weight))
    logits = x @ weight.T
    loss = baselines.switch_loss(logits.softmax(1), result.indices)
    gates = logits.gather(1, result.indices).softmax(1)
    exact = torch.autograd.grad([gates, loss], [x, weight], [s.d_gates.double(), None])
    # Probabilities are rounded to the dtype on the way there and back.
    slack = 1e-4 + 16 * torch.finfo(s.x.dtype).eps
    for name, one, other in zip(("dx", "d weight"), got, exact, strict=True):
        off, largest = float((one.double() - other).abs().max()), float(other.abs().max())
        assert off <= slack * largest, f"{name}: error {off:.2e}, largest value {largest:.2e}"
