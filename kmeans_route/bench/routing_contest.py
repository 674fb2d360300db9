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

from kmeans_route import KMeansRouter, Routing, centroid_sums, directions, route
from kmeans_route.bench import baselines, truth
from kmeans_route.bench.clock import Clock, reason
from kmeans_route.bench.contest import Contest, Contestant, NotVerifiedError
from kmeans_route.checks import DEFAULT_TAU as TAU
from kmeans_route.testing import BenchShape, assert_same_selection, make_centroids, make_hidden_states

OURS = "kmeans_route"
RIVALS = ("eager", "compiled reference", "learned", "learned compiled", "textbook")
QUICK_RIVALS = tuple(name for name in RIVALS if "compiled" not in name)
"""Those that need no compiler."""
MODES = ("eval", "train")


class Entry(NamedTuple):
    """step: what is timed. check: raises AssertionError where the contestant is wrong."""

    step: Callable[[], object]
    check: Callable[[], None]


class Setting:
    """One input for all: x (T, D), a leaf in the dtype; centroids (E, D) fp32 unit rows; weight, the same in the dtype
    for the learned router; d_weights (T, K) fp32, the gradient of the gates."""

    def __init__(self, shape: BenchShape, dtype: torch.dtype, device: torch.device, mode: str) -> None:
        self.shape, self.mode, self.device = shape, mode, device
        self.x = make_hidden_states(
            shape.num_tokens, shape.hidden_size, num_clusters=4 * shape.num_experts, spread=1.0, offset=0.5,
            dtype=dtype, device=device,
        ).requires_grad_(mode == "train")  # fmt: skip
        self.centroids = make_centroids(shape.num_experts, shape.hidden_size, device=device)
        self.directions = directions(self.centroids, dtype)
        self.weight = self.centroids.to(dtype, copy=True).requires_grad_(mode == "train")
        self.no_bias = torch.zeros(shape.num_experts, device=device)
        self.d_weights = make_hidden_states(shape.num_tokens, shape.top_k, seed=2, device=device)
        self.d_gates = self.d_weights.to(dtype)

    @property
    def plain_backend(self) -> str:
        """Plain PyTorch that is not what "auto" runs: its backend on a GPU, the definition on a CPU."""
        return "torch" if self.device.type == "cuda" else "reference"


class ClockedContest(Contest):
    """A contest timed by a `Clock`: on a GPU replayed graphs between events with a cold L2, on a CPU the wall clock.

    method: contestant -> how it was timed. peak_bytes: contestant -> most memory that a call allocates, on a GPU.
    """

    def __init__(self, clock: Clock, title: str, contestants: list[Contestant], baselines: list[str]) -> None:
        super().__init__(title, contestants, baselines)
        self.clock = clock
        self.method: dict[str, str] = {}
        self.peak_bytes: dict[str, int | None] = {}
        self._timed: dict[str, Callable[[], object]] = {}

    def warm_up(self, rounds: int = 1) -> None:
        """Call everyone until all is compiled, and make the graphs."""
        self._check_verified()
        with self.clock.scope():
            for name, step, reset in self.contestants:
                for _ in range(rounds):
                    self.peak_bytes[name] = self.clock.warm_up(step, reset)
                self._timed[name], self.method[name] = self.clock.captured(step)

    def round(self) -> None:
        """One step of each contestant, timed, in the order of this round."""
        self._check_verified()
        if not self._timed:
            raise NotVerifiedError(f"{self.title}: call warm_up() before the first round")
        with self.clock.scope():
            for name, _, reset in self.order():
                (time_us,) = self.clock.samples_us(self._timed[name], reset)
                self.times_ms[name].append(time_us / 1e3)


def routing_contest(
    title: str, setting: Setting, rivals: list[str], clock: Clock
) -> tuple[ClockedContest, dict[str, str]]:
    """The contest, verified, and rival -> reason for those that cannot run.

    Raises:
        AssertionError: a contestant is wrong; the message begins with its name. RuntimeError: this package cannot run.
    """
    entries, skipped = {}, {}
    with clock.scope():
        for name, make in makers(setting, rivals).items():
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


