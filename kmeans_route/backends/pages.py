"""Fresh memory for a large result, in large pages where the system gives them on request.

glibc maps a block above 32 MiB anew each time, and Linux then zeroes it page by page: 1 us for 4 KiB on an Intel Xeon,
8 ms for a gradient of 32 MiB. On most distributions a page of 2 MiB is one request away (`enabled` in
/sys/kernel/mm/transparent_hugepage says "madvise"); PyTorch makes that request for all memory or for none
(THP_MEM_ALLOC_ENABLE). Here it is made for one block. It is a hint: where it is refused, memory is as it was.
"""

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor

MAPPED_ANEW = 32 << 20  # bytes from which glibc never reuses memory: DEFAULT_MMAP_THRESHOLD_MAX of its malloc


def empty_like(x: Tensor) -> Tensor:
    """An empty tensor like x, contiguous."""
    made = torch.empty_like(x, memory_format=torch.contiguous_format)
    advise = _madvise()
    if advise is not None and made.is_cpu and made.nbytes >= MAPPED_ANEW:
        start = -(-made.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (made.data_ptr() + made.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, end - start, mmap.MADV_HUGEPAGE)
    return made


@cache
def _madvise() -> Any:
    """The system's call, None where it has no large pages on request."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux alone
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call
