"""The figures of finished runs: one run's measures, their mean over seeds, and the comparison's verdicts.

A run is a plain dict of JSON values, so that a report can be drawn again from the file:
label, config, corpus, num_parameters, measures {key: number}, layers {load (L, E), max_vio (L,), coupling (L,),
effective_experts (L,), direction_cosine (L, E, E)}, history (one record a step, see `Trainer.train_step`).
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
    Measure("max_vio_train", f"MaxVio, training batches, last {TAIL_STEPS} steps", 3),
    Measure("max_vio_validation", "MaxVio, validation, counts pooled", 3),
    Measure("load_std", "load standard deviation, validation", 4),
    Measure("dead_experts", "dead experts, validation", 0),
    Measure("effective_experts", "effective experts, mean over layers", 1),
    Measure("coupling", "router-expert coupling (correlation)", 2),
    Measure("time_ms", "time per step, median (ms)", 1),
)


def summarize(trainer: Trainer, evaluation: Evaluation) -> Run:
    """The figures of a trainer after its last step, with an evaluation of its model that has the sample."""
    counts_LE = evaluation.tokens_per_expert
    max_vio_L = metrics.max_vio(counts_LE)
    tail = [statistics.fmean(record["max_vio"]) for record in trainer.history[-TAIL_STEPS:]]
    directions = [layer.router.weight.detach().float().cpu() for layer in trainer.model.moe_layers]
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
            "direction_cosine": [metrics.pairwise_cosine(weight).tolist() for weight in directions],
        },
        "history": trainer.history,
    }


def group_by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of one router together, in the order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(run)
    return groups


def means(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Label -> measure -> mean over that router's runs."""
    return {
        label: {measure.key: statistics.fmean([run["measures"][measure.key] for run in group]) for measure in MEASURES}
        for label, group in group_by_label(runs).items()
    }


def table_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Column headings and rows of the comparison: measures down, routers across.

    Of several seeds the mean ± sample standard deviation.
    """
    groups = group_by_label(runs)
    rows = []
    for measure in MEASURES:
        label = measure.label
        if measure.key == "dead_experts":
            label += f" (of {runs[0]['config']['layers'] * runs[0]['config']['experts']})"
        values = [[run["measures"][measure.key] for run in group] for group in groups.values()]
        rows.append([label, *(_cell(column, measure.digits) for column in values)])
    return ["measure", *groups], rows


def verdicts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The two questions of one K-Means router and at least one learned one, answered from the means: text, passed."""
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
