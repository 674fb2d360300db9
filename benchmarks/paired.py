"""K-Means routing beside a learned router, in alternation: a training step, without or with its commit, or eval.

    python -m benchmarks.paired --threads 1 --rounds 21 [--malloc recycle] [--json FILE]
    python -m benchmarks.paired --mode commit --threads 1
    python -m benchmarks.paired --mode eval --threads 1 --shape 1024,1024,64,8 --shape 256,256,16,2

In mode train the other is a softmax router without auxiliary loss, in plain PyTorch: two contestants alone, so that
each finds the memory that the other left. In mode commit the modules do as in a training: `KMeansRouter` as it comes
and `LearnedRouter` with sigmoid, forward and backward, without and with what comes once a step. In mode eval they route
as in a model's eval: `KMeansRouter`, the same frozen, and `LearnedRouter` with softmax and with sigmoid. A ratio is the
median over the rounds of K-Means' time over the other's in the same round: below 1 K-Means is faster. With one thread
times are thread time.
"""

import argparse
import copy
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import checks, steps
from benchmarks.harness.contest import Contest
from benchmarks.harness.results import write_results
from benchmarks.harness.shapes import CPU_BENCH_SHAPES
from kmeans_route import LearnedRouter
from kmeans_route.bench import baselines, truth
from kmeans_route.bench.contest import Contestant
from kmeans_route.bench.memory import recycle_memory
from kmeans_route.bench.problem import Problem
from kmeans_route.bench.results import command_line
from kmeans_route.routing.base import StatefulRouter
from kmeans_route.testing import BenchShape, assert_same_selection

OURS, FROZEN, LEARNED = "kmeans_route", "kmeans_route, frozen", "softmax, no aux"
KINDS, COMMIT = ("softmax", "sigmoid"), " with commit"
SMALL_SHAPES = ("256,64,8,2", "256,256,16,2", "1024,128,16,2", "2048,128,16,2", "2048,512,64,8")
EVAL_SHAPES = ("4096,2048,64,8", "1024,1024,64,8", "256,256,16,2", "64,64,8,2")


def contest(problem: Problem) -> Contest:
    """The two of a training step, verified."""
    router = steps.make_kmeans_router(problem)
    learned = steps.learned_step(LEARNED, baselines.softmax_plain, problem)
    made = Contest(str(problem.shape), [steps.kmeans_step(problem, router, OURS), learned], baselines=[LEARNED])

    def check() -> None:
        checks.check_kmeans(router, problem)
        checks.check_learned(LEARNED, baselines.softmax_plain, problem)

    made.verify(check)
    return made


def commit_contest(problem: Problem) -> Contest:
    """K-Means and sigmoid routing as modules in training, verified, each without its commit and with it."""
    shape = problem.shape
    routers = {
        OURS: steps.make_kmeans_router(problem, directions="whitened"),
        "sigmoid": LearnedRouter(*shape[1:], kind="sigmoid").train(),
    }
    routers["sigmoid"].commit()  # as in make_kmeans_router: commits come by hand

    def forward_backward(router: StatefulRouter) -> None:
        torch.autograd.backward(router(problem.x).weights, problem.d_weights)

    def with_commit(router: StatefulRouter) -> None:
        forward_backward(router)
        router.commit()

    contestants = [
        Contestant(
            name + said, partial(step, copy.deepcopy(router)), partial(steps.clear, problem.x, *router.parameters())
        )
        for step, said in ((forward_backward, ""), (with_commit, COMMIT))
        for name, router in routers.items()
    ]
    made = Contest(str(shape), contestants, baselines=["sigmoid", "sigmoid" + COMMIT])

    def check() -> None:
        checks.check_kmeans(routers[OURS], problem)
        check_gates("sigmoid", routers["sigmoid"], problem.x.detach())

    made.verify(check)
    return made


