"""The benchmark suites: each runs at a tiny shape, leaves a complete record, and refuses a contestant that is wrong."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import clusters, commits, peers, rivals, steps
from benchmarks.harness.contest import Contest
from kmeans_route import KMeansRouter
from kmeans_route.bench import baselines
from kmeans_route.bench.problem import Problem
from kmeans_route.testing import BenchShape

ROOT = Path(__file__).parents[2]
TINY = BenchShape(96, 24, 8, 2)
SUITES = ("clusters", "combine", "commit", "decode", "dispatch", "moe", "route", "scaling")
TIMING = {"median_ms", "q1_ms", "q3_ms", "min_ms", "ratio", "paired_ratio", "repeats"}
ROUTERS = {f"transformers {name}" for name in ("Mixtral", "Qwen3-MoE", "OLMoE", "GPT-OSS", "DeepSeek-V3")}
ROUTERS |= {"TransformerEngine fused router", "triton_kernels topk"}
PERMUTATIONS = {"TransformerEngine permute", "triton_kernels routing"}
CLUSTERING = {"kmeans_route", "textbook K-Means", "vector-quantize-pytorch codebook"}
CLUSTERING |= {"flash-kmeans, its PyTorch path", "flash-kmeans, its kernels"}
LEARNED = {f"{name}{how}" for name in rivals.LEARNED for how in ("", ", compiled")}
ROUTING = ROUTERS | {"kmeans_route", "textbook K-Means", "reference, compiled"}
PARTS = {"the product x W^T", "one vector_norm", "one topk", "one copy of x"}
EXPECTED = {  # how the title begins -> how many contests, and who is in each
    "training step, ": (1, ROUTING | LEARNED | {"kmeans_route commit alone"}),
    "routing alone, ": (
        6, ROUTING | PARTS | {"softmax, no aux", "softmax, no aux, compiled", "kmeans_route, frozen"}
    ),
    "dispatch, ": (2, PERMUTATIONS | {"kmeans_route", "index", "index, compiled"}),
    "combine, ": (
        2, PERMUTATIONS | {"kmeans_route", "gather", "gather, compiled", "scatter", "scatter, compiled"}
    ),
    "dispatch and combine, ": (1, {"kmeans_route", "index + gather", "index + scatter"}),
    "commit, ": (
        1, {"kmeans_route", "kmeans_route, whitened", "reference", "reference, compiled", "AdamW, the learned weight",
            "AdamW, the learned weight, fused"},
    ),
    "MoE layer step, ": (
        1, {"kmeans_route", "softmax + aux", "sigmoid + bias", "transformers OLMoE block, eager",
            "transformers OLMoE block, grouped_mm", "Liger fused MoE", "triton_kernels routed matmul"},
    ),
    "assignment, K = 1, ": (1, CLUSTERING),
    "assignment and update of the centroids, K = 1, ": (1, CLUSTERING),
    "training step over ": (4, None),
    "routing alone over ": (4, None),
}  # fmt: skip


def suite(name: str) -> Any:
    return importlib.import_module(f"benchmarks.test_bench_{name}")


def test_every_suite_is_named_here() -> None:
    assert sorted(path.stem for path in (ROOT / "benchmarks").glob("test_bench_*.py")) == [
        f"test_bench_{name}" for name in SUITES
    ]


def test_one_command_writes_everything(tmp_path: Path) -> None:
    """`make bench` at tiny shapes: every contest, with everybody in it timed or said not to run, and why."""
    result = tmp_path / "result.json"
    options = ["benchmarks", "-q", "-s", "-p", "no:cacheprovider", "--quick", "--no-compile", "--threads=1"]
    # Inside a worker of pytest-xdist, pytest-benchmark would time nothing.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--results={result}"],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    text = result.read_text()
    document = json.loads(text)
    assert {"device", "torch", "date", "command", "num_threads"} <= document["environment"].keys()
    assert "--quick" in document["environment"]["command"]
    assert str(tmp_path) not in text
    records = document["results"]
    for begin, (how_many, names) in EXPECTED.items():
        found = [record for record in records if record["title"].startswith(begin)]
        assert len(found) == how_many, begin
        for record in found:
            check_record(record, names)
            assert record["title"] in run.stdout
    assert len(records) == sum(how_many for how_many, _ in EXPECTED.values())
    assert "not run: left out by --no-compile" in run.stdout


def check_record(record: dict[str, Any], names: set[str] | None) -> None:
    assert record["quick"]
    for timing in record["contestants"].values():
        assert timing.keys() >= TIMING
        assert timing["repeats"] == 2
        assert timing["median_ms"] > 0
    not_run = {one["contestant"]: one for one in record["not_run"]}
    assert all(one["status"] == "not run" and one["reason"] for one in not_run.values())
    if names is not None:
        assert record["contestants"].keys() | not_run.keys() == names
        assert not record["contestants"].keys() & not_run.keys()
        others = {
            name for name in names if name.startswith(("transformers", "Transformer", "triton", "flash", "Liger"))
        }
        assert record["versions"].keys() >= others
    else:
        growth = record["growth"]
        assert [str(size) for size in growth["sizes"]] == list(record["contestants"])
        assert growth["median_ms"] == [timing["median_ms"] for timing in record["contestants"].values()]
        assert len(growth["peak_extra_num_bytes"]) == len(growth["sizes"])
        assert {"exponent", "r_squared"} <= growth["time"].keys() & growth["memory"].keys()
    if record["title"].startswith("routing alone, ") and record["dtype"] == "torch.float32":
        whole, product = record["goals"]
        parts = ("the product x W^T", "one vector_norm", "one topk")
        assert tuple(whole["over"]) == parts
        assert whole["over_ms"] == pytest.approx(sum(record["contestants"][part]["median_ms"] for part in parts))
        assert (product["over"], product["at_most"]) == ([parts[0]], 1.35)
    if record["title"].startswith("training step, "):
        assert ["softmax, no aux"] in [goal["over"] for goal in record["goals"]]
        assert record["goals"][-1]["aim"] == 0.85
    if record["title"].startswith("MoE"):
        (goal,) = record["goals"]
        assert (goal["over"], goal["at_most"]) == (["softmax + aux"], 1.0)


def only(peer: peers.Peer) -> Callable[..., dict[str, peers.Peer]]:
    return lambda *_: {"broken": peer}


def gates_off(x: Tensor, weight: Tensor, top_k: int) -> baselines.LearnedResult:
    right = baselines.softmax_plain(x, weight, top_k)
    return right._replace(weights=right.weights * 1.001)


def ids_off(x: Tensor, weight: Tensor, top_k: int) -> baselines.LearnedResult:
    return baselines.softmax_plain(x.roll(1, 0), weight, top_k)


def sigmoid(x: Tensor, weight: Tensor, top_k: int) -> baselines.LearnedResult:
    selected, indices = (x @ weight.T).sigmoid().topk(top_k, dim=1)
    return baselines.LearnedResult(selected / selected.sum(1, keepdim=True), indices, None)


@pytest.mark.parametrize("function", [gates_off, ids_off, sigmoid])
@pytest.mark.parametrize("make", ["training_contest", "eval_contest"])
def test_a_router_that_is_wrong_is_refused(
    make: str, function: baselines.LearnedFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "routers", only(peers.Peer(function, "broken 1.0")))
    with pytest.raises(AssertionError):
        getattr(suite("route"), make)(TINY, compiles=False)


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_a_sigmoid_router_is_held_to_its_groups(groups: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peers.Peer(sigmoid, "sigmoid 1.0", kind="sigmoid", groups=groups)
    monkeypatch.setattr(peers, "routers", only(peer))
    if groups == (1, 1):
        contest = suite("route").eval_contest(TINY)
        contest.run(1, warm_up=0)
        assert contest.record()["versions"] == {"broken": "sigmoid 1.0"}
    else:
        with pytest.raises(AssertionError, match="rows differ"):
            suite("route").eval_contest(TINY)


def test_a_wrong_codebook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose codes stay where they are, and one whose assignment is shifted by a token."""
    given = clusters.make_clusters(TINY)

    def moves_less(x: Tensor) -> tuple[Tensor, Tensor]:
        cosines = torch.nn.functional.normalize(x) @ given.centroids.T
        return cosines.argmax(1), given.centroids

    monkeypatch.setattr(peers, "updates", only(peers.Peer(moves_less, "broken 1.0")))
    with pytest.raises(AssertionError, match="broken: step 0: the centroids' directions are off"):
        suite("clusters").update_contest(TINY)
    shifted = peers.Peer(lambda x: (x @ given.centroids.T).argmax(1).roll(1), "broken 1.0")
    monkeypatch.setattr(peers, "assignments", only(shifted))
    with pytest.raises(AssertionError, match="rows differ"):
        suite("clusters").assignment_contest(TINY)


