"""The plan of `make gpu` and its clock: when a step ends, what is left, exit codes, going on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import plan
from benchmarks.gpu.plan import Plan, Step, Timer, Unit
from benchmarks.gpu.report import Report

HEAD = {"kind": "header", "device": "H", "torch": "2", "triton": "3", "commit": None, "date": "2026-01-01T00:00"}
HEAD |= {"command": "c"}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of the only result file."""
    (file,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


class Now:
    """A clock that goes as it is told."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def unit(name: str, now: Now, seconds: float = 0.0, **record: Any) -> Unit:
    def do(left: Callable[[], float]) -> tuple[dict[str, Any], str]:
        now.time += seconds
        return {"kind": "check", "left_s": left(), **record}, "done"

    return Unit(name, do)


def run_plan(folder: Path, now: Now, *of: Step, alive: Callable[[], object] = lambda: None) -> tuple[int, Plan]:
    made = Plan(list(of), Timer(now=now), Report(folder, HEAD), alive)
    made.run()
    return made.finish(), made


def test_unused_time_passes_on_and_the_next_step_begins_on_time(tmp_path: Path) -> None:
    now = Now()
    first = Step("first", 10, [unit("a", now, 2)])
    second = Step("second", 20, [unit("b", now, 17), unit("c", now, 5), unit("d", now)])  # from 2 to 24
    third = Step("third", 30, [unit("e", now)])
    code, made = run_plan(tmp_path, now, first, second, third)
    assert (code, made.left()) == (plan.NOT_FINISHED, ["second: d"])
    units = [line for line in lines_of(tmp_path) if "unit" in line]
    assert [(line["unit"], line["at_s"]) for line in units] == [("a", 0), ("b", 2), ("c", 19), ("e", 24)]
    assert [line["left_s"] for line in units] == [8, 1, 0, 6], "what a unit is told at its end"


def test_what_is_left_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = Now()
    slow = Step("slow", 10, [unit("a", now, 12), unit("b", now)])
    code, made = run_plan(tmp_path, now, slow, Step("quick", 20, [unit("c", now, left=["its second half"])]))
    assert code == plan.NOT_FINISHED == 3
    assert made.left() == ["slow: b", "quick: c (its second half)"]
    assert "left: slow: b" in capsys.readouterr().out
    end = lines_of(tmp_path)[-1]
    assert (end["kind"], end["exit_code"], end["left"]) == ("end", 3, made.left())
    (markdown,) = tmp_path.glob("*.md")
    assert "Not measured in this run: slow: b; quick: c (its second half)." in markdown.read_text(encoding="utf-8")


def test_an_error_is_wrong_and_the_others_go_on(tmp_path: Path) -> None:
    now = Now()

    def fail(_left: object) -> Any:
        raise ValueError("at /some/folder/file.py")

    code, made = run_plan(tmp_path, now, Step("one", 10, [Unit("a", fail), unit("b", now), unit("c", now, ok=False)]))
    assert (code, made.wrong) == (plan.WRONG, ["one: a", "one: c"])
    assert lines_of(tmp_path)[1]["error"] == "ValueError: at file.py"


def test_nothing_more_runs_on_a_dead_device(tmp_path: Path) -> None:
    def alive() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    now = Now()
    code, made = run_plan(tmp_path, now, Step("one", 10, [unit("a", now), unit("b", now)]), alive=alive)
    assert (code, made.left(), made.wrong) == (plan.WRONG, ["one: b"], ["device"])


def test_a_run_that_hangs_says_what_is_left(tmp_path: Path) -> None:
    now, codes = Now(), list[int]()
    made = Plan([Step("one", 10, [unit("a", now)])], Timer(now=now, speed=1000), Report(tmp_path, HEAD), lambda: None)
    made.stop_at(50, codes.append).join(10)
    assert codes == [plan.NOT_FINISHED]
    assert lines_of(tmp_path)[-1]["left"] == ["one: a"]


def test_it_goes_on_with_what_is_left(tmp_path: Path) -> None:
    now = Now()
    of = [Step("one", 10, [unit("a", now), unit("b", now, 20)]), Step("two", 15, [unit("c", now)])]
    code, _ = run_plan(tmp_path, now, *of)
    assert code == plan.NOT_FINISHED
    report, seen = Report(tmp_path, HEAD, go_on=True), list[str]()
    made = Plan(of, Timer(now=Now()), report, lambda: seen.append("unit"))
    made.run()
    assert (made.finish(), len(seen)) == (plan.RIGHT, 1)
    assert [line["unit"] for line in lines_of(tmp_path) if "unit" in line] == ["a", "b", "c"]
    other = Report(tmp_path, HEAD | {"commit": "another"}, go_on=True)
    assert (other.finished, other.path.name == report.path.name) == (set(), False)
