"""The state of a K-Means router: made, given, loaded, written by others, and copied.

`initialized` says whether data has set the centroids; `_initialized` mirrors it, so that a forward need not read the
device. Whatever may have changed the buffer makes the mirror follow.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from kmeans_route import reference
from kmeans_route.routing.base import StatefulRouter
from kmeans_route.routing.pending import Pending
from kmeans_route.types import CommitOptions


class CentroidState(StatefulRouter):
    """The buffers of `KMeansRouter`, and all that sets them but a commit."""

    weight: Tensor
    offset: nn.Parameter | None
    score_std: Tensor
    dropped_total: Tensor
    steps: Tensor
    initialized: Tensor
    unsaved: Tensor
    tokens_seen: Tensor | None
    init: str
    commit_options: CommitOptions
    FP32_STATE = ("weight", "expert_bias", "score_std")
    PLAIN_TENSORS = ("tokens_per_expert", "centroid_turn")

    def _make_state(self, device: torch.device | str | None, *, cumulative: bool, learned_offset: bool) -> None:
        num_experts, hidden_size = self.num_experts, self.hidden_size

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.register_buffer("weight", buffer(num_experts, hidden_size))
        self.register_buffer("expert_bias", buffer(num_experts))
        self.register_buffer("score_std", buffer())
        self.register_buffer("steps", buffer(dtype=torch.int64))
        self.register_buffer("dropped_total", buffer(dtype=torch.int64))
        self.register_buffer("initialized", buffer(dtype=torch.bool))
        self.register_buffer("unsaved", buffer(dtype=torch.bool), persistent=False)
        self.register_buffer("tokens_seen", buffer(num_experts, dtype=torch.int64) if cumulative else None)
        offset = nn.Parameter(buffer(num_experts, hidden_size)) if learned_offset else None
        self.register_parameter("offset", offset)
        self.reset_parameters()

    @property
    def has_data(self) -> bool:
        """Whether data, or somebody, has set the centroids."""
        return self._initialized

    @property
    def want_hist(self) -> bool:
        """Whether the balance rule needs the histogram of margins."""
        return self.commit_options.balance == "quantile" and self.top_k < self.num_experts

    def reset_parameters(self) -> None:
        """Gaussian unit rows from the private generator, no bias, no offset, nothing pending. After `to_empty`, too."""
        self._initialized = False
        self._pinned: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._seen: tuple[int, int] | None = None
        self._new_pending()
        self.centroid_turn = torch.zeros(2, self.num_experts, dtype=torch.float32, device=self.weight.device)
        if self.weight.is_meta:
            return
        with torch.no_grad():
            rows = torch.randn(
                (self.num_experts, self.hidden_size),
                generator=self._private_generator(),
                dtype=torch.float32,
                device="cpu",
            )
            self.weight.copy_(rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True))
            for tensor in (
                self.expert_bias, self.score_std, self.steps, self.dropped_total, self.initialized, self.unsaved,
                self.tokens_seen, self.offset,
            ):  # fmt: skip
                if tensor is not None:
                    tensor.zero_()

    def _new_pending(self) -> None:
        self.pending = Pending(
            self.num_experts,
            self.hidden_size,
            self.weight.device,
            with_hist=self.want_hist,
            with_reservoir=not self._initialized and self.init != "normal",
        )
        self.tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.int64, device=self.weight.device)

    @torch.no_grad()
    def set_centroids(self, weight: Tensor, tokens_seen: int = 10_000_000) -> None:
        """Take given centroids, scaled to unit rows, with enough weight that the first commit cannot erase them.

        Args:
            weight: (E, D) floating point. `steps` becomes round(decay / (1 - decay)).
            tokens_seen: how many tokens each centroid stands for, with average="cumulative" only.

        Raises:
            ValueError: another shape, or a row that is zero or not finite.
        """
        if tuple(weight.shape) != (self.num_experts, self.hidden_size):
            raise ValueError(
                f"weight must have shape {(self.num_experts, self.hidden_size)}, got {tuple(weight.shape)}: "
                "one row an expert"
            )
        given = weight.detach().to(device=self.weight.device, dtype=torch.float32)
        unit = reference.directions_reference(given, torch.float32)
        if not bool((unit != 0).any(1).all()):
            raise ValueError("weight must have a direction in every row, got a zero or non-finite one: replace it")
        self.reset_parameters()
        self.weight.copy_(unit)
        decay = self.commit_options.decay
        self.steps.fill_(round(decay / (1 - decay)))
        if self.tokens_seen is not None:
            self.tokens_seen.fill_(tokens_seen)
        self._mark_initialized()

    def snapshot(self) -> dict[str, Any]:
        """All that gathering and committing change, and the options of routing, as they are now: for `restore`."""
        names = ("options", "pending", "tokens_per_expert", "centroid_turn", "_initialized")
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers(recurse=False)}
        return {"attributes": copy.deepcopy({name: getattr(self, name) for name in names}), "buffers": buffers}

    @torch.no_grad()
    def restore(self, snapshot: dict[str, Any]) -> None:
        """Put back what `snapshot` gave."""
        for name, value in copy.deepcopy(snapshot["attributes"]).items():  # it may be put back again
            setattr(self, name, value)
        for name, value in snapshot["buffers"].items():
            self.get_buffer(name).copy_(value)
        self._pinned, self._seen = {}, self._trace()

    def follow_state(self) -> None:
        """Go by the buffers as they are now, which something else has written one by one.

        Raises:
            RuntimeError: they hold NaN or Inf.
        """
        self._pinned, self._seen = {}, None
        self._initialized = False
        self._notice_load(committing=False)

    def before_commit(self) -> None:
        """Follow a load in place that no forward has noticed; see `StatefulRouter`."""
        self._notice_load(committing=True)

    def _notice_load(self, *, committing: bool) -> None:
        """Bring `_initialized` up to date when something else has written the buffer that it mirrors.

        torch.distributed.checkpoint.load copies into the tensors of `state_dict()` and calls nothing here; it leaves
        a trace in the version counter. Only then, and before the first data, is a value read back to the host.
        """
        flag = self.initialized
        now = self._trace()
        if flag.is_meta or (now == self._seen and (self._initialized or not committing)):
            return
        for name in self.FP32_STATE:
            if not bool(self.get_buffer(name).isfinite().all()):
                raise RuntimeError(
                    f"{name} of router {self.name!r} must be finite, got NaN or Inf written in place: load a "
                    "checkpoint from before that"
                )
        written, initialized = self._seen not in (None, now), bool(flag)
        turned = initialized != self._initialized
        if turned and initialized and committing:  # compiled forwards have gathered with the loaded state
            self._initialized = True
            self.pending.drop_reservoir()
        elif turned or (written and not committing):
            self._after_load()
        self._seen = now

    def _trace(self) -> tuple[int, int]:
        """What changes when `initialized` is replaced, or written by itself; writes of kernels leave no trace.

        The broadcast with which DDP begins a forward writes to all buffers alike, and counts as a write in torch 2.11
        and not in 2.13. It is no load, and has written to the one that no checkpoint holds, too.
        """
        flag, unsaved = self.initialized, self.unsaved
        untold = flag.is_inference() or unsaved.is_inference()
        return (flag.data_ptr(), 0 if untold else flag._version - unsaved._version)

    def _mark_initialized(self) -> None:
        self.initialized.fill_(True)
        self._initialized, self._seen, self._pinned = True, self._trace(), {}
        self.pending.drop_reservoir()

    def _apply(self, fn: Any, recurse: bool = True) -> "CentroidState":
        super()._apply(fn, recurse)
        self._pinned, self._seen = {}, None
        return self

    def _after_load(self) -> None:
        super()._after_load()
        self._initialized = not self.initialized.is_meta and bool(self.initialized)
        self._pinned, self._seen = {}, self._trace()
        if bool(self.pending.hashes.numel()) != (not self._initialized and self.init != "normal"):
            self._new_pending()
        else:
            self.tokens_per_expert.zero_()  # in place: a captured graph may write here

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pinned": {}, "_seen": None}
