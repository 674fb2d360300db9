"""The routers in alternation: verified, then timed, and kept with where and when."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import paired
from benchmarks.harness import checks
from benchmarks.paired import COMMIT, FROZEN, LEARNED, OURS, commit_contest, contest, eval_contest
from kmeans_route import LearnedRouter, route
from kmeans_route.bench.problem import Problem
from kmeans_route.testing import BenchShape


def test_both_are_checked_and_timed() -> None:
    found = contest(Problem(BenchShape(96, 24, 8, 2)))
    found.run(2)
    timings = found.timings()
    assert set(timings) == {OURS, LEARNED}
    assert all(timing.min_ms > 0 and timing.repeats == 2 for timing in timings.values())


@pytest.mark.parametrize("mode", ["train", "commit", "eval"])
def test_the_file_says_where_when_and_under_what_load(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = torch.get_num_threads(), tmp_path / "paired.json"
    words = ["--mode", mode, "--threads", "1", "--rounds", "3", "--shape", "96,24,8,2", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["paired", *words])
    try:
        paired.main()
    finally:
        torch.set_num_threads(before)
    document = json.loads(out.read_text())
    where = document["environment"]
    assert where["num_threads"] == 1
    assert {"device", "torch", "date", "load_average_1_min"} <= set(where)
    assert where["command"] == f"python -m benchmarks.paired {' '.join(words[:-1])} paired.json"
    (record,) = document["results"]
    assert (record["shape"], record["num_tokens"], record["method"]) == ("96,24,8,2", 96, "thread time")
    said = capsys.readouterr().out
    ours, others = {
        "train": ([OURS], [LEARNED]),
        "commit": ([OURS, OURS + COMMIT], ["sigmoid", "sigmoid" + COMMIT]),
        "eval": ([OURS, FROZEN], list(paired.KINDS)),
    }[mode]
    pairs = zip(ours, others, strict=True) if mode == "commit" else itertools.product(ours, others)
    assert set(record["paired_ratios"]) == {f"{one} / {other}" for one, other in pairs}
    for each, ratio in record["paired_ratios"].items():
        assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
        assert f"  {each}: " in said
    assert set(record["times"]) == {*ours, *others}


def test_gates_at_another_tau_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "route", lambda *given, tau=0.2, **options: route(*given, tau=2 * tau, **options))
    with pytest.raises(AssertionError, match="weights: plain PyTorch is off"):
        commit_contest(Problem(BenchShape(96, 24, 8, 2)))


def test_a_wrong_router_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LearnedRouter.forward

    def forward(router: LearnedRouter, x: torch.Tensor) -> object:
        out = right(router, x)
        return out._replace(weights=1.01 * out.weights)

    monkeypatch.setattr(LearnedRouter, "forward", forward)
    with torch.no_grad(), pytest.raises(AssertionError, match="gates"):
        eval_contest(BenchShape(96, 24, 8, 2))
