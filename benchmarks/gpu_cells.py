"""What is timed in one cell of the GPU run: the contestants of every part, and the order of check and timing.

Parts: eval (routing alone); forward (routing, sorted copies, centroid sums); backward; forward_backward; combine and
its backward; commit; step (forward, backward, commit). Contestants: kmeans_route (its kernels), eager (its plain
PyTorch backend), compiled reference, and the learned router eager and compiled (linear, softmax, top-k, division by the
sum; then, but for eval, a stable sort of the ids and a gather).

Legend: T tokens, D hidden size, E experts, K top_k.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_checks import CHUNK, TAU, Cell, Problem, check_routing, gate_leaf, verify
from benchmarks.gpu_clock import Clock, Outcome, Runner, reason
from kmeans_route import KMeansRouter, combine, route
from kmeans_route.kernels.configs import architecture, dispatch_config, route_config
from kmeans_route.kernels.dispatch import token_splits
from kmeans_route.types import Routing

PARTS = ("eval", "forward", "backward", "forward_backward", "combine", "combine_backward", "commit", "step")
SMALL_T = 512
"""Up to here calls back to back are timed too: a decoding step finds the directions in L2."""


class Run(NamedTuple):
    """What is timed, what comes before each sample, and what to say about it."""

    run: Runner
    prepare: Runner | None = None
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


def learned_forward(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Learned routing, then copies by expert: gates (T, K) and x_sorted (T*K, D)."""
    gates, ids = learned_route(x, weight, top_k)
    order = ids.flatten().sort(stable=True).indices
    return gates, x.index_select(0, order // top_k)


def reference_route(x: Tensor, centroids: Tensor, bias: Tensor, directions: Tensor, top_k: int) -> Routing:
    """The definition, for torch.compile."""
    return route(x, centroids, top_k, bias, tau=TAU, directions=directions, backend="reference")


def checked(p: Problem, made: Run) -> Run:
    """`made`, once its routing of the first rows has passed the checks that the package passes."""
    check_routing(p, made.run(), min(CHUNK, p.cell.num_tokens))
    return made


def eval_runs(p: Problem, compiler: Compiler) -> dict[str, Maker]:
    """Routing alone, to be made and run with gradients off."""
    x, top_k = p.x.detach(), p.cell.top_k
    learned = (x, p.learned_weight.detach(), top_k)
    fixed = (p.centroids, p.bias, p.directions, top_k)
    return {
        "kmeans_route": lambda: checked(p, Run(lambda: p.ours.route(x))),
        "eager": lambda: checked(p, Run(lambda: p.eager.route(x))),
        "compiled reference": lambda: checked(p, compiler(reference_route, x, *fixed)),
        "learned eager": lambda: Run(partial(learned_route, *learned)),
        "learned compiled": lambda: compiler(learned_route, *learned),
    }


def training_runs(p: Problem, compiler: Compiler) -> dict[str, dict[str, Maker]]:
    """Part -> contestant -> maker, from the forward to the whole step. Learned: gradients of its weight too."""
    learned = (p.x, p.learned_weight, p.cell.top_k)

    def learned_step(forward: Run) -> Run:
        return forward._replace(run=lambda: p.backward(forward.run(), learned[:2]))

    forward: dict[str, Maker] = {
        "learned eager": lambda: Run(partial(learned_forward, *learned)),
        "learned compiled": lambda: compiler(learned_forward, *learned),
    }
    parts: dict[str, dict[str, Maker]] = {part: {} for part in PARTS[1:]}
    for name, router in (("kmeans_route", p.ours), ("eager", p.eager)):
        parts["forward"][name] = lambda r=router: Run(lambda: p.forward(r))
        parts["backward"][name] = partial(backward_run, p, router)
        parts["forward_backward"][name] = lambda r=router: Run(lambda: p.backward(outputs(p, r), (p.x,)))
        parts["combine"][name] = partial(combine_run, p, router, backward=False)
        parts["combine_backward"][name] = partial(combine_run, p, router, backward=True)
        parts["commit"][name] = partial(commit_run, p, router)
        parts["step"][name] = partial(step_run, p, router)
    parts["forward"] |= forward
    parts["forward_backward"] |= {name: lambda m=make: learned_step(m()) for name, make in forward.items()}
    return parts


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


def run_cell(cell: Cell, clock: Clock, compiler: Compiler) -> Outcome:
    """The record of a cell: checks, and part -> contestant -> timing or {"skipped": reason}."""
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
            record["parts"] = time_all(p, clock, compiler)
    return record


def time_all(p: Problem, clock: Clock, compiler: Compiler) -> dict[str, dict[str, Outcome]]:
    """Every contestant of every part."""
    with torch.no_grad():
        parts = {"eval": {name: time_one(p, clock, make) for name, make in eval_runs(p, compiler).items()}}
    for part, makers in training_runs(p, compiler).items():
        parts[part] = {name: time_one(p, clock, make) for name, make in makers.items()}
    return parts


def time_one(p: Problem, clock: Clock, make: Maker) -> Outcome:
    """Timing of one contestant, or why there is none. An error that the device does not survive is raised."""
    try:
        made = make()
        small = p.cell.num_tokens <= SMALL_T and made.prepare is None
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
