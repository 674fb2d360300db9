"""The routers of a checkpoint: a run of `kmeans-route train`, a model of transformers, or a plain state dict."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kmeans_route import metrics
from kmeans_route.cli import places
from kmeans_route.cli.output import Output
from kmeans_route.cli.pretrained import Pretrained, first_line, is_pretrained
from kmeans_route.cli.trained import Trained
from kmeans_route.conversion.compare import Forward, Router, Seen, watch
from kmeans_route.install import install_line
from kmeans_route.lm.checkpoint import CheckpointError, exists, load_checkpoint
from kmeans_route.lm.report import PAGE, write_picture
from kmeans_route.reference import unit_rows, whitened_reference

BIAS_NAMES = ("expert_bias", "e_score_correction_bias")
GATE_NAMES = ("router", "gate")
INSPECTED_BYTES = 65536
Facts = dict[str, Any]
ROWS = ("weight", "centroids")  # of facts: too long to tell


def inspect(path: Path, out: Path | None, output: Output, *, text: Sequence[Path], against: Path | None) -> None:
    """The command `inspect`: what the routers of a checkpoint have learned; app.py says what the options are."""
    if out is not None and find_spec("matplotlib") is None:
        raise ModuleNotFoundError(f"pictures need matplotlib: {install_line('cli', 'viz')}", name="matplotlib")
    if out is not None:
        places.check_folder(out)
        if (out / PAGE).exists():
            raise ValueError(f"{out} already holds a report, with pictures of the same names: name another --out")
    source: Trained | Pretrained | None = None
    if is_pretrained(path):
        source = Pretrained(path, text)
    elif exists(path):
        source = Trained(path, text)
    routers = describe(state_of(path) if source is None else source.state)
    if not routers:
        raise CheckpointError(
            f"{path} holds no router: looked for NAME.weight (E, D) beside NAME.expert_bias, and for "
            f"{' and '.join(f'{name}.weight' for name in GATE_NAMES)}"
        )
    no_loads = "a state dict alone holds no model that could run text" if source is None else None
    if source is not None:
        try:
            held_out = source.windows(INSPECTED_BYTES)[1]
        except CheckpointError as error:
            no_loads = str(error)
        else:
            add_loads(routers, source.model, held_out, source.forward)
    if against is not None:
        add_drift(routers, describe(state_of(against)), against)
    _table(routers, path, output)
    if no_loads:
        output.note(f"the state as it is stored, without loads: {no_loads}")
    files = [] if out is None else _draw(routers, out)
    for file in files:
        output.note(f"picture: {file}")
    output.document(
        {
            "command": "inspect",
            "checkpoint": str(path),
            "against": None if against is None else str(against),
            "no_loads": no_loads,
            "routers": {name: {k: v for k, v in facts.items() if k not in ROWS} for name, facts in routers.items()},
            "files": [str(file) for file in files],
        }
    )


def state_of(path: Path) -> Mapping[str, Tensor]:
    """Name -> tensor of a model's folder, a .safetensors file or a state dict that torch saved, no code of it run."""
    if is_pretrained(path):
        return Pretrained(path, []).state
    if path.is_dir():
        return load_checkpoint(path).model_state()
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: name a folder of kmeans-route train or a state dict") from None
    except pickle.UnpicklingError:  # whose text proposes to run the file's code
        raise CheckpointError(
            f"{path} must be a .safetensors file or a state dict that torch.save wrote, got a file that holds other "
            "things, or none of these: save model.state_dict() alone"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is no readable state dict: {first_line(error)}") from None
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} must hold a state dict, got {type(state).__name__}")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def describe(state: Mapping[str, Tensor]) -> dict[str, Facts]:
    """The routers of a state dict, by name, with what their state alone says."""
    routers: dict[str, Facts] = {}
    for key in sorted(state, key=_in_order):
        name, _, last = key.rpartition(".")
        weight = state[key]
        if last != "weight" or weight.dim() != 2 or not weight.is_floating_point():
            continue
        prefix = f"{name}." if name else ""
        bias = next((state[prefix + one] for one in BIAS_NAMES if prefix + one in state), None)
        # A learned gate is told by its bias or its name.
        is_kmeans = prefix + "steps" in state and prefix + "centroids" in state
        if bias is not None and bias.shape != weight.shape[:1]:
            bias = None
        if not is_kmeans and bias is None and name.rpartition(".")[2] not in GATE_NAMES:
            continue
        weight = weight.float()
        facts: Facts = {
            "kind": "kmeans" if is_kmeans else "learned",
            "experts": weight.shape[0],
            "hidden": weight.shape[1],
            "finite": bool(weight.isfinite().all()) and (bias is None or bool(bias.isfinite().all())),
            "direction_cosine": float(metrics.mean_pairwise_cosine(weight)),
            "weight": weight,
        }
        if is_kmeans:
            facts["directions"] = rule_of_directions(weight, state[prefix + "centroids"].float())
        facts["nearest_cosine"] = float(metrics.nearest_cosine(metrics.differences_cosine(weight)))
        if bias is not None:
            facts |= {"bias": bias.float().tolist(), "bias_abs_max": float(bias.abs().max())}
        if is_kmeans:
            facts |= {
                "steps": int(state[prefix + "steps"]),
                "centroids": unit_rows(state[prefix + "centroids"].float(), weight),
                "initialized": bool(state[prefix + "centroids"].any()),
                "score_std": float(state[prefix + "score_std"]),
                "dropped_total": int(state[prefix + "dropped_total"]),
            }
            if prefix + "tokens_seen" in state:  # average="cumulative"
                facts["tokens_seen"] = state[prefix + "tokens_seen"].tolist()
        routers[name or "router"] = facts
    return routers


