"""Compiling ahead: as many processes as there are cores fill Triton's cache with the kernels that will be needed.

A process runs `JITFunction.run(warmup=True)` on the meta tensors of a planned launch, with a driver that knows the
GPU's target and nothing else. So signature, constants, attributes and options, and with them the key of the cache, are
made by the code that will look them up; no process but the first touches the GPU.
"""

import multiprocessing
import os
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import triton
from triton.runtime import driver

from benchmarks.gpu.launches import distinct
from kmeans_route.bench.clock import reason
from kmeans_route.kernels import configs


class NoDevice:
    """In place of Triton's driver: the target is known, and there is nothing to launch on."""

    utils = SimpleNamespace(launch=None)

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        """GPUTarget to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        """The default stream."""
        return 0


def work(plan: tuple[Any, ...], number: int, target: Any, arch: str, launchers: bool, turn: Any, done: Any) -> None:
    """Compile the first `number` launches, always the next that no process has taken; (key, seconds, problem) of each
    goes to `done`."""
    driver.set_active(NoDevice(target))
    configs.assumed_architecture = arch
    planned = list(distinct(*plan).items())[:number]
    while True:
        with turn.get_lock():
            place, turn.value = turn.value, turn.value + 1
        if place >= len(planned):
            return
        (key, launch), began, problem = planned[place], time.perf_counter(), ""
        try:
            kernel = launch.kernel.run(**launch.arguments, **launch.options, grid=launch.grid, warmup=True)
            if launchers:
                build_launcher(kernel)
        except Exception as error:
            problem = f"{launch.name}: {reason(error)}"
        done.put((key, time.perf_counter() - began, problem))


def build_launcher(kernel: Any) -> None:
    """Triton 3.6 compiles C code for each signature as a kernel is first launched, 0.5 s each; later versions have one
    launcher for all."""
    from triton.backends.nvidia import driver as nvidia

    if hasattr(nvidia, "make_launcher"):
        with suppress(Exception):  # a launcher that is not there is built when it is needed
            nvidia.CudaLauncher(kernel.src, kernel.metadata)


class Ahead:
    """The processes, and what they have done so far.

    plan: the arguments of `launches.distinct`. number: how many of its launches to compile. launchers: build those too.
    environment: for the processes, where it differs from this one's.
    """

    def __init__(
        self, plan: tuple[Any, ...], number: int, target: Any, arch: str, *, workers: int, launchers: bool,
        environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        context = multiprocessing.get_context("spawn")
        self.number, self.ready, self.problems = number, set[str](), list[str]()
        self.cpu_s = 0.0
        self._turn, self._done = context.Value("i", 0), context.SimpleQueue()
        arguments = (plan, number, target, arch, launchers, self._turn, self._done)
        self._workers = [context.Process(target=work, args=arguments, daemon=True) for _ in range(workers)]
        own = dict(os.environ)
        os.environ.pop("TRITON_INTERPRET", None)  # this process may interpret kernels, those compile them
        os.environ.update(environment or {})
        for worker in self._workers:
            worker.start()
        os.environ.clear()
        os.environ.update(own)

    def look(self) -> bool:
        """Take in what has been done; whether that is all, or nobody is left who works."""
        while not self._done.empty():
            key, seconds, problem = self._done.get()
            self.ready.add(key)
            self.cpu_s += seconds
            self.problems += [problem] if problem else []
        finished = len(self.ready) >= self.number
        return finished or not any(worker.is_alive() for worker in self._workers)

    def wait(self, seconds: float) -> bool:
        """Whether everything is done within that time."""
        end = time.monotonic() + seconds
        while not self.look() and time.monotonic() < end:
            time.sleep(0.05)
        return self.look() and len(self.ready) >= self.number

    def stop(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()


def cores() -> int:
    """Of this process; those of the machine where nobody limits it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LateCompilations:
    """Names of the package's kernels that this process had to compile by itself while it listened."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, *, src: Any, cache_hit: bool, **_rest: Any) -> None:
        """What Triton calls after each compilation or look-up."""
        if not cache_hit and getattr(src.fn, "__module__", "").startswith("kmeans_route."):
            self.names.append(src.name)

    def listen(self, listening: bool) -> None:
        """From now on, or no longer."""
        triton.knobs.compilation.listener = self if listening else None
