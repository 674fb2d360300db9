"""State shared by all routers: what forward gathers, when a forward counts, and fp32 buffers that stay fp32.

Forward only gathers into `Pending`; `commit` folds it into the buffers once per optimizer step. So the state that
decides routing never changes between a forward and its recomputation.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kmeans_route import ops
from kmeans_route.reference import NUM_MARGIN_BINS
from kmeans_route.reservoir import EMPTY_HASH, TOKENS_PER_EXPERT


def seed_for(seed: int, name: str) -> int:
    """A seed in [0, 2^63) from (seed, name), equal on every rank and Python version."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Pending:
    """What forward has gathered since the last commit. Plain tensors, never buffers: no state dict, broadcast or
    sharding plan touches them.

    sums: (E, D) fp32, sums_e = sum of x_t / ||x_t|| over tokens routed to e; (0, 0) for learned routers.
    counts: (E,) int64. std_sum: () fp32. num_tokens, num_dropped: () int64.
    margin_hist: (E, 1024) int32 for quantile balancing, else (0, 1024).
    hashes, rows: the token reservoir (16 E,), (16 E, D) until the centroids have data, else (0,), (0, D).
    """

    FIELDS = ("sums", "counts", "std_sum", "num_tokens", "num_dropped", "margin_hist", "hashes", "rows")

    def __init__(
        self, num_experts: int, hidden_size: int, device: torch.device, *, with_hist: bool, with_reservoir: bool
    ) -> None:
        places = TOKENS_PER_EXPERT * num_experts if with_reservoir else 0
        sums_shape = (num_experts, hidden_size) if hidden_size else (0, 0)
        self.sums = torch.zeros(sums_shape, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.std_sum = torch.zeros((), dtype=torch.float32, device=device)
        self.num_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.num_dropped = torch.zeros((), dtype=torch.int64, device=device)
        bins = (num_experts if with_hist else 0, NUM_MARGIN_BINS)
        self.margin_hist = torch.zeros(bins, dtype=torch.int32, device=device)
        self.hashes = torch.full((places,), EMPTY_HASH, dtype=torch.int64, device=device)
        self.rows = torch.zeros(places, hidden_size, dtype=torch.float32, device=device)

    def to(self, device: torch.device) -> None:
        """Move in place of the old tensors; dtypes stay. Values of a meta device are lost, so they become zero."""
        for field in self.FIELDS:
            old: Tensor = getattr(self, field)
            if old.device != device:
                empty = EMPTY_HASH if field == "hashes" else 0
                setattr(self, field, torch.full_like(old, empty, device=device) if old.is_meta else old.to(device))

    def clear_(self, skip: Tensor | None = None) -> None:
        """Empty everything in place, or nothing where `skip` () bool is true."""
        for field in self.FIELDS:
            tensor: Tensor = getattr(self, field)
            empty = EMPTY_HASH if field == "hashes" else 0
            if skip is None:
                tensor.fill_(empty)
            else:
                tensor.masked_fill_(~skip, empty)

    def drop_reservoir(self) -> None:
        """Free the reservoir: the centroids have data."""
        self.hashes, self.rows = self.hashes[:0].clone(), self.rows[:0].clone()


class CountingScope:
    """Whether the forward of an attached root that is running now counts; None outside of one.

    Reentrant checkpointing runs the first forward of a router with grad disabled, exactly like a user's no_grad; only
    the root's own entry tells the two apart.
    """

    def __init__(self) -> None:
        self.active: bool | None = None


class StatefulRouter(nn.Module):
    """Base of the routers: fp32 state, pending, and the rule that says when a forward counts."""

    expert_bias: Tensor
    learns = True  # whether a commit changes anything
    FP32_STATE: tuple[str, ...] = ("expert_bias",)
    PLAIN_TENSORS: tuple[str, ...] = ("tokens_per_expert",)

    def __init__(self, hidden_size: int, num_experts: int, *, seed: int, name: str) -> None:
        nn.Module.__init__(self)  # not super(): adapters put a class of another framework behind this one
        self.hidden_size, self.num_experts = hidden_size, num_experts
        self.seed, self.name = seed, name
        self.frozen = False
        self.pending: Pending
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64)
        self._scope: CountingScope | None = None
        self._commits_by_hand = False
        self._warned = self._has_gathered = False

    def commit(self, skip: Tensor | None = None) -> None:
        """Fold what forward has gathered into the state, once per optimizer step; `attach` calls it for you.

        Args:
            skip: () bool on the router's device; true leaves state and pending as they are, for a step that a
                gradient scaler skipped. Read on the device, without a sync.

        With nothing pending the state does not change, so a second call does nothing. Until a K-Means router has its
        first data, one value is read back to the host.
        """
        self._commits_by_hand = True
        self.commit_pending(skip)

    def commit_pending(self, skip: Tensor | None = None, batch: Pending | None = None) -> None:
        """`commit` as `attach` calls it: with `batch`, what all ranks have gathered, in place of this rank's own."""
        raise NotImplementedError

    def before_commit(self) -> None:
        """Called on every rank before the exchange of a commit: the last moment to change what is pending."""

    def metrics(self) -> dict[str, float]:
        """Flat scalars of the last committed step. See the subclasses."""
        raise NotImplementedError

    def freeze(self, frozen: bool = True) -> "StatefulRouter":
        """Stop (or with False, resume) gathering and committing; routing goes on with the state as it is."""
        self.frozen = frozen
        return self

    def counts_now(self) -> bool:
        """Whether a forward at this moment gathers statistics.

        Under an attached root, the root's training and grad mode at its entry decide; elsewhere the router's own.
        """
        if self.frozen:
            return False
        if self._scope is not None and self._scope.active is not None:
            return self._scope.active
        counting = self.training and torch.is_grad_enabled()
        if counting and self.learns and self._scope is None and not torch.compiler.is_compiling():
            self._check_unattached()
        return counting

    def _check_unattached(self) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            if world > 1:
                raise RuntimeError(
                    f"a router that trains on {world} ranks must be attached, got one that is not, so that the ranks "
                    "would drift apart: call kmeans_route.attach(model, optimizer); if each rank is to learn alone, "
                    "with a process group of its own"
                )
        if ops.in_backward():
            if not (self._has_gathered or self._warned):
                self._warned = True
                warnings.warn(
                    f"router {self.name!r} gathers nothing: its forward ran without gradients, as reentrant activation "
                    "checkpointing runs it: call kmeans_route.attach(model, optimizer), or checkpoint with "
                    "use_reentrant=False",
                    stacklevel=4,
                )
            return
        self._has_gathered = True
        remedy = "call kmeans_route.attach(model, optimizer) once, or router.commit() after each optimizer step"
        if not (self._warned or self._commits_by_hand):
            self._warned = True
            warnings.warn(f"router {self.name!r} trains but nothing commits its statistics: {remedy}", stacklevel=4)

    def _private_generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(seed_for(self.seed, self.name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StatefulRouter":
        """Moves go through; casts do not: a bf16 average stalls (99% of the gap is left after 2000 steps)."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = new.to(old.dtype) if old.is_meta else old.to(device=new.device)
        self._move_plain_tensors()
        return self

    def _move_plain_tensors(self) -> None:
        """Bring what is no buffer to the device of the buffers; what was on the meta device starts at zero."""
        device = self.expert_bias.device
        self.pending.to(device)
        for name in self.PLAIN_TENSORS:
            old: Tensor = getattr(self, name)
            if old.device != device:
                setattr(self, name, torch.zeros_like(old, device=device) if old.is_meta else old.detach().to(device))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pending = self.pending.num_tokens
        if not pending.is_meta and int(pending):
            warnings.warn(
                f"router {self.name!r} is saved with {int(pending)} tokens pending, which a state dict does not hold: "
                "save right after an optimizer step",
                stacklevel=2,
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load all of this module's state, or none of it: a foreign or non-finite entry refuses the rest by name."""
        problems = []
        for name, own in [*self.named_buffers(recurse=False), *self.named_parameters(recurse=False)]:
            given = state_dict.get(prefix + name)
            if given is None:
                continue
            if given.shape != own.shape:
                problems.append(
                    f"{prefix}{name} must have shape {tuple(own.shape)}, got {tuple(given.shape)}: the checkpoint is "
                    "of a router with another number of experts or another hidden size"
                )
            elif given.is_floating_point() and not given.is_meta and not bool(given.isfinite().all()):
                problems.append(f"{prefix}{name} must be finite, got NaN or Inf: load a checkpoint from before that")
        if problems:
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in self.FP32_STATE:  # load_state_dict(assign=True) brings the checkpoint's own dtype
            buffer = self._buffers[name]
            if buffer is not None and buffer.dtype != torch.float32:
                self._buffers[name] = buffer.float()
        if any(prefix + name in state_dict for name in self.FP32_STATE):
            self._after_load()

    def _after_load(self) -> None:
        """Called when state of this module has been loaded: what is pending belongs to the state that is gone."""
        self._move_plain_tensors()
        pending = self.pending.num_tokens
        if not pending.is_meta and int(pending):
            warnings.warn(
                f"router {self.name!r} drops {int(pending)} pending tokens: they belong to the state that is replaced",
                stacklevel=2,
            )
        if not pending.is_meta:
            self.pending.clear_()

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: a copy is not attached, and shares no graph."""
        state: dict[str, Any] = self.__dict__.copy()
        state["_scope"] = None
        for name in self.PLAIN_TENSORS:
            state[name] = state[name].detach()
        return state
