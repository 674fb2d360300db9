"""What is compared: sizes, contestants, seeds, changes in mid-run. A run is one `TrainConfig` of `kmeans-route train`.

At every size a token passes through experts of 2 D inner width in all: expert_hidden is 2 D / top_k.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.quality.trials import FAN_IN, TRIALS
from kmeans_route.lm.config import TrainConfig

STEPS = 2400
PINNED = {"tau": 0.05, "decay": 0.999, "aux_loss_coef": 0.01, "balance": ""}
"""What a contestant has unless it says otherwise, whatever the package's defaults become."""
CURVE_POINTS = 12
SIZES: dict[str, dict[str, Any]] = {
    f"D{hidden}-E{experts}-K{top_k}": {"hidden": hidden, "experts": experts, "top_k": top_k}
    for hidden in (64, 128)
    for experts, top_k in ((16, 2), (16, 8), (64, 2), (64, 8), (1, 1))
}
"""The last of each width is dense: one expert that every token passes through, as wide as top_k of the others."""
TINY = "D16-E4-K2"
SIZES[TINY] = {"layers": 1, "hidden": 16, "heads": 2, "experts": 4, "top_k": 2, "seq_len": 32, "eval_bytes": 2048}
"""For tests alone."""
SUBWORDS = "D128-E64-K8-subwords"
SIZES[SUBWORDS] = {"hidden": 128, "experts": 64, "top_k": 8, "seq_len": 256, "batch": 8}
"""Closer to life: `texts.subwords` in place of bytes, 2,048 of them a step."""

MAIN: dict[str, dict[str, Any]] = {
    **{
        f"softmax, aux {coef:g}": {"router": "softmax", "balance": "aux", "aux_loss_coef": coef}
        for coef in (0.001, 0.01, 0.1)
    },
    **{
        f"sigmoid, sign {rate:g}": {"router": "sigmoid", "balance": "sign", "bias_rate": rate}
        for rate in (0.001, 0.01, 0.1)
    },
    "sigmoid, quantile": {"router": "sigmoid", "balance": "quantile"},
    "K-Means, sign": {"router": "kmeans", "balance": "sign"},
    "K-Means, proportional": {"router": "kmeans", "balance": "proportional"},
    "K-Means, proportional, tau 0.2": {"router": "kmeans", "balance": "proportional", "tau": 0.2},
    "K-Means, proportional, tau 0.2, learned offset": {
        "router": "kmeans", "balance": "proportional", "tau": 0.2, "trial": "learned offset",
    },
    "K-Means, quantile": {"router": "kmeans", "balance": "quantile"},
    "K-Means, whitened": {
        "router": "kmeans", "balance": "proportional", "tau": 0.1, "router_options": {"directions": "whitened"},
    },
    "K-Means, whitened, learned offset": {
        "router": "kmeans", "balance": "proportional", "tau": 0.1,
        "router_options": {"directions": "whitened", "learned_offset": True},
    },
    "random, fixed": {"router": "random"},
    "hash of the byte": {"router": "hash"},
}  # fmt: skip
"""With a learned offset it was run as a trial, before that became an option of the router."""
MAIN_SEEDS = 3
"""Those of the main study are 0, 1, 2; what ran with later ones belongs to the decision alone."""
WHITENED = "K-Means, whitened"
"""What the router's defaults make with more than one expert a token."""
WHITENED_OFFSET = f"{WHITENED}, learned offset"
CENTROIDS = "K-Means, proportional, tau 0.2"
"""The paper's directions, and what the router's defaults make with one expert a token."""
OFFSET = f"{CENTROIDS}, learned offset"


RIVALS = ("sigmoid, sign 0.01", "softmax, aux 0.01")
"""Of each kind of learned router the one with the fewest bits per byte over the twelve runs of the main study."""
FINAL = {name: MAIN[name] for name in (WHITENED, WHITENED_OFFSET, CENTROIDS, *RIVALS)}
"""Those between whom the study decides."""
FLOORS = {name: MAIN[name] for name in ("hash of the byte", "random, fixed")}
DENSE: dict[str, dict[str, Any]] = {"dense": {"router": "random"}}
RATES = (0.006, 0.012)
"""Peak learning rates beside 0.003, which the main study has."""


def at_rate(name: str, rate: float) -> str:
    """The name of a contestant at a peak learning rate."""
    return name if rate not in RATES else f"{name}, lr {rate:g}"


RATED = {at_rate(name, rate): options | {"lr": rate} for rate in RATES for name, options in (FINAL | FLOORS).items()}


def _options(**options: Any) -> dict[str, Any]:
    return {"router_options": options}