def makers(s: Setting, rivals: list[str]) -> dict[str, Callable[[], Entry]]:
    """Contestant -> maker, this package first. In training "learned" brings both orders of its operations."""
    train = s.mode == "train"
    one = _training_entry if train else _eval_entry
    learned = baselines.softmax_aux if train else baselines.softmax_plain
    known: dict[str, Callable[[], Entry]] = {
        "eager": partial(one, s, s.plain_backend),
        "compiled reference": partial(_compiled_reference, s),
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


def _eval_entry(s: Setting, backend: str) -> Entry:
    def step() -> Routing:
        return route(s.x, s.centroids, s.shape.top_k, tau=TAU, directions=s.directions, backend=backend)

    return Entry(step, lambda: _check(s, step()))


def _training_entry(s: Setting, backend: str) -> Entry:
    shape = s.shape
    router = KMeansRouter(
        shape.hidden_size, shape.num_experts, shape.top_k, tau=TAU, backend=backend, device=s.device
    ).train()
    router.set_centroids(s.centroids)
    router.commit()  # nothing is pending: it tells the router that commits come by hand, so it does not warn

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(router(s.x).weights, s.x, s.d_weights)

    def check() -> None:
        router.pending.clear_()
        routing = router(s.x, details=True)
        (dx,) = torch.autograd.grad(routing.weights, s.x, s.d_weights)
        _check(s, routing, dx, router.pending.sums)

    return Entry(step, check)


def _compiled_reference(s: Setting) -> Entry:
    top_k = s.shape.top_k

    def routed(x: Tensor, centroids: Tensor, at_hand: Tensor) -> Routing:
        return route(x, centroids, top_k, tau=TAU, directions=at_hand, backend="reference")

    def trained(x: Tensor, centroids: Tensor) -> tuple[Routing, Tensor]:
        routing = route(x, centroids, top_k, tau=TAU, backend="reference")
        return routing, centroid_sums(x, routing, backend="reference")[0]

    if s.mode == "eval":
        compiled = torch.compile(routed, dynamic=False)
        return Entry(
            lambda: compiled(s.x, s.centroids, s.directions),
            lambda: _check(s, compiled(s.x, s.centroids, s.directions)),
        )
    both = torch.compile(trained, dynamic=False)

    def check() -> None:
        routing, sums = both(s.x, s.centroids)
        (dx,) = torch.autograd.grad(routing.weights, s.x, s.d_weights)
        _check(s, routing, dx, sums)

    return Entry(lambda: torch.autograd.grad(both(s.x, s.centroids)[0].weights, s.x, s.d_weights), check)


def _learned(s: Setting, function: baselines.LearnedFunction, *, compiles: bool = False) -> Entry:
    call: baselines.LearnedFunction = torch.compile(function, dynamic=False) if compiles else function

    def gradients(result: baselines.LearnedResult) -> tuple[Tensor, ...]:
        assert result.aux_loss is not None
        return torch.autograd.grad([result.weights, result.aux_loss], [s.x, s.weight], [s.d_gates, None])

    def step() -> object:
        result = call(s.x, s.weight, s.shape.top_k)
        return result if result.aux_loss is None else gradients(result)

    def check() -> None:
        result = call(s.x, s.weight, s.shape.top_k)
        truth.check_learned(s.x, s.weight, result.weights, result.indices)
        if result.aux_loss is not None:
            _check_learned_gradients(s, result, gradients(result))

    return Entry(step, check)


def _textbook(s: Setting) -> Entry:
    textbook = baselines.TextbookKMeansRouter(s.centroids.to(s.x.dtype, copy=True), s.shape.top_k, tau=TAU)

    def step() -> object:
        weights, _ = textbook(s.x, update=s.mode == "train")
        return torch.autograd.grad(weights, s.x, s.d_gates) if s.mode == "train" else weights

    def check() -> None:
        textbook.centroids.copy_(s.centroids)
        weights, ids = textbook(s.x.detach(), update=False)
        eps = torch.finfo(s.x.dtype).eps
        for rows in truth.chunks(len(ids)):
            scores = truth.cosines(s.x.detach()[rows], s.directions)
            # It rounds the unit rows and the scores to the dtype: in 16 bits most rows have near-ties.
            tolerance = truth.score_tolerance(s.shape.hidden_size, scores) + 4 * eps * float(scores.abs().max())
            cap = truth.NEAR_TIE_CAP if eps < 1e-6 else 1.0
            assert_same_selection(ids[rows], scores, tolerance=tolerance, cap=cap)
            gates = (scores.gather(1, ids[rows]) / TAU).softmax(1)
            off = float((weights[rows].double() - gates).abs().max())
            assert off <= 2 * tolerance / TAU + 4 * eps, f"gates: error {off:.2e}"

    return Entry(step, check)


def _check(s: Setting, routing: Routing, dx: Tensor | None = None, sums: Tensor | None = None) -> None:
    truth.check_routing(s.x, s.directions, s.no_bias, TAU, routing)
    if sums is not None:
        truth.check_sums(s.x, routing.indices, sums)
    if dx is not None:
        for rows in truth.chunks(len(dx)):
            exact = truth.gate_gradient(s.x[rows], s.directions, TAU, routing.indices[rows], s.d_weights[rows])
            truth.assert_near("dx", dx[rows], exact)


def _check_learned_gradients(s: Setting, result: baselines.LearnedResult, got: tuple[Tensor, ...]) -> None:
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
