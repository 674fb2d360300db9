"""Contestants from other packages: what runs, what does not and why; goals and fits of the contests."""

import re

import pytest
import torch

from benchmarks.harness import checks, peers
from benchmarks.harness.contest import Contest, Goal
from benchmarks.harness.scaling import fit_power
from kmeans_route.bench.contest import Contestant
from kmeans_route.bench.problem import Problem
from kmeans_route.testing import BenchShape, make_centroids

TINY = BenchShape(96, 24, 8, 2)


def test_a_package_that_is_not_there_is_reported() -> None:
    def make() -> None:
        import no_such_package  # type: ignore[import-not-found] # noqa: F401

    peer = peers.find("no-such-package", make)  # type: ignore[arg-type]
    assert peer.function is None
    assert peer.version == "no-such-package, not installed"
    assert peer.reason == "ModuleNotFoundError: No module named 'no_such_package'"
    assert peers.cuda_only("no-such-package", "no_such_package") == peer


def test_a_package_that_cannot_run_here_is_reported() -> None:
    def fails(x: torch.Tensor) -> None:
        assert x.is_cuda, "All tensors must be on CUDA\nand so on"

    assert peers.find("torch", lambda: fails, torch.ones(1)).reason == "AssertionError: All tensors must be on CUDA"
    peer = peers.cuda_only("torch", "torch")
    assert (peer.function, peer.reason) == (None, "its kernels are for CUDA devices alone")
    assert re.fullmatch(r"torch \d.*", peer.version)


def test_all_peers_have_a_version_and_a_function_or_a_reason() -> None:
    centroids = make_centroids(8, 24)
    experts = torch.randn(8, 32, 24), torch.randn(8, 24, 16)
    found = [
        peers.routers(TINY), peers.layers(TINY, *experts), peers.permutations(), peers.assignments(centroids),
        peers.updates(centroids, 0.9, 12.0),
    ]  # fmt: skip
    for group in found:
        for peer in group.values():
            assert peer.version
            assert (peer.function is None) == bool(peer.reason)
    running, not_run, versions = peers.split(found[0])
    assert running.keys() | not_run.keys() == versions.keys() == found[0].keys()


@pytest.mark.parametrize("shape", [TINY, BenchShape(40, 32, 256, 8)], ids=["tiny", "256 experts"])
def test_routers_of_transformers_are_the_learned_router(shape: BenchShape) -> None:
    pytest.importorskip("transformers", minversion="5.16")
    problem = Problem(shape)
    found = {name: peer for name, peer in peers.routers(shape).items() if name.startswith("transformers")}
    assert len(found) == 5
    for name, peer in found.items():
        assert peer.function, peer.reason
        if peer.kind == "sigmoid":
            assert peer.groups == ((8, 4) if shape.num_experts == 256 else (1, 1))
            checks.check_sigmoid(name, peer.function, problem, peer.groups)
        else:
            checks.check_learned(name, peer.function, problem)


def contest_of_three(goals: list[Goal]) -> Contest:
    return Contest(
        "three",
        [Contestant(name, lambda: None) for name in "abc"],
        ["b"],
        goals=goals,
        not_run={"d": "no GPU"},
        versions={"a": "torch 1.0", "d": "other 2.0"},
    )


def test_goals_and_those_not_run_are_shown_and_kept() -> None:
    contest = contest_of_three([Goal("a", ("b", "c"), 1.0), Goal("a", ("b",), 1.35, aim=0.5)])
    contest.verify(lambda: None)
    contest.times_ms = {"a": [9.0, 6.0, 3.0], "b": [4.0, 4.0, 4.0], "c": [5.0, 3.0, 8.0]}
    both, one = contest.outcomes()
    assert (both["over_ms"], both["ratio"], both["met"]) == (9.0, 6 / 9, True)
    assert (one["over_ms"], one["ratio"], one["met"], one["aim"]) == (4.0, 1.5, False, 0.5)
    table = contest.table()
    assert "a / (b + c, 9.00 ms) = 0.67 (goal at most 1: met)" in table
    assert "a / (b, 4.00 ms) = 1.50 (goal at most 1.35, aim 0.5: not met)" in table
    assert re.search(r"^d +not run: no GPU$", table, re.MULTILINE)
    record = contest.record()
    assert record["not_run"] == [{"contestant": "d", "status": "not run", "reason": "no GPU"}]
    assert record["versions"] == {"a": "torch 1.0", "d": "other 2.0"}
    assert record["goals"] == [both, one]


def test_goals_must_name_contestants() -> None:
    with pytest.raises(ValueError, match=r"goals and versions must name contestants, got \['x'\]"):
        contest_of_three([Goal("a", ("x",), 1.0)])
    with pytest.raises(ValueError, match="different names"):
        Contest("one", [Contestant("a", lambda: None)], ["a"], not_run={"a": "no GPU"})


def test_fits_find_the_exponent() -> None:
    sizes = [8, 16, 64, 128]
    fit = fit_power(sizes, [5 * size**0.75 for size in sizes])
    assert fit == pytest.approx((0.75, 5.0, 1.0))
    noisy = fit_power([1, 2, 4], [1.0, 4.0, 4.0])
    assert noisy.exponent == pytest.approx(1.0)
    assert noisy.r_squared == pytest.approx(0.75)
    assert fit_power([1, 2], [3.0, 3.0]) == pytest.approx((0.0, 3.0, 1.0))
    with pytest.raises(ValueError, match="two sizes or more"):
        fit_power([4, 4], [1.0, 2.0])
    with pytest.raises(ValueError, match="must be positive"):
        fit_power([1, 2], [0.0, 2.0])