def test_the_routers_trajectory_is_that_of_running_averages() -> None:
    given = clusters.make_clusters(TINY)
    assert all(batch.shape == (96, 24) for batch in given.batches)
    clusters.check_trajectory("router", clusters.router_update(given), given)
    with pytest.raises(AssertionError, match="router: step 0: the centroids"):
        clusters.check_trajectory("router", clusters.router_update(given), given, keeps=0.8)


@pytest.mark.parametrize(
    ("part", "name", "make"),
    [
        ("dispatch", "plain_dispatch", "dispatch_contest"),
        ("combine", "package_combine", "combine_contest"),
        ("dispatch", "package_exchange", "exchange_contest"),
    ],
)
def test_a_wrong_permutation_is_refused(part: str, name: str, make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(steps, name)

    def rows_swapped(given: Any) -> Tensor:
        y: Tensor = right(given)
        return y.roll(1, 0)

    monkeypatch.setattr(steps, name, rows_swapped)
    with pytest.raises(AssertionError, match=r"expert order|y: error"):
        getattr(suite(part), make)(TINY)


def test_a_wrong_gradient_of_dispatch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = steps.plain_dispatch

    def twice_the_gradient(given: steps.Exchange) -> Tensor:
        y = right(given)
        return y + (y - y.detach())

    monkeypatch.setattr(steps, "plain_dispatch", twice_the_gradient)
    with pytest.raises(AssertionError, match="index: dx: error"):
        suite("dispatch").dispatch_contest(TINY)


def test_a_wrong_commit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(TINY)
    router = steps.make_kmeans_router(problem)
    router(problem.x)
    given = commits.gathered(router)
    right = commits.package_commit(given)
    commits.check_commit("right", lambda: right, given)
    for field in ("weight", "expert_bias", "score_std", "steps"):
        wrong = right._replace(**{field: getattr(right, field) + 1})
        with pytest.raises(AssertionError, match=f"wrong: {field}"):
            commits.check_commit("wrong", lambda wrong=wrong: wrong, given)  # type: ignore[misc]
    monkeypatch.setattr(commits, "WEIGHT_DECAY", 0.5)
    optimizer = commits.make_adamw(problem, fused=False)
    monkeypatch.setattr(commits, "WEIGHT_DECAY", 0.01)
    with pytest.raises(AssertionError, match="the weight is off"):
        commits.check_adamw("AdamW", optimizer)


def test_a_wrong_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "layers", only(peers.Peer(lambda x, _: x, "broken 1.0")))
    with pytest.raises(AssertionError, match="broken: y: error"):
        suite("moe").moe_contest(TINY, 16)


