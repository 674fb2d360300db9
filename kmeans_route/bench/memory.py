"""How much memory is free, and a malloc that keeps what it has, for a suite that asks for it.

glibc's malloc maps a block above 32 MiB anew at each call, and the kernel then zeroes it page by page: 14 to 23 ms for
one gradient of 32 to 48 MiB where all of the arithmetic takes 30. Users have that malloc, so times are taken with it.
`--malloc recycle` lets malloc keep its memory, for all contestants alike, as under a caching allocator.
"""

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

# <malloc.h>
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def recycle_memory() -> bool:
    """Make malloc take every block from a heap that it never gives back; whether the system has such a malloc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process may still take on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):  # a container's limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        found.append(limit - used)
    return min(found, default=None)
