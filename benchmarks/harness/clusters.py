"""K = 1, where a K-Means router does what clustering packages do: assign tokens to centroids, and move the centroids.

The tokens lie around E separated centres, the same number around each, in every batch: then averages of sums and
averages of means are the same, and trajectories of different packages can be compared.

Legend: T tokens, D hidden size, E experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import checks
from benchmarks.harness.peers import Codebook
from benchmarks.harness.truth import assert_close_to_truth
from kmeans_route import KMeansRouter
from kmeans_route.bench import baselines
from kmeans_route.testing import BenchShape, make_centroids, make_hidden_states

DECAY = 0.9
NUM_BATCHES = 4
Assign = Callable[[Tensor], Tensor]
Update = Callable[[Tensor], tuple[Tensor, Tensor]]


class Clusters(NamedTuple):
    """batches: T tokens (T, D) each, tokens_per_centroid around each centre. centroids (E, D): unit rows near these."""

    batches: list[Tensor]
    centroids: Tensor
    tokens_per_centroid: int


def make_clusters(shape: BenchShape, seed: int = 0) -> Clusters:
    """As many batches as a trajectory is checked over; T is rounded down to a multiple of E."""
    num_experts, hidden_size = shape.num_experts, shape.hidden_size
    each = max(1, shape.num_tokens // num_experts)
    centres = make_centroids(num_experts, hidden_size, seed=seed)
    member = torch.arange(each * num_experts) % num_experts
    noise = (make_hidden_states(len(member), hidden_size, seed=seed + 1 + i) for i in range(NUM_BATCHES))
    batches = [(centres[member] + n * (0.3 * hidden_size**-0.5)) * (i + 1) for i, n in enumerate(noise)]
    start = centres + make_hidden_states(num_experts, hidden_size, seed=seed + 9) * (0.2 * hidden_size**-0.5)
    return Clusters(batches, F.normalize(start), each)


def make_router(clusters: Clusters) -> KMeansRouter:
    """The package's router with K = 1, no balance bias, from the given centroids; in training."""
    num_experts, hidden_size = clusters.centroids.shape
    router = KMeansRouter(hidden_size, num_experts, 1, decay=DECAY, balance="none", backend="torch")
    router.set_centroids(clusters.centroids)
    router.commit()
    return router.train()


def router_update(clusters: Clusters) -> Update:
    """A training forward without gradient, and the commit: ids and the moved centroids."""
    router = make_router(clusters)

    def update(x: Tensor) -> tuple[Tensor, Tensor]:
        indices = router(x).indices
        router.commit()
        return indices[:, 0], router.centroids

    return update


def textbook_update(clusters: Clusters) -> Update:
    """The textbook router's forward, which moves its centroids expert by expert."""
    textbook = baselines.TextbookKMeansRouter(clusters.centroids.clone(), 1, decay=DECAY)

    def update(x: Tensor) -> tuple[Tensor, Tensor]:
        return textbook(x)[1][:, 0], textbook.centroids

    return update


def check_assignment(name: str, assign: Assign, clusters: Clusters) -> None:
    """Each token goes to the centroid of largest cosine, in fp64."""
    x = clusters.batches[0]
    cosines = F.normalize(x.double()) @ clusters.centroids.double().T
    plain = F.normalize(x) @ clusters.centroids.T
    checks.check_routed(name, torch.ones(len(x), 1), assign(x)[:, None], cosines, 1.0, plain)


def check_codebook_sums(codebook: Codebook, clusters: Clusters) -> None:
    """Sums and counts that one update puts into the codebook's averages, against one-hot products in fp64."""
    module, x = codebook.module, clusters.batches[0]
    before, size = module.embed_avg[0].clone(), module.cluster_size[0].clone()
    ids = codebook(x, update=True)
    member = F.one_hot(ids, len(before))
    counts = ((module.cluster_size[0] - size * module.decay) / (1 - module.decay)).round().long()
    assert torch.equal(counts, member.sum(0)), "the codebook counts other tokens than it assigns"
    sums = (module.embed_avg[0] - before * module.decay) / (1 - module.decay)
    truth = member.double().T @ F.normalize(x.double())
    plain = member.float().T @ F.normalize(x)
    tolerance = 4 * torch.finfo(x.dtype).eps * float(truth.abs().max()) / (1 - module.decay)
    assert_close_to_truth(sums, truth, plain, tolerance=tolerance, name="codebook: sums")


def check_trajectory(name: str, update: Update, clusters: Clusters, *, keeps: float = DECAY) -> None:
    """Ids and directions of the centroids after each batch: c <- keeps c + (1 - keeps) mean of its tokens, in fp64.

    keeps: 0 for a step of Lloyd's algorithm, which starts from the given centroids each time.
    """
    c = clusters.centroids.double()
    for step, x in enumerate(clusters.batches):
        unit = F.normalize(x.double())
        expected = (unit @ F.normalize(c).T).argmax(1)
        ids, directions = update(x)
        assert torch.equal(ids, expected), f"{name}: step {step}: {int((ids != expected).sum())} tokens go elsewhere"
        member = F.one_hot(expected, len(c)).double()
        mean = (member.T @ unit) / member.sum(0).clamp_min(1)[:, None]
        moved = torch.where(member.any(0)[:, None], keeps * c + (1 - keeps) * mean, c)
        c = moved if keeps else c
        error = float((F.normalize(directions.double()) - F.normalize(moved)).abs().max())
        assert error <= 1e-6, f"{name}: step {step}: the centroids' directions are off by {error:.3e}"
