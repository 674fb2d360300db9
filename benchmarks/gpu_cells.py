"""What is timed in one cell of the GPU run: the contestants of every part, and the order of check and timing.

Parts: eval (routing alone); assignment (the same with K = 1 and no bias); forward (directions, routing, sorted copies,
centroid sums); backward; forward_backward; combine and its backward; commit; step (forward, backward, commit).
Contestants: kmeans_route (its kernels), eager (its plain PyTorch backend), compiled reference, and the learned router
eager and compiled (linear, softmax, top-k, division by the sum; then, but for eval, a stable sort of the ids and a
gather; its step is its forward and backward, weight gradient included, without the optimizer's part). For the
assignment: flash-kmeans, where it is installed.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

import gc
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_checks import TAU, Cell, Problem, check_dx, check_routing, gate_leaf, verify
from kmeans_route import KMeansRouter, centroid_sums, combine, dispatch, route
from kmeans_route.bench import truth
from kmeans_route.bench.clock import Clock, Outcome, Runner, nothing, reason
from kmeans_route.bench.truth import CHUNK
from kmeans_route.kernels.configs import architecture, dispatch_config, route_config
from kmeans_route.kernels.dispatch import token_splits
from kmeans_route.testing import assert_same_selection
from kmeans_route.types import Dispatch, Routing

TRAINING_PARTS = ("forward", "backward", "forward_backward", "combine", "combine_backward", "commit", "step")
NO_TIME = "no time was left"
SMALL_T = 512
"""Up to here calls back to back are timed too: a decoding step finds the directions in L2."""


class Run(NamedTuple):
    """What is timed, what comes before each sample, and what to say about it."""

    run: Callable[[], Any]
    prepare: Runner = nothing
    note: str = ""


Maker = Callable[[], Run]


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


def checked(p: Problem, made: Run) -> Run:
    """`made`, once its first rows have passed the checks that the package passes: routing, and sums if it has them."""
    result, num_rows = made.run(), min(CHUNK, p.cell.num_tokens)
    routing = result if isinstance(result, Routing) else result[0]
    check_routing(p, routing, num_rows)
    if len(result) == 3:
        truth.check_sums(p.x, routing.indices, result[2][0])
    return made


def checked_learned(p: Problem, made: Run) -> Run:
    """`made`, once gates and ids of its first rows have been found right."""
    gates, ids = made.run()[:2]
    truth.check_learned(p.x, p.learned_weight, gates, ids, min(CHUNK, p.cell.num_tokens))
    return made


def eval_runs(p: Problem, compiler: Compiler) -> dict[str, Maker]:
    """Routing alone, to be made and run with gradients off. The directions are at hand, as for inference."""
    x, top_k = p.x.detach(), p.cell.top_k
    learned = (x, p.learned_weight.detach(), top_k)
    fixed = (p.centroids, p.bias, p.directions, top_k)

    def ours(backend: str) -> Run:
        return checked(p, Run(lambda: route_at_hand(p, x, p.bias, top_k, backend)))

    return {
        "kmeans_route": lambda: ours("triton"),
        "eager": lambda: ours("torch"),
        "compiled reference": lambda: checked(p, compiler(reference_route, x, *fixed)),
        "learned eager": lambda: checked_learned(p, Run(partial(learned_route, *learned))),
        "learned compiled": lambda: checked_learned(p, compiler(learned_route, *learned)),
    }


def route_at_hand(p: Problem, x: Tensor, bias: Tensor, top_k: int, backend: str) -> Routing:
    """Routing by one backend. A router's own directions would be made anew inside of every graph."""
    return route(x, p.centroids, top_k, bias, tau=TAU, directions=p.directions, backend=backend)


