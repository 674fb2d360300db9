"""The routers of a checkpoint: a run of `kmeans-route train`, a model of transformers, or a plain state dict."""

from __future__ import annotations

import io
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
from kmeans_route.agreement import Forward, Router, Seen, watch
from kmeans_route.cli.checkpoint import CheckpointError, exists, load_checkpoint, write_atomically
from kmeans_route.cli.model import next_byte_loss
from kmeans_route.cli.output import Output
from kmeans_route.cli.pretrained import is_pretrained, load_for_inspection, token_batches
from kmeans_route.cli.run import resumed
from kmeans_route.cli.training import Trainer

BIAS_NAMES = ("expert_bias", "e_score_correction_bias")
GATE_NAMES = ("router", "gate")
INSPECTED_BYTES = 65536
Facts = dict[str, Any]


def inspect(path: Path, out: Path | None, output: Output, *, text: Sequence[Path], against: Path | None) -> int:
    """The command `inspect`: what the routers of a checkpoint have learned.

    Args:
        path: folder of a run of `kmeans-route train` or of transformers' save_pretrained, or a .safetensors or torch
            file.
        out: folder of pictures; None draws none.
        output: where to speak.
        text: held-out text of a run, as named; none means the checkpoint's.
        against: an earlier checkpoint, from which the drift is counted.

    Returns:
        The exit code, 0.

    Raises:
        CheckpointError: no readable checkpoint, or none with routers. ModuleNotFoundError: pictures need matplotlib.
    """
    if out is not None and find_spec("matplotlib") is None:
        raise ModuleNotFoundError('pictures need matplotlib: pip install "kmeans_route[cli,viz]"', name="matplotlib")
    pretrained = load_for_inspection(path) if is_pretrained(path) else None
    routers = describe(state_of(path) if pretrained is None else pretrained[0].state_dict())
    if not routers:
        raise CheckpointError(
            f"{path} holds no router: looked for NAME.weight (E, D) beside NAME.expert_bias, and for "
            f"{' and '.join(f'{name}.weight' for name in GATE_NAMES)}"
        )
    if exists(path):
        add_loads(routers, *_run(path, text))
    elif pretrained is not None:
        add_loads(routers, *_pretrained(path, *pretrained, text, output))
    if against is not None:
        add_drift(routers, describe(state_of(against)), against)
    _table(routers, path, output)
    files = [] if out is None else _draw(routers, out)
    for file in files:
        output.note(f"picture: {file}")
    output.document(
        {
            "command": "inspect",
            "checkpoint": str(path),
            "against": None if against is None else str(against),
            "routers": {name: {k: v for k, v in facts.items() if k != "weight"} for name, facts in routers.items()},
            "files": [str(file) for file in files],
        }
    )
    return 0


