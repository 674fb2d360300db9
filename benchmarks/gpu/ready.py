"""What `make gpu` needs, a line each: torch, Triton, a GPU. It decides nothing: a dry run goes without a GPU."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path


def installed(name: str) -> str:
    """The version of a package, or where it is missing."""
    if importlib.util.find_spec(name) is None:
        return f"missing in {Path(sys.executable).name}: choose another with PYTHON=..., or install it there"
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "there, of unknown version"


def gpu() -> str:
    """The name of the GPU that torch uses, or why there is none."""
    if importlib.util.find_spec("torch") is None:
        return "unknown without torch"
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    built = torch.version.cuda or getattr(torch.version, "hip", None)
    why = f"torch is built for {built}, and finds no device" if built else "this torch is built for CPUs alone"
    return f"none ({why})"


def main() -> None:
    """Print the lines."""
    for what, answer in (("torch", installed("torch")), ("Triton", installed("triton")), ("GPU", gpu())):
        print(f"{what:<7}{answer}", flush=True)


if __name__ == "__main__":
    main()