def assignment_runs(p: Problem) -> dict[str, Maker]:
    """The nearest centroid alone, K = 1 and no bias: ids of flash-kmeans, ids and gates of this package."""
    x, no_bias = p.x.detach(), torch.zeros_like(p.bias)

    def ours() -> Run:
        made = Run(lambda: route_at_hand(p, x, no_bias, 1, "triton"))
        truth.check_routing(x, p.directions, no_bias, TAU, made.run(), min(CHUNK, p.cell.num_tokens))
        return made

    def flash() -> Run:
        assign = importlib.import_module("flash_kmeans.assign_euclid_triton").cosine_assign_triton
        made = Run(lambda: assign(x[None], p.directions[None]))
        rows = slice(0, min(CHUNK, p.cell.num_tokens))
        scores = truth.cosines(x[rows], p.directions)
        tolerance = truth.score_tolerance(p.cell.hidden_size, scores)
        ids = made.run()[0][rows, None].long()
        assert_same_selection(ids, scores, tolerance=tolerance, cap=truth.NEAR_TIE_CAP)
        return made

    return {"kmeans_route": ours, "flash-kmeans": flash}


def training_runs(p: Problem, compiler: Compiler) -> dict[str, dict[str, Maker]]:
    """Part -> contestant -> maker, from the forward to the whole step. Learned: gradients of its weight too."""
    learned = (p.x, p.learned_weight, p.cell.top_k)

    def learned_step(forward: Run) -> Run:
        return forward._replace(run=lambda: p.backward(forward.run()[::2], learned[:2]))

    forward: dict[str, Maker] = {
        "kmeans_route": lambda: checked(p, Run(lambda: p.forward(p.ours))),
        "eager": lambda: checked(p, Run(lambda: p.forward(p.eager))),
        "compiled reference": lambda: checked(p, compiler(reference_forward, p.x, p.centroids, p.bias, p.cell.top_k)),
    }
    theirs: dict[str, Maker] = {
        "learned eager": lambda: checked_learned(p, Run(partial(learned_forward, *learned))),
        "learned compiled": lambda: checked_learned(p, compiler(learned_forward, *learned)),
    }
    steps: dict[str, Maker] = {name: lambda m=make: learned_step(m()) for name, make in theirs.items()}
    parts: dict[str, dict[str, Maker]] = {part: {} for part in TRAINING_PARTS}
    parts["forward"] = forward | theirs
    parts["forward_backward"] = {name: lambda m=make: both_ways(p, m()) for name, make in forward.items()} | steps
    for name, router in (("kmeans_route", p.ours), ("eager", p.eager)):
        parts["backward"][name] = partial(backward_run, p, router)
        parts["combine"][name] = partial(combine_run, p, router, backward=False)
        parts["combine_backward"][name] = partial(combine_run, p, router, backward=True)
        parts["commit"][name] = partial(commit_run, p, router)
        parts["step"][name] = partial(step_run, p, router)
    parts["step"] |= steps
    return parts


