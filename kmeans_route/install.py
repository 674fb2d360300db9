"""The pip command that adds an extra to this installation, for errors that name one."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parents[1]


def install_line(*extras: str) -> str:
    """E.g. 'pip install "/sources[cli]"'. No index has a release yet: it names where this package came from.

    That is the folder that holds this file, where it is a clone; else the place that pip has recorded; else the
    folder of the sources, in words.
    """
    wanted = f"[{','.join(extras)}]"
    if (SOURCES / "pyproject.toml").exists() and (SOURCES / "kernels" / "triton").is_dir():
        return f'pip install {"-e " if _recorded().get("dir_info", {}).get("editable") else ""}"{SOURCES}{wanted}"'
    url = str(_recorded().get("url", ""))
    if not url:
        return f'pip install ".{wanted}" in the folder of its sources'
    prefix = "git+" if "vcs_info" in _recorded() else ""
    return f'pip install "kmeans_route{wanted} @ {prefix}{url}"'


def _recorded() -> dict[str, Any]:
    """What pip knows of the place that it installed from (PEP 610); empty where it was not asked."""
    try:
        text = importlib.metadata.distribution("kmeans_route").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return {}
    return dict(json.loads(text)) if text else {}
