"""Nsight Compute, where it is installed and allowed: a kernel's time and the bytes that really moved."""

import csv
import shutil
from collections.abc import Iterator

from benchmarks.gpu.child import Child

METRICS = {"time_us": "gpu__time_duration.sum", "hbm_bytes": "dram__bytes.sum", "l2_bytes": "lts__t_bytes.sum"}
"""What we call it -> what ncu calls it."""
UNITS = {
    "byte": 1.0, "kbyte": 1e3, "mbyte": 1e6, "gbyte": 1e9, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9,
    "nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3, "second": 1e6, "ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6,
}  # fmt: skip
"""Unit -> bytes or microseconds."""
WARM_UPS = 8  # more than one step of the package launches a kernel
NOT_FINISHED, NO_PERMISSION = "ncu did not finish", "ERR_NVGPUCTRPERM"


class NcuError(RuntimeError):
    """ncu is not there, may not read the counters, or said something else than expected."""


def profile(kernel: str, command: list[str], *, cwd: str, env: dict[str, str], seconds: float) -> dict[str, float]:
    """METRICS of the launch of `kernel` (its device name) that comes after WARM_UPS others in `command`.

    seconds: that all of it may take.

    Caches are flushed before it, as in our own timings; clocks are left as they are, as for the peaks.

    Raises:
        NcuError: it did not work; the message says what can be done.
    """
    tool = shutil.which("ncu")
    if tool is None:
        raise NcuError("ncu is not on the PATH: it comes with the CUDA toolkit (Nsight Compute)")
    options = [
        "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS.values()),
        "--kernel-name", f"regex:^{kernel}", "--launch-skip", str(WARM_UPS), "--launch-count", "1",
        "--cache-control", "all", "--clock-control", "none", "--target-processes", "all",
    ]  # fmt: skip
    try:
        with Child([tool, *options, *command], cwd=cwd, env=env) as child:
            ended = child.wait(seconds)
    except OSError as error:
        raise NcuError(f"ncu did not run: {type(error).__name__}") from error
    if ended is None:
        raise NcuError(f"{NOT_FINISHED} within {seconds:.0f} s")
    return parse(ended[1], kernel)


def parse(text: str, kernel: str) -> dict[str, float]:
    """METRICS from what ncu printed: its own lines, the program's, a header, a row of units, a row a launch.

    Raises:
        NcuError: there is no such row, or ncu was not allowed to read the counters.
    """
    if NO_PERMISSION in text:
        raise NcuError(
            f"ncu may not read the GPU's counters ({NO_PERMISSION}): run it as root, or have the driver loaded with "
            "NVreg_RestrictProfilingToAdminUsers=0; in a container add the capability SYS_ADMIN"
        )
    rows = list(_rows(text))
    if len(rows) < 3 or "Kernel Name" not in rows[0]:
        said = [line for line in text.splitlines() if line.startswith("==ERROR==")]
        raise NcuError(f"ncu printed no launch of {kernel}{': ' + said[0] if said else ''}")
    names, units = rows[0], dict(zip(rows[0], rows[1], strict=False))
    launches = [dict(zip(names, row, strict=False)) for row in rows[2:]]
    launch = next((row for row in launches if row["Kernel Name"].startswith(kernel)), None)
    if launch is None:
        raise NcuError(f"ncu printed no launch of {kernel}, only of {launches[0]['Kernel Name']}")
    found = {}
    for ours, theirs in METRICS.items():
        try:
            found[ours] = float(launch[theirs].replace(",", "")) * UNITS[units[theirs].lower()]
        except (KeyError, ValueError):
            raise NcuError(f"ncu has no {theirs} on this device: {launch.get(theirs, 'it is absent')!r}") from None
    return found


def _rows(text: str) -> Iterator[list[str]]:
    """Rows of CSV from the header on; other lines are left out."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    return csv.reader(line for line in lines[start:] if line.startswith('"'))
