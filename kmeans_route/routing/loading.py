"""The state of a K-Means router: made, given, loaded, written by others, and copied.

`weight` holds the directions that score, `centroids` the averages, zero until there is data. Anybody may write either,
past this module too: the next forward routes by `weight`, and the first commit looks at what lies in both before it
sets centroids from data, so that it never wipes what was loaded. What lies there is all that it goes by, so that ranks
of one state decide alike, and a state dict of a state behaves as the state: rows that nobody has given are told by
their length, `FIRST_NORM`, whatever the seed that they were drawn with.
"""

import copy
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from kmeans_route import reference
from kmeans_route.routing.base import StatefulRouter, called
from kmeans_route.routing.pending import Pending

FIRST_NORM = 2.0**-7  # of the rows that score before there is data; a power of two, so that directions keep their bits


class CentroidState(StatefulRouter):
    """The buffers of `KMeansRouter`, and all that sets them but a commit."""

    weight: Tensor
    centroids: Tensor
    offset: nn.Parameter | None
    score_std: Tensor
    dropped_total: Tensor
    steps: Tensor
    tokens_seen: Tensor | None
    init: str
    FP32_STATE = ("weight", "centroids", "expert_bias", "score_std")
    INT64_STATE = ("steps", "dropped_total", "tokens_seen")
    PLAIN_TENSORS = ("tokens_per_expert", "centroid_turn", "chosen_together", "_moved")

    def _make_state(self, device: torch.device | str | None, *, cumulative: bool, learned_offset: bool) -> None:
        num_experts, hidden_size = self.num_experts, self.hidden_size

        @torch.inference_mode(False)
        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.register_buffer("weight", buffer(num_experts, hidden_size))
        self.register_buffer("centroids", buffer(num_experts, hidden_size))
        self.register_buffer("expert_bias", buffer(num_experts))
        self.register_buffer("score_std", buffer())
        self.register_buffer("steps", buffer(dtype=torch.int64))
        self.register_buffer("dropped_total", buffer(dtype=torch.int64))
        self.register_buffer("tokens_seen", buffer(num_experts, dtype=torch.int64) if cumulative else None)
        offset = nn.Parameter(buffer(num_experts, hidden_size)) if learned_offset else None
        self.register_parameter("offset", offset)
        self._told_of_collapse = False
        self.reset_parameters()

    @property
    def initialized(self) -> Tensor:
        """() bool on the router's device: whether data, or somebody, has set the centroids."""
        return self.centroids.any()

    @property
    def has_data(self) -> bool:
        """`initialized`, read back to the host: not for the routing path."""
        return not self.centroids.is_meta and bool(self.initialized)

    def reset_parameters(self) -> None:
        """Gaussian rows from the private generator, no bias, no offset, nothing pending. After `to_empty`, too."""
        self._pinned: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._own_dtypes_again(tell=False)
        self._make_plain_tensors()
        self._await_data(True)
        if self.weight.is_meta:
            return
        with torch.no_grad():
            for tensor in (*self.buffers(recurse=False), self.offset):
                if tensor is not None:
                    tensor.zero_()
            rows = self._gaussian_rows()
            self.weight.copy_(FIRST_NORM * rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True))

    @torch.inference_mode(False)  # training writes into them
    def _make_plain_tensors(self) -> None:
        num_experts, device = self.num_experts, self.weight.device
        self._moved = torch.zeros((), dtype=torch.bool, device=device)
        self.centroid_turn = torch.zeros(2, num_experts, dtype=torch.float32, device=device)
        self.chosen_together = torch.zeros(num_experts, num_experts, dtype=torch.float32, device=device)

    @torch.inference_mode(False)
    def _await_data(self, awaits: bool) -> None:
        """Gather for the first centroids, or no more; nothing is pending then.

        A wrong guess loses nothing: while it awaits data, a commit looks at the state first, and afterwards a commit
        averages from nothing where centroids are zero.
        """
        self._awaits_data = awaits
        self.pending = Pending(
            *(self.num_experts, self.hidden_size, self.weight.device),
            with_hist=self.want_hist,
            with_moments=awaits and self.init == "tokens",
        )
        self.tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.int64, device=self.weight.device)

    @torch.no_grad()
    def set_centroids(
        self, weight: Tensor, tokens_seen: int = reference.GIVEN_TOKENS, *, averages: bool = False
    ) -> None:
        """Take given centroids, scaled to unit rows, with enough weight that the first commit cannot erase them.

        Args:
            weight: (E, D) floating point. `steps` becomes round(decay / (1 - decay)).
            tokens_seen: how many tokens each centroid stands for, with average="cumulative" only.
            averages: the rows are averages of hidden states, from which `directions` makes those that score; with
                accumulate="raw" centroids keep their length. Else they score as they are, as the rows of a gate should,
                until the first commit.

        Raises:
            ValueError: another shape, a row that is zero or not finite, or accumulate="raw" with rows that are no
                averages: hidden states of another length would wipe them.
        """
        if tuple(weight.shape) != (self.num_experts, self.hidden_size):
            raise ValueError(
                f"weight must have shape {(self.num_experts, self.hidden_size)}, got {tuple(weight.shape)}: "
                "one row an expert"
            )
        raw = self.accumulate == "raw"
        if raw and not averages:
            raise ValueError(
                f"{called(self)} must have centroids as long as hidden states with accumulate='raw', got rows of any "
                "length: use accumulate='unit', or pass averages of hidden states and averages=True"
            )
        given = weight.detach().to(device=self.weight.device, dtype=torch.float32)
        unit = reference.directions_reference(given, torch.float32)
        if not bool((unit != 0).any(1).all()):
            raise ValueError("weight must have a direction in every row, got a zero or non-finite one: replace it")
        self.reset_parameters()
        self.weight.copy_(unit)
        self._take_weight_as_given(tokens_seen)
        if raw:
            self.centroids.copy_(given)
        if averages:
            self._write_weight()
        self._have_data()

    @property
    def _whitens(self) -> bool:
        return self.commit_options.directions == "whitened"

    def _write_weight(self) -> None:
        """The directions of the centroids, as a commit writes them."""
        rule = reference.whitened_reference if self._whitens else reference.unit_rows
        self.weight.copy_(rule(self.centroids, self.weight))

    def _take_weight_as_given(self, tokens_seen: int = reference.GIVEN_TOKENS) -> None:
        """Averages that go on from the directions in `weight`."""
        self.centroids.copy_(reference.directions_reference(self.weight, torch.float32))
        self._count_as_given(tokens_seen=tokens_seen)

    def _count_as_given(self, *, kept: Collection[str] = (), tokens_seen: int = reference.GIVEN_TOKENS) -> None:
        """kept: counters that stay as they are."""
        if "steps" not in kept:
            self.steps.fill_(reference.given_steps(self.commit_options.decay))
        if self.tokens_seen is not None and "tokens_seen" not in kept:
            self.tokens_seen.fill_(tokens_seen)

    @torch.inference_mode(False)
    def _have_data(self) -> None:
        """The centroids are set: the moments go, and what else is pending stays."""
        self._awaits_data, self._pinned = False, {}
        self.pending.drop_moments()

    @torch.inference_mode(False)
    @torch.no_grad()
    def snapshot(self) -> dict[str, Any]:
        """All that gathering, committing and setting centroids change, and the options of routing, as they are now: for
        `restore`."""
        names = ("options", "pending", "_awaits_data", *self.PLAIN_TENSORS)
        state = {name: tensor.clone() for name, tensor in self._state()}
        return {"attributes": copy.deepcopy({name: getattr(self, name) for name in names}), "state": state}

    def _state(self) -> list[tuple[str, Tensor]]:
        return [*self.named_buffers(recurse=False), *self.named_parameters(recurse=False)]

    @torch.no_grad()
    def restore(self, snapshot: dict[str, Any]) -> None:
        """Put back what `snapshot` gave."""
        self._own_dtypes_again(tell=True)
        with torch.inference_mode(False):
            attributes = copy.deepcopy(snapshot["attributes"])  # it may be put back again
        for name, value in attributes.items():
            setattr(self, name, value)
        for name, tensor in self._state():
            tensor.copy_(snapshot["state"][name])
        self._pinned = {}

    def before_commit(self) -> None:
        """Look, until there is data, at what lies in the buffers: whoever wrote there has left no other trace.

        Raises:
            RuntimeError: they hold NaN or Inf.
        """
        super().before_commit()
        if not self._awaits_data or self.weight.is_meta:
            return
        for name in self.FP32_STATE:
            if not bool(self.get_buffer(name).isfinite().all()):
                raise RuntimeError(
                    f"{name} of {called(self)} must be finite, got NaN or Inf written in place: load a "
                    "checkpoint from before that"
                )
        if self.has_data:
            if self.tokens_seen is not None and bool(self.steps) and not bool(self.tokens_seen.any()):
                self._warn_of_part("centroids without tokens_seen", "taken as given")
                self._count_as_given(kept=["steps"])
            self._have_data()
        elif not self._has_first_rows():
            self._warn_of_part("a weight without centroids", "taken as given centroids")
            self._take_weight_as_given()
            self._have_data()

    def _has_first_rows(self) -> bool:
        """Whether `weight` is as some router was made, and nobody has given it since; a cast may have rounded."""
        norms = torch.linalg.vector_norm(self.weight, dim=1)
        return bool(((norms / FIRST_NORM - 1).abs() < 2**-8).all())

    def _warn_of_part(self, got: str, taken: str) -> None:
        warnings.warn(
            f"{called(self)} must be loaded whole to go on with a run, got {got}: {taken}, as by set_centroids, "
            "so that the next commits do not wipe them"
            + ("; whitening turns a gate's rows, which directions='centroids' keeps" if self._whitens else "")
            + ("; but with accumulate='raw' those of long hidden states do" if self.accumulate == "raw" else ""),
            stacklevel=2,
        )

    def _warn_of_another_rule(self) -> None:
        """A weight says by which rule it was written, but for given rows until the first commit."""
        given = bool(self.steps) and not bool(self.score_std)
        if given or self._is_written_by(reference.unit_rows) is not self._whitens:
            return
        if self._is_written_by(reference.whitened_reference) is self._whitens:
            return
        own, other = ("whitened", "centroids") if self._whitens else ("centroids", "whitened")
        warnings.warn(
            f"{called(self)} must have the rule of the state that it loads, got directions={own!r} and a weight that "
            f"directions={other!r} has written: the first commit will turn it, and tau differs too where nobody named "
            f"it; pass directions={other!r}, or the top_k of before, which decides where nobody names directions",
            stacklevel=2,
        )

    def _is_written_by(self, rule: Any) -> bool:
        """To the rounding of states that were kept in a shorter dtype."""
        written, weight = (
            nn.functional.normalize(rows, dim=1) for rows in (rule(self.centroids, self.weight), self.weight)
        )
        return bool((torch.linalg.vecdot(written, weight) > 1 - 1e-5).all())

    def _apply(self, fn: Any, recurse: bool = True) -> "CentroidState":
        super()._apply(fn, recurse)
        self._pinned = {}
        return self

    def _after_load(self, brought: set[str]) -> None:
        """Make whole what was loaded in part."""
        self._pinned = {}
        self._materialize(brought)
        super()._after_load(brought)
        if self.weight.is_meta:
            return
        with torch.no_grad():
            self._complete(brought)
        awaits = not self.has_data
        if bool(self.pending.moments.numel()) != (awaits and self.init == "tokens"):
            self._await_data(awaits)
        else:
            self._awaits_data = awaits
            self.tokens_per_expert.zero_()  # in place: a captured graph may write here

    @torch.inference_mode(False)
    def _materialize(self, brought: set[str]) -> None:
        """Zeros for what load_state_dict(assign=True) has left on the meta device, where it has brought directions."""
        devices = [self.get_buffer(name).device for name in ("weight", "centroids") if name in brought]
        for name, buffer in list(self.named_buffers(recurse=False)):
            if buffer.is_meta and devices:
                self._buffers[name] = torch.zeros_like(buffer, device=devices[0])

    def _complete(self, brought: set[str]) -> None:
        if "centroids" not in brought:
            if "weight" in brought:
                for name, buffer in self.named_buffers(recurse=False):
                    if name != "weight":  # a bias that came with a gate is not for cosines
                        buffer.zero_()
                if not self._has_first_rows():
                    self._warn_of_part("a weight without centroids", "taken as given centroids")
                    self._take_weight_as_given()
            return
        if not self.has_data:
            return
        if "weight" not in brought:
            self._write_weight()
        else:
            self._warn_of_another_rule()
        counters = {"steps", "tokens_seen"} if self.tokens_seen is not None else {"steps"}
        if not counters <= brought:
            self._warn_of_part(f"centroids without {' and '.join(sorted(counters - brought))}", "taken as given")
            self._count_as_given(kept=brought)

    def __getstate__(self) -> dict[str, Any]:
        """A copy routes by itself: nothing pinned, and nothing replayed, which ends for the original alone."""
        return {**super().__getstate__(), "_pinned": {}, "replayed": None, "_has_replayed": False}
