"""The problem of one cell of the GPU run, and the checks that the package must pass before anything of it is timed.

A cell is one shape at one T. Every check compares with a plain fp64 computation on the same device, in chunks of rows,
so that no (T, E) or (T, K, D) in fp64 exists at once.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kmeans_route import KMeansRouter, combine, directions, reference
from kmeans_route.bench import truth
from kmeans_route.bench.clock import Outcome, reason
from kmeans_route.bench.truth import CHUNK, assert_near, chunks, cosines
from kmeans_route.checks import DEFAULT_TAU as TAU
from kmeans_route.functional import directions_for
from kmeans_route.testing import make_centroids
from kmeans_route.types import Dispatch, Routing


class Cell(NamedTuple):
    """One shape at one T. dtype: of the hidden states, by its name in torch."""

    shape: str
    num_tokens: int
    hidden_size: int
    num_experts: int
    top_k: int
    dtype: str = "bfloat16"


class Problem:
    """Inputs of a cell, drawn on the device, and the two routers: this package's kernels and its eager backend.

    x (T, D). rows (T*K, D): the gradient of x_sorted, and expert outputs. dy (T, D). d_weights (T, K), scaled by D so
    that both ways back to x weigh about the same.
    """

    def __init__(self, cell: Cell, device: torch.device) -> None:
        (self.cell, self.device), dtype = (cell, device), getattr(torch, cell.dtype)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=kind)

        num_tokens, width, num_experts, top_k = cell[1:5]
        self.x = normal(num_tokens, width).requires_grad_()
        self.rows, self.dy = normal(num_tokens * top_k, width), normal(num_tokens, width)
        self.d_weights = normal(num_tokens, top_k, kind=torch.float32) * width
        self.centroids = make_centroids(num_experts, width, device=device)
        self.bias = normal(num_experts, kind=torch.float32) * 0.1 * width**-0.5
        self.learned_weight = self.centroids.to(dtype).requires_grad_()
        self.ours, self.eager = self._router("triton"), self._router("torch")
        self.directions = directions(self.centroids, dtype)

    def _router(self, backend: str) -> KMeansRouter:
        cell = self.cell
        router = KMeansRouter(
            cell.hidden_size, cell.num_experts, cell.top_k, tau=TAU, backend=backend, device=self.device
        )
        router.set_centroids(self.centroids)
        router.expert_bias.copy_(self.bias)
        router.commit()  # nothing is pending: it only says that commits are made by hand
        return router.train()

    def forward(self, router: KMeansRouter) -> tuple[Routing, Dispatch]:
        """A training forward, with the directions made anew as after every commit."""
        router._cached = None
        return router(self.x, with_dispatch=True)

    def backward(self, outputs: tuple[Tensor, Tensor], wrt: tuple[Tensor, ...], *, keep: bool = False) -> Any:
        """Gradients of gates and sorted copies in `wrt`. keep: the outputs serve again."""
        grads = (self.d_weights.to(outputs[0].dtype), self.rows)
        return torch.autograd.grad(outputs, wrt, grads, retain_graph=keep)


def check_routing(p: Problem, routing: Routing, num_rows: int | None = None) -> Outcome:
    """ids, selected scores, gates and counts against fp64; near-ties are counted."""
    return truth.check_routing(p.x, p.directions, p.bias, TAU, routing, num_rows)


def check_dispatch(p: Problem, routing: Routing, sent: Dispatch) -> Outcome:
    """The order of a stable sort by expert, bit for bit."""
    order = routing.indices.flatten().sort(stable=True).indices
    tokens = order // p.cell.top_k
    assert torch.equal(sent.token_of_row, tokens), "token_of_row is not the stable order"
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=p.device))
    assert torch.equal(sent.positions.flatten(), places), "positions are not the stable order"
    assert torch.equal(sent.offsets[1:].long(), routing.tokens_per_expert.cumsum(0)), "offsets are not the counts' sum"
    for rows in chunks(order.numel()):
        assert torch.equal(sent.x_sorted.detach()[rows], p.x.detach()[tokens[rows]]), f"x_sorted differs in {rows}"
    return {}


def check_statistics(p: Problem, routing: Routing) -> Outcome:
    """Pending sums, counts and score spread."""
    pending, cell, x = p.ours.pending, p.cell, p.x.detach()
    truth.check_sums(x, routing.indices, pending.sums)
    spread = sum(float(cosines(x[rows], p.directions).std(dim=1, correction=0).sum()) for rows in chunks(len(x)))
    assert torch.equal(pending.counts, routing.tokens_per_expert), "pending counts differ"
    assert int(pending.num_tokens) == cell.num_tokens, "pending num_tokens differs"
    assert abs(float(pending.std_sum) - spread) <= 1e-3 * spread, "the sum of the scores' spreads differs"
    return {}


def check_backward(p: Problem, routing: Routing, sent: Dispatch) -> Outcome:
    """dx of gates and copies together against autograd in fp64."""
    (dx,) = p.backward((routing.weights, sent.x_sorted), (p.x,), keep=True)
    check_dx(p, routing, sent, dx, p.cell.num_tokens)
    return {}


def check_dx(p: Problem, routing: Routing, sent: Dispatch, dx: Tensor, num_rows: int) -> None:
    """The first rows of dx against autograd in fp64."""
    for rows in chunks(num_rows, CHUNK // 4):
        gates = truth.gate_gradient(p.x[rows], p.directions, TAU, routing.indices[rows], p.d_weights[rows])
        assert_near("dx", dx[rows], gates + p.rows[sent.positions[rows]].double().sum(1))


def check_combine(p: Problem, routing: Routing, sent: Dispatch) -> Outcome:
    """y, d y_sorted and d weights against the definition."""
    leaf, routing = gate_leaf(p, routing)
    y = combine(leaf, routing, sent, backend="triton")
    d_rows, d_weights = torch.autograd.grad(y, (leaf, routing.weights), p.dy)
    for rows in chunks(p.cell.num_tokens, CHUNK // 4):
        place, w = sent.positions[rows], routing.weights.detach()[rows].double()
        outputs, dy = p.rows[place].double(), p.dy[rows].double()
        assert_near("combine", y.detach()[rows], (w[:, :, None] * outputs).sum(1))
        assert_near("d y_sorted", d_rows[place], w[:, :, None] * dy[:, None])
        assert_near("d weights", d_weights[rows], (outputs * dy[:, None]).sum(2))
    return {}


def gate_leaf(p: Problem, routing: Routing) -> tuple[Tensor, Routing]:
    """Expert outputs and gates as leaves that want gradients."""
    weights = routing.weights.detach().clone().requires_grad_()
    return p.rows.detach().requires_grad_(), routing._replace(weights=weights)


def check_commit(p: Problem) -> Outcome:
    """Centroids, bias and score scale after a commit against the reference; the state is put back."""
    r, pending = p.ours, p.ours.pending
    old = reference.State(*(t.clone() for t in (r.weight, r.expert_bias, r.score_std, r.steps)), None)
    gathered = [t.clone() for t in (pending.sums, pending.counts, pending.std_sum, pending.num_tokens)]
    new = reference.commit_reference(old, *gathered, pending.margin_hist, r.commit_options)
    r.commit()
    for name, actual in (("weight", r.weight), ("expert_bias", r.expert_bias), ("score_std", r.score_std)):
        assert_near(name, actual, getattr(new, name))
    assert int(r.steps) == int(new.steps), "steps differ"
    assert not bool(pending.counts.any()), "pending counts were not emptied"
    assert not bool(pending.sums.any()), "pending sums were not emptied"
    for buffer, value in zip((r.weight, r.expert_bias, r.score_std, r.steps), old, strict=False):
        buffer.copy_(value)
    r._cached = None
    return {}


def check_directions(p: Problem) -> Outcome:
    """The kernel's directions, within a rounding of the definition; the definition serves as truth where they agree."""
    made = directions_for("triton", p.ours.weight, p.x.dtype)
    assert_near("directions", made, p.directions)
    p.directions = made  # so that a rounding that went the other way does not count as an error of a score
    return {}


def verify(p: Problem) -> dict[str, Outcome]:
    """Check -> {"ok": bool, ...figures or "message"}."""
    with torch.no_grad():
        p.ours.pending.clear_()
        results = {"directions": _outcome(lambda: check_directions(p))}
        results["eval routing"] = _outcome(lambda: check_routing(p, p.ours.route(p.x)))
    routing, sent = p.forward(p.ours)
    steps: dict[str, Callable[[], Outcome]] = {
        "training routing": lambda: check_routing(p, routing),
        "dispatch": lambda: check_dispatch(p, routing, sent),
        "statistics": lambda: check_statistics(p, routing),
        "backward": lambda: check_backward(p, routing, sent),
        "combine": lambda: check_combine(p, routing, sent),
        "commit": lambda: check_commit(p),
    }
    return results | {name: _outcome(step) for name, step in steps.items()}


def _outcome(step: Callable[[], Outcome]) -> Outcome:
    try:
        return {"ok": True, **step()}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a kernel that does not run is not right either, and the other checks still tell
        return {"ok": False, "message": reason(error)}
