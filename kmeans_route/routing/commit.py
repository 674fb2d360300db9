"""The commit of a K-Means router: first data sets the centroids, each step moves them and the bias."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kmeans_route import backends, metrics, reference
from kmeans_route.backends.first import first_centroids
from kmeans_route.ops.schema import no_autocast
from kmeans_route.routing.base import StatefulRouter, called, scalars
from kmeans_route.routing.loading import CentroidState
from kmeans_route.routing.pending import Pending
from kmeans_route.types import RouterState

WHITENED_BYTES = 64 << 20  # of centroids at once; working space takes a few times as much


def point(routers: Iterable[StatefulRouter]) -> None:
    """Write the whitened directions of all routers whose centroids a commit has moved, those of equal shape at once."""
    alike: dict[Any, list[CentroidCommit]] = {}
    for router in routers:
        if isinstance(router, CentroidCommit) and router.commit_options.directions == "whitened":
            alike.setdefault((router.weight.shape, router.weight.device, router.backend), []).append(router)
    for (shape, device, name), those in alike.items():
        backend = backends.choose(name, device, num_experts=shape[0])
        together = max(1, WHITENED_BYTES // (4 * shape.numel()))
        for start in range(0, len(those), together):
            _point_at_once(those[start : start + together], backend)


@torch.no_grad()
def _point_at_once(routers: "list[CentroidCommit]", backend: Any) -> None:
    old = torch.stack([router.weight for router in routers])
    moved = torch.stack([router._moved for router in routers])[:, None, None]
    with no_autocast(old):
        new = torch.where(moved, backend.whitened(torch.stack([router.centroids for router in routers]), old), old)
    turns = metrics.centroid_turn(old, new).movedim(1, 0)
    for router, weight, turn in zip(routers, new, turns, strict=True):
        router.weight.copy_(weight)
        router.centroid_turn.copy_(torch.where(router._moved, turn, router.centroid_turn))
        router._moved.zero_()


class CentroidCommit(CentroidState):
    """What happens to the state once an optimizer step, and what is told of it."""

    @torch.no_grad()
    def commit_pending(self, skip: Tensor | None = None, batch: Pending | None = None) -> None:
        """Fold what forward has gathered into centroids and bias; see `commit`."""
        batch = self.pending if batch is None else batch
        if self._awaits_data:
            if int(batch.num_tokens) == 0 or (skip is not None and bool(skip)):
                return
            if self.init != "normal":
                self._commit_first_data(batch)
                return
            self._have_data()
        self._commit_step(skip, batch)

    def _commit_first_data(self, batch: Pending) -> None:
        """Set the centroids from the moments and nothing else: steps, bias and sigma stay 0."""
        with no_autocast(self.weight):
            self.centroids.copy_(first_centroids(batch.moments, self.weight))
        if self.commit_options.directions == "centroids":
            self.weight.copy_(reference.unit_rows(self.centroids, self.weight))
        self._moved.fill_(True)
        self.dropped_total.add_(batch.num_dropped)
        self.tokens_per_expert.copy_(batch.counts)
        self.chosen_together.copy_(self.pending.pairs)
        self.pending.clear_()
        self._have_data()

    def _commit_step(self, skip: Tensor | None, batch: Pending) -> None:
        backend = backends.choose(self.backend, self.weight.device, num_experts=self.num_experts)
        steps = self.steps.clone()
        state = RouterState(
            self.weight, self.centroids, self.expert_bias, self.score_std, self.steps, self.tokens_seen,
            self.dropped_total, self.tokens_per_expert, self.centroid_turn,
        )  # fmt: skip
        backend.commit(state, batch.statistics, skip, self.commit_options)
        torch.ne(self.steps, steps, out=self._moved)
        pairs, together = self.pending.pairs, self.chosen_together
        torch.where(self._moved, pairs, together, out=together)
        pairs.masked_fill_(self._moved, 0.0)
        self._pinned = {}
        if batch is self.pending:
            batch.copied = False  # the backend has emptied it
        else:
            self.pending.clear_(skip)

    def commit(self, skip: Tensor | None = None) -> None:
        """See `StatefulRouter.commit`."""
        super().commit(skip)
        point([self])

    def _effective_experts(self) -> Tensor:
        """Of this rank's tokens of the last step, the first 1024 of each forward; says once when few are left."""
        together = torch.diag(self.tokens_per_expert) if self.top_k == 1 else self.chosen_together
        found = metrics.effective_experts_of(together, self.top_k)
        enough = float(together.diagonal().sum()) >= 8 * self.num_experts * self.top_k
        few = bool(found < self.num_experts / 4) and 1 < self.top_k < self.num_experts
        if enough and few and self.commit_options.directions == "centroids" and not self._told_of_collapse:
            self._told_of_collapse = True
            warnings.warn(
                f"{called(self)} must not have its experts chosen together, got {float(found):.1f} effective "
                f'experts of {self.num_experts}: use directions="whitened", which keeps them apart',
                stacklevel=3,
            )
        return found

    def metrics(self) -> dict[str, float]:
        """Flat scalars of the last committed step, for any logger: NaN before the first where they need its tokens.

        Reads values back: not for the routing path.
        """
        self._move_plain_tensors()
        counts = self.tokens_per_expert
        bias = self.expert_bias
        values = {
            "maxvio": metrics.max_vio(counts),
            "load_std": metrics.load_std(counts),
            "load_entropy": metrics.load_entropy(counts),
            "load_gini": metrics.gini(counts),
            "dead_experts": metrics.dead_experts(counts),
            "effective_experts": self._effective_experts(),
            "bias_abs_max": bias.abs().max(),
            "score_std": self.score_std,
            "direction_cosine": metrics.mean_pairwise_cosine(self.weight),
            "centroid_drift": metrics.angle_of_turn(self.centroid_turn).mean(),
            "steps": self.steps,
            "dropped_total": self.dropped_total,
        }
        return scalars(values, counts)
