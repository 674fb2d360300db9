"""Times of one cell: this package's kernels beside the product of cuBLAS and eager PyTorch, wrong ones marked.

Parts: eval (routing alone); forward (directions, routing, sorted copies, centroid sums); backward; combine and its
backward; commit; step (forward, backward, commit). Contestants: kmeans_route (its kernels) and eager (its plain
PyTorch backend); for eval also the product x W^T alone, and with top-k and softmax of what it selects: the least that
a learned router launches.

A part's floor adds up the floors of its launches; a launch has three, HBM bytes over the copy rate, L2 bytes over the
rate of a copy that stays in L2, and FLOPs over the bf16 matrix rate, all three rates measured in the same run. The
largest counts. GB/s are the HBM bytes over the median. Every time includes what the graph of one tiny kernel takes.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.checks import Problem, check_routing, gate_leaf, verify
from benchmarks.gpu.launches import parts_of
from benchmarks.gpu.measure import Outcome, measure
from benchmarks.gpu.race import route_at
from benchmarks.harness.commits import gathered
from benchmarks.offline import Launch, work_of
from kmeans_route import KMeansRouter, combine
from kmeans_route.bench import truth
from kmeans_route.bench.clock import Clock, Runner, nothing, reason
from kmeans_route.bench.truth import CHUNK
from kmeans_route.types import Routing

NO_TIME = "no time was left"
SMALL_T = 512
"""Up to here calls back to back are timed too: a decoding step finds the directions in L2."""
RATES = {"hbm": "copy_bytes_per_s", "l2": "l2_bytes_per_s", "flop": "bf16_flop_per_s"}


class Run(NamedTuple):
    """What is timed, what comes before each sample, what raises AssertionError where it is wrong, and a remark."""

    run: Callable[[], Any]
    prepare: Runner = nothing
    check: Runner = nothing
    note: str = ""


Maker = Callable[[], Run]
Parts = dict[str, dict[str, Maker]]
"""Part -> contestant -> what makes it."""


def num_checked(p: Problem) -> int:
    """Rows of a contestant that are held against fp64; of the package itself `verify` has seen all."""
    return min(CHUNK, p.cell.num_tokens)


def checked(p: Problem, made: Run) -> Run:
    """`made` with the checks that the package passes: routing, and centroid sums if it returns them."""

    def check() -> None:
        result = made.run()
        routing = result if isinstance(result, Routing) else result[0]
        check_routing(p, routing, num_checked(p))
        if len(result) == 3:
            truth.check_sums(p.x, routing.indices, result[2][0])

    return made._replace(check=check)


def product(x: Tensor, weight: Tensor) -> tuple[Callable[[], Tensor], str]:
    """x W^T by the library, (T, E) in fp32 where it offers that for 16 bits, and a remark."""
    if x.dtype == torch.float32:
        return lambda: x @ weight.T, ""
    try:
        torch.mm(x, weight.T, out_dtype=torch.float32)
    except Exception as error:
        return lambda: x @ weight.T, f"logits in {x.dtype}: {reason(error)}"
    return lambda: torch.mm(x, weight.T, out_dtype=torch.float32), "logits in fp32"


def product_run(p: Problem) -> Run:
    """The product alone."""
    run, note = product(p.x.detach(), p.directions)
    return Run(run, note=note)


def select_run(p: Problem) -> Run:
    """The product, top-k and gates: a learned router whose weight has the directions for rows."""
    logits, note = product(p.x.detach(), p.directions)

    def run() -> tuple[Tensor, Tensor]:
        selected, ids = logits().topk(p.cell.top_k, dim=1)
        return selected.float().softmax(1), ids

    return Run(run, check=lambda: truth.check_learned(p.x, p.directions, *run(), num_checked(p)), note=note)


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
    return Run(router.commit, gathered(router).restore)


def step_run(p: Problem, router: KMeansRouter) -> Run:
    """Forward, backward and commit. The centroids really move."""

    def step() -> None:
        p.backward(outputs(p, router), (p.x,))
        router.commit()

    router.pending.clear_()
    return Run(step)


def contestants(p: Problem) -> Parts:
    """Every contest of the ten minutes. The directions are at hand for eval, as for inference."""
    parts: Parts = {
        "eval": {
            "kmeans_route": lambda: checked(p, Run(torch.no_grad()(lambda: route_at(p)))),
            "product": lambda: product_run(p),
            "product, top-k": lambda: select_run(p),
            "eager": lambda: checked(p, Run(torch.no_grad()(lambda: route_at(p, "torch")))),
        }
    }
    routers = {"kmeans_route": p.ours, "eager": p.eager}
    makers: dict[str, Callable[[KMeansRouter], Run]] = {
        "forward": lambda router: checked(p, Run(lambda: p.forward(router))),
        "backward": partial(backward_run, p),
        "combine": partial(combine_run, p, backward=False),
        "combine_backward": partial(combine_run, p, backward=True),
        "commit": partial(commit_run, p),
        "step": partial(step_run, p),
    }
    for part, make in makers.items():
        parts[part] = {name: partial(make, router) for name, router in routers.items()}
    return parts


def floors(cell: Cell, peaks: Outcome) -> dict[str, Outcome]:
    """Part -> bytes of HBM, the three floors in microseconds, their largest launch by launch, and its name."""
    launches = {part: of_part for part, of_part in parts_of(cell).items() if part != "pieces"}
    launches["combine_backward"] = launches.pop("combine_bwd")
    launches["forward"] = launches["directions"] + launches["forward"]
    launches["forward_backward"] = launches["forward"] + launches["backward"]
    launches["step"] = launches["forward_backward"] + launches["commit"]
    return {part: floor(of_part, peaks) for part, of_part in launches.items()}


def floor(launches: list[Launch], peaks: Outcome) -> Outcome:
    """The floors of launches that follow each other."""
    works = [work_of(launch) for launch in launches]
    times = [{name: 1e6 * getattr(work, name) / peaks[rate] for name, rate in RATES.items()} for work in works]
    total = {name: sum(time[name] for time in times) for name in RATES}
    return {
        "bytes": sum(work.hbm for work in works),
        **{f"{name}_us": total[name] for name in RATES},
        "floor_us": sum(max(time.values()) for time in times),
        "largest": max(RATES, key=lambda name: total[name]),
    }


def bytes_needed(cell: Cell) -> int:
    """What a cell may hold at once: inputs, copies and their gradients, and fp64 chunks."""
    size = getattr(torch, cell.dtype).itemsize
    token_rows = (4 + 3 * cell.top_k) * cell.num_tokens * cell.hidden_size * size
    return token_rows + 16 * min(cell.num_tokens, CHUNK // 4) * cell.top_k * cell.hidden_size * 4


def time_cell(
    cell: Cell, clock: Clock, peaks: Outcome, left: Callable[[], float], make: Callable[[Problem], Parts] = contestants
) -> Outcome:
    """The record of a cell: checks, and part -> contestant -> timing or {"skipped": reason}.

    left: seconds that are left; no contestant starts without any.
    """
    record: Outcome = {"kind": "cell", **cell._asdict()}
    gc.unfreeze()
    clear()
    gc.freeze()  # modules and compiled code: every capture collects garbage, and would walk them all
    if clock.on_gpu and bytes_needed(cell) > 0.6 * (free := torch.cuda.mem_get_info(clock.device)[0]):
        return record | {"skipped": f"{bytes_needed(cell) / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"}
    p = Problem(cell, clock.device)
    record["checks"] = verify(p)
    record["correct"] = all(check["ok"] for check in record["checks"].values())
    record["floors"], record["parts"] = floors(cell, peaks), {}
    for part, makers in make(p).items():
        record["parts"][part] = {name: time_one(p, clock, maker, left) for name, maker in makers.items()}
        for timing in record["parts"][part].values():
            weigh(timing, record["floors"].get(part), peaks)
    timings = [timing for part in record["parts"].values() for timing in part.values()]
    record["ok"] = record["correct"] and not any("wrong" in timing for timing in timings)
    late = sum(timing.get("skipped") == NO_TIME for timing in timings)
    return record | ({"left": [f"{late} of {len(timings)} contestants"]} if late else {})


def weigh(timing: Outcome, least: Outcome | None, peaks: Outcome) -> None:
    """Add GB/s and percentages to a timing, in place."""
    if least is None or "median_us" not in timing:
        return
    rate = 1e6 * least["bytes"] / timing["median_us"]
    timing["gb_per_s"], timing["percent_of_copy"] = rate / 1e9, 100 * rate / peaks["copy_bytes_per_s"]
    timing["percent_of_floor"] = 100 * least["floor_us"] / timing["median_us"]


def time_one(p: Problem, clock: Clock, make: Maker, left: Callable[[], float]) -> Outcome:
    """Timing of one contestant, or why there is none. An error that the device does not survive is raised."""
    if left() <= 0:
        return {"skipped": NO_TIME}
    wrong = ""
    try:
        made = make()
        try:
            made.check()
        except AssertionError as error:
            wrong = reason(error)
        small = p.cell.num_tokens <= SMALL_T and made.prepare is nothing
        timing = measure(clock, made.run, made.prepare, back_to_back=small)
        timing |= {"note": made.note} if made.note else {}
        timing |= {"wrong": wrong} if wrong else {}
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