def both_ways(p: Problem, forward: Run) -> Run:
    """Forward and backward of a K-Means contestant, once dx of the first rows has been found right."""

    def run() -> tuple[Any, Any]:
        made = forward.run()
        return made, p.backward((made[0].weights, made[1].x_sorted), (p.x,))

    made, (dx,) = run()
    check_dx(p, made[0], made[1], dx, min(CHUNK // 4, p.cell.num_tokens))
    del made, dx
    return forward._replace(run=lambda: run()[1])


def outputs(p: Problem, router: KMeansRouter) -> tuple[Tensor, Tensor]:
    """Gates and sorted copies of a training forward."""
    routing, sent = p.forward(router)
    return routing.weights, sent.x_sorted


def backward_run(p: Problem, router: KMeansRouter) -> Run:
    """The backward alone, of a forward kept for it."""
    made = outputs(p, router)
    return Run(lambda: p.backward(made, (p.x,), keep=True))


def combine_run(p: Problem, router: KMeansRouter, *, backward: bool) -> Run:
    """combine of given expert outputs, or its backward alone."""
    routing, sent = p.forward(router)
    leaf, routing = gate_leaf(p, routing)
    sent = sent._replace(x_sorted=p.x.new_empty(0, p.cell.hidden_size))  # the copies are not needed: free them
    if not backward:
        return Run(torch.no_grad()(lambda: combine(leaf, routing, sent, backend=router.backend)))
    y = combine(leaf, routing, sent, backend=router.backend)
    return Run(lambda: torch.autograd.grad(y, (leaf, routing.weights), p.dy, retain_graph=True))


def commit_run(p: Problem, router: KMeansRouter) -> Run:
    """A commit of one batch; what it empties is filled again before each sample."""
    router.pending.clear_()
    p.forward(router)
    pending = [router.pending.sums, router.pending.counts, router.pending.std_sum, router.pending.num_tokens]
    kept = [tensor.clone() for tensor in pending]
    return Run(router.commit, lambda: [a.copy_(b) for a, b in zip(pending, kept, strict=True)])


def step_run(p: Problem, router: KMeansRouter) -> Run:
    """Forward, backward and commit. The centroids really move."""

    def step() -> None:
        p.backward(outputs(p, router), (p.x,))
        router.commit()

    router.pending.clear_()
    return Run(step)


def bytes_needed(cell: Cell) -> int:
    """What a cell may hold at once: inputs, copies and their gradients, and fp64 chunks."""
    size = getattr(torch, cell.dtype).itemsize
    token_rows = (4 + 3 * cell.top_k) * cell.num_tokens * cell.hidden_size * size
    return token_rows + 16 * min(cell.num_tokens, CHUNK // 4) * cell.top_k * cell.hidden_size * 4


def run_cell(cell: Cell, clock: Clock, compiler: Compiler, late: Callable[[], bool] = lambda: False) -> Outcome:
    """The record of a cell: checks, and part -> contestant -> timing or {"skipped": reason}.

    late: whether no contestant may start any more.
    """
    record: Outcome = {"kind": "cell", **cell._asdict()}
    compiler.start(cell.shape)
    gc.unfreeze()
    clear()
    gc.freeze()  # modules and compiled code: every capture collects garbage, and would walk them all
    if clock.on_gpu:
        free = torch.cuda.mem_get_info(clock.device)[0]
        if bytes_needed(cell) > 0.6 * free:
            needed = f"{bytes_needed(cell) / 1e9:.1f} GB needed, {0.6 * free / 1e9:.1f} GB is 60% of what is free"
            return record | {"skipped": needed}
    with clock.scope():
        p = Problem(cell, clock.device)
        record["checks"] = verify(p)
        record["correct"] = all(check["ok"] for check in record["checks"].values())
        arch, dtype = architecture(clock.device), p.x.dtype
        shape = (cell.num_tokens, cell.hidden_size, cell.num_experts)
        record["block_tokens"] = route_config(cell.num_tokens, cell.num_experts, dtype, arch).BT
        record["splits"] = token_splits(*shape, dispatch_config(cell.num_experts, dtype, arch))[0]
        if record["correct"]:
            record["parts"] = time_all(p, clock, compiler, late)
    return record


def time_all(p: Problem, clock: Clock, compiler: Compiler, late: Callable[[], bool]) -> dict[str, dict[str, Outcome]]:
    """Every contestant of every part."""
    parts: dict[str, dict[str, Outcome]] = {}
    with torch.no_grad():
        for part, makers in {"eval": eval_runs(p, compiler), "assignment": assignment_runs(p)}.items():
            parts[part] = {name: time_one(p, clock, make, late) for name, make in makers.items()}
    for part, makers in training_runs(p, compiler).items():
        parts[part] = {name: time_one(p, clock, make, late) for name, make in makers.items()}
    return parts


def time_one(p: Problem, clock: Clock, make: Maker, late: Callable[[], bool]) -> Outcome:
    """Timing of one contestant, or why there is none. An error that the device does not survive is raised."""
    if late():
        return {"skipped": NO_TIME}
    try:
        made = make()
        small = p.cell.num_tokens <= SMALL_T and made.prepare is nothing
        timing = clock.measure(made.run, made.prepare, back_to_back=small)
        if made.note:
            timing["note"] = made.note
    except Exception as error:
        timing = {"skipped": reason(error)}
    made = None  # so that its tensors go before the next contestant's come
    clear()
    clock.wait()
    return timing


def clear() -> None:
    """Give the memory of graphs and caches back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
