"""What takes longer than ten minutes: contests against compiled PyTorch, learned routers and all peers, at every T.

To the contestants of `timing` come the compiled reference, and the learned router eager and compiled (linear, softmax,
top-k, division by the sum; then, but for eval, a stable sort of the ids and a gather; its step is its forward and
backward, weight gradient included, without the optimizer's part). To the parts come forward_backward, and those of
`peers`.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.checks import TAU, Problem, check_dx
from benchmarks.gpu.peers import peer_contestants
from benchmarks.gpu.timing import Maker, Parts, Run, checked, contestants, num_checked
from kmeans_route import centroid_sums, dispatch, route
from kmeans_route.bench import truth
from kmeans_route.bench.clock import reason
from kmeans_route.bench.truth import CHUNK
from kmeans_route.types import Dispatch, Routing


class Compiler:
    """torch.compile with T dynamic, one compilation a shape (T = 1 is always one of its own).

    backend: of torch.compile. `shape` is the one that dynamo's caches hold: its limit of recompilations counts all.
    """

    def __init__(self, backend: str) -> None:
        self.backend, self.shape = backend, ""

    def start(self, shape: str) -> None:
        """Forget what was compiled for another shape."""
        if shape != self.shape:
            torch._dynamo.reset()
            self.shape = shape

    def __call__(self, function: Callable[..., Any], *args: Any) -> Run:
        """`function(x, ...)` compiled in one graph, or with graph breaks where that fails. Compiles now."""
        if len(args[0]) > 1:
            torch._dynamo.maybe_mark_dynamic(args[0], 0)
        note = "one graph"
        try:
            compiled = torch.compile(function, fullgraph=True, backend=self.backend)
            compiled(*args)
        except Exception as error:
            note = f"graph breaks ({reason(error)})"
            compiled = torch.compile(function, backend=self.backend)
            compiled(*args)
        return Run(lambda: compiled(*args), note=note)


def without_grad(make: Maker) -> Maker:
    """Make, check and time it with gradients off."""

    @torch.no_grad()
    def made() -> Run:
        run = make()
        return run._replace(run=torch.no_grad()(run.run), check=torch.no_grad()(run.check))

    return made


def learned_route(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The learned router: gates (T, K) fp32 and ids (T, K)."""
    selected, ids = F.linear(x, weight).softmax(1, dtype=torch.float32).topk(top_k, dim=1)
    return selected / selected.sum(1, keepdim=True), ids


def learned_forward(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Learned routing, then copies by expert: gates (T, K), ids and x_sorted (T*K, D)."""
    gates, ids = learned_route(x, weight, top_k)
    order = ids.flatten().sort(stable=True).indices
    return gates, ids, x.index_select(0, order // top_k)


def reference_route(x: Tensor, centroids: Tensor, bias: Tensor, directions: Tensor, top_k: int) -> Routing:
    """The definition, for torch.compile."""
    return route(x, centroids, top_k, bias, tau=TAU, directions=directions, backend="reference")


def reference_forward(
    x: Tensor, centroids: Tensor, bias: Tensor, top_k: int
) -> tuple[Routing, Dispatch, tuple[Tensor, Tensor]]:
    """The definition of a training forward, from the centroids to sorted copies and centroid sums."""
    routing = route(x, centroids, top_k, bias, tau=TAU, backend="reference")
    sent = dispatch(x, routing, backend="reference")
    return routing, sent, centroid_sums(x, routing, backend="reference")


def checked_learned(p: Problem, made: Run) -> Run:
    """`made` with a check of gates and ids of its first rows."""
    return made._replace(check=lambda: truth.check_learned(p.x, p.weight, *made.run()[:2], num_rows=num_checked(p)))


def both_ways(p: Problem, forward: Run) -> Run:
    """Forward and backward of a K-Means contestant, with a check of dx of the first rows."""

    def run() -> tuple[Any, Any]:
        made = forward.run()
        return made, p.backward((made[0].weights, made[1].x_sorted), (p.x,))

    def check() -> None:
        made, (dx,) = run()
        check_dx(p, made[0], made[1], dx, min(CHUNK // 4, p.cell.num_tokens))

    return forward._replace(run=lambda: run()[1], check=check)


def all_contestants(compiler: Compiler, modules: dict[str, Any], p: Problem) -> Parts:
    """Part -> contestant -> maker. modules: of the peers, by name."""
    compiler.start(p.cell.shape)
    x, top_k, parts = p.x.detach(), p.cell.top_k, contestants(p)
    fixed, alone = (p.centroids, p.bias), (x, p.weight, top_k)
    learned = (p.x, p.weight.detach().requires_grad_(), top_k)
    more: dict[str, Maker] = {
        "compiled reference": lambda: checked(p, compiler(reference_route, x, *fixed, p.directions, top_k)),
        "learned eager": lambda: checked_learned(p, Run(partial(learned_route, *alone))),
        "learned compiled": lambda: checked_learned(p, compiler(learned_route, *alone)),
    }
    parts["eval"] |= {name: without_grad(make) for name, make in more.items()}
    for part, some in peer_contestants(modules, p).items():
        parts.setdefault(part, {}).update(some)
    parts["forward"]["compiled reference"] = lambda: checked(p, compiler(reference_forward, p.x, *fixed, top_k))
    ours = dict(parts["forward"])
    theirs: dict[str, Maker] = {
        "learned eager": lambda: checked_learned(p, Run(partial(learned_forward, *learned))),
        "learned compiled": lambda: checked_learned(p, compiler(learned_forward, *learned)),
    }

    def learned_step(make: Maker) -> Run:
        forward = make()
        return forward._replace(run=lambda: p.backward(forward.run()[::2], learned[:2]))

    steps: dict[str, Maker] = {name: partial(learned_step, make) for name, make in theirs.items()}
    parts["forward"] |= theirs
    parts["forward_backward"] = {name: lambda m=make: both_ways(p, m()) for name, make in ours.items()} | steps
    parts["step"] |= steps
    for part in ("commit", "step"):  # last: they move the centroids, and the checks know where those were
        parts[part] = parts.pop(part)
    return parts
