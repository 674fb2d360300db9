"""Peak extra memory of a call on the CPU, by what PyTorch's profiler records."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Largest sum of bytes that `call` holds at one time above what was there before, its result included.

    Every allocation through PyTorch's CPU allocator counts, inside opaque operators too; scratch that a library
    (MKL, FBGEMM) takes past that allocator does not. Run the call once before, so that what is made once is there.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    )
    assert changes, "the profiler recorded no allocation: the call made no tensor, or memory profiling is off"
    held = peak = 0
    for _, _, num_bytes in changes:
        held += num_bytes
        peak = max(peak, held)
    return peak
