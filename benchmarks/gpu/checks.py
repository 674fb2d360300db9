"""The problem of one cell of the GPU run, and the checks that the package must pass before anything of it is timed.

A cell is one shape at one T. Every check compares with a plain fp64 computation on the same device, in chunks of rows,
so that no (T, E) or (T, K, D) in fp64 exists at once.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.measure import Outcome
from benchmarks.harness.commits import gathered
from kmeans_route import KMeansRouter, backends, centroid_sums, combine, dispatch, reference
from kmeans_route.bench import problem, truth
from kmeans_route.bench.clock import reason
from kmeans_route.bench.truth import CHUNK, assert_near, chunks, cosines
from kmeans_route.checks import DEFAULT_TAU as TAU
from kmeans_route.testing import BenchShape
from kmeans_route.types import Dispatch, Routing

HOT_STRIDE = 64


class Problem(problem.Problem):
    """Inputs of a cell, drawn on the device, and two routers: `ours` by this package's kernels, and the `eager` one.

    To what any benchmark gets come rows (T*K, D), the gradient of x_sorted, and expert outputs; and dy (T, D).
    d_weights are scaled by D, so that both ways back to x weigh about the same.

    hot: the rows of x overlap, each starts HOT_STRIDE elements after the one before; so x lies in L2 at any T, where
    loads return early and what is refilled too early shows. common: length of a direction that all tokens share, in
    units of their own standard deviation, as the hidden states of real models have one.
    """

    def __init__(self, cell: Cell, device: torch.device, *, hot: bool = False, common: float = 0.0) -> None:
        self.cell, dtype = cell, getattr(torch, cell.dtype)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=kind)

        num_tokens, width, num_experts, top_k = shape = BenchShape(*cell[1:5])
        if hot:
            x = normal((num_tokens - 1) * HOT_STRIDE + width).as_strided((num_tokens, width), (HOT_STRIDE, 1))
        else:
            x = normal(num_tokens, width)
            if common:
                x += common * normal(width)
        self.rows, self.dy = normal(num_tokens * top_k, width), normal(num_tokens, width)
        d_weights = normal(num_tokens, top_k, kind=torch.float32) * width
        bias = normal(num_experts, kind=torch.float32) * 0.1 * width**-0.5
        super().__init__(shape, dtype, device, x=x, bias=bias, d_weights=d_weights)
        self.ours, self.eager = self.router("triton"), self.router("torch")
        self.directions = reference.directions_reference(self.centroids, dtype)

    def draw(self, seed: int) -> None:
        """Other hidden states in the same memory."""
        generator = torch.Generator(self.device).manual_seed(seed)
        self.x.detach().normal_(generator=generator)

    def forward(self, router: KMeansRouter) -> tuple[Routing, Dispatch]:
        """A training forward, with the directions made anew as after every commit."""
        return router.route_dispatch(self.x, gather=True)

    def backward(self, outputs: tuple[Tensor, Tensor], wrt: tuple[Tensor, ...], *, keep: bool = False) -> Any:
        """Gradients of gates and sorted copies in `wrt`. keep: the outputs serve again."""
        grads = (self.d_weights.to(outputs[0].dtype), self.rows)
        return torch.autograd.grad(outputs, wrt, grads, retain_graph=keep)


def routing_alone(p: Problem) -> Routing:
    """Routing as for inference, directions included."""
    with torch.no_grad():
        return p.ours.route(p.x)


def training_step(p: Problem) -> None:
    """Every launch of a training step: routing with its copies, both ways, the exchange of one layer, the commit."""
    p.ours.pending.clear_()
    routing, sent = p.forward(p.ours)
    p.backward((routing.weights, sent.x_sorted), (p.x,))
    leaf, routing = gate_leaf(p, routing)
    y = combine(leaf, routing, sent, backend="triton")
    torch.autograd.grad(y, (leaf, routing.weights), p.dy)
    p.ours.commit()


@torch.no_grad()
def pieces(p: Problem) -> tuple[Routing, Dispatch, tuple[Tensor, Tensor]]:
    """The public functions one by one, from routing to copies and to centroid sums."""
    routing = p.ours.route(p.x)
    return routing, dispatch(p.x, routing, backend="triton"), centroid_sums(p.x, routing, backend="triton")


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
    """Pending sums, counts and score spread.

    A token's spread is off by no more than its scores are; their fp32 sum is rounded T / 1024 times in each of 1024
    lanes, and 20 times across lanes and experts.
    """
    pending, num_tokens, x = p.ours.pending, p.cell.num_tokens, p.x.detach()
    truth.check_sums(x, routing.indices, pending.sums)
    assert torch.equal(pending.counts, routing.tokens_per_expert), "pending counts differ"
    assert int(pending.num_tokens) == num_tokens, "pending num_tokens differs"
    spread, allowed = 0.0, 0.0
    for rows in chunks(num_tokens):
        scores = cosines(x[rows], p.directions)
        spread += float(scores.std(dim=1, correction=0).sum())
        allowed += len(scores) * truth.score_tolerance(p.cell.hidden_size, scores)
    allowed += (num_tokens / 1024 + 20) * 2**-24 * spread
    off = abs(float(pending.std_sum) - spread)
    assert off <= allowed, f"the sum of the scores' spreads: error {off:.2e}, allowed {allowed:.2e}"
    return {}


def check_pieces(p: Problem, routing: Routing, sent: Dispatch) -> Outcome:
    """The public functions one by one: the copies of dispatch bit for bit, the sums of centroid_sums."""
    _, alone, (sums, counts) = pieces(p)
    for name, one, other in zip(sent._fields, alone, sent, strict=True):
        assert torch.equal(one, other), f"{name} of dispatch differs from that of a training forward"
    truth.check_sums(p.x, routing.indices, sums)
    assert torch.equal(counts, routing.tokens_per_expert), "counts of centroid_sums differ"
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
    r, pending, given = p.ours, p.ours.pending, gathered(p.ours)
    new = reference.commit_reference(*given.arguments())
    r.commit()
    for name in ("weight", "centroids", "expert_bias", "score_std"):
        assert_near(name, getattr(r, name), getattr(new, name))
    assert int(r.steps) == int(new.steps), "steps differ"
    assert not bool(pending.counts.any()), "pending counts were not emptied"
    assert not bool(pending.sums.any()), "pending sums were not emptied"
    for name, value in given.state._asdict().items():
        if value is not None:
            getattr(r, name).copy_(value)
    return {}


def check_directions(p: Problem) -> Outcome:
    """The kernel's directions, within a rounding of the definition; the definition serves as truth where they agree."""
    made = backends.get("triton").directions(p.ours.weight, p.x.dtype)
    assert_near("directions", made, p.directions)
    p.directions = made  # so that a rounding that went the other way does not count as an error of a score
    return {}


def verify(p: Problem) -> dict[str, Outcome]:
    """Check -> {"ok": bool, ...figures or "message"}."""
    with torch.no_grad():
        p.ours.pending.clear_()
        results = {"directions": _outcome(lambda: check_directions(p))}
        results["eval routing"] = _outcome(lambda: check_routing(p, routing_alone(p)))
    routing, sent = p.forward(p.ours)
    steps: dict[str, Callable[[], Outcome]] = {
        "training routing": lambda: check_routing(p, routing),
        "dispatch": lambda: check_dispatch(p, routing, sent),
        "pieces": lambda: check_pieces(p, routing, sent),
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