def rule_of_directions(weight: Tensor, centroids: Tensor) -> str:
    """ "whitened" or "centroids": by which rule the weight (E, D) follows from the centroids, as a state does not say.

    The one that it is nearer to; with neither data nor a difference that of the centroids.
    """
    if not (weight.isfinite().all() and centroids.isfinite().all()):
        return "centroids"
    plain = torch.linalg.vector_norm(weight - unit_rows(centroids, weight))
    return (
        "whitened" if torch.linalg.vector_norm(weight - whitened_reference(centroids, weight)) < plain else "centroids"
    )


def _in_order(name: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def add_loads(routers: dict[str, Facts], model: nn.Module, batches: Sequence[Any], forward: Forward | None) -> None:
    """Run a checkpoint's model on held-out text: loads, dead and effective experts, how far centroids are from tokens.

    `lag_degrees` of a K-Means expert is the angle between its centroid and the mean of the unit hidden states that it
    gets now, null for a dead one.
    """
    modules = dict(model.named_modules())
    watched = {name: Router(modules[name], _top_k(modules[name]), facts["experts"]) for name, facts in routers.items()}
    counts = {name: torch.zeros(facts["experts"], dtype=torch.int64) for name, facts in routers.items()}
    sums = {name: torch.zeros(facts["experts"], facts["hidden"]) for name, facts in routers.items()}
    chosen: dict[str, list[Tensor]] = {name: [] for name in routers}

    def see(name: str, seen: Seen) -> None:
        chosen[name].append(seen.indices.cpu())
        counts[name] += torch.bincount(seen.indices.flatten(), minlength=len(counts[name])).cpu()
        rows = F.normalize(seen.x.float(), dim=1).repeat_interleave(seen.indices.shape[1], 0)
        sums[name].index_add_(0, seen.indices.flatten().cpu(), rows.cpu())

    watch(model, watched, batches, see, forward)
    for name, facts in routers.items():
        facts |= {
            "load": metrics.load(counts[name]).tolist(),
            "max_vio": float(metrics.max_vio(counts[name])),
            "dead_experts": int(metrics.dead_experts(counts[name])),
            "effective_experts": float(metrics.effective_experts(torch.cat(chosen[name]), facts["experts"])),
        }
        if facts["kind"] == "kmeans":
            angles = torch.rad2deg(metrics.centroid_drift(facts["centroids"], sums[name]))
            facts["lag_degrees"] = [
                angle if count else None for angle, count in zip(angles.tolist(), counts[name].tolist(), strict=True)
            ]


def _top_k(router: nn.Module) -> int:
    for name in ("top_k", "moe_topk"):
        value = getattr(router, name, None)
        if isinstance(value, int):
            return value
    raise CheckpointError(f"{type(router).__name__} must say its top_k, got none: inspect the file of its state dict")


def add_drift(routers: dict[str, Facts], earlier: Mapping[str, Facts], path: Path) -> None:
    """The angle in degrees that each direction has turned since an earlier checkpoint of the same routers."""
    for name, facts in routers.items():
        old = earlier.get(name)
        if old is None or old["weight"].shape != facts["weight"].shape:
            got = "none" if old is None else str(tuple(old["weight"].shape))
            raise CheckpointError(
                f"{path} must hold router {name} with weight {tuple(facts['weight'].shape)}, got {got}: "
                "compare checkpoints of one model"
            )
        facts["drift_degrees"] = torch.rad2deg(metrics.centroid_drift(old["weight"], facts["weight"])).tolist()


def _table(routers: dict[str, Facts], path: Path, output: Output) -> None:
    rows = [
        {
            "router": name,
            "kind": facts["kind"] + ("" if facts.get("initialized", True) else ", no data yet"),
            "experts": str(facts["experts"]),
            "hidden": str(facts["hidden"]),
            "commits": _cell(facts.get("steps"), 0),
            "MaxVio": _cell(facts.get("max_vio"), 3),
            "dead": _cell(facts.get("dead_experts"), 0),
            "eff. E": _cell(facts.get("effective_experts"), 1),
            "bias |max|": _cell(facts.get("bias_abs_max"), 4),
            "nearest": _cell(facts["nearest_cosine"], 3),
            "spread": _cell(None if "load" in facts else facts.get("score_std"), 3),
            "lag": _cell(_mean(facts.get("lag_degrees")), 1),
            "drift": _cell(_mean(facts.get("drift_degrees")), 1),
        }
        for name, facts in routers.items()
    ]
    title = f"Routers of {path}"
    for column in list(rows[0]):
        cells = {row[column] for row in rows}
        if cells == {"n/a"} or (column in ("experts", "hidden") and len(cells) == 1):
            title += "" if cells == {"n/a"} else f", {column} {rows[0][column]}"
            for row in rows:
                del row[column]
    shared = _shared_ends(list(routers))
    if len("".join(shared)) > 30:  # no row is to be folded
        title += f", {'*'.join(shared)}"
        for row in rows:
            row["router"] = row["router"].removeprefix(shared[0]).removesuffix(shared[1])
    output.table(title, list(rows[0]), [list(row.values()) for row in rows])
    output.note(f"{'; '.join(_legend(list(rows[0])))}; means over experts")
    for name, facts in routers.items():
        if not facts["finite"]:
            output.note(f"warning: {name} holds NaN or Inf")


def _legend(columns: Sequence[str]) -> list[str]:
    """What those columns mean that are shown and do not say it themselves."""
    meaning = {
        "commits": "commits: after the one that set the centroids",
        "MaxVio": "MaxVio, dead, eff. E (effective experts): on held-out text",
        "nearest": "nearest: cosine with the direction most alike, the mean of all taken off; near 1 two act as one",
        "spread": "spread: of the scores",
        "lag": "lag: degrees from a centroid to the mean of its tokens now",
        "drift": "drift: degrees since --against",
    }
    return [text for column, text in meaning.items() if column in columns]


def _shared_ends(names: list[str]) -> tuple[str, str]:
    """What all dotted names begin and end with, of several: ("model.layers.", ".mlp.gate")."""
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts)) - 1
    same = [len({tuple(part[:n]) for part in parts}) == 1 for n in range(shortest + 1)]
    first = max(n for n, equal in enumerate(same) if equal) if len(names) > 1 else 0
    same = [len({tuple(part[len(part) - n :]) for part in parts}) == 1 for n in range(shortest + 1 - first)]
    last = max(n for n, equal in enumerate(same) if equal) if len(names) > 1 else 0
    head, tail = parts[0][:first], parts[0][len(parts[0]) - last :]
    return "".join(f"{part}." for part in head), "".join(f".{part}" for part in tail)


