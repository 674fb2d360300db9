"""compute-sanitizer over every kernel of the package, at shapes that leave tiles half full.

python -m benchmarks.gpu_sanitize       # what compute-sanitizer runs: the checks alone, no timing
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck")
TOKENS = (1, 33, 600)
FOUND = 86
"""Exit code that compute-sanitizer is told to use for its own findings."""


def sanitize(seconds: float) -> dict[str, Any]:
    """Tool -> "clean", what it found, or in words why it tells nothing. seconds: for all tools together."""
    program, end = shutil.which("compute-sanitizer"), time.monotonic() + seconds
    record: dict[str, Any] = {"kind": "sanitizer"}
    for tool in TOOLS:
        if program is None:
            record[tool] = "not run: compute-sanitizer is not on the PATH"
            continue
        left = end - time.monotonic()
        if left < 10:
            record[tool] = "not run: no time was left"
            continue
        # Without PyTorch's cache every tensor is an allocation of its own, whose bounds memcheck knows.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--launch-timeout", "0"]
        command += ["--target-processes", "all", sys.executable, "-m", "benchmarks.gpu_sanitize"]
        try:
            run = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left, check=False
            )
        except subprocess.TimeoutExpired:
            record[tool] = f"not finished within {left:.0f} s"
            continue
        record[tool] = outcome(run.returncode, run.stdout + run.stderr)
    return record


def outcome(code: int, text: str) -> str:
    """One line about what a tool said."""
    from kmeans_route.bench.clock import without_paths

    own = [line.strip("= ") for line in text.splitlines() if line.startswith("=========")]
    summary = next((line for line in reversed(own) if "SUMMARY" in line), "no summary")
    if code == 0:
        return f"clean: {summary}"
    if code == FOUND:
        first = next((line for line in own if line and "COMPUTE-SANITIZER" not in line), "")
        return without_paths(f"FOUND: {summary}; first: {first}")
    last = text.strip().splitlines()[-1:] or ["nothing"]
    return without_paths(f"could not run, exit code {code}: {last[0]}")


def main() -> int:
    """Checks of small cells in both element sizes."""
    import torch

    from benchmarks.gpu_checks import Cell, Problem, verify

    wrong = []
    for dtype in ("bfloat16", "float32"):
        for num_tokens in TOKENS:
            p = Problem(Cell("odd", num_tokens, 200, 13, 3, dtype), torch.device("cuda", torch.cuda.current_device()))
            wrong += [f"{dtype} T={num_tokens} {name}" for name, check in verify(p).items() if not check["ok"]]
    print("wrong: " + ", ".join(wrong) if wrong else "all right")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
