"""The exchange between ranks that see different tokens: all pending state of all layers, once per commit.

Every rank ends up with the sums over all ranks, so every rank commits the same. It is one all-reduce a dtype (fp32
sums; int64 counts; int32 histograms where a balance rule keeps them; fp64 moments until the first centroids are
there), all in flight at once.

Two options lay the sums of all layers end to end, cut them into one chunk a rank, and send each chunk to its owner,
who adds the ranks' parts in fp32 and in a fixed order:

- wire="bf16" rounds what it sends, and returns the sums rounded. What rounding left out stays where it arose and is
  added to the next exchange (error feedback), so that nothing is lost in the long run.
- shard=True returns no sums: each owner commits its chunk of the centroids in fp32, and the new centroids travel in
  bf16. All ranks take their directions from the same rounded centroids; the owner keeps the rest and goes on from the
  exact ones.

Legend: E experts, D hidden size, R ranks, N elements of all sums.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kmeans_route import metrics
from kmeans_route.reference import unit_rows
from kmeans_route.routing.base import StatefulRouter
from kmeans_route.routing.kmeans import KMeansRouter
from kmeans_route.routing.pending import Pending

COUNTED = ("std_sum", "counts", "num_tokens", "num_dropped", "margin_hist", "moments")
WIRE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Exchange:
    """The exchanges of one attachment, one at a time: `start`, `finish`, the commits, `settle`.

    Every rank of the group must call it with the same routers in the same order.
    """

    def __init__(self, group: Any, *, wire: str = "fp32", shard: bool = False) -> None:
        self.group, self.shard, self.dtype = group, shard, WIRE_DTYPES[wire]
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.routers: list[StatefulRouter] = []
        self._works: list[Any] = []
        # What rounding left out: of this rank's sums (R, n), and of the chunk that it owns (n,); n = ceil(N / R).
        self.left_of_sums = self.left_of_chunk = torch.empty(0)
        self.left_by: list[StatefulRouter] = []  # whose sums those are, in this order

    def start(self, routers: list[StatefulRouter]) -> None:
        """Copy what is pending and send it; the routers' own stays as it is."""
        self.routers = routers
        self._sent = [router.pending for router in routers]
        self._merged = [copy.copy(pending) for pending in self._sent]
        for pending in self._sent:
            pending.copied = True
        chunked = self.shard or self.dtype != torch.float32
        self._averaging = [
            (router, pending)
            for router, pending in zip(routers, self._merged, strict=True)
            if chunked and isinstance(router, KMeansRouter)
        ]
        places: dict[torch.dtype, list[tuple[Pending, str]]] = {}
        for pending in self._merged:
            for field in COUNTED if chunked else ("sums", *COUNTED):
                places.setdefault(getattr(pending, field).dtype, []).append((pending, field))
        for those in places.values():
            own = [getattr(pending, field) for pending, field in those]
            buffer = torch.cat([tensor.reshape(-1) for tensor in own])
            for (pending, field), view in zip(those, _views(buffer, own), strict=True):
                setattr(pending, field, view)
            if buffer.numel():
                self._works.append(dist.all_reduce(buffer, group=self.group, async_op=True))
        if self._averaging:
            self._send_sums()

    def _send_sums(self) -> None:
        flat = self._end_to_end([pending.sums for _, pending in self._averaging])
        routers: list[StatefulRouter] = [router for router, _ in self._averaging]
        if self.left_by != routers or self.left_of_sums.shape != flat.shape:  # one was frozen or thawed
            self.left_of_sums, self.left_of_chunk = torch.zeros_like(flat), torch.zeros_like(flat[0])
            self.left_by = routers
        self.left_of_sums, self.left_of_chunk = self.left_of_sums.to(flat.device), self.left_of_chunk.to(flat.device)
        flat += self.left_of_sums
        sent = flat.to(self.dtype)
        self._new_left_of_sums = flat - sent
        self._received = torch.empty_like(sent)
        work = dist.all_to_all_single(self._received.view(-1), sent.view(-1), group=self.group, async_op=True)
        self._works.append(work)

    def under_way(self, routers: list[StatefulRouter]) -> bool:
        """Whether an exchange of just these routers, and of what they hold now, has been started and not finished.

        What they held then may have been committed by hand, or dropped with the state that it belonged to. All ranks
        make the same calls, so they all answer alike.
        """
        if not self._works or self.routers != routers:
            return False
        return all(router.pending is sent and sent.copied for router, sent in zip(routers, self._sent, strict=True))

    def wait(self) -> None:
        """Until all that is under way has arrived. Without `finish` it is forgotten: the routers still hold it."""
        for work in self._works:
            work.wait()
        self._works = []

    def finish(self) -> list[Pending]:
        """What the routers are to commit: their pending state, summed over the ranks."""
        self.wait()
        if self._averaging:
            self._take_sums()
        self._has_tokens = [pending.num_tokens > 0 for _, pending in self._averaging]  # a commit empties them
        return self._merged

    def _take_sums(self) -> None:
        # A router without centroids commits its moments and leaves the sums alone, and so what they leave out.
        self._uses_sums = [not pending.moments.numel() for _, pending in self._averaging]
        chunk = self._received.float().sum(0)
        if self.shard:
            self._before = self._end_to_end([router.centroids for router, _ in self._averaging])
            self._weights_before = [router.weight.clone() for router, _ in self._averaging]
            exact = self._before.clone()
            exact[self.rank] += self.left_of_chunk
            self._set_centroids(exact)
            flat = torch.zeros_like(self._before)
            flat[self.rank] = chunk
        else:
            flat, self._new_left_of_chunk = self._gather(chunk + self.left_of_chunk)
        sums = [pending.sums for _, pending in self._averaging]
        for (_, pending), view in zip(self._averaging, _views(flat, sums), strict=True):
            pending.sums = view

    def agree(self, skip: Tensor | None) -> Tensor | None:
        """Whether any rank skips; all ranks then do."""
        if skip is None:
            return None
        flag = skip.to(torch.int32).reshape(1)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return flag[0] > 0

    def settle(self, skip: Tensor | None) -> None:
        """After the commits: gather the centroids where they are sharded, and keep what rounding has left out."""
        if not self._averaging:
            return
        committed = [some if skip is None else some & ~skip for some in self._has_tokens]
        averaged = [go & uses for go, uses in zip(committed, self._uses_sums, strict=True)]
        moved = self._where(averaged)
        self.left_of_sums = torch.where(moved, self._new_left_of_sums, self.left_of_sums)
        if self.shard:
            moved = self._where(committed)
            self._gather_centroids(moved, committed, averaged)
        self.left_of_chunk = torch.where(moved[self.rank], self._new_left_of_chunk, self.left_of_chunk)

    def _gather_centroids(self, moved: Tensor, committed: list[Tensor], averaged: list[Tensor]) -> None:
        exact = self._end_to_end([router.centroids for router, _ in self._averaging])[self.rank]
        gathered, self._new_left_of_chunk = self._gather(exact)
        self._set_centroids(torch.where(moved, gathered, self._before))
        places = zip(self._averaging, self._weights_before, committed, averaged, strict=True)
        for (router, _), old, go, turned in places:
            if router.commit_options.directions == "whitened":  # written from what was gathered, after this
                continue
            weight = unit_rows(router.centroids, old)
            router.weight.copy_(torch.where(go, weight, router.weight))
            turn = metrics.centroid_turn(old, weight)
            router.centroid_turn.copy_(torch.where(turned, turn, router.centroid_turn))

    def _set_centroids(self, flat: Tensor) -> None:
        held = [router.centroids for router, _ in self._averaging]
        for centroids, view in zip(held, _views(flat, held), strict=True):
            centroids.copy_(view)

    def _gather(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """Every rank's chunk (R, n) fp32, rounded to bf16 on the way, and what rounding left out of one's own (n,)."""
        sent = chunk.bfloat16()
        received = sent.new_empty(self.num_ranks, sent.numel())
        # An old name and a new one for the same call.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(received.view(-1), sent, group=self.group)
        return received.float(), chunk - sent

    def _end_to_end(self, tensors: list[Tensor]) -> Tensor:
        """All of them in one (R, n), zeros at the end."""
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        return torch.nn.functional.pad(flat, (0, -flat.numel() % self.num_ranks)).view(self.num_ranks, -1)

    def _where(self, each: list[Tensor]) -> Tensor:
        """One boolean a router, spread over its elements: (R, n)."""
        spread = [go.expand(router.weight.shape) for (router, _), go in zip(self._averaging, each, strict=True)]
        return self._end_to_end(spread)


def _views(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The start of flat, cut into views of the tensors' shapes."""
    sizes = [tensor.numel() for tensor in tensors]
    parts = torch.split(flat.view(-1)[: sum(sizes)], sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def check_same_routers(routers: dict[str, StatefulRouter], options: str, group: Any) -> None:
    """Refuse ranks whose routers differ, on every rank alike, before they wait for each other in vain.

    Raises:
        RuntimeError: the options of attach, or the routers' names, options or state are not the same on all ranks.
    """
    own = options, {name: (repr(router), _fingerprint(router)) for name, router in routers.items()}
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    wanted, first = everyone[0]
    for rank, (asked, _) in enumerate(everyone):
        if asked != wanted:
            raise RuntimeError(
                f"options of attach must be the same on all ranks, got {asked} on rank {rank}, on rank 0: {wanted}"
            )
    for rank, (_, theirs) in enumerate(everyone):
        if list(theirs) != list(first):
            difference = f"rank {rank} has {list(theirs)}, rank 0 has {list(first)}"
            raise RuntimeError(f"routers must be the same on all ranks, got other names: {difference}")
        for name, (text, state) in theirs.items():
            first_text, first_state = first[name]
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
