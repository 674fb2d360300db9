"""The way back for a model of transformers: an ordinary checkpoint of its architecture, for engines that know no other.

Example:
    >>> import torch
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from kmeans_route.integrations.transformers import apply_kmeans_routing, export_vanilla
    >>> config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    >>> model = MixtralForCausalLM(config)
    >>> _ = apply_kmeans_routing(model)  # and train it
    >>> tokens = torch.randint(64, (4, 16))
    >>> export = export_vanilla(model, [{"input_ids": tokens, "labels": tokens}])
    >>> export.comparison.mean("overlap") > 0.99  # no bias yet: equal choices; print(export) for all of it
    True
    >>> type(export.model.model.layers[0].mlp.gate).__name__  # export.model.save_pretrained(folder) writes it
    'MixtralTopKRouter'
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kmeans_route.agreement import Comparison, Forward, Router, Tick, choices, compare, reread, ticking
from kmeans_route.integrations.transformers import _check_model, _swapped, revert
from kmeans_route.integrations.transformers_router import TransformersRouter
from kmeans_route.router import KMeansRouter
from kmeans_route.way_back import BIASES, VanillaGate, fit_gates, watched_routers


class Slot(NamedTuple):
    """What the gate of an architecture is.

    kind: of its probabilities. bias: where a bias goes, as in `export_gates`. key: of that bias, seen from the router;
    "../" is its block.
    """

    kind: str
    bias: str = "rows"
    key: str = ""


_OWN = "e_score_correction_bias"
SLOTS = {
    "DeepseekV2TopkRouter": Slot("softmax"),
    "DeepseekV3TopkRouter": Slot("sigmoid", "score", _OWN),
    "Ernie4_5_MoeTopKRouter": Slot("softmax", "score", f"moe_statics.{_OWN}"),
    "ExaoneMoeTopkRouter": Slot("sigmoid", "score", _OWN),
    "FlexOlmoTopKRouter": Slot("softmax"),
    "Glm4MoeTopkRouter": Slot("sigmoid", "score", _OWN),
    "GptOssTopKRouter": Slot("softmax", "logit", "bias"),
    "GraniteMoeTopKRouter": Slot("softmax"),
    "HunYuanMoEV1Gate": Slot("softmax"),
    "Lfm2MoeTopKRouter": Slot("sigmoid", "score", "../expert_bias"),
    "Llama4Router": Slot("sigmoid"),
    "MiniMaxM2TopKRouter": Slot("sigmoid", "score", f"../{_OWN}"),
    "MixtralTopKRouter": Slot("softmax"),
    "OlmoeTopKRouter": Slot("softmax"),
    "Qwen2MoeTopKRouter": Slot("softmax"),
    "Qwen3MoeTopKRouter": Slot("softmax"),
    "Qwen3NextTopKRouter": Slot("softmax"),
}
REFUSED = {"PhimoeTopKRouter": "its gates are those of sparsemixer, near 1 for each expert, not a share of the whole"}


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

    The choices are equal, but for ties within rounding, only where every bias of the routers is 0, the dtype of the
    model holds the rows exactly enough, and no groups are chosen by the sum of their two best (DeepSeek-V3, GLM4,
    EXAONE: sums of sigmoids have another order than sums of cosines). Otherwise nothing is promised: the gates are
    fitted to the least disagreement on `batches`, choices and gates in one number, and the report says how far the
    routers that will be served agree, with loads and loss.

    Args:
        model: a PreTrainedModel with swapped routers; it is not changed.
        batches: calibration text, mappings for model(**batch), several thousand tokens; with labels for a loss.
        held_out: other batches to report on; None for `batches` again.
        bias: None puts the selection bias where the architecture has a place for one: e_score_correction_bias of
            DeepSeek-V3, GLM4, EXAONE, Ernie 4.5, MiniMax-M2, expert_bias of LFM2, bias of GPT-OSS' router. Others have
            none, and fold it into the rows. "rows" or "none" (lost) for those that shall not use the place.
        forward, progress: as in `calibrate`.

    Returns:
        VanillaExport, printable: write its model with `save_pretrained`.

    Raises:
        ValueError: no swapped routers, an architecture without such a gate, batches that bring no tokens. TypeError: no
            model of transformers. After any error the model is as before.
    """
    _check_model(model)
    swapped = _swapped(model)
    if not swapped:
        raise ValueError(f"model must have swapped routers, got {type(model).__name__} without: nothing to export")
    slots = {path: _slot(model, path, router) for path, router in swapped.items()}
    slot = next(iter(slots.values()))
    if bias is not None and bias not in ("rows", "none", slot.bias):
        raise ValueError(
            f"bias must be one of {sorted({'rows', 'none', slot.bias})} for {type(model).__name__}, got {bias!r}: "
            f"{'choose one' if bias in BIASES else 'leave it out'}"
        )
    routers: dict[str, KMeansRouter] = dict(swapped)
    held = reread(batches, "batches")
    reported = held if held_out is None else reread(held_out, "held_out")
    vanilla = _vanilla_copy(model)
    with ticking(progress, "exporting", len(held) + 2 * len(reported)) as tick, torch.no_grad():
        gates = fit_gates(model, routers, held, slot.kind, bias or slot.bias, forward, tick)
        for path, gate in gates.items():
            _put(vanilla, path, swapped[path], slots[path], gate)
        watched = watched_routers(routers)
        after = {path: one._replace(module=vanilla.get_submodule(path)) for path, one in watched.items()}
        choosers = {path: _chooser(vanilla, path, one, slots[path]) for path, one in after.items()}
        second = (vanilla, after)
        comparison = compare(model, watched, choosers, reported, forward=forward, target=second, tick=tick)
    return VanillaExport(vanilla, comparison, gates)


def _slot(model: Any, path: str, router: TransformersRouter) -> Slot:
    name = router.original_class.__name__
    if name not in SLOTS:
        reason = REFUSED.get(name, "it is not known")
        raise ValueError(f"{path} must be of an architecture with an ordinary gate, got {name}: {reason}")
    slot = SLOTS[name]
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


def _vanilla_copy(model: Any) -> Any:
    """A copy with learned routers, which shares every weight but those that an export writes."""
    written = {id(_bias_of(model, path, _slot(model, path, router))) for path, router in _swapped(model).items()}
    written |= {id(t) for r in _swapped(model).values() for t in (*r.original.parameters(), *r.original.buffers())}
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in written]
    vanilla = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for router in _swapped(vanilla).values():
        if any(tensor.is_meta for tensor in router.original.parameters()):
            router.original.to_empty(device=router.weight.device)
    revert(vanilla)
    return vanilla


def _put(vanilla: Any, path: str, router: TransformersRouter, slot: Slot, gate: VanillaGate) -> None:
    place = vanilla.get_submodule(path)
    place.get_parameter(router.contract.gate_key).copy_(gate.linear.weight)
    bias = _bias_of(vanilla, path, slot)
    if bias is not None:
        value = gate.linear.bias if slot.bias == "logit" else gate.score_bias
        bias.zero_() if value is None else bias.copy_(value.view_as(bias))


def _chooser(vanilla: Any, path: str, router: Router, slot: Slot) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What the router that will be served chooses, by calling it as its block does."""
    extra = [_bias_of(vanilla, path, slot)] if slot.key.startswith("../") else []

    def choose(x: Tensor) -> tuple[Tensor, Tensor]:
        return choices(path, router, router.module(x, *extra))

    return choose
