"""The wheel and the sdist: both hold the whole package, and what a wheel brings runs without the repository."""

import json
import os
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).parent.parent


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist of what git tracks, by the backend itself: nothing is fetched."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools import build_meta as b; b.build_wheel({str(out)!r}); b.build_sdist({str(out)!r})"
    run = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_every_module(made: tuple[Path, Path]) -> None:
    want = {name for name in tracked() if name.startswith("kmeans_route/")}
    want |= {
        name.replace("kernels/triton/", "kmeans_route/kernels/") for name in tracked() if "kernels/triton/" in name
    }
    names = zipfile.ZipFile(made[0]).namelist()
    assert {name for name in names if ".dist-info/" not in name} == {
        name for name in want if name.endswith((".py", "py.typed")) and not name.startswith("tests/")
    }


def test_the_sdist_holds_pages_and_examples_and_no_test_that_could_not_run(made: tuple[Path, Path]) -> None:
    with tarfile.open(made[1]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {name for name in tracked() if name.startswith(("docs/", "examples/"))} <= names
    assert {"CHANGELOG.md", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_the_sdist_builds_the_same_wheel(made: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(made[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    build = "import sys; from setuptools import build_meta as b; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=folder, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert sorted(zipfile.ZipFile(wheel).namelist()) == sorted(zipfile.ZipFile(made[0]).namelist())


def test_the_metadata_is_complete(made: tuple[Path, Path]) -> None:
    archive = zipfile.ZipFile(made[0])
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(f"{info}/METADATA").decode()
    head = metadata.partition("\n\n")[0]
    for field in ("Author", "Classifier", "Description-Content-Type: text/markdown", "License-Expression: Apache-2.0",
                  "Project-URL", "Requires-Python: >=3.11", "Summary"):  # fmt: skip
        assert f"\n{field}" in head, field
    required = [line for line in head.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch"], "the base install needs torch alone, of any version"
    entries = archive.read(f"{info}/entry_points.txt").decode()
    assert "kmeans-route = kmeans_route.cli:main" in entries
    assert "kmeans_route = kmeans_route.integrations.vllm:register" in entries


def test_an_unpacked_wheel_runs_by_itself(made: tuple[Path, Path], tmp_path: Path) -> None:
    zipfile.ZipFile(made[0]).extractall(tmp_path / "site")
    code = """
        import json, torch, kmeans_route, kmeans_route.kernels
        layer = kmeans_route.MoE(16, 32, num_experts=4, top_k=2).eval()
        shape = list(layer(torch.randn(3, 16)).shape)
        print(json.dumps([kmeans_route.__file__, kmeans_route.kernels.__file__, shape]))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    package, kernels, shape = json.loads(run.stdout)
    assert Path(package).is_relative_to(tmp_path)
    assert Path(kernels).is_relative_to(tmp_path)
    assert shape == [3, 16]
