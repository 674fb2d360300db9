"""`make gpu` without a GPU: compiling ahead, all steps in the interpreter, and what is made of their results."""

import json
import os
import stat
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import full, plan, race, sanitize, steps, table, timing
from benchmarks.gpu.cells import CELLS, PIPELINED, TINY
from benchmarks.gpu.checks import Problem
from benchmarks.gpu.launches import parts_of
from benchmarks.gpu.measure import measure
from benchmarks.gpu.plan import ENDS
from kmeans_route.bench.clock import Clock
from kmeans_route.kernels import route

ROOT = Path(__file__).parents[2]
HEAD = {"kind": "header", "device": "H", "driver": None, "torch": "2", "triton": "3", "commit": None}
HEAD |= {"date": "2026-01-01T00:00", "command": "c"}
PEAKS = {"copy_bytes_per_s": 1e12, "l2_bytes_per_s": 1e13, "bf16_flop_per_s": 1e15}
CPU = torch.device("cpu")
PAIR = {"kmeans_route", "eager"}
CONTESTS = {
    "eval": PAIR | {"product", "product, top-k"},
    **dict.fromkeys(("forward", "backward", "combine", "combine_backward", "commit", "step"), PAIR),
}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of the only result file, which names no folder of the machine."""
    (file,) = folder.glob("*.jsonl")
    text = file.read_text(encoding="utf-8")
    assert str(folder) not in text
    assert str(ROOT) not in text
    return [json.loads(line) for line in text.splitlines()]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python from the repository root, in a process without the interpreter."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=clean | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip


class NothingAhead:
    """In place of the processes that compile."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number, self.ready, self.cpu_s, self.problems = 0, set[str](), 0.0, list[str]()

    def wait(self, _seconds: float) -> bool:
        return True

    def stop(self) -> None:
        pass


def test_when_time_is_taken_away_all_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "Ahead", NothingAhead)
    assert command.main(["--dry", "--clock-speed", "100000", "--out", str(tmp_path)]) == plan.NOT_FINISHED
    left = lines_of(tmp_path)[-1]["left"]
    assert [*dict.fromkeys(name.partition(":")[0] for name in left)] == list(ENDS)
    said = capsys.readouterr().out
    assert "left: timing: tiny T=16" in said
    assert "exit code 3" in said
    assert "Not measured in this run: compile: rates;" in said


def test_from_a_step_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the time before it had passed, but for compiling."""
    monkeypatch.setattr(steps, "Ahead", NothingAhead)
    assert command.main(["--dry", "--from", "sanitizer", "--out", str(tmp_path)]) == plan.RIGHT
    units = [line for line in lines_of(tmp_path) if "unit" in line]
    assert [line["step"] for line in units] == ["compile", "compile", "sanitizer"]
    assert all(ENDS["configs"] - ENDS["compile"] <= line["at_s"] < ENDS["sanitizer"] for line in units)


def test_it_refuses_in_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the run removes, here for this test only
    assert command.main([]) == plan.NO_START == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "There is no CUDA or ROCm device that torch can use; --dry runs without one.\n"
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.main([]) == plan.NO_START
    assert "torch and triton cannot be imported by" in capsys.readouterr().err


def test_make_gpu_without_a_gpu() -> None:
    """What it needs, a line each, one sentence, and make's own line; nothing is installed for it."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
    )  # fmt: skip
    assert done.returncode == 2
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["torch", "Triton", "GPU"]
    assert " none (" in done.stdout
    sentence, *of_make = done.stderr.splitlines()
    assert sentence.startswith("There is no CUDA or ROCm device")
    assert [line.startswith("make") for line in of_make] == [True]