def eval_contest(shape: BenchShape) -> Contest:
    """The four of routing alone, verified; to be run with gradients off."""
    problem = Problem(shape)
    x, router = problem.x.detach(), steps.make_kmeans_router(problem).eval()
    kmeans = {OURS: router, FROZEN: copy.deepcopy(router).freeze()}
    learned = {kind: LearnedRouter(*shape[1:], kind=kind).eval() for kind in KINDS}
    made = Contest(
        str(shape), [Contestant(name, partial(each, x)) for name, each in (kmeans | learned).items()], list(KINDS)
    )

    def check() -> None:
        scores, bias = truth.cosines(x, F.normalize(router.weight.double())), router.expert_bias.double()
        off = truth.score_tolerance(shape.hidden_size, scores)
        for each in kmeans.values():
            out = each(x)
            truth.check_selection(out.indices, out.weights, scores, router.options.tau, off, torch.float32, bias)
        for kind, each in learned.items():
            check_gates(kind, each, x)

    made.verify(check)
    return made


def check_gates(kind: str, router: StatefulRouter, x: Tensor) -> None:
    """Ids and gates of a learned router of that kind."""
    out, logits = router(x), x.double() @ router.weight.double().T
    if kind == "softmax":
        truth.check_learned(x, router.weight, out.weights, out.indices)
        return
    off = 2e-7 * float(logits.detach().abs().max())
    assert_same_selection(out.indices, logits, tolerance=off, cap=checks.NEAR_TIE_CAP)
    truth.assert_near("gates", out.weights, F.normalize(logits.sigmoid().gather(1, out.indices), p=1, dim=1))


def shape_of(texts: Iterable[str]) -> dict[str, BenchShape]:
    """T,D,E,K -> the shape."""
    return {text: BenchShape(*map(int, text.split(","))) for text in texts}


def record_of(found: Contest, name: str, shape: BenchShape, mode: str) -> dict[str, Any]:
    """Times of each, and K-Means' time over each learned router's, by the rounds."""
    times = found.times_ms
    others = [each for each in times if not each.startswith(OURS)]
    ratios = {
        f"{ours} / {other}": sorted(one / base for one, base in zip(times[ours], times[other], strict=True))
        for ours in times
        if ours not in others
        for other in others
        if ours.endswith(COMMIT) == other.endswith(COMMIT)
    }
    return {
        "shape": name,
        **shape._asdict(),
        "mode": mode,
        "method": found.clock.method,
        "load_average_1_min": os.getloadavg()[0],
        "times": {each: timing._asdict() for each, timing in found.timings().items()},
        "paired_ratios": {each: quartiles(values) for each, values in ratios.items()},
    }


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return {"median": float(median), "q1": float(q1), "q3": float(q3)}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("train", "commit", "eval"), default="train")
    parser.add_argument("--shape", action="append", metavar="T,D,E,K", help="repeatable; default: those of the docs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--malloc", choices=("default", "recycle"), default="default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, device, versions and load there")
    return parser.parse_args()


def main() -> None:
    """The command."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.malloc == "recycle":
        recycle_memory()
    shapes = {"train": CPU_BENCH_SHAPES, "commit": shape_of(SMALL_SHAPES), "eval": shape_of(EVAL_SHAPES)}[options.mode]
    if options.shape:
        shapes = shape_of(options.shape)
    make = {"train": contest, "commit": commit_contest}
    records: list[dict[str, object]] = []
    for name, shape in shapes.items():
        with torch.set_grad_enabled(options.mode != "eval"):
            found = eval_contest(shape) if options.mode == "eval" else make[options.mode](Problem(shape))
            found.run(options.rounds)
        record = record_of(found, name, shape, options.mode) | {"malloc": options.malloc}
        records.append(record)
        print(f"{name}: load {record['load_average_1_min']:.1f}, {record['method']}")
        for each, ratio in record["paired_ratios"].items():
            ours, other = (record["times"][one]["median_ms"] for one in each.split(" / "))
            spread = f"quartiles {ratio['q1']:.2f} to {ratio['q3']:.2f}"
            print(f"  {each}: {ours:.3f} over {other:.3f} ms, paired {ratio['median']:.3f}, {spread}", flush=True)
    if options.json:
        write_results(options.json, command_line("python -m benchmarks.paired", sys.argv[1:]), records)


if __name__ == "__main__":
    main()
