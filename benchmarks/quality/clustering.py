"""The router as an online clusterer, beside sklearn's KMeans on unit rows: `python -m benchmarks.quality.clustering`.

Each run is a router with the package's defaults, 160 training forwards of 512 tokens each with its commit, several
passes over the data. Then its selection without gradient, on the same tokens, is measured. sklearn's KMeans sees all
tokens at once (Lloyd, the best of four starts); with K > 1 its selection is the K nearest centroids.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

import argparse
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.quality import minilm
from kmeans_route import KMeansRouter, metrics

COMMITS, BATCH, SEEDS = 160, 512, 5
TOP_K = (1, 2, 8)
RULES = ("centroids", "whitened")


class Data(NamedTuple):
    """x: (T, D) fp32 tokens. num_experts: E. labels: (T,) int64, the cluster of each token, where one is known."""

    x: Tensor
    num_experts: int
    labels: Tensor | None = None


class Figures(NamedTuple):
    """What a selection and its centroids are worth as a clustering of unit rows u_t.

    cosine: mean over t of max over e of u_t . unit(c_e). explained: R2 of u from the 0/1 selection matrix (T, E), by
    least squares. effective: `metrics.effective_experts`. max_vio: of the selection's counts. nmi: normalised mutual
    information of first choice and label; NaN without labels.
    """

    cosine: float
    explained: float
    effective: float
    max_vio: float
    nmi: float


def labelled(seed: int) -> Data:
    """16 clusters of unequal size around means of a falling spectrum, on an offset that all tokens share: D = 64.

    Coordinate i has weight 10^(-i/63) in means and noise alike; the smallest cluster has a quarter of the largest.
    """
    num_clusters, hidden_size, num_tokens = 16, 64, 4096
    gen = torch.Generator().manual_seed(seed)
    spectrum = torch.logspace(0, -1, hidden_size)
    spectrum /= spectrum.square().mean().sqrt()
    means = torch.randn(num_clusters, hidden_size, generator=gen) * spectrum
    offset = torch.randn(hidden_size, generator=gen)
    sizes = torch.arange(1, num_clusters + 1).float() ** -0.5
    labels = torch.multinomial(sizes, num_tokens, replacement=True, generator=gen)
    noise = torch.randn(num_tokens, hidden_size, generator=gen) * spectrum
    return Data(normalize(means[labels] + offset + 0.7 * noise), num_clusters, labels)


DATA: dict[str, Callable[[int], Data]] = {
    "labelled": labelled,
    "MiniLM, layer 3": lambda seed: Data(minilm.read_sample(3), 32),
    "MiniLM, layer 5": lambda seed: Data(minilm.read_sample(5), 32),
}
"""Name -> data of a seed; real states are the same for each."""


def online(data: Data, top_k: int, directions: str, seed: int, balance: str = "proportional") -> KMeansRouter:
    """A router after COMMITS commits."""
    router = KMeansRouter(data.x.shape[1], data.num_experts, top_k, directions=directions, balance=balance, seed=seed)
    gen, commits = torch.Generator().manual_seed(seed), 0
    while commits < COMMITS:
        for ids in torch.randperm(len(data.x), generator=gen).split(BATCH):
            router(data.x[ids])
            router.commit()
            commits += 1
    return router


def run_router(data: Data, top_k: int, directions: str, seed: int, balance: str = "proportional") -> Figures:
    router = online(data, top_k, directions, seed, balance)
    return measure(data, router.route(data.x).indices, router.centroids)


def run_sklearn(data: Data, top_k: int, seed: int) -> Figures:
    unit = normalize(data.x)
    centroids = torch.from_numpy(
        KMeans(data.num_experts, n_init=4, random_state=seed).fit(unit.numpy()).cluster_centers_
    )
    return measure(data, torch.cdist(unit, centroids).topk(top_k, dim=1, largest=False).indices, centroids)


def measure(data: Data, indices: Tensor, centroids: Tensor) -> Figures:
    """See `Figures`; sums in fp64."""
    unit, num_experts = normalize(data.x.double()), data.num_experts
    chosen = torch.zeros(len(unit), num_experts, dtype=torch.double).scatter(1, indices, 1.0)
    # By singular values, since experts that are always chosen together have equal columns.
    fitted = chosen @ torch.linalg.lstsq(chosen, unit, driver="gelsd").solution
    unexplained = (unit - fitted).square().sum() / (unit - unit.mean(0)).square().sum()
    return Figures(
        float((unit @ normalize(centroids.double()).T).amax(1).mean()),
        1 - float(unexplained),
        float(metrics.effective_experts(indices, num_experts)),
        float(metrics.max_vio(chosen.sum(0))),
        math.nan if data.labels is None else float(normalized_mutual_info_score(data.labels, indices[:, 0])),
    )


def num_axes(data: Data) -> float:
    """Participation ratio of the variances along the first E - 1 principal axes of unit rows.

    Decorrelated directions are orthogonal and span at most E - 1 axes. If these are the first ones, the covariance of
    the scores has this participation ratio: more experts than that cannot differ much by their scores.
    """
    unit = normalize(data.x.double())
    variances = torch.linalg.svdvals(unit - unit.mean(0)).square()[: data.num_experts - 1]
    return float(variances.sum().square() / variances.square().sum())


def cosine_of_first_tokens(data: Data, seed: int, draws: int = 8) -> float:
    """Mean cosine with the nearest of E tokens of the data: where a clusterer starts. Mean over some draws of the E."""
    gen, unit = torch.Generator().manual_seed(seed), normalize(data.x)
    starts = [unit[torch.randperm(len(unit), generator=gen)[: data.num_experts]] for _ in range(draws)]
    return statistics.fmean(float((unit @ start.T).amax(1).mean()) for start in starts)


def _cell(runs: list[list[Figures]], key: str, digits: int) -> str:
    """sklearn / centroids / whitened, means over the seeds."""
    columns = [[getattr(figures, key) for figures in of_one] for of_one in runs]
    return (
        "-" if math.isnan(columns[0][0]) else " / ".join(f"{statistics.fmean(column):.{digits}f}" for column in columns)
    )


def table(seeds: range) -> Iterator[str]:
    """Lines of Markdown, as they are found: a row for each data and K."""
    columns = {"cosine": 3, "explained": 2, "effective": 1, "max_vio": 2, "nmi": 2}
    yield "| data | E | K | mean cosine | R2 from the selection | effective experts | MaxVio | NMI |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, make in DATA.items():
        given = {seed: make(seed) for seed in seeds}
        for top_k in TOP_K:
            runs = [[run_sklearn(data, top_k, seed) for seed, data in given.items()]]
            runs += [[run_router(data, top_k, rule, seed) for seed, data in given.items()] for rule in RULES]
            cells = [_cell(runs, key, digits) for key, digits in columns.items()]
            yield f"| {name} | {given[seeds[0]].num_experts} | {top_k} | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="The router as an online clusterer: sklearn / centroids / whitened.")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*nothing commits its statistics")  # said before the first commit
    for line in table(range(parser.parse_args().seeds)):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
