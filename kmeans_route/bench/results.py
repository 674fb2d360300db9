"""Where and when a result was measured."""

import datetime
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

import kmeans_route


def processor_name() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def command_line(program: str, arguments: Sequence[str]) -> str:
    """The command as results keep it: of a whole path the name alone, which says enough elsewhere."""
    kept = [Path(each).name if Path(each).is_absolute() else each for each in arguments]
    return " ".join([program, shlex.join(kept)]).rstrip()


def environment(command: str) -> dict[str, object]:
    """Device, versions, date and command, without paths of the machine."""
    return {
        "device": processor_name(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average_1_min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",  # type: ignore[no-untyped-call]
        "kmeans_route": kmeans_route.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
    }
