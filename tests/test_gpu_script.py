"""`make gpu` without a GPU: the dry run takes the same path at one tiny shape, in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_sanitize, gpu_table

ROOT = Path(__file__).parent.parent
LEARNED = {"learned eager", "learned compiled"}
PAIR = {"kmeans_route", "eager"}
REFERENCE = {"compiled reference"}
EXPECTED = {
    "eval": PAIR | LEARNED | REFERENCE,
    "assignment": {"kmeans_route", "flash-kmeans"},
    "forward": PAIR | LEARNED | REFERENCE,
    "backward": PAIR,
    "forward_backward": PAIR | LEARNED | REFERENCE,
    "combine": PAIR,
    "combine_backward": PAIR,
    "commit": PAIR,
    "step": PAIR | LEARNED,
}
# An id too many by one, as a kernel might have it, behind everything that checks arguments.
SPOILED = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
from benchmarks import gpu, gpu_sanitize, gpu_table
from kmeans_route.kernels import route
right = route.route_fwd
def wrong(*args, **kwargs):
    result = right(*args, **kwargs)
    result.indices[3] = (result.indices[3] + 1) % 8
    return result
route.route_fwd = wrong
sys.exit(gpu.main(sys.argv[1:]))
"""


def run(folder: Path, *command: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """Run Python with these arguments from the repository root; what it printed, and the lines of its result file."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, *command, "--out", str(folder)],
        cwd=ROOT, env=clean | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    files = list(folder.glob("*.jsonl"))
    assert len(files) <= 1
    text = files[0].read_text(encoding="utf-8") if files else ""
    assert str(folder) not in text
    assert str(ROOT) not in text
    return done, [json.loads(line) for line in text.splitlines()]


def test_dry_run_checks_and_times_every_contestant(tmp_path: Path) -> None:
    done, lines = run(tmp_path, "-m", "benchmarks.gpu", "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
    header, tests, peaks, cell, end = lines
    assert [line["kind"] for line in lines] == ["header", "tests", "peaks", "cell", "end"]
    assert {"device", "driver", "torch", "triton", "python", "date", "command", "commit"} <= header.keys()
    assert "dry run" in header["device"]
    assert (tests["outcome"], tests["detail"]) == ("not run", "--dry")
    assert all(value > 0 for name, value in peaks.items() if name != "kind")
    assert cell["correct"]
    assert all(check["ok"] for check in cell["checks"].values())
    assert {part: set(contestants) for part, contestants in cell["parts"].items()} == EXPECTED
    for part, contestants in cell["parts"].items():
        for name, timing in contestants.items():
            assert ("skipped" in timing) != ("median_us" in timing), (part, name)
            if "median_us" in timing:
                assert timing["q1_us"] <= timing["median_us"] <= timing["q3_us"]
                assert {"gb_per_s", "percent_of_copy", "percent_of_floor", "peak_bytes", "method"} <= timing.keys()
        assert "median_us" in contestants["kmeans_route"], contestants["kmeans_route"]
        assert cell["floors"][part]["largest"] in ("hbm", "l2", "flop")
        others = set(contestants) - {"flash-kmeans"}  # which is not installed, and needs a GPU
        assert all("median_us" in contestants[name] for name in others), contestants
    assert end["exit_code"] == 0
    assert end["left"] == []
    (markdown,) = tmp_path.glob("*.md")
    assert "| tiny | 32 | " in markdown.read_text(encoding="utf-8")
    assert "tiny T=32 D=64 E=8 K=2 float32: correct" in done.stdout


def test_out_of_time_lists_what_is_left(tmp_path: Path) -> None:
    done, lines = run(tmp_path, "-m", "benchmarks.gpu", "--dry", "--seconds", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["kind"] for line in lines] == ["header", "tests", "peaks", "end"]
    assert lines[-1]["left"] == ["tiny T=32"]
    assert "Not measured in this run: tiny T=32." in done.stdout


def test_no_contestant_starts_when_it_is_too_late() -> None:
    """The cell that runs as the time ends keeps what it has."""
    gpu_cells = pytest.importorskip("benchmarks.gpu_cells")
    assert gpu_cells.time_one(None, None, lambda: pytest.fail("made"), lambda: True) == {"skipped": gpu_cells.NO_TIME}


def test_sanitizer_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = "========= ERROR SUMMARY: 2 errors"
    said = f"========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n{summary}"
    assert gpu_sanitize.outcome(0, "all right\n========= ERROR SUMMARY: 0 errors").startswith("clean: ERROR SUMMARY: 0")
    found = gpu_sanitize.outcome(gpu_sanitize.FOUND, said)
    assert found == "FOUND: ERROR SUMMARY: 2 errors; first: Invalid __global__ read of size 4 bytes"
    assert gpu_sanitize.outcome(1, "x\nwrong: T=1") == "could not run, exit code 1: wrong: T=1"

    monkeypatch.setattr(gpu_sanitize.shutil, "which", lambda name: "/bin/tool")
    monkeypatch.setattr(gpu_sanitize.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, said, ""))
    record = gpu_sanitize.sanitize(60)
    assert set(record) == {"kind", "memcheck", "racecheck"}
    assert "no time was left" in gpu_sanitize.sanitize(0)["memcheck"]
    monkeypatch.setattr(gpu_sanitize.shutil, "which", lambda name: None)
    assert "not on the PATH" in gpu_sanitize.sanitize(60)["racecheck"]


def test_readme_table() -> None:
    timing = {"median_us": 20.0, "percent_of_floor": 84.6}
    slow = {"median_us": 50.0, "percent_of_floor": 30.0}
    parts = {
        "eval": {"kmeans_route": timing},
        "forward": {"kmeans_route": {"skipped": "no time was left"}},
        "step": {"kmeans_route": timing, "eager": slow, "learned compiled": slow},
    }
    cell = {"kind": "cell", "shape": "OLMoE", "num_tokens": 64}
    header = {"kind": "header", "device": "H", "driver": None, "torch": "2", "triton": "3", "commit": None}
    header |= {"date": "2026-01-01T00:00", "command": "c"}
    end = {"kind": "end", "left": ["OLMoE T=1"]}
    wrong = cell | {"correct": False, "checks": {}}
    table = gpu_table.readme_table([header, cell | {"parts": parts}, wrong, end])
    assert "| OLMoE | 64 | 20.0 | 85% | n/a | n/a | 20.0 | 0.40 | 2.50 |" in table
    assert "| OLMoE | 64 | wrong, not timed |" in table
    assert "H (torch 2, triton 3, 2026-01-01, `c`)" in table
    assert table.endswith("Not measured in this run: OLMoE T=1.\n")
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_a_wrong_result_is_not_timed(tmp_path: Path) -> None:
    done, lines = run(tmp_path, "-c", SPOILED, "--dry")
    assert done.returncode == 1, done.stdout + done.stderr
    (cell,) = (line for line in lines if line["kind"] == "cell")
    assert not cell["correct"]
    assert "parts" not in cell
    assert "differ outside near-ties" in cell["checks"]["eval routing"]["message"]
    assert "WRONG, not timed" in done.stdout
    assert "median us" not in done.stdout
    assert lines[-1]["exit_code"] == 1


def test_it_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the run removes, here for this test only
    assert gpu.main([]) == 2
    assert "no CUDA or ROCm device" in capsys.readouterr().err


def test_cells_that_decide_come_first() -> None:
    shapes = dict.fromkeys(["OLMoE", "Qwen3-30B-A3B", "DeepSeek-V3"])
    cells = gpu.ordered_cells(shapes, (1, 64, 512, 4096, 16384, 65536), None)
    first = [(name, tokens) for name in ("OLMoE", "DeepSeek-V3") for tokens in (1, 4096, 65536)]
    assert cells[:6] == first
    assert {name for name, _ in cells[6:12]} == {"OLMoE", "DeepSeek-V3"}
    assert {name for name, _ in cells[12:]} == {"Qwen3-30B-A3B"}
    assert len(set(cells)) == len(cells) == 18
    with pytest.raises(ValueError, match="--shape must be among"):
        gpu.ordered_cells(shapes, (1,), ["Olmo"])


def test_floors_by_hand() -> None:
    """OLMoE at T = 4096 in bf16 against the table of byte floors: T D B is 16 MiB."""
    cell = {"num_tokens": 4096, "hidden_size": 2048, "num_experts": 64, "top_k": 8, "block_tokens": 64, "splits": 16}
    x, table = 4096 * 2048 * 2, 64 * 2048
    parts = {part: gpu.work(part, cell, 2) for part in EXPECTED}
    floors = {part: w["bytes"] / x for part, w in parts.items()}
    assert floors["eval"] == 1
    assert (floors["forward"], floors["backward"], floors["combine"], floors["combine_backward"]) == (10, 10, 9, 17)
    assert floors["forward_backward"] == 20
    assert parts["commit"]["bytes"] == 5 * table * 4
    assert parts["step"]["bytes"] == 20 * x + 5 * table * 4
    assert parts["eval"]["l2"] - parts["eval"]["hbm"] == 64 * table * 2, "64 blocks read all directions"
    assert parts["eval"]["flop"] == 2 * 4096 * 2048 * 64
    record = cell | {"parts": {"eval": {"a": {"median_us": 20.0}, "b": {"skipped": "no"}}}}
    gpu.weigh(record, {"copy_bytes_per_s": 1e12, "l2_bytes_per_s": 1e13, "bf16_flop_per_s": 1e15}, 2)
    timing, floor = record["parts"]["eval"]["a"], record["floors"]["eval"]
    assert floor["largest"] == "hbm"
    assert floor["hbm_us"] == pytest.approx((x + 2 * table) / 1e6)
    assert timing["gb_per_s"] == pytest.approx(x / 20e3)
    assert timing["percent_of_copy"] == pytest.approx(100 * x / 20e6)
    assert record["parts"]["eval"]["b"] == {"skipped": "no"}
