"""What forward has gathered since the last commit, and the moment at which a forward counts."""

import threading
from typing import Any

import torch
from torch import Tensor

from kmeans_route.backends.first import moments_dtype, no_moments
from kmeans_route.reference import NUM_MARGIN_BINS
from kmeans_route.types import PendingStatistics


class Pending:
    """What forward has gathered since the last commit. Plain tensors, never buffers: no state dict, broadcast or
    sharding plan touches them.

    sums: (E, D) fp32, sums_e = sum of x_t / ||x_t|| over tokens routed to e; (0, 0) for learned routers.
    counts: (E,) int64. std_sum: () fp32. num_tokens, num_dropped: () int64.
    margin_hist: (E, 1024) int32 for quantile balancing, else (0, 1024).
    pairs: (E, E) fp32, tokens of a sample that chose both of two experts; (0, 0) for learned routers.
    moments: (2 E + 2, D + 1) fp64, see `backends.first`, until the centroids have data, else (0, D + 1).
    copied: whether what an exchange has copied of it is still held, beside what forwards have added since. A flag that
        a commit only writes: of a number to count up, a compiled one would compile anew for each value.
    """

    FIELDS = (*PendingStatistics._fields, "pairs", "moments")

    def __init__(
        self, num_experts: int, hidden_size: int, device: torch.device, *, with_hist: bool, with_moments: bool = False
    ) -> None:
        self.copied = False
        sums_shape = (num_experts, hidden_size) if hidden_size else (0, 0)
        self.sums = torch.zeros(sums_shape, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.std_sum = torch.zeros((), dtype=torch.float32, device=device)
        self.num_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.num_dropped = torch.zeros((), dtype=torch.int64, device=device)
        bins = (num_experts if with_hist else 0, NUM_MARGIN_BINS)
        self.margin_hist = torch.zeros(bins, dtype=torch.int32, device=device)
        by_pair = (num_experts, num_experts) if hidden_size else (0, 0)
        self.pairs = torch.zeros(by_pair, dtype=torch.float32, device=device)
        self.moments = no_moments(num_experts, hidden_size, device)
        if not with_moments:
            self.drop_moments()

    @property
    def statistics(self) -> PendingStatistics:
        """What a commit folds into the state."""
        return PendingStatistics(*(getattr(self, name) for name in PendingStatistics._fields))

    def to(self, device: torch.device) -> None:
        """Move in place of the old tensors; dtypes stay, but of moments where the device has no fp64. Values of a meta
        device are lost, so they become zero."""
        for field in self.FIELDS:
            old: Tensor = getattr(self, field)
            if old.device != device:
                self.copied = False
                dtype = moments_dtype(device) if field == "moments" else old.dtype
                new = torch.zeros_like(old, dtype=dtype, device=device) if old.is_meta else old.to(device, dtype)
                setattr(self, field, new)

    def clear_(self, skip: Tensor | None = None) -> None:
        """Empty everything in place, or nothing where `skip` () bool is true."""
        self.copied = False
        for field in self.FIELDS:
            tensor: Tensor = getattr(self, field)
            tensor.zero_() if skip is None else tensor.masked_fill_(~skip, 0)

    def drop_moments(self) -> None:
        """Free them: the centroids have data."""
        self.copied = False
        self.moments = self.moments[:0].clone()


class CountingScope:
    """Whether the forward of an attached root that is running now, on this thread, counts; None outside of one.

    Reentrant checkpointing runs the first forward of a router with grad disabled, exactly like a user's no_grad; only
    the root's own entry tells the two apart. On another thread than that of the entry, modes are that thread's own.

    Args:
        owner: whoever made the scope.
    """

    def __init__(self, owner: Any = None) -> None:
        self.owner = owner
        self._here = threading.local()  # not a base: of a subclass torch.compile sees the class's values alone

    @property
    def entered(self) -> tuple[bool, ...]:
        """Of each root that this thread is inside of, the outermost first, whether it counts."""
        return getattr(self._here, "entered", ())

    @property
    def active(self) -> bool | None:
        """Whether the innermost root counts."""
        entered = self.entered
        return entered[-1] if entered else None

    def enter(self, counts: bool) -> None:
        """A root begins."""
        self._here.entered = (*self.entered, counts)

    def leave(self) -> bool | None:
        """The innermost root ends; whether it counted."""
        active = self.active
        self._here.entered = self.entered[:-1]
        return active

    def forget(self) -> None:
        """This thread is inside of no root, whatever was entered: an interrupt ends a forward without its hooks."""
        self._here.entered = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy belongs to nobody; threads cannot be copied."""
        return (CountingScope, ())
