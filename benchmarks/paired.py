"""A training step of K-Means routing beside that of a learned softmax router without auxiliary loss, in alternation.

    python -m benchmarks.paired --threads 1 --rounds 21 [--malloc recycle]

Two contestants alone, so that each finds the memory that the other left; the ratio is the median over the rounds.
"""

import argparse

import torch

from benchmarks.harness import checks, steps
from benchmarks.harness.contest import Contest
from benchmarks.harness.shapes import CPU_BENCH_SHAPES
from kmeans_route.bench import baselines
from kmeans_route.bench.memory import recycle_memory
from kmeans_route.bench.problem import Problem

OURS, LEARNED = "kmeans_route", "softmax, no aux"


def contest(problem: Problem) -> Contest:
    """The two, verified."""
    router = steps.make_kmeans_router(problem)
    learned = steps.learned_step(LEARNED, baselines.softmax_plain, problem)
    made = Contest(str(problem.shape), [steps.kmeans_step(problem, router, OURS), learned], baselines=[LEARNED])

    def check() -> None:
        checks.check_kmeans(router, problem)
        checks.check_learned(LEARNED, baselines.softmax_plain, problem)

    made.verify(check)
    return made


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--malloc", choices=("default", "recycle"), default="default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.malloc == "recycle":
        recycle_memory()
    for name, shape in CPU_BENCH_SHAPES.items():
        found = contest(Problem(shape))
        found.run(options.rounds)
        ours, learned = (found.timings()[one] for one in (OURS, LEARNED))
        print(f"{name}: {ours.median_ms:.1f} over {learned.median_ms:.1f} ms, paired {ours.paired_ratio:.3f}")


if __name__ == "__main__":
    main()
