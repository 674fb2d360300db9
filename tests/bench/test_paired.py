"""The routers in alternation: verified, then timed, and kept with where and when."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import paired
from benchmarks.paired import FROZEN, LEARNED, OURS, contest, eval_contest
from kmeans_route import LearnedRouter
from kmeans_route.bench.problem import Problem
from kmeans_route.testing import BenchShape


def test_both_are_checked_and_timed() -> None:
    found = contest(Problem(BenchShape(96, 24, 8, 2)))
    found.run(2)
    timings = found.timings()
    assert set(timings) == {OURS, LEARNED}
    assert all(timing.min_ms > 0 and timing.repeats == 2 for timing in timings.values())


@pytest.mark.parametrize("mode", ["train", "eval"])
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
    others = [LEARNED] if mode == "train" else list(paired.KINDS)
    ours = [OURS] if mode == "train" else [OURS, FROZEN]
    assert set(record["paired_ratios"]) == {f"{one} / {other}" for one in ours for other in others}
    for each, ratio in record["paired_ratios"].items():
        assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
        assert f"  {each}: " in said
    assert set(record["times"]) == {*ours, *others}


def test_a_wrong_router_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LearnedRouter.forward

    def forward(router: LearnedRouter, x: torch.Tensor) -> object:
        out = right(router, x)
        return out._replace(weights=1.01 * out.weights)

    monkeypatch.setattr(LearnedRouter, "forward", forward)
    with torch.no_grad(), pytest.raises(AssertionError, match="gates"):
        eval_contest(BenchShape(96, 24, 8, 2))
