"""compute-sanitizer over every kernel of the package: shapes that leave tiles half full, and the pipelined loops.

python -m benchmarks.gpu.sanitize       # what compute-sanitizer runs: the launches alone, no check and no timing
"""

import os
import re
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.gpu.child import Child

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ("memcheck", "racecheck")
FOUND = 86
"""Exit code that compute-sanitizer is told to use for its own findings."""
LEAST_S = 10


def sanitize(seconds: float) -> dict[str, Any]:
    """Tool -> "clean", what it found, or in words why it tells nothing. Both at once, within so many seconds."""
    program, end = shutil.which("compute-sanitizer"), time.monotonic() + seconds
    record: dict[str, Any] = {"kind": "sanitizer"}
    if program is None:
        return record | dict.fromkeys(TOOLS, "not run: compute-sanitizer is not on the PATH")
    if seconds < LEAST_S:
        return record | {"left": list(TOOLS)}
    # Without PyTorch's cache every tensor is an allocation of its own, whose bounds memcheck knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--error-exitcode", str(FOUND), "--launch-timeout", "0", "--target-processes", "all"]
    with ExitStack() as stack:
        children = {}
        for tool in TOOLS:
            command = [program, "--tool", tool, *options, sys.executable, "-m", "benchmarks.gpu.sanitize"]
            children[tool] = stack.enter_context(Child(command, cwd=str(ROOT), env=environment))
        for tool, child in children.items():
            ended = child.wait(end - time.monotonic())
            record[tool] = outcome(*ended) if ended else f"not finished within {seconds:.0f} s"
            if ended is None:
                record.setdefault("left", []).append(tool)
    record["ok"] = not any(str(record.get(tool)).startswith("FOUND") for tool in TOOLS)
    return record


def outcome(code: int, text: str) -> str:
    """One line about what a tool said."""
    from kmeans_route.bench.clock import without_paths

    own = [line.strip("= ") for line in text.splitlines() if line.startswith("=========")]
    summary = next((line for line in reversed(own) if "SUMMARY" in line), "no summary")
    if code == 0:
        warned = any(int(number) for number in re.findall(r"\d+", summary))
        return f"{'with warnings' if warned else 'clean'}: {summary}"
    if code == FOUND:
        first = next((line for line in own if line and "COMPUTE-SANITIZER" not in line), "")
        return without_paths(f"FOUND: {summary}; first: {first}")
    last = text.strip().splitlines()[-1:] or ["nothing"]
    return without_paths(f"could not run, exit code {code}: {last[0]}")


def main() -> None:
    """Every launch of every cell, those from pipelined loops first."""
    import torch

    from benchmarks.gpu.cells import cells_of
    from benchmarks.gpu.checks import Problem, pieces, routing_alone, training_step

    for cell in cells_of("sanitizer", dry=False):
        p = Problem(cell, torch.device("cuda", torch.cuda.current_device()))
        routing_alone(p)
        training_step(p)
        pieces(p)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