def _cell(value: float | None, digits: int) -> str:
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _mean(values: list[float | None] | None) -> float | None:
    known = [value for value in values or () if value is not None]
    return sum(known) / len(known) if known else None


def _draw(routers: dict[str, Facts], out: Path) -> list[Path]:
    """Similarity of directions, and where text was run, loads; one row of panels a kind and number of experts."""
    from kmeans_route import viz

    out.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Facts]] = {}
    for facts in routers.values():
        kind = f"kmeans, {facts['directions']}" if "directions" in facts else facts["kind"]
        groups.setdefault(f"{kind}, {facts['experts']} experts", []).append(facts)
    finite = {label: group for label, group in groups.items() if all(facts["finite"] for facts in group)}
    figures = {}
    if finite:
        whitened = [label for label, group in finite.items() if group[0].get("directions") == "whitened"]
        cosines = {}
        for label, group in finite.items():
            cosine = metrics.differences_cosine if label in whitened else metrics.pairwise_cosine
            cosines[label] = torch.stack([cosine(facts["weight"]) for facts in group])
        figures["directions"] = viz.direction_similarity(cosines, less_mean=whitened)
    if all("load" in facts for facts in routers.values()):
        figures["load"] = viz.load_heatmap({label: [f["load"] for f in group] for label, group in groups.items()})
    for name, figure in figures.items():
        write_picture(out / f"{name}.png", figure)
    return [out / f"{name}.png" for name in figures]
