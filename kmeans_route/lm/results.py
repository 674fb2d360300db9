"""The figures of finished runs: one run's measures, their mean over seeds, and the comparison's verdicts.

A run is a plain dict of JSON values, so that a report can be drawn again from the file:
label, config, corpus, num_parameters, measures {key: number}, layers {load (L, E), max_vio (L,), coupling (L,),
effective_experts (L,), direction_cosine (L, E, E), of whitened directions less their mean}, history (one record a step,
see `Trainer.train_step`).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from kmeans_route import metrics
from kmeans_route.lm.trainer import Evaluation, Trainer

Run = dict[str, Any]
TAIL_STEPS = 100
"""The training MaxVio is a mean over this many last steps."""
FEW_TOKENS, FEW_STEPS = 100, 200
"""With fewer tokens an expert and commit the usual bias step leaves twice the imbalance of a smaller one (docs/api.md);
in the first 200 steps the text makes loads uneven whatever the rule (docs/quality.md)."""
BITS_MARGIN = 0.05
"""Differences in bits per byte below this are not resolved by runs as short as the demo's."""


class Measure(NamedTuple):
    """A row of the table: key in `measures`, label with unit and direction, digits after the point."""

    key: str
    label: str
    digits: int


MEASURES = (
    Measure("bits_per_byte", "validation bits per byte", 3),
    Measure("perplexity", "validation perplexity per byte", 2),
    Measure("max_vio_train", "MaxVio, training", 3),
    Measure("max_vio_validation", "MaxVio, validation, pooled", 3),
    Measure("load_std", "load deviation, validation", 4),
    Measure("dead_experts", "dead experts", 0),
    Measure("effective_experts", "effective experts", 1),
    Measure("coupling", "router-expert coupling", 2),
    Measure("time_ms", "time per step, median (ms)", 1),
    Measure("time_ratio", "step time / that of K-Means", 2),
)
ROUTING = ("max_vio_train", "max_vio_validation", "dead_experts", "effective_experts", "time_ms", "time_ratio")
"""Of these, what a run of one seed can tell."""
QUALITY_PAGE = "docs/quality.md"
STUDY = {"kmeans": "2.126 ± 0.021", "softmax": "2.124 ± 0.004", "sigmoid": "2.140 ± 0.001"}
"""Validation bits per byte of the demo's routers after 800 steps, seeds 0, 1, 2: `make demo-seeds`, QUALITY_PAGE."""


def summarize(trainer: Trainer, evaluation: Evaluation) -> Run:
    """The figures of a trainer after its last step, with an evaluation of its model that has the sample."""
    counts_LE = evaluation.tokens_per_expert
    max_vio_L = metrics.max_vio(counts_LE)
    tail = [statistics.fmean(record["max_vio"]) for record in trainer.history[-TAIL_STEPS:]]
    directions = [layer.router.weight.detach().float().cpu() for layer in trainer.model.moe_layers]
    cosine = metrics.differences_cosine if is_whitened(trainer.config.to_dict()) else metrics.pairwise_cosine
    return {
        "label": trainer.config.label,
        "config": trainer.config.to_dict(),
        "corpus": trainer.corpus.summary(),
        "num_parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "measures": {
            "bits_per_byte": evaluation.bits_per_byte,
            "perplexity": evaluation.perplexity,
            "max_vio_train": statistics.fmean(tail),
            "max_vio_validation": float(max_vio_L.mean()),
            "load_std": float(metrics.load_std(counts_LE).mean()),
            "dead_experts": int(metrics.dead_experts(counts_LE).sum()),
            "effective_experts": float(evaluation.effective_experts.mean()),
            "coupling": float(evaluation.coupling.mean()),
            "time_ms": statistics.median(record["time_ms"] for record in trainer.history),
        },
        "layers": {
            "load": metrics.load(counts_LE).tolist(),
            "max_vio": max_vio_L.tolist(),
            "coupling": evaluation.coupling.tolist(),
            "effective_experts": evaluation.effective_experts.tolist(),
            "direction_cosine": [cosine(weight).tolist() for weight in directions],
        },
        "history": trainer.history,
    }


def not_yet_balanced(config: dict[str, Any]) -> str:
    """A sentence on a run too small for its MaxVio to be that of a trained router; "" where it is large enough."""
    tokens = config["batch"] * config["seq_len"] * config["top_k"] * config["commit_every"] // config["experts"]
    small = [f"{tokens} tokens an expert and commit (about {FEW_TOKENS} are needed)"] if tokens < FEW_TOKENS else []
    small += [f"{config['steps']} steps (some hundred are needed)"] if config["steps"] < FEW_STEPS else []
    return f"So small a run says little of balance: {', '.join(small)}; see docs/api.md." if small else ""


def is_whitened(config: dict[str, Any]) -> bool:
    """Whether the options of a run say that its directions are whitened."""
    return bool(config["router_options"].get("directions") == "whitened")


def group_by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of one router together, in the order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(run)
    return groups


