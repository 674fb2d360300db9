"""Timing on one device: graph replay with a cold L2 between CUDA events, and the rates that the device reaches."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import torch

REPEATS_BACK_TO_BACK = 20
Outcome = dict[str, Any]
Runner = Callable[[], Any]


class Clock:
    """Times functions on one device: CUDA events around a replayed graph with a cold L2, or the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.stream = self.flush = None
        if self.on_gpu:
            # One stream for all: a backward runs on its forward's stream, and a capture may touch no other.
            self.stream = torch.cuda.Stream(device)
            l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            # The last-level cache of AMD's devices lies behind L2 and is not reported.
            least = 512 << 20 if torch.version.hip else 64 << 20
            self.flush = torch.empty(max(2 * l2, least), dtype=torch.uint8, device=device)

    def scope(self) -> AbstractContextManager[Any]:
        """Where everything of a cell runs."""
        return torch.cuda.stream(self.stream) if self.on_gpu else nullcontext()

    def wait(self) -> None:
        """Until the device has done its work."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def measure(self, run: Runner, prepare: Runner | None = None, *, back_to_back: bool = False) -> Outcome:
        """Median and quartiles of `run` in microseconds, and the peak of what it allocates in bytes.

        prepare: called before each sample, outside of its time. back_to_back: also the mean of 20 calls in one graph,
        with whatever they leave in L2.
        """
        prepare = prepare or (lambda: None)
        peak = self._warm_up(run, prepare)
        timed, method = self._replayed(run)
        count = 2
        if self.on_gpu:  # at least 20 samples, of about a second in all; fewer where one takes more than 50 ms
            count = max(5, min(50, int(1e6 / max(self._samples(timed, prepare, 1)[0], 1.0))))
        samples = torch.tensor(self._samples(timed, prepare, count), dtype=torch.float64)
        q1, median, q3 = samples.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        result = {"median_us": median, "q1_us": q1, "q3_us": q3, "samples": count, "peak_bytes": peak, "method": method}
        if back_to_back and method == "graph":
            many = self._replayed(lambda: [run() for _ in range(REPEATS_BACK_TO_BACK)])
            if many[1] == "graph":
                times = torch.tensor(self._samples(many[0], prepare, 20))
                result["back_to_back_us"] = float(times.median()) / REPEATS_BACK_TO_BACK
        return result

    def _warm_up(self, run: Runner, prepare: Runner) -> int | None:
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

    def _replayed(self, run: Runner) -> tuple[Runner, str]:
        """`run` as a graph, or itself and the reason why not."""
        if not self.on_gpu:
            return run, "wall clock"
        torch.cuda.set_sync_debug_mode("error")  # a failed capture leaves more behind than this does
        try:
            run()
        except Exception as error:
            return run, f"events, no graph: {reason(error)}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        self.wait()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                run()
        except Exception as error:
            self.wait()
            return run, f"events, no graph: {reason(error)}"
        return graph.replay, "graph"

    def _samples(self, run: Runner, prepare: Runner, count: int) -> list[float]:
        times = []
        if not self.on_gpu:
            for _ in range(count):
                prepare()
                start = perf_counter()
                run()
                times.append(1e6 * (perf_counter() - start))
            return times
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            prepare()
            self.flush.zero_()  # evicts the inputs, and the launch of `run` hides behind it
            start.record(self.stream)
            run()
            end.record(self.stream)
        self.wait()
        return [1e3 * start.elapsed_time(end) for start, end in events]


def reason(error: BaseException) -> str:
    """Type and first line of a message."""
    lines = str(error).strip().splitlines()
    return without_paths(f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}")


def without_paths(text: str) -> str:
    """Absolute paths cut to their last part: a result file says nothing of the machine's folders."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+", "", text)


def peaks(clock: Clock) -> dict[str, float]:
    """Measured on this device: bytes/s of a large copy, of a copy inside L2, FLOP/s in bf16, and the time of a graph
    of one tiny kernel in microseconds, which every timing includes."""
    device, large = clock.device, (1 << 30) if clock.on_gpu else 1 << 20
    size = 8192 if clock.on_gpu else 64
    with clock.scope():

        def copy_rate(num_bytes: int, times: int) -> float:
            source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
            median = clock.measure(lambda: [target.copy_(source) for _ in range(times)])["median_us"]
            return 2e6 * num_bytes * times / median

        l2 = clock.flush.numel() // 2 if clock.flush is not None else 1 << 20
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        product = clock.measure(lambda: a @ b)["median_us"]
        one = torch.zeros(1, device=device)
        return {
            "copy_bytes_per_s": copy_rate(large, 1),
            "l2_copy_bytes_per_s": copy_rate(l2 // 4, 20),
            "bf16_flop_per_s": 2e6 * size**3 / product,
            "empty_graph_us": clock.measure(lambda: one.add_(1))["median_us"],
        }
