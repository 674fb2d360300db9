"""K = 1: assignment, and assignment with the update of the centroids, against clustering packages."""

from functools import partial

import torch

from benchmarks.conftest import Bench
from benchmarks.harness import clusters, peers
from benchmarks.harness.contest import Contest
from benchmarks.harness.shapes import CPU_BENCH_SHAPES
from kmeans_route.bench import baselines
from kmeans_route.bench.contest import Contestant
from kmeans_route.testing import BenchShape

SHAPES = {name: shape._replace(top_k=1) for name, shape in CPU_BENCH_SHAPES.items()}
QUICK = {"quick": BenchShape(96, 24, 8, 1)}


def assignment_contest(shape: BenchShape) -> Contest:
    """All contestants of the assignment at one shape, verified."""
    given = clusters.make_clusters(shape)
    router = clusters.make_router(given).eval()
    textbook = baselines.TextbookKMeansRouter(given.centroids.clone(), 1)
    functions: dict[str, clusters.Assign] = {
        "kmeans_route": lambda x: router(x).indices[:, 0],
        "textbook K-Means": lambda x: textbook(x, update=False)[1][:, 0],
    }
    running, not_run, versions = peers.split(peers.assignments(given.centroids))
    functions |= {name: peer.function for name, peer in running.items() if peer.function}
    contest = Contest(
        f"assignment, K = 1, {shape}",
        [Contestant(name, partial(function, given.batches[0])) for name, function in functions.items()],
        baselines=["textbook K-Means"],
        note="the codebook also gathers the codes of the tokens, (T, D)",
        not_run=not_run,
        versions=versions,
    )

    def check() -> None:
        for name, function in functions.items():
            clusters.check_assignment(name, function, given)

    contest.verify(check)
    return contest


def update_contest(shape: BenchShape) -> Contest:
    """All contestants of the assignment with update at one shape, verified over a trajectory."""
    given = clusters.make_clusters(shape)
    running, not_run, versions = peers.split(peers.updates(given.centroids, clusters.DECAY, given.tokens_per_centroid))
    functions: dict[str, clusters.Update] = {
        "kmeans_route": clusters.router_update(given),
        "textbook K-Means": clusters.textbook_update(given),
    }
    functions |= {name: peer.function for name, peer in running.items() if peer.function}
    contest = Contest(
        f"assignment and update of the centroids, K = 1, {shape}",
        [Contestant(name, partial(function, given.batches[-1])) for name, function in functions.items()],
        baselines=["textbook K-Means"],
        note="the codebook also gathers the codes of the tokens, (T, D); flash-kmeans keeps no running average",
        not_run=not_run,
        versions=versions,
    )

    def check() -> None:
        for name, function in functions.items():
            clusters.check_trajectory(name, function, given, keeps=0.0 if "flash" in name else clusters.DECAY)
        if "vector-quantize-pytorch codebook" in running:
            fresh = peers.Codebook(given.centroids, clusters.DECAY, given.tokens_per_centroid)
            clusters.check_codebook_sums(fresh, given)

    contest.verify(check)
    return contest


def test_assignment(shape: BenchShape, bench: Bench) -> None:
    contest = assignment_contest(shape)
    with torch.no_grad():
        bench.run(contest, {"shape": shape._asdict()})


def test_assignment_and_update(shape: BenchShape, bench: Bench) -> None:
    bench.run(update_contest(shape), {"shape": shape._asdict()})