def test_dry_run(tmp_path: Path) -> None:
    """Every step in order; no launch that was not planned; the table at the end."""
    done = run("-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = lines_of(tmp_path)
    assert [*dict.fromkeys(line["step"] for line in lines if "step" in line)] == list(ENDS)
    header, cell, end = lines[0], next(line for line in lines if line["kind"] == "cell"), lines[-1]
    assert {"device", "driver", "torch", "triton", "python", "date", "command", "commit"} <= header.keys()
    assert "dry run" in header["device"]
    (compiled,) = (line for line in lines if line["kind"] == "compile")
    assert compiled["problems"] == []
    assert compiled["ready"] == compiled["of"] == steps.DRY_AHEAD
    (late,) = (line for line in lines if line["kind"] == "late")
    assert late["kernels"] == [], "launched, and not among the planned"
    assert (end["exit_code"], end["left"], end["wrong"]) == (0, [], [])
    assert {part: set(contestants) for part, contestants in cell["parts"].items()} == CONTESTS
    (found,) = (line for line in lines if line["kind"] == "peers")
    (beside,) = (line for line in lines if line["kind"] == "peers cell")
    timed = {name for some in beside["parts"].values() for name in some}
    assert found["versions"].keys() - found["absent"].keys() == timed & found["versions"].keys()
    assert beside["ok"]
    for part, contestants in cell["parts"].items():
        assert cell["floors"][part]["largest"] in ("hbm", "l2", "flop")
        for timing_ in contestants.values():
            assert timing_["q1_us"] <= timing_["median_us"] <= timing_["q3_us"]
            assert {"gb_per_s", "percent_of_copy", "percent_of_floor", "peak_bytes", "method"} <= timing_.keys()
    (markdown,), (document,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    assert "| tiny | 16 | " in markdown.read_text(encoding="utf-8")
    assert markdown.read_text(encoding="utf-8") in done.stdout
    assert json.loads(document.read_text(encoding="utf-8"))["cell"] == [cell]


def test_compiled_ahead_is_found_by_the_launch() -> None:
    """Without a GPU: another process compiles the planned launches, then the package launches with real tensors."""
    done = run("-m", "tests.helpers.compiled_ahead")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["problems"] == []
    assert found["new_entries"] == []
    assert found["missed"] == []
    assert len(found["hits"]) == found["planned"] > 10
    assert found["keys"] == found["keys_of_triton"] == found["pairs"] > 100


def test_wrong_results_are_timed_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """An id too many by one, as a kernel might have it, behind everything that checks arguments."""
    right = route.route_fwd

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        result.indices[3] = (result.indices[3] + 1) % 8
        return result

    monkeypatch.setattr(route, "route_fwd", wrong)
    record = timing.time_cell(TINY, Clock(CPU), PEAKS, lambda: 1.0, lambda p: {"eval": timing.contestants(p)["eval"]})
    assert (record["ok"], record["correct"]) == (False, False)
    assert "differ outside near-ties" in record["checks"]["eval routing"]["message"]
    ours, eager = record["parts"]["eval"]["kmeans_route"], record["parts"]["eval"]["eager"]
    assert "differ outside near-ties" in ours["wrong"]
    assert ours["median_us"] > 0
    assert "wrong" not in eager
    assert "WRONG, timed all the same" in table.cell_table(record)
    assert "| tiny | 16 (wrong) | " in table.readme_table([HEAD, record])


def test_no_contestant_starts_when_it_is_too_late() -> None:
    assert timing.time_one(None, None, lambda: pytest.fail("made"), lambda: 0.0) == {"skipped": timing.NO_TIME}


def test_contests_that_take_longer() -> None:
    """Compiled and learned contestants, by dynamo's eager backend here; peers have tests of their own."""

    def slow_ones(p: Problem) -> timing.Parts:
        parts = full.all_contestants(full.Compiler("eager"), {}, p)
        return {
            part: {name: make for name, make in some.items() if name != "kmeans_route"} for part, some in parts.items()
        }

    record = timing.time_cell(TINY, Clock(CPU), PEAKS, lambda: 1.0, slow_ones)
    assert record["ok"], table.cell_table(record)
    learned, plain = {"learned eager", "learned compiled"}, {"eager", "compiled reference"}
    timed = {part: {who for who, t in some.items() if "median_us" in t} for part, some in record["parts"].items()}
    assert timed["eval"] == learned | plain | {"product", "product, top-k"}
    assert timed["forward"] == timed["forward_backward"] == learned | plain
    assert timed["step"] == learned | {"eager"}
    assert [*timed][-2:] == ["commit", "step"], "they move the centroids"


@pytest.fixture
def phantom(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that takes every branch of a GPU; streams, events and graphs are played, and a replay does nothing."""

    class Event:
        def __init__(self, **_: Any) -> None:
            self.time = 0.0

        def record(self, _stream: Any) -> None:
            self.time = time.perf_counter()

        def elapsed_time(self, other: Any) -> float:
            return 1e3 * (other.time - self.time)

    @contextmanager
    def graph(_graph: Any, stream: Any) -> Any:
        yield

    modes: list[str] = []
    played = {
        "Stream": lambda *_: SimpleNamespace(), "Event": Event, "stream": lambda _: nullcontext(), "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "set_sync_debug_mode": modes.append,
        "synchronize": lambda *_: None, "reset_peak_memory_stats": lambda *_: None,
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 7,
    }  # fmt: skip
    for name, value in played.items():
        monkeypatch.setattr(torch.cuda, name, value)
    clock = Clock(CPU)
    clock.on_gpu, clock.stream, clock.flush = True, torch.cuda.Stream(), torch.empty(8)
    clock.modes = modes  # type: ignore[attr-defined]
    return clock


def test_the_branches_that_only_a_gpu_takes(phantom: Clock) -> None:
    calls: list[int] = []
    with phantom.scope():
        found = measure(phantom, lambda: calls.append(1), back_to_back=True)
    assert (found["method"], found["peak_bytes"], found["samples"]) == ("graph", 7, 50)
    assert {"median_us", "q1_us", "q3_us", "back_to_back_us"} <= found.keys()
    assert len(calls) == 3 + 1 + 2 + 2 * 20, "warm, its memory, and each capture after a call that may not wait"
    assert phantom.modes == ["error", "default"] * 2  # type: ignore[attr-defined]
    assert race.streams(TINY, phantom, rounds=1) == {"rounds": 1}
    with pytest.raises(AssertionError, match=r"graph replay: \w+ differs"):  # the played one leaves what was there
        race.graph_replay(TINY, phantom)


def test_repeated_bits_are_compared() -> None:
    numbers = iter(range(10))
    same = torch.ones(3)
    assert race.same_bits(lambda: (same, torch.tensor([next(numbers) % 2, 0])), 4) == [0, 2]
    assert race.same_bits(lambda: (torch.tensor([torch.nan]),), 2) == [2], "NaN is no result"


def test_the_sanitizer_sees_pipelined_loops() -> None:
    """Several tiles a program from the tensor cores, with D split over programs and not."""
    tiles: dict[bool, int] = {}
    for cell in PIPELINED:
        for launch in parts_of(cell)["forward"]:
            if launch.name == "route_fwd":
                a = launch.arguments
                split = a["num_splits"] > 1
                tiles[split] = max(tiles.get(split, 0), -(-a["split_size"] // a["BD"]))
    assert min(tiles[False], tiles[True]) >= 3
    assert set(PIPELINED) < set(CELLS["shapes"]), "they have been held against fp64"


def fake_tool(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name comes first on the PATH."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
    found = f"{said}========= ERROR SUMMARY: 2 errors"
    assert sanitize.outcome(0, "right\n========= ERROR SUMMARY: 0 errors") == "clean: ERROR SUMMARY: 0 errors"
    hazards = "RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)"
    assert sanitize.outcome(0, f"========= {hazards}") == f"with warnings: {hazards}"
    assert sanitize.outcome(1, "x\nno module") == "could not run, exit code 1: no module"
    assert sanitize.sanitize(60)["racecheck"] == "not run: compute-sanitizer is not on the PATH"

    fake_tool(tmp_path, "compute-sanitizer", f'echo "{found}"; [ "$2" = memcheck ] && exit 86; sleep 60', monkeypatch)
    monkeypatch.setattr(sanitize, "LEAST_S", 0)
    began = time.monotonic()
    record = sanitize.sanitize(1)
    assert time.monotonic() - began < 20
    assert record["memcheck"] == "FOUND: ERROR SUMMARY: 2 errors; first: Invalid __global__ read of size 4 bytes"
    assert (record["ok"], record["left"]) == (False, ["racecheck"])
    monkeypatch.setattr(sanitize, "LEAST_S", 10)
    assert sanitize.sanitize(5) == {"kind": "sanitizer", "left": ["memcheck", "racecheck"]}


def test_readme_table() -> None:
    fast, slow = {"median_us": 20.0, "percent_of_floor": 84.6}, {"median_us": 50.0, "percent_of_floor": 30.0}
    parts = {
        "eval": {"kmeans_route": fast, "product": {"median_us": 10.0}, "product, top-k": slow},
        "forward": {"kmeans_route": {"skipped": "no time was left"}},
        "step": {"kmeans_route": fast, "eager": slow},
    }
    cell = {"kind": "cell", "shape": "OLMoE", "num_tokens": 64, "parts": parts}
    end = {"kind": "end", "left": ["timing: OLMoE T=1"]}
    told = table.readme_table([HEAD, cell | {"parts": {}}, cell, end])
    assert "| OLMoE | 64 | 20.0 | 85% | 10.0 | 2.50 | n/a | n/a | 20.0 | 2.50 |\n" in told, "the last of a cell counts"
    assert told.count("OLMoE | 64") == 1
    assert "compiled" not in told
    assert "H (torch 2, triton 3, 2026-01-01, `c`)" in told
    assert told.endswith("Not measured in this run: timing: OLMoE T=1.\n")
    learned = cell | {"parts": parts | {"step": parts["step"] | {"learned compiled": slow}}}
    assert "| 2.50 | 0.40 |" in table.readme_table([HEAD, learned])
    trial = {"kind": "config", "kernel": "route_fwd", "shape": "OLMoE", "num_tokens": 64}
    trials = [trial | {"config": None, "median_us": 9.0}, trial | {"config": [64, 64, 4, 3], "median_us": 8.0}]
    trials += [trial | {"config": [32, 64, 4, 3], "median_us": 1.0, "wrong": "ids"}]
    assert "OLMoE, T=64: [64, 64, 4, 3] takes 8.0 us, the table's configuration 9.0 us." in table.readme_table(
        [HEAD, *trials]
    )


def test_floors_add_up() -> None:
    """Those of a step are those of its parts; a launch counts with its largest."""
    found = timing.floors(CELLS["timing"][0], PEAKS)
    assert set(CONTESTS) < set(found)
    for key in ("bytes", "hbm_us", "floor_us"):
        whole = sum(found[part][key] for part in ("forward", "backward", "commit"))
        assert found["step"][key] == pytest.approx(whole)
    for floor in found.values():
        assert floor["floor_us"] >= max(floor["hbm_us"], floor["l2_us"], floor["flop_us"]) - 1e-9
        assert floor["bytes"] == pytest.approx(1e-6 * floor["hbm_us"] * PEAKS["copy_bytes_per_s"])
    x = 4096 * 2048 * 2
    assert x < found["eval"]["bytes"] < 1.2 * x
    timing_: dict[str, Any] = {"median_us": 20.0}
    timing.weigh(timing_, {"bytes": 10e6, "floor_us": 15.0}, PEAKS)
    assert timing_["gb_per_s"] == pytest.approx(500)
    assert timing_["percent_of_copy"] == pytest.approx(50)
    assert timing_["percent_of_floor"] == pytest.approx(75)


def test_cells_that_decide_come_first() -> None:
    timed = [(cell.shape, cell.num_tokens) for cell in CELLS["timing"]]
    assert timed[:4] == [(name, num_tokens) for num_tokens in (4096, 16384) for name in ("OLMoE", "DeepSeek-V3")]
    assert {name for name, _ in timed[:8]} == {"OLMoE", "DeepSeek-V3"}
    assert len(set(timed)) == len(timed) == 24
