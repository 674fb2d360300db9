"""The way back for a model of transformers: an ordinary checkpoint of it, for engines that know no other."""

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kmeans_route.conversion import compare as agreement
from kmeans_route.conversion.compare import Choose, Comparison, Forward, Router, Tick
from kmeans_route.conversion.to_learned import BIASES, VanillaGate, fit_gates, write_gate
from kmeans_route.integrations.transformers.router import ROUTERS, Slot, TransformersRouter
from kmeans_route.integrations.transformers.swap import check_model, revert, swapped_routers
from kmeans_route.routing.kmeans import KMeansRouter
from kmeans_route.routing.learned import KINDS


class VanillaExport(NamedTuple):
    """What `export_vanilla` returns.

    model: with ordinary routers; all weights but theirs are shared with the K-Means model.
    comparison: `Comparison` of the K-Means model (before) with it (after). gates: path -> VanillaGate, as fitted in
    fp32, before they were written in the dtype of the model.
    """

    model: Any
    comparison: Comparison
    gates: dict[str, VanillaGate]

    def __str__(self) -> str:
        return str(self.comparison)


def export_vanilla(
    model: Any,
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    bias: str | None = None,
    forward: Forward | None = None,
    progress: bool | Tick = True,
) -> VanillaExport:
    """An ordinary model of the same architecture whose gates choose as the K-Means routers do, as far as they can.

    What `export_gates` promises holds here where, besides, the dtype of the model holds the rows exactly enough, and no
    groups are chosen by the sum of their two best (DeepSeek-V3, GLM4, EXAONE: sums of sigmoids have another order than
    sums of cosines). The report is of the routers that will be served.

    Args:
        model: a PreTrainedModel with swapped routers; it is not changed.
        batches: calibration text, mappings for model(**batch), several thousand tokens; with labels for a loss.
        held_out, forward, progress: as in `calibrate`.
        bias: None puts the selection bias where the architecture has a place for one: e_score_correction_bias of
            DeepSeek-V3, GLM4, EXAONE, Ernie 4.5, MiniMax-M2, expert_bias of LFM2, bias of GPT-OSS' router. Others have
            none, and fold it into the rows. "rows" or "none" (lost) for those that shall not use the place.

    Returns:
        VanillaExport, printable: write its model with `save_pretrained`.

    Raises:
        ValueError, TypeError: a model, batches or a bias that do not fit; the model is as before.
    """
    check_model(model)
    swapped = swapped_routers(model, "export")
    slots = {path: _slot(model, path, router) for path, router in swapped.items()}
    slot = next(iter(slots.values()))
    if bias is not None and bias not in ("rows", "none", slot.bias):
        raise ValueError(
            f"bias must be one of {sorted({'rows', 'none', slot.bias})} for {type(model).__name__}, got {bias!r}: "
            f"{'choose one' if bias in BIASES else 'leave it out'}"
        )
    held, reported = agreement.reread(batches, held_out)
    routers: dict[str, KMeansRouter] = dict(swapped)
    watched = agreement.to_watch(routers)
    vanilla = _vanilla_copy(model, slots)
    total = len(held) + 2 * len(reported)
    with agreement.ticking(forward, progress, "exporting", total) as run, torch.no_grad():
        gates = fit_gates(model, routers, held, slot.kind, bias or slot.bias, run)
        choose = {}
        for path, gate in gates.items():
            place, own_bias = vanilla.get_submodule(path), _bias_of(vanilla, path, slots[path])
            write_gate(gate, place.get_parameter(swapped[path].contract.gate_key), own_bias)
            given = [own_bias] if slots[path].key.startswith("../") else []
            choose[path] = _chooser(path, watched[path]._replace(module=place), given)
        comparison = agreement.compare(model, watched, choose, reported, forward=run, target=vanilla)
    return VanillaExport(vanilla, comparison, gates)


def _slot(model: Any, path: str, router: TransformersRouter) -> Slot:
    name = router.original_class.__name__
    slot = ROUTERS[name]
    if slot.kind not in KINDS:
        raise ValueError(
            f"{path} must be of an architecture with an ordinary gate, got {name}: its gates are those of "
            f"{slot.kind}, near 1 for each expert, not a share of the whole"
        )
    if slot.key.startswith("../") and _bias_of(model, path, slot) is None:
        return Slot(slot.kind)
    return slot


def _bias_of(model: Any, path: str, slot: Slot) -> Tensor | None:
    """The tensor of the bias, None where the architecture or its config has none."""
    if not slot.key:
        return None
    module = model.get_submodule(path.rpartition(".")[0] if slot.key.startswith("../") else path)
    if isinstance(module, TransformersRouter):
        module = module.original
    *inner, last = slot.key.removeprefix("../").split(".")
    bias: Tensor | None = getattr(module.get_submodule(".".join(inner)), last, None)
    return bias


def _vanilla_copy(model: Any, slots: dict[str, Slot]) -> Any:
    """A copy with learned routers, which shares every weight but those that an export writes."""
    written = {id(_bias_of(model, path, slot)) for path, slot in slots.items()}
    originals = [router.original for router in swapped_routers(model).values()]
    written |= {id(tensor) for gate in originals for tensor in (*gate.parameters(), *gate.buffers())}
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in written]
    vanilla = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for router in swapped_routers(vanilla).values():
        if any(tensor.is_meta for tensor in router.original.parameters()):
            router.original.to_empty(device=router.weight.device)
    revert(vanilla)
    return vanilla


def _chooser(path: str, router: Router, given: list[Tensor | None]) -> Choose:
    """What the router that will be served chooses, by calling it as its block does."""
    return lambda x: agreement.choices(path, router, router.module(x, *given))
