"""Kernels compiled for GPUs that are not here: spills, instructions, bytes and launches of every shipped config."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "gfx942"]
STEP = [
    "route_fwd", "route_select", "route_rank", "prefix", "positions", "dispatch_fwd", "accumulate", "combine_fwd",
    "combine_bwd", "route_bwd", "commit", "directions",
]  # fmt: skip


def offline(*arguments: str) -> dict[str, Any]:
    """The document of `python -m benchmarks.offline`, in a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.offline", "--json", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stdout, run.stderr[-2000:]
    document: dict[str, Any] = json.loads(run.stdout)
    assert run.returncode == bool(document["problems"])
    return document


def row(document: dict[str, Any], arch: str, regime: str, kernel: str) -> dict[str, Any]:
    found = [r for r in document["rows"] if (r["arch"], r["regime"], r["kernel"]) == (arch, regime, kernel)]
    assert len(found) == 1, (arch, regime, kernel)
    return found[0]


@pytest.mark.parametrize("archs", [["sm_90"], pytest.param(ARCHITECTURES, marks=pytest.mark.slow)], ids=str)
def test_one_shape(archs: list[str]) -> None:
    document = offline("--shape", "OLMoE", "--arch", *archs)
    assert document["problems"] == []
    for arch in archs:
        of_step = [r for r in document["rows"] if r["arch"] == arch and r["regime"] == "training"]
        assert [r["kernel"] for r in of_step] == STEP
        assert all(r["compiled"]["spills"] == 0 and r["compiled"]["registers"] > 0 for r in of_step)
        for regime in ("prefill", "decode"):
            kernels = [r["kernel"] for r in document["rows"] if (r["arch"], r["regime"]) == (arch, regime)]
            assert kernels == ["route_fwd", "route_select"]
    products = row(document, "sm_90", "training", "route_fwd")["compiled"]["instructions"]
    assert products["HGMMA"] > 0
    assert products["LDGSTS"] > 0, "x must come through asynchronous 128-bit copies"
    if len(archs) > 1:
        assert row(document, "sm_100", "training", "route_fwd")["compiled"]["instructions"]["UTCHMMA"] > 0
        assert row(document, "gfx942", "training", "route_fwd")["compiled"]["instructions"]["v_mfma"] > 0
    check_bytes(document)


def check_bytes(document: dict[str, Any]) -> None:
    """The floors at OLMoE, T 16384, bf16: T D B = 64 MiB a pass, give or take the tables of T K entries."""
    one_pass, top_k = 16384 * 2048 * 2, 8
    passes = {
        ("prefill", "route_fwd"): 1,
        ("training", "route_fwd"): 1,
        ("training", "dispatch_fwd"): 1 + top_k,
        ("index mode", "dispatch_fwd"): 1,
        ("training", "combine_fwd"): 1 + top_k,
        ("training", "combine_bwd"): 1 + 2 * top_k,
        ("training", "route_bwd"): 2 + top_k,
    }
    for (regime, kernel), count in passes.items():
        moved = row(document, "sm_90", regime, kernel)["work"]["hbm"]
        assert count * one_pass <= moved <= (count + 0.2) * one_pass, (regime, kernel, moved / one_pass)
    assert row(document, "sm_90", "training", "commit")["work"]["hbm"] <= 7 * 64 * 2048 * 4


def test_a_spill_is_a_problem() -> None:
    """The check can fail: a tile far too large for its warps spills, and is named."""
    code = (
        "import sys; from benchmarks import offline; from kmeans_route.kernels import route; "
        "from kmeans_route.kernels.configs import Config; "
        "route.route_config = lambda *_: Config(128, 64, 4, 2); "
        "sys.argv = ['offline', '--arch', 'sm_80', '--shape', 'DeepSeek-V3', '--json']; "
        "offline.launches_of = lambda s, d: (('prefill', x) for x in offline.eval_launches(s, 16384, d)); "
        "sys.exit(offline.main())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr[-2000:]
    assert any("bytes spilled" in problem for problem in json.loads(run.stdout)["problems"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_shape(dtype: str) -> None:
    document = offline("--dtype", dtype)
    assert document["problems"] == []
    assert {r["shape"] for r in document["rows"]} >= {"OLMoE", "Mixtral", "DeepSeek-V3", "GPT-OSS-120B", "Qwen3-Next"}
