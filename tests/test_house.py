"""The shape of the house: imports go one way, the backend is chosen once, x is checked once, files stay readable."""

import ast
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import kmeans_route
from kmeans_route import MoE, backends, functional
from kmeans_route.routing import base

PACKAGE = Path(kmeans_route.__file__).parent
ROOT = PACKAGE.parent
SOURCES = sorted(p for p in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")] if "__pycache__" not in p.parts)
FLOORS = [
    {"types", "checks", "install", "reference", "metrics", "testing", "viz"},
    {"kernels"},
    {"backends"},
    {"ops"},
    {"functional"},
    {"routing"},
    {"training", "parallel"},
    {"conversion", "integrations"},
    {"lm", "bench"},
    {"cli"},
]
"""From the ground up: a module may import from its own floor and from those below."""
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def rooms_imported(path: Path) -> set[str]:
    """The parts of the package that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kmeans_route":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("kmeans_route.")}
    return found


def room_of(path: Path) -> str:
    if PACKAGE not in path.parents:
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__",):
        return
    above_routing = FLOOR[room] > FLOOR["routing"]
    for name in rooms_imported(path):
        if name not in FLOOR:  # a public name of the package itself: for those above routing
            assert above_routing, f"{path} imports {name} from the front door"
            continue
        assert FLOOR[name] <= FLOOR[room], f"{room} imports {name}, which stands above"


def test_no_circles() -> None:
    """Between rooms of one floor: none imports one that imports it."""
    edges: dict[str, set[str]] = {}
    for path in SOURCES:
        edges.setdefault(room_of(path), set()).update(rooms_imported(path) & FLOOR.keys() - {room_of(path)})

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = edges.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    assert [room for room in edges if room in reached(room)] == []


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_x_is_checked_once_and_the_backend_chosen_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.update([name]) or right(*args, **kwargs))

    layer = MoE(8, 8, 4, 2, backend=backend, init="normal")
    for name in ("flatten_hidden_states", "flatten_mask", "check_indices", "check_device"):
        count(functional, name)
    count(backends, "choose")
    count(base, "enter")
    layer(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool), torch.zeros(6, 2).long() + torch.arange(2))
    assert calls == {
        "flatten_hidden_states": 1, "flatten_mask": 1, "check_indices": 1, "check_device": 1, "choose": 1, "enter": 1,
    }  # fmt: skip


def test_a_backends_name_is_compared_in_backends_alone() -> None:
    compared = re.compile(r"""\bbackend\w*(\.NAME)?\s*(==|!=|in)\s*[("']|["'](torch|triton|reference)["']\s*(==|!=)""")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in SOURCES
        if room_of(path) != "backends"
        for line in path.read_text(encoding="utf-8").splitlines()
        if compared.search(line)
    ]
    assert found == []


FUNCTIONS = (
    "accumulate", "centroid_sums", "combine_fwd", "commit", "directions", "dispatch_fwd", "route_fwd", "whitened",
)  # fmt: skip
BACKWARDS = ("combine_bwd", "route_bwd")
"""Of those that are not PLAIN."""
FUSED = ("num_partials", "route_dispatch_fwd")
"""Of those that are FUSED."""


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_every_backend_has_the_functions(name: str) -> None:
    backend = backends.get(name)
    wanted = [*FUNCTIONS, *(() if backend.PLAIN else BACKWARDS), *(FUSED if backend.FUSED else ())]
    assert name == backend.NAME
    assert [each for each in wanted if not callable(getattr(backend, each, None))] == []


def lengths() -> dict[str, int]:
    found = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                most = 350 if isinstance(node, ast.ClassDef) else 80 if room_of(path) == "kernels" else 60
                length = (node.end_lineno or 0) - node.lineno + 1
                doc = ast.get_docstring(node, clean=False)
                length -= (
                    doc.count("\n") + 1 if doc and most == 60 else 0
                )  # a public docstring is as long as it must be
                if length > most:
                    found[f"{path.relative_to(ROOT)}: {node.name}"] = length
    return found


def test_nothing_is_too_long() -> None:
    assert lengths() == {}


def test_the_formatter_is_rarely_overruled() -> None:
    skips = sum(path.read_text(encoding="utf-8").count("# fmt: " + "skip") for path in SOURCES)
    assert skips <= 15