def test_a_wrong_router_is_refused_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    right = steps.make_kmeans_router

    def wrong_for_8(problem: Problem) -> KMeansRouter:
        router = right(problem)
        forward = router.forward

        def off(*args: Any, **kwargs: Any) -> Any:
            routing: Any = forward(*args, **kwargs)
            return routing._replace(weights=routing.weights * 1.01)

        if problem.shape.num_experts == 8:
            monkeypatch.setattr(router, "forward", off)
        return router

    monkeypatch.setattr(steps, "make_kmeans_router", wrong_for_8)
    scaling_contest = suite("scaling").scaling_contest
    scaling_contest("num_experts", [2, 4], TINY, training=True)
    with pytest.raises(AssertionError, match="weights: error"):
        scaling_contest("num_experts", [4, 8], TINY, training=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contests_run_in_both_dtypes(dtype: torch.dtype) -> None:
    contests: list[Contest] = [
        suite("route").eval_contest(TINY, dtype),
        suite("dispatch").dispatch_contest(TINY, dtype),
        suite("combine").combine_contest(TINY, dtype),
    ]
    for contest in contests:
        contest.run(2, warm_up=1)
        assert str(dtype) in contest.title
        assert "kmeans_route" in contest.table()


def test_what_cannot_be_compiled_says_why() -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    reason = rivals.compile_or_reason(breaks, lambda function: function(torch.ones(2)), compiles=True)
    assert isinstance(reason, str)
    assert ": " in reason
