"""What is compared: sizes, contestants, seeds. Each run is one `TrainConfig` of `kmeans-route train`.

At every size a token passes through as many expert weights: expert_hidden is 256 / top_k.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from kmeans_route.cli.config import TrainConfig

STEPS = 2400
CURVE_POINTS = 12
SIZES: dict[str, dict[str, Any]] = {
    f"E{experts}-K{top_k}": {"experts": experts, "top_k": top_k, "expert_hidden": 256 // top_k}
    for experts in (16, 64)
    for top_k in (2, 8)
}
MAIN: dict[str, dict[str, Any]] = {
    **{
        f"softmax, aux {coef:g}": {"router": "softmax", "balance": "aux", "aux_loss_coef": coef}
        for coef in (0.001, 0.01, 0.1)
    },
    **{
        f"sigmoid, sign {rate:g}": {"router": "sigmoid", "balance": "sign", "bias_rate": rate}
        for rate in (0.0003, 0.001, 0.01)
    },
    "sigmoid, quantile": {"router": "sigmoid", "balance": "quantile"},
    "K-Means, sign": {"router": "kmeans", "balance": "sign"},
    "K-Means, proportional": {"router": "kmeans", "balance": "proportional"},
    "K-Means, quantile": {"router": "kmeans", "balance": "quantile"},
    "random, fixed": {"router": "random"},
    "hash of the byte": {"router": "hash"},
}
_QUANTILE = {"router": "kmeans", "balance": "quantile"}
TRIES: dict[str, dict[str, Any]] = {
    **{f"K-Means, quantile, tau {tau:g}": _QUANTILE | {"tau": tau} for tau in (0.02, 0.1, 0.2, 0.5, 1.0)},
    **{f"K-Means, quantile, decay {decay:g}": _QUANTILE | {"decay": decay} for decay in (0.99, 0.9999)},
    "K-Means, quantile, cumulative": _QUANTILE | {"average": "cumulative"},
    "K-Means, quantile, kmeans++": _QUANTILE | {"init": "kmeans++"},
    "K-Means, quantile, sigmoid gate": _QUANTILE | {"gate": "sigmoid"},
    "K-Means, quantile, uniform gate": _QUANTILE | {"gate": "uniform"},
    "K-Means, quantile, commit every 4": _QUANTILE | {"commit_every": 4},
}
STUDIES = {"main": MAIN, "tries": TRIES}


class Job(NamedTuple):
    """One run. name: size/contestant/seed, its key in the result file together with the options."""

    size: str
    contestant: str
    config: TrainConfig

    @property
    def name(self) -> str:
        return f"{self.size}/{self.contestant}/{self.config.seed}"


def jobs(
    study: str, sizes: Sequence[str], seeds: Sequence[int], base: TrainConfig, only: Sequence[str] = ()
) -> list[Job]:
    """All runs of a study, seed by seed, so that a sweep that is stopped has whole comparisons.

    Raises:
        ValueError: a study, size or contestant that is not known.
    """
    for what, got, known in (
        ("--study", [study], STUDIES), ("--size", sizes, SIZES), ("--only", only, STUDIES.get(study, {})),
    ):  # fmt: skip
        unknown = [name for name in got if name not in known]
        if unknown:
            raise ValueError(f"{what} must be among {', '.join(known)}, got {', '.join(unknown)}")
    every = max(1, base.steps // CURVE_POINTS)
    return [
        Job(size, name, replace(base, **{"seed": seed, "eval_every": every, "balance": ""} | SIZES[size] | options))
        for size in sizes
        for seed in seeds
        for name, options in STUDIES[study].items()
        if not only or name in only
    ]
