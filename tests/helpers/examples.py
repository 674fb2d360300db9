"""Run the example of a framework that docs/integrations.md shows."""

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def run_example(framework: str) -> dict[str, Any]:
    """The names that the example leaves behind."""
    codes = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (code,) = (code for code in codes if f"kmeans_route.integrations.{framework}" in code)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, f"{PAGE.name}: {framework}", "exec"), names)
    return names
