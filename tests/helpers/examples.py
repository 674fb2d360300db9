"""Run the example of a module's docstring: what is indented below "Example:"."""

import itertools
import textwrap
from types import ModuleType
from typing import Any

import torch


def run_example(module: ModuleType) -> dict[str, Any]:
    """The names that the example leaves behind."""
    lines = (module.__doc__ or "").partition("\nExample:\n")[2].splitlines()
    code = textwrap.dedent("\n".join(itertools.takewhile(lambda line: line.startswith("    ") or not line, lines)))
    assert "import" in code, "no example"
    assert len(code.splitlines()) <= 20
    names: dict[str, Any] = {"torch": torch, "__name__": "example"}
    exec(compile(code, f"{module.__name__} docstring", "exec"), names)
    return names
