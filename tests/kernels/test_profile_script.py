"""`python -m benchmarks.gpu.profile` in Triton's interpreter, and what it makes of ncu's output."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import ncu

ROOT = Path(__file__).parents[2]
# Made up, in the form of --csv --page raw --print-units base.
COLUMNS = ("ID", "Process Name", "Kernel Name", "Stream", "Block Size", "CC", *sorted(ncu.METRICS.values()))
UNITS = ("", "", "", "", "", "", "byte", "ns", "byte")
LAUNCH = ("0", "python3.12", "_route_fwd_kernel", "13", "(256, 1, 1)", "9.0", "17,301,504", "9,600", "34603008.000")
SAMPLE = "\n".join(
    [
        "==PROF== Connected to process 4242 (python3.12)",
        'something that the program says, with "quotes"',
        '==PROF== Profiling "_route_fwd_kernel" - 0: 0%....50%....100% - 4 passes',
        "==PROF== Disconnected from process 4242",
        *(",".join(f'"{cell}"' for cell in row) for row in (COLUMNS, UNITS, LAUNCH)),
    ]
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.profile", *arguments],
        cwd=ROOT, env=clean | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_ncu_sample() -> None:
    found = ncu.parse(SAMPLE, "_route_fwd_kernel")
    assert found == {"time_us": pytest.approx(9.6), "hbm_bytes": 17301504.0, "l2_bytes": 34603008.0}
    scaled = SAMPLE.replace('"byte","ns","byte"', '"Mbyte","usecond","Kbyte"')
    scaled = scaled.replace('"17,301,504","9,600"', '"17.3","9.6"')
    assert ncu.parse(scaled, "_route_fwd_kernel")["time_us"] == pytest.approx(9.6)
    assert ncu.parse(scaled, "_route_fwd_kernel")["hbm_bytes"] == pytest.approx(17.3e6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "may not read the GPU's counters .*as root"),
        ("==WARNING== No kernels were profiled.", "printed no launch of _route_fwd_kernel$"),
        ("==ERROR== Failed to find metric x", "no launch of _route_fwd_kernel: ==ERROR== Failed to find metric x"),
        (SAMPLE.replace("_route_fwd_kernel", "_commit_kernel"), "only of _commit_kernel"),
        (SAMPLE.replace("dram__bytes.sum", "dram__other.sum"), "has no dram__bytes.sum on this device: 'it is absent'"),
        (SAMPLE.replace('"9,600"', '"n/a"'), "has no gpu__time_duration.sum on this device: 'n/a'"),
    ],
)
def test_ncu_problems(text: str, message: str) -> None:
    with pytest.raises(ncu.NcuError, match=message):
        ncu.parse(text, "_route_fwd_kernel")


def test_ncu_is_called_for_one_launch_with_a_cold_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ncu.NcuError, match="not on the PATH"):
        ncu.profile("_route_fwd_kernel", [], cwd=".", env={}, seconds=1)
    tool, asked = tmp_path / "ncu", tmp_path / "asked"
    tool.write_text(f"#!/bin/sh\necho \"$@\" > {asked}\ncat <<'END'\n{SAMPLE}\nEND\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    here = {"cwd": str(tmp_path), "env": dict(os.environ)}
    found = ncu.profile("_route_fwd_kernel", ["python3", "-m", "x"], seconds=60, **here)
    assert found["time_us"] == pytest.approx(9.6)
    line = asked.read_text(encoding="utf-8").strip()
    assert "--kernel-name regex:^_route_fwd_kernel --launch-skip 8 --launch-count 1 --cache-control all" in line
    assert "--clock-control none" in line
    assert line.endswith("python3 -m x")
    tool.write_text("#!/bin/sh\nsleep 60\n", encoding="utf-8")
    with pytest.raises(ncu.NcuError, match=ncu.NOT_FINISHED):
        ncu.profile("_route_fwd_kernel", [], seconds=0.2, **here)


def test_dry_run_names_the_bound() -> None:
    done = run("--kernel", "route_fwd", "--dry", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout)
    assert (record["kernel"], record["shape"], record["ncu"]) == (
        "route_fwd",
        "tiny",
        {"error": "not asked in a dry run"},
    )
    assert set(record["levels"]) == {"HBM", "L2", "matrix"}
    # T D + E D; each of two blocks reads all 8 directions; padded to 16 experts.
    assert record["levels"]["HBM"]["least"] == 4 * (32 * 32 + 8 * 32)
    assert record["levels"]["matrix"]["least"] == 2 * 32 * 32 * 16
    time_us = record["events"]["median_us"]
    for row in record["levels"].values():
        assert row["counted"] is None
        assert row["per_s"] == pytest.approx(1e6 * row["least"] / time_us)
        assert row["percent_of_peak"] == pytest.approx(100 * row["per_s"] / row["peak_per_s"])
    floors = {level: row["floor_us"] for level, row in record["levels"].items()}
    assert record["bound"] == max(floors, key=lambda level: floors[level])
    assert record["percent_of_floor"] == pytest.approx(100 * floors[record["bound"]] / time_us)
    assert "mean nothing" in done.stderr


def test_a_kernel_that_changes_its_arguments_is_repeated_from_the_same_state(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu import profile
    from benchmarks.gpu.launches import Seen

    kept = []

    class Kernel:
        arg_names = ("sums",)

        def __getitem__(self, grid: object) -> object:
            return lambda sums: sums.add_(1)

    sums = torch.zeros(2)
    seen = Seen(Kernel(), "accumulate", (1,), (sums,), {})
    for _ in range(2):
        seen.restore()
        seen.again()
        kept.append(sums.tolist())
    assert kept == [[1.0, 1.0]] * 2
    assert profile.main(["--kernel", "commit", "--dry"]) == 0
    said = capsys.readouterr().out
    assert "commit, tiny T=32 D=32 E=8 K=2 float32" in said
    assert "bound by" in said


def test_a_kernel_that_is_not_launched(capsys: pytest.CaptureFixture[str]) -> None:
    profile = pytest.importorskip("benchmarks.gpu.profile")
    assert profile.main(["--kernel", "rank", "--dry"]) == 1
    assert (
        "rank is not launched at tiny T=32: launched are directions, route_fwd, route_select, route_rank"
        in capsys.readouterr().err
    )
    assert profile.main(["--kernel", "rank", "--dry", "--shape", "none"]) == 2


def test_counted_bytes_take_the_place_of_the_least() -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu import profile

    work = SimpleNamespace(hbm=10e6, l2=20e6, flop=1e9)
    peaks = {"copy_bytes_per_s": 2e12, "l2_bytes_per_s": 5e12, "bf16_flop_per_s": 1e15}
    table = profile.levels(work, 10.0, peaks, {"hbm_bytes": 15e6, "l2_bytes": 40e6})
    assert table["HBM"]["percent_of_peak"] == pytest.approx(75)
    assert table["HBM"]["floor_us"] == pytest.approx(5)
    assert table["L2"]["per_s"] == pytest.approx(4e12)
    assert table["matrix"]["counted"] is None
    assert table["matrix"]["percent_of_peak"] == pytest.approx(10)
