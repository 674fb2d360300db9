"""The benchmark of host time runs, and tells every case in both trees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import host

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent.parent
CASES = {"route", "frozen router", "route, triton", "launcher of route", "launcher of dispatch", "MoE, eval"}
CASES |= {"MoE, training", "the same, and backward"}


def test_a_worker_times_every_case() -> None:
    """With the kernels of today: one that has another name or other arguments would end the worker."""
    worker = host.start(ROOT, 1)
    times_us = host.ask(worker)
    worker.communicate()
    assert set(times_us) >= CASES
    assert all(0 < time_us < 1e6 for time_us in times_us.values())


@pytest.mark.slow
def test_every_case_has_a_ratio(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    command = [sys.executable, "-m", "benchmarks.host", "--rounds", "1", "--batches", "1", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    cases = json.loads(out.read_text())["cases"]
    assert set(cases) >= CASES
    assert all(0 < row["now_us"] < 1e5 and row["ratio"] > 0 for row in cases.values())
    assert len(done.stdout.splitlines()) == len(cases)
