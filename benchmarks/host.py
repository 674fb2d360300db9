"""Host time of a call: the Python and the PyTorch calls around the arithmetic, beside another tree of this repository.

    python -m benchmarks.host [--against DIR] [--rounds 9] [--batches 30] [--json FILE]

Backend "torch", T = 1, D = 64, E = 16, K = 2, eval without gradients, one thread: `route`, a router, a frozen router.

Backend "triton", T = 64, D = 2048, E = 64, K = 8, on the CPU: every kernel is replaced by a call that does nothing, so
this is all but Triton's own launch and a GPU's work: results hold what memory held, ids of experts 0. The functions
`route` and `dispatch`; launchers alone (route, route with what training and dispatch want, dispatch, dispatch with
centroid sums); and an MoE layer whose experts hand back what they get: a forward in eval without gradients, one in
training, and that with its backward.

Thread time, the least of many batches; workers of both trees take turns. Printed are the least times of all turns, and
the median of the ratios, each within one turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
CALLS = 50  # a batch


def time_us(call: Callable[[], object], batches: int) -> float:
    """Microseconds of this thread a call, the least of many batches."""
    best = float("inf")
    for _ in range(batches):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        best = min(best, time.thread_time() - start)
    return best / CALLS * 1e6


def plain_cases() -> dict[str, Callable[[], object]]:
    """Calls on the backend "torch"."""
    from kmeans_route import KMeansRouter, route

    x, weight = torch.randn(1, 64), torch.randn(16, 64)
    router, frozen = (KMeansRouter(64, 16, 2, init="normal").eval() for _ in range(2))
    frozen.freeze()
    return {"route": lambda: route(x, weight, 2), "router": lambda: router(x), "frozen router": lambda: frozen(x)}


WRITE_IDS = ("_route_select_kernel", "_route_fwd_kernel")
"""Who writes the ids that others index with: selection, which older trees have in the second."""


class _NoLaunch:
    """In place of a kernel. Ids that others index with are in range."""

    def __init__(self, kernel: Any, name: str) -> None:
        writes = name in WRITE_IDS and "ids_ptr" in kernel.arg_names
        self.ids = kernel.arg_names.index("ids_ptr") if writes else None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **_kwargs: Any) -> None:
        """Do nothing."""
        if self.ids is not None:
            args[self.ids].zero_()


def launcher_cases() -> dict[str, Callable[[], object]]:
    """Calls on the backend "triton" without launches."""
    import kmeans_route
    from kmeans_route import MoE, kernels
    from kmeans_route.checks import check_route_options
    from kmeans_route.kernels import dispatch, route

    for file in Path(kernels.__file__).parent.glob("*.py"):
        module = __import__(f"kmeans_route.kernels.{file.stem}", fromlist=["*"])
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, _NoLaunch(getattr(module, name), name))
    options = check_route_options(64, 8)
    x, directions, bias = torch.randn(64, 2048), torch.randn(64, 2048), torch.zeros(64)
    given = (x, directions, bias, None, None, options)
    r = route.route_fwd(*given, want_std=True, want_rank=True)
    ranks = dispatch.Ranks(r.rank, r.block_counts, r.offsets, r.block)
    layer, trained = (MoE(2048, 16, 64, 8, backend="triton", init="normal").train(train) for train in (False, True))
    for each in (layer, trained):
        each.experts.forward = lambda rows, offsets: rows
    trained.router.commit()  # nothing is pending: commits come by hand, so it does not warn
    leaf = x.clone().requires_grad_()
    routed = {"expert_bias": bias, "directions": directions, "backend": "triton"}
    routing = kmeans_route.route(x, directions, 8, **routed)
    return {
        "route, triton": lambda: kmeans_route.route(x, directions, 8, **routed),
        "dispatch, triton": lambda: kmeans_route.dispatch(x, routing, backend="triton"),
        "launcher of route": lambda: route.route_fwd(*given),
        "the same, in training": lambda: route.route_fwd(*given, want_std=True, want_rank=True),
        "launcher of dispatch": lambda: dispatch.dispatch_fwd(x, r.indices, r.valid, 64, ranks),
        "the same, with sums": lambda: dispatch.dispatch_fwd(
            x, r.indices, r.valid, 64, ranks, r.inv_norm, want_sums=True
        ),
        "MoE, eval": lambda: layer(x),
        "MoE, training": torch.enable_grad()(lambda: trained(leaf)),
        "the same, and backward": torch.enable_grad()(lambda: trained(leaf).backward(x)),
    }


def work(batches: int) -> None:
    """One worker: a line of figures for each line that comes."""
    torch.set_num_threads(1)
    cases = plain_cases() | launcher_cases()
    for _ in sys.stdin:
        with torch.no_grad():
            figures = {name: time_us(call, batches) for name, call in cases.items()}
        print(json.dumps(figures), flush=True)


def start(tree: Path, batches: int) -> "subprocess.Popen[str]":
    """A worker that imports the package of `tree`."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--worker", "--batches", str(batches)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(worker: "subprocess.Popen[str]") -> dict[str, float]:
    """One turn of a worker."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return dict(json.loads(worker.stdout.readline()))


def compare(against: Path, rounds: int, batches: int) -> dict[str, Any]:
    """Of each case the least time in both trees, and the median of the ratios of `rounds` turns."""
    workers = [start(tree, batches) for tree in (against.resolve(), ROOT)]
    turns = []
    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)
        answers = {i: ask(workers[i]) for i in order}
        turns.append((answers[0], answers[1]))
    for worker in workers:
        worker.communicate()
    return {
        name: {
            "before_us": min(before[name] for before, _ in turns),
            "now_us": min(now[name] for _, now in turns),
            "ratio": statistics.median(now[name] / before[name] for before, now in turns),
        }
        for name in turns[0][0]
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", type=Path, default=ROOT, help="another tree; this one by default: all ratios 1")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.batches)
        return
    from benchmarks import needs  # a worker is a file, and has no such package

    needs.kernels()
    figures = compare(args.against, args.rounds, args.batches)
    for name, row in figures.items():
        print(f"{name:24} {row['before_us']:8.1f} us {row['now_us']:8.1f} us   {row['ratio']:.3f}")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "cases": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
