"""The benchmark of host time runs, and tells every case in both trees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_every_case_has_a_ratio(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    command = [sys.executable, "-m", "benchmarks.host", "--rounds", "1", "--batches", "1", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    cases = json.loads(out.read_text())["cases"]
    assert {"route", "frozen router", "route, triton", "launcher of route", "launcher of dispatch"} <= set(cases)
    assert {"MoE, eval", "MoE, training", "the same, and backward"} <= set(cases)
    assert all(0 < row["now_us"] < 1e5 and row["ratio"] > 0 for row in cases.values())
    assert len(done.stdout.splitlines()) == len(cases)