_TRIES: dict[str, dict[str, dict[str, Any]]] = {
    "K-Means, quantile": {
        "K-Means, tau 0.2": {"tau": 0.2},
        "K-Means, tau 1": {"tau": 1.0},
        "K-Means, decay 0.9999": {"decay": 0.9999},
        "K-Means, cumulative mean": _options(average="cumulative"),
        "K-Means, uniform gate": _options(gate="uniform"),
        "K-Means, learned offset": {"trial": "learned offset"},
        "K-Means, centred": {"trial": "centred"},
    },
    CENTROIDS: {
        **{f"K-Means, proportional, tau {tau:g}": {"tau": tau} for tau in (0.02, 0.1, 0.5, 1.0)},
        **{f"K-Means, proportional {rate:g}, tau 0.2": {"bias_rate": rate} for rate in (0.015, 0.15)},
        **{f"{CENTROIDS}, decay {decay:g}": {"decay": decay} for decay in (0.99, 0.9999)},
        f"{CENTROIDS}, cumulative mean": _options(average="cumulative"),
        f"{CENTROIDS}, raw sums": _options(accumulate="raw"),
        **{f"{CENTROIDS}, {gate} gate": _options(gate=gate) for gate in ("sigmoid", "cosine", "uniform")},
        f"{CENTROIDS}, detached gates": _options(detach_gates=True),
        f"{CENTROIDS}, 4 groups of which 2": _options(n_group=4, topk_group=2),
        f"{CENTROIDS}, commit every 4": {"commit_every": 4},
        **{f"{CENTROIDS}, {trial}": {"trial": trial} for trial in TRIALS if trial not in ("learned offset", FAN_IN)},
    },
    at_rate(WHITENED, 0.006): {
        **{f"{at_rate(WHITENED, 0.006)}, decay {decay:g}": {"decay": decay} for decay in (0.99, 0.9999)},
        f"{at_rate(WHITENED, 0.006)}, tau 0.2": {"tau": 0.2},
    },
}
"""The first tries changed quantile balancing at tau 0.05, before the default was what it is; others change that; the
last ones change whitened directions at a rate that suits them better."""
TRIES = {name: (MAIN | RATED)[base] | options for base, tries in _TRIES.items() for name, options in tries.items()}
CHANGED_BY = {name: base for base, tries in _TRIES.items() for name in tries}
"""Try -> the contestant of the main study, or of the rates, that it changes."""
CHANGES = {
    "prose": "the text turns from code to prose",
    "lr": "the learning rate doubles",
    "batch": "the batch grows from 4 to 64 sequences",
}
"""What happens after half of the steps."""
CHANGED = (
    "softmax, aux 0.01", "sigmoid, sign 0.01", "sigmoid, quantile", "K-Means, sign", "K-Means, proportional", CENTROIDS,
    "K-Means, quantile", "K-Means, whitened",
)  # fmt: skip
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "main": MAIN,
    "tries": TRIES,
    "dense": {
        at_rate(name, rate): options | {"lr": rate} for rate in (0.003, *RATES) for name, options in DENSE.items()
    },
    FAN_IN: {f"{name}, {FAN_IN}": options | {"trial": FAN_IN} for name, options in FINAL.items()},
    "rates": RATED,
    **{change: {f"{name}; {change}": MAIN[name] for name in CHANGED} for change in CHANGES},
}
"""Study -> contestants. The last three change something after half of the steps, see `one.py`; "dense" is for the
sizes of one expert."""


class Job(NamedTuple):
    """One run. name: size/contestant/seed, its key in the result file together with the options."""

    size: str
    contestant: str
    config: TrainConfig
    change: str = ""
    trial: str = ""
    text: str = ""

    @property
    def name(self) -> str:
        return f"{self.size}/{self.contestant}/{self.config.seed}"


def _sizes(size: str) -> dict[str, Any]:
    sizes = SIZES[size]
    return sizes | {"expert_hidden": 2 * sizes["hidden"] // sizes["top_k"]}


def _named(options: dict[str, Any]) -> dict[str, Any]:
    """K-Means with the directions that it is of: centroids where a contestant names none."""
    if options["router"] != "kmeans":
        return options
    return options | {"router_options": {"directions": "centroids"} | options.get("router_options", {})}


def usual_sizes(study: str) -> list[str]:
    """Those of several experts and of bytes; for the dense model those of one."""
    one = study == "dense"
    return [name for name, sizes in SIZES.items() if (sizes["experts"] == 1) == one and name not in (TINY, SUBWORDS)]


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
    change = study if study in CHANGES else ""
    every = 0 if change else max(1, base.steps // CURVE_POINTS)
    batch = {"batch": base.batch // 4} if change == "batch" else {}
    chosen = {
        name: (options.get("trial", ""), {key: value for key, value in options.items() if key != "trial"})
        for name, options in STUDIES[study].items()
        if not only or name in only
    }
    return [
        Job(
            size, name,
            replace(base, **PINNED | {"seed": seed, "eval_every": every} | _sizes(size) | batch | _named(options)),
            change, trial, "subwords" if size == SUBWORDS else "",
        )
        for size in sizes
        for seed in seeds
        for name, (trial, options) in chosen.items()
    ]  # fmt: skip
