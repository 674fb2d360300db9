"""One memory regime for all contestants.

glibc's malloc maps a block above 32 MiB anew at each call, and the kernel then zeroes it page by page: 14 to 23 ms for
one gradient of 32 to 48 MiB where all of the arithmetic takes 30. Whether a step pays that depends on what happens to
lie free on the heap, so the same step was seen at 28 and at 46 ms. A training loop with a caching allocator does not
pay it. So the benchmarks let malloc keep what it has, for everyone; `--malloc default` leaves it as it is.
"""

import ctypes

# <malloc.h>
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def recycle_memory() -> bool:
    """Make malloc take every block from a heap that it never gives back; whether the system has such a malloc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
