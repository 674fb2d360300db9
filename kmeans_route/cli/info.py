"""What this machine offers: versions, devices, backends."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

import kmeans_route

AVAILABLE = "available"


def environment() -> dict[str, Any]:
    """Versions and machine as plain JSON values; absent packages are null."""
    return {
        "kmeans_route": kmeans_route.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "numpy", "safetensors", "matplotlib")},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "devices": devices(),
        "backends": backends(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[str]:
    """The devices that torch sees, the CPU first."""
    found = ["cpu"]
    found += [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    if torch.xpu.is_available():
        found += [f"xpu:{index} ({torch.xpu.get_device_name(index)})" for index in range(torch.xpu.device_count())]
    return found


def backends() -> dict[str, str]:
    """Backend name -> "available", or why not, found by routing one token with it."""
    x, weight = torch.ones(1, 4), torch.eye(4)
    found = {}
    for name in ("reference", "torch", "triton"):
        device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
        try:
            kmeans_route.route(x.to(device), weight.to(device), 1, backend=name)
            found[name] = AVAILABLE
        except (ValueError, RuntimeError, NotImplementedError, ImportError) as error:
            found[name] = " ".join(str(error).split())
    return found


def rows(facts: dict[str, Any]) -> list[list[str]]:
    """`environment()` as table rows of name and value, but why a backend is not here."""
    table = []
    for name, value in facts.items():
        if isinstance(value, dict):
            table += [[f"backend {key}", item if item == AVAILABLE else "not here"] for key, item in value.items()]
        elif isinstance(value, list):
            table += [[name.removesuffix("s"), item] for item in value]
        else:
            table.append([name, "not installed" if value is None else str(value)])
    return table
