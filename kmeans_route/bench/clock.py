"""Timing on one device: graph replay with a cold L2 between CUDA events; on a CPU the wall clock, or thread time.

With one thread PyTorch computes in the thread that calls, backward too, so the CPU time of this thread is all there is,
and while other work has the core nothing is counted. Several threads wait for each other, so they need the wall clock.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from time import perf_counter, thread_time
from typing import Any

import torch

Runner = Callable[[], object]


def nothing() -> None:
    """What comes before a sample that needs no preparing."""


class Clock:
    """Times functions on one device: CUDA events around a replayed graph with a cold L2; on a CPU `method`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.stream: torch.cuda.Stream | None = None
        self.flush: torch.Tensor | None = None
        if self.on_gpu:
            # One stream for all: a backward runs on its forward's stream, and a capture may touch no other.
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # The last-level cache of AMD's devices lies behind L2 and is not reported.
            least = 512 << 20 if torch.version.hip else 64 << 20
            self.flush = torch.empty(max(2 * self.l2_bytes, least), dtype=torch.uint8, device=device)

    @property
    def l2_bytes(self) -> int:
        """Size of the device's L2; 0 where it is not known."""
        return getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) if self.on_gpu else 0

    @property
    def method(self) -> str:
        """How a call is timed on a CPU: "thread time" with one thread, else "wall clock"."""
        return "thread time" if torch.get_num_threads() == 1 else "wall clock"

    def scope(self) -> AbstractContextManager[Any]:
        """Where everything that is timed must run, the making of its inputs included."""
        return torch.cuda.stream(self.stream) if self.on_gpu else nullcontext()

    def wait(self) -> None:
        """Until the device has done its work."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the block the host may not wait for the device: where it would, an error is raised."""
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if self.on_gpu:
                torch.cuda.set_sync_debug_mode("default")

    def warm_up(self, run: Runner, prepare: Runner = nothing) -> int | None:
        """Run it until everything is compiled; the peak of what one call allocates in bytes, on a GPU."""
        for _ in range(3 if self.on_gpu else 1):
            prepare()
            run()
        if not self.on_gpu:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        prepare()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def captured(self, run: Runner) -> tuple[Runner, str]:
        """A warm `run` as a graph, or itself and the reason why not."""
        if not self.on_gpu:
            return run, self.method
        graph = torch.cuda.CUDAGraph()
        try:
            with self.no_sync():  # a failed capture leaves more behind than this does
                run()
            self.wait()
            with torch.cuda.graph(graph, stream=self.stream):
                run()
        except Exception as error:
            self.wait()
            return run, f"events, no graph: {reason(error)}"
        return graph.replay, "graph"

    def samples_us(self, run: Runner, prepare: Runner = nothing, count: int = 1) -> list[float]:
        """Microseconds of each of `count` calls; on a GPU all are launched before the first is waited for."""
        times = []
        if self.flush is None:
            now = thread_time if self.method == "thread time" else perf_counter
            for _ in range(count):
                prepare()
                start = now()
                run()
                times.append(1e6 * (now() - start))
            return times
        event = partial(torch.cuda.Event, enable_timing=True)
        events = [(event(), event()) for _ in range(count)]
        for begin, end in events:
            prepare()
            self.flush.zero_()  # evicts the inputs, and the launch of `run` hides behind it
            begin.record(self.stream)
            run()
            end.record(self.stream)
        self.wait()
        return [1e3 * begin.elapsed_time(end) for begin, end in events]


def reason(error: BaseException) -> str:
    """Type and first line of a message."""
    lines = str(error).strip().splitlines()
    return without_paths(f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}")


def without_paths(text: str) -> str:
    """Absolute paths cut to their last part: a result file says nothing of the machine's folders."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+", "", text)
