"""The exchange between ranks that see different tokens: all pending state of all layers, once per optimizer step.

Every rank ends up with the sums over all ranks, so every rank commits the same. It is one all-reduce a dtype (fp32
sums; int64 counts; int32 histograms where a balance rule keeps them), all in flight at once. Only before the first
centroids are there does more travel: the token reservoir, merged to the tokens that one process would have kept.

Legend: E experts, D hidden size, R ranks.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kmeans_route.reservoir import EMPTY_HASH
from kmeans_route.state import Pending, StatefulRouter

SUMMED = ("sums", "std_sum", "counts", "num_tokens", "num_dropped", "margin_hist")


def exchange(routers: list[StatefulRouter], group: Any) -> list[Pending]:
    """The pending state of each router, summed over the ranks of `group`; the routers' own stays as it is.

    Every rank of the group must call it with the same routers in the same order.
    """
    merged = [copy.copy(router.pending) for router in routers]
    flat: dict[torch.dtype, list[tuple[Pending, str]]] = {}
    for pending in merged:
        for field in SUMMED:
            flat.setdefault(getattr(pending, field).dtype, []).append((pending, field))
    buffers = {
        dtype: torch.cat([getattr(pending, field).reshape(-1) for pending, field in places])
        for dtype, places in flat.items()
    }
    works = [dist.all_reduce(buffer, group=group, async_op=True) for buffer in buffers.values() if buffer.numel()]
    for work in works:
        work.wait()
    for dtype, places in flat.items():
        start = 0
        for pending, field in places:
            own: Tensor = getattr(pending, field)
            setattr(pending, field, buffers[dtype][start : start + own.numel()].view(own.shape))
            start += own.numel()
    for pending in merged:
        if pending.hashes.numel():
            pending.hashes, pending.rows = merge_reservoirs(pending.hashes, pending.rows, group)
    return merged


def merge_reservoirs(hashes: Tensor, rows: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """The (16 E,) smallest hashes of all ranks, each once, and their rows (16 E, D): what one process would have kept.

    Rows travel once, whatever the number of ranks: each is given by the lowest rank that holds it, and all are summed.
    """
    places, num_ranks = hashes.numel(), dist.get_world_size(group)
    everyone = hashes.new_empty(num_ranks * places)
    dist.all_gather(list(everyone.view(num_ranks, places).unbind()), hashes, group=group)
    order = everyone.sort(stable=True).indices  # equal hashes: the lowest rank first
    values = everyone[order]
    again = torch.zeros_like(values, dtype=torch.bool)
    again[1:] = values[1:] == values[:-1]
    first = again.long().sort(stable=True).indices[:places]
    chosen, source = values.masked_fill(again, EMPTY_HASH)[first], order[first]
    mine = (source // places == dist.get_rank(group)) & (chosen != EMPTY_HASH)
    given = torch.where(mine[:, None], rows[source % places], 0.0)
    dist.all_reduce(given, group=group)
    return chosen, given


def check_same_routers(routers: dict[str, StatefulRouter], group: Any) -> None:
    """Refuse ranks whose routers differ, on every rank alike, before they wait for each other in vain.

    Raises:
        RuntimeError: the routers' names, options or state are not the same on all ranks.
    """
    own = {name: (repr(router), _fingerprint(router)) for name, router in routers.items()}
    everyone: list[dict[str, tuple[str, Any]]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, own, group=group)
    for rank, theirs in enumerate(everyone):
        if list(theirs) != list(everyone[0]):
            difference = f"rank {rank} has {list(theirs)}, rank 0 has {list(everyone[0])}"
            raise RuntimeError(f"routers must be the same on all ranks, got other names: {difference}")
        for name, (text, state) in theirs.items():
            first_text, first_state = everyone[0][name]
            if text != first_text:
                raise RuntimeError(
                    f"routers must be the same on all ranks, got other options of {name!r} on rank {rank}: {text}, on "
                    f"rank 0: {first_text}"
                )
            if state != first_state:
                raise RuntimeError(
                    f"routers must be the same on all ranks, got another state of {name!r} on rank {rank} than on rank "
                    "0: use one seed, or load one checkpoint on all ranks before attach"
                )


def _fingerprint(router: StatefulRouter) -> list[float] | None:
    """Sums of the router's fp32 state, in a fixed order; parameters differ by sharding and are left out."""
    buffers = [buffer for _, buffer in router.named_buffers(recurse=False)]
    if any(buffer.is_meta for buffer in buffers):
        return None
    return [float(buffer.double().sum()) for buffer in buffers]