def means(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Label -> measure -> mean over that router's runs."""
    return {
        label: {key: statistics.fmean([run["measures"][key] for run in group]) for key in group[0]["measures"]}
        for label, group in group_by_label(runs).items()
    }


def pair_times(runs: Sequence[Run]) -> None:
    """Add to runs that took their steps in turn the measure time_ratio: the median over the rounds of (time of the step
    / time of K-Means' step in that round)."""
    ours = next(run for run in runs if run["config"]["router"] == "kmeans")
    for run in runs:
        rounds = zip(run["history"], ours["history"], strict=True)
        run["measures"]["time_ratio"] = statistics.median(one["time_ms"] / other["time_ms"] for one, other in rounds)


def table_rows(runs: Sequence[Run], keys: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Column headings and rows of the comparison: measures (of `keys`, if any) down, routers across.

    Of several seeds the mean ± sample standard deviation.
    """
    groups = group_by_label(runs)
    rows = []
    for measure in MEASURES:
        if measure.key not in (keys or runs[0]["measures"]) or measure.key not in runs[0]["measures"]:
            continue
        label = measure.label
        if measure.key == "dead_experts":
            label += f" (of {runs[0]['config']['layers'] * runs[0]['config']['experts']})"
        if measure.key == "max_vio_train":
            label += f", last {min(TAIL_STEPS, runs[0]['config']['steps'])} steps"
        values = [[run["measures"][measure.key] for run in group] for group in groups.values()]
        rows.append([label, *(_cell(column, measure.digits) for column in values)])
    return ["measure", *groups], rows


def routing_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """The table of what a run can tell: balance, experts kept apart, time of a step."""
    return table_rows(runs, ROUTING)


def quality_title(runs: Sequence[Run]) -> str:
    """What stands above `quality_rows`."""
    if _one_seed(runs):
        return f"What one seed cannot tell: quality. {QUALITY_PAGE} has three seeds"
    return f"Quality, lower is better; differences below {BITS_MARGIN} are not resolved"


def quality_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Bits per byte of this run, and those of the study beside it."""
    columns, rows = table_rows(runs, ("bits_per_byte",))
    routers = [group[0]["config"]["router"] for group in group_by_label(runs).values()]
    return columns, [*rows, ["study: 800 steps, 3 seeds", *(STUDY.get(router, "n/a") for router in routers)]]


def conclusion(runs: Sequence[Run]) -> str:
    """One sentence, of what the run can tell, which ends with the page that tells the rest."""
    averages = means(runs)
    kmeans = next(label for label in averages if label.startswith("K-Means"))
    learned = {label: values for label, values in averages.items() if label != kmeans}
    even = min(learned, key=lambda label: learned[label]["max_vio_train"])
    quick = min(learned, key=lambda label: learned[label]["time_ratio"])
    return (
        f"In training K-Means' fullest expert took {averages[kmeans]['max_vio_train']:.0%} more than a fair share, "
        f"that of {even.partition(',')[0]} {learned[even]['max_vio_train']:.0%} more, and a step of "
        f"{quick.partition(',')[0]} took "
        f"{learned[quick]['time_ratio']:.2f} times as long as one of K-Means; which of them trains the better model, "
        "and by how much, stands in"
    )


def _one_seed(runs: Sequence[Run]) -> bool:
    return len({run["config"]["seed"] for run in runs}) == 1


def verdicts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The two questions of one K-Means router and at least one learned one, answered from the means: text, passed.

    None of a single seed, which decides neither.
    """
    if _one_seed(runs):
        return []
    averages = means(runs)
    kmeans = next(label for label in averages if label.startswith("K-Means"))
    learned = {label: values for label, values in averages.items() if label != kmeans}
    ours = averages[kmeans]
    calmest = min(learned, key=lambda label: learned[label]["max_vio_validation"])
    rival_vio = learned[calmest]["max_vio_validation"]
    best = min(learned, key=lambda label: learned[label]["bits_per_byte"])
    gap = ours["bits_per_byte"] - learned[best]["bits_per_byte"]
    return [
        {
            "name": "lowest_validation_max_vio",
            "passed": ours["max_vio_validation"] < rival_vio,
            "text": f"K-Means has the lowest mean validation MaxVio: {ours['max_vio_validation']:.3f} against "
            f"{rival_vio:.3f} ({calmest})",
        },
        {
            "name": "bits_per_byte_within_margin",
            "passed": gap <= BITS_MARGIN,
            "text": f"K-Means' mean bits per byte are at most {BITS_MARGIN} above the best learned router's: "
            f"{gap:+.3f} ({best})",
        },
    ]


def _cell(values: Sequence[float], digits: int) -> str:
    mean = statistics.fmean(values)
    if not math.isfinite(mean):
        return "n/a"
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    # A mean of counts is no count.
    digits = max(1, digits)
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def to_json(document: Any) -> str:
    """Strict JSON, indented; NaN and infinity become null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
