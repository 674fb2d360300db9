"""Zeroed counters for kernels whose last program finishes the work of all.

Every launch returns its counters to zero, so they are zeroed once, when they are made. Launches on one stream run one
after another and share a slice; each stream has its own; and each launch captured in a CUDA graph takes a slice that
nothing else ever uses, since a replay may run beside anything.
"""

from itertools import accumulate

import torch
from torch import Tensor

_CHUNK = 1 << 20  # int32 counters to a chunk: 4 MiB, some 600 captured launches at 256 experts and 1024 blocks
_by_stream: dict[tuple[torch.device, int], Tensor] = {}
_for_graphs: dict[torch.device, list[Tensor]] = {}


def counters(device: torch.device, *sizes: int) -> list[Tensor]:
    """int32 zeros, at least as many as these sizes say, 16-byte aligned, which the launch that gets them must leave at
    zero. Each reaches to the end of all: a kernel gets no length, and each end would take a microsecond more."""
    padded = [-(-size // 4) * 4 for size in sizes]
    space = _space(device, sum(padded))
    return [space, *(space[start:] for start in accumulate(padded[:-1]))]


def _space(device: torch.device, size: int) -> Tensor:
    if device.type != "cuda":
        return torch.zeros(size, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _captured(device, size)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _by_stream or _by_stream[key].numel() < size:
        _by_stream[key] = torch.zeros(max(size, 8192), dtype=torch.int32, device=device)
        _for_graphs.setdefault(device, [torch.zeros(_CHUNK, dtype=torch.int32, device=device)])
    return _by_stream[key]


def _captured(device: torch.device, size: int) -> Tensor:
    """A slice of its own. Memory made during a capture is zeroed by every replay: right too, one memset more."""
    left = _for_graphs.get(device)
    if not left or left[0].numel() < size:
        return torch.zeros(size, dtype=torch.int32, device=device)
    taken, left[0] = left[0][:size], left[0][size:]
    return taken
