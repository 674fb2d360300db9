"""What errors say of installing, and what an editable install meets."""

import importlib.metadata
import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import kmeans_route
from kmeans_route import install

ROOT = Path(install.__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


class Recorded:
    """A distribution of which pip knows where it came from."""

    def __init__(self, url: dict[str, Any] | None) -> None:
        self.url = url

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.url is None else json.dumps(self.url)


def test_in_a_clone_the_line_names_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Recorded(None))
    *command, place = shlex.split(install.install_line("cli", "viz"))
    assert command == ["pip", "install"]
    folder, _, extras = place.partition("[")
    assert (Path(folder) / "pyproject.toml").exists()
    assert set(extras.strip("]").split(",")) <= EXTRAS.keys()
    editable = Recorded({"url": "file:///x", "dir_info": {"editable": True}})
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: editable)
    assert install.install_line("cli").startswith("pip install -e ")


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ({"url": "file:///home/me/kmeans_route", "dir_info": {}}, "kmeans_route[cli] @ file:///home/me/kmeans_route"),
        (
            {"url": "https://host/kmeans_route.git", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            "kmeans_route[cli] @ git+https://host/kmeans_route.git",
        ),
    ],
)
def test_elsewhere_the_line_names_where_pip_took_it_from(
    url: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(install, "SOURCES", tmp_path)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Recorded(url))
    assert shlex.split(install.install_line("cli")) == ["pip", "install", line]


def test_where_nothing_is_known_the_line_is_for_the_folder_of_the_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unknown(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(install, "SOURCES", tmp_path)
    monkeypatch.setattr(importlib.metadata, "distribution", unknown)
    assert install.install_line("cli") == 'pip install ".[cli]" in the folder of its sources'


def test_no_error_names_an_index_that_has_no_release() -> None:
    for path in sorted((ROOT / "kmeans_route").rglob("*.py")):
        if path.name != "install.py":
            assert 'pip install "kmeans_route' not in path.read_text(), path


def test_a_script_beside_a_clone_of_that_name_finds_the_package(tmp_path: Path) -> None:
    """The folder of the script comes first on the path, and there lies a folder named as the package."""
    clone = tmp_path / "kmeans_route"
    clone.mkdir()
    (clone / "kmeans_route").symlink_to(ROOT / "kmeans_route")
    (clone / "__init__.py").write_text((ROOT / "__init__.py").read_text())
    script = tmp_path / "script.py"
    script.write_text(
        "import kmeans_route, kmeans_route.metrics, pickle\n"
        "assert pickle.loads(pickle.dumps(kmeans_route.KMeansRouter)) is kmeans_route.KMeansRouter\n"
        "print(kmeans_route.__file__, kmeans_route.metrics.__name__, kmeans_route.__version__)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=True)
    file, name, version = done.stdout.split()
    assert Path(file).resolve() == (clone / "kmeans_route" / "__init__.py").resolve()
    assert name == "kmeans_route.metrics"
    assert version == kmeans_route.__version__