def state_of(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a run's model, a .safetensors file or a state dict that torch saved.

    Raises:
        CheckpointError: nothing readable there. A torch file is read without running code that it may hold.
    """
    if is_pretrained(path):  # by the names of the model, which are not those in its files
        return dict(load_for_inspection(path)[0].state_dict())
    if path.is_dir():
        tensors = load_checkpoint(path).tensors
        return {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: name a folder of kmeans-route train or a state dict") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is no readable state dict: {reason}") from None
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} must hold a state dict, got {type(state).__name__}")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def describe(state: Mapping[str, Tensor]) -> dict[str, Facts]:
    """The routers of a state dict, by name, with what their state alone says.

    A K-Means router is told by the number of its commits and the mark of its first data; a learned gate by its bias or
    by the name "router" or "gate".
    """
    routers: dict[str, Facts] = {}
    for key in sorted(state, key=_in_order):
        name, _, last = key.rpartition(".")
        weight = state[key]
        if last != "weight" or weight.dim() != 2 or not weight.is_floating_point():
            continue
        prefix = f"{name}." if name else ""
        bias = next((state[prefix + one] for one in BIAS_NAMES if prefix + one in state), None)
        is_kmeans = prefix + "steps" in state and prefix + "initialized" in state
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
        if bias is not None:
            facts |= {"bias": bias.float().tolist(), "bias_abs_max": float(bias.abs().max())}
        if is_kmeans:
            facts |= {
                "steps": int(state[prefix + "steps"]),
                "initialized": bool(state[prefix + "initialized"]),
                "score_std": float(state[prefix + "score_std"]),
                "dropped_total": int(state[prefix + "dropped_total"]),
            }
        routers[name or "router"] = facts
    return routers


def _in_order(name: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


Loads = tuple[nn.Module, Sequence[Any], Forward | None]
"""A model, batches of held-out text, and how to run one."""


def _run(folder: Path, text: Sequence[Path]) -> Loads:
    config, corpus, checkpoint = resumed(folder, {}, text)
    trainer = Trainer(config, corpus)
    trainer.restore(checkpoint)
    trainer.attachment.remove()

    def run(model: nn.Module, windows: Tensor) -> Tensor:
        return next_byte_loss(model, windows.to(trainer.device).long())  # type: ignore[arg-type]

    return trainer.model, torch.split(trainer.windows, config.batch), run


def _pretrained(folder: Path, model: Any, tokenizer: Any, text: Sequence[Path], output: Output) -> Loads:
    if tokenizer is None:
        output.note(f"no loads: {folder} holds no tokenizer")
        return model, [], None
    return model, token_batches(model, tokenizer, text, INSPECTED_BYTES)[1], None


def add_loads(routers: dict[str, Facts], model: nn.Module, batches: Sequence[Any], forward: Forward | None) -> None:
    """Run a checkpoint's model on held-out text: loads, dead experts, and how far centroids are from their tokens.

    `lag_degrees` of a K-Means expert is the angle between its centroid and the mean of the unit hidden states that it
    gets now, null for a dead one.
    """
    if not batches:
        return
    modules = dict(model.named_modules())
    watched = {name: Router(modules[name], _top_k(modules[name]), facts["experts"]) for name, facts in routers.items()}
    counts = {name: torch.zeros(facts["experts"], dtype=torch.int64) for name, facts in routers.items()}
    sums = {name: torch.zeros(facts["experts"], facts["hidden"]) for name, facts in routers.items()}

    def see(name: str, seen: Seen) -> None:
        counts[name] += torch.bincount(seen.indices.flatten(), minlength=len(counts[name])).cpu()
        rows = F.normalize(seen.x.float(), dim=1).repeat_interleave(seen.indices.shape[1], 0)
        sums[name].index_add_(0, seen.indices.flatten().cpu(), rows.cpu())

    watch(model, watched, batches, see, forward)
    for name, facts in routers.items():
        facts |= {
            "load": metrics.load(counts[name]).tolist(),
            "max_vio": float(metrics.max_vio(counts[name])),
            "dead_experts": int(metrics.dead_experts(counts[name])),
        }
        if facts["kind"] == "kmeans":
            angles = torch.rad2deg(metrics.centroid_drift(facts["weight"], sums[name]))
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
    """The angle in degrees that each direction has turned since an earlier checkpoint.

    Raises:
        CheckpointError: it has other routers.
    """
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
    columns = [
        "router",
        "kind",
        "experts",
        "hidden",
        "commits",
        "MaxVio",
        "dead",
        "bias |max|",
        "cosine",
        "lag",
        "drift",
    ]
    rows = [
        [
            name,
            facts["kind"] + ("" if facts.get("initialized", True) else ", no data yet"),
            str(facts["experts"]),
            str(facts["hidden"]),
            _cell(facts.get("steps"), 0),
            _cell(facts.get("max_vio"), 3),
            _cell(facts.get("dead_experts"), 0),
            _cell(facts.get("bias_abs_max"), 4),
            _cell(facts["direction_cosine"], 3),
            _cell(_mean(facts.get("lag_degrees")), 1),
            _cell(_mean(facts.get("drift_degrees")), 1),
        ]
        for name, facts in routers.items()
    ]
    output.table(f"Routers of {path}", columns, rows)
    output.note(
        "MaxVio, dead: on held-out text. cosine: mean between directions. lag: degrees from a centroid to the mean of "
        "its tokens now; drift: degrees since --against; means over experts"
    )
    for name, facts in routers.items():
        if not facts["finite"]:
            output.note(f"warning: {name} holds NaN or Inf")


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
        groups.setdefault(f"{facts['kind']}, {facts['experts']} experts", []).append(facts)
    finite = {label: group for label, group in groups.items() if all(facts["finite"] for facts in group)}
    figures = {}
    if finite:
        figures["directions"] = viz.direction_similarity(
            {
                label: torch.stack([metrics.pairwise_cosine(f["weight"]) for f in group])
                for label, group in finite.items()
            }
        )
    if all("load" in facts for facts in routers.values()):
        figures["load"] = viz.load_heatmap({label: [f["load"] for f in group] for label, group in groups.items()})
    files = []
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        files.append(out / f"{name}.png")
        write_atomically(files[-1], buffer.getvalue())
    return files
