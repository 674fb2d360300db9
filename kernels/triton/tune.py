"""KMEANS_ROUTE_TUNE=1: search launch configurations on this GPU, and print what to put into `configs.py`.

A search happens at the first eager call of each kernel, size and dtype; its winner serves the rest of the process. Not
for compiled graphs, which have taken the table's shapes. Without the variable nothing here runs.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton.testing

from kmeans_route.kernels.configs import Config, architecture

ENABLED = os.environ.get("KMEANS_ROUTE_TUNE") == "1"
_winners: dict[tuple[object, ...], Config] = {}


def candidates() -> Iterator[Config]:
    """Every combination worth trying; those that do not fit the device fail to launch and are passed over."""
    for tokens, columns, warps, stages in itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        yield Config(tokens, columns, warps, stages)


def time_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of a call, the L2 cache flushed before each."""
    return float(triton.testing.do_bench(call, return_mode="median"))


def tuned(
    function: str, key: tuple[object, ...], device: torch.device, default: Config, launch: Callable[[Config], object]
) -> Config:
    """The fastest config for `launch`, or `default` where tuning is off, already known, or impossible.

    Args:
        function: of `configs.py`, whose row this is. key: what tells one search from another.
        default: the table's own. launch: runs the kernel with a config.
    """
    if not ENABLED or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return default
    known = (function, architecture(device), *key)
    if known not in _winners:
        times = {default: time_ms(partial(launch, default))}
        for config in candidates():
            try:
                times[config] = time_ms(partial(launch, config))
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError):
                continue
        best = min(times, key=times.__getitem__)
        _winners[known] = best
        print(
            f"{function}{known[1:]}: {best} {times[best]:.4f} ms, the table's {default} {times[default]:.4f} ms",
            file=sys.stderr,
        )
    return _winners[known]
