"""Swap the routers of a model, and go back."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from kmeans_route.checks import check_option_names
from kmeans_route.integrations.transformers.config import (
    MODEL_TYPES,
    KMeansConfig,
    copied_configs,
    give_back,
    to_architecture,
    to_kmeans,
)
from kmeans_route.integrations.transformers.router import (
    Contract,
    Masks,
    TransformersRouter,
    architecture_options,
    is_known,
    keep_from_kernels,
    probe,
    router_class,
    zero_bad_rows,
)
from kmeans_route.routing.base import option_names
from kmeans_route.routing.kmeans import KMeansRouter

# 1: the model type in config.json was that of the architecture.
SECTION_VERSION = 2
SHAPE = ("num_experts", "hidden_size", "top_k")
# Of the machine that a model is swapped on, not of the model: whoever loads it gets what is best there, "auto".
NOT_SAVED = ("backend",)
DECIDED_BY_MODEL = (*SHAPE, "name", "device", "return_scores")
Layers = Callable[[str], bool] | Sequence[str | int] | None


class Swap(NamedTuple):
    """One router that was swapped: where, the class it had, and the router that is there now."""

    path: str
    old_class: str
    router: TransformersRouter

    def __str__(self) -> str:
        r, o = self.router, self.router.options
        groups = f" groups={o.topk_group}/{o.n_group}" if o.grouped else ""
        scaling = f" scaling={o.scaling:g}" if o.scaling != 1 else ""
        normalize = "" if o.normalize else " not normalised"
        return (
            f"{self.path}  {self.old_class}  E={r.num_experts} D={r.hidden_size} K={r.top_k} gate={o.gate} "
            f"tau={o.tau:g} directions={r.commit_options.directions}{normalize}{scaling}{groups}"
        )


class Summary(tuple[Swap, ...]):
    """What `apply_kmeans_routing` has swapped, a line a router."""

    def __str__(self) -> str:
        return "\n".join([f"{len(self)} router{'s' if len(self) != 1 else ''} swapped", *map(str, self)])


def apply_kmeans_routing(
    model: Any, layers: Layers = None, *, from_gate: bool | None = None, **router_options: Any
) -> Summary:
    """Put a K-Means router in the place of every learned router of a model of transformers.

    Args:
        model: a PreTrainedModel, the one that will be saved; with PEFT the base model, before or after it is wrapped.
        layers: which routers: a predicate on the path ("model.layers.0.mlp.gate"), or a list of paths or layer indices;
            None for all.
        from_gate: take the gate's rows as first centroids. None: where the gate came from a checkpoint, else the first
            data set them. With them directions="centroids" unless named, for whitening would turn them. A selection
            bias or a gate's bias is not taken over: it was made for other scores.
        router_options: of `KMeansRouter`, over those of the architecture.

    Returns:
        Summary, printable: path, old class, E, D, K, gate and groups of each.

    The model gets a config of its own, a copy: the one that it was made with stays as it is. The auxiliary loss is
    switched off: it would still push on the hidden states. `output_router_logits=True` in a call gives s / tau. On any
    error nothing is changed.

    Raises:
        ValueError: nothing to swap, a filter that names no router, a router that answers otherwise than expected.
        RuntimeError: a path that bypasses the router. TypeError: no model of transformers.
    """
    check_model(model)
    if getattr(model.config, "kmeans_route", None) and not swapped_routers(model):
        raise ValueError(
            "model must not come from a K-Means checkpoint by a plain from_pretrained, got a config with a "
            "kmeans_route section: use load_kmeans_pretrained, or delete model.config.kmeans_route to start anew"
        )
    for option in DECIDED_BY_MODEL:
        if option in router_options:
            raise ValueError(f"router_options must not hold {option}, got {router_options[option]!r}: leave it out")
    check_option_names("apply_kmeans_routing", router_options, option_names(KMeansRouter) - {*DECIDED_BY_MODEL})
    made = {}
    for path, old in _select(model, layers).items():
        contract = _contract(model, path, old)
        options = {"name": path, **architecture_options(old, contract), **router_options}
        made[path] = _make(old, contract, options, from_gate)
    return swap(model, made)


def revert(model: Any) -> list[str]:
    """Put the learned routers back as they were, and the auxiliary loss; the K-Means state is lost.

    The model's config comes back too: the very object, unless its copy has been changed by others in the meantime.

    Returns:
        The paths of the routers.

    Raises:
        ValueError: nothing was swapped, or a model inside this one.
        RuntimeError: a router is attached, or was never given its weights.
    """
    swapped = swapped_routers(model, "revert")
    if not hasattr(model.config, "kmeans_route"):
        raise ValueError(
            f"model must be the one that apply_kmeans_routing was called with, got {type(model).__name__} around it: "
            "pass that one"
        )
    for path, router in swapped.items():
        if router.attached:
            raise RuntimeError(f"{path} must not be attached, got an attached router: call remove() on the attachment")
        if any(p.is_meta for p in router.original.parameters()):
            raise RuntimeError(
                f"{path} must have been swapped after its weights were loaded, got a router without: a K-Means "
                "checkpoint holds no learned router; load a checkpoint that does"
            )
    for path, router in swapped.items():
        for handle in router.handles:
            handle.remove()
        router.original.train(router.training)
        model.set_submodule(path, router.original)
    for module in _pretrained(model):
        masks: Masks | None = module.__dict__.pop("_kmeans_masks", None)
        module.__dict__.pop("_init_weights", None)
        for handle in masks.handles if masks else ():
            handle.remove()
    for owner, name, old in model.__dict__.pop("_kmeans_aux_loss", ()):
        setattr(owner, name, old)
    del model.config.kmeans_route
    to_architecture(model.config)
    give_back(model.__dict__.pop("_kmeans_configs", ()))
    return list(swapped)


def check_model(model: Any) -> None:
    """Raise TypeError unless this is a model of transformers."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a PreTrainedModel, got {type(model).__name__}: pass the model itself (of PEFT's, "
            "model.get_base_model())"
        )
    for path, module in model.named_modules():
        if type(module).__name__ == "AutoEPMoELayer":  # DeepSpeed's; its router is learned, whatever stood there before
            raise RuntimeError(
                f"{path} must be a block of transformers, got DeepSpeed's AutoEP in its place, which routes by itself: "
                "leave expert_parallel out of DeepSpeed's configuration"
            )


def swapped_routers(model: nn.Module, purpose: str = "") -> dict[str, TransformersRouter]:
    """The routers of a model that are swapped, by path; ValueError where there are none for a purpose."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, TransformersRouter)}
    if purpose and not found:
        raise ValueError(f"model must have swapped routers, got {type(model).__name__} without: nothing to {purpose}")
    return found


def _pretrained(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _select(model: Any, layers: Layers) -> dict[str, nn.Module]:
    """The routers that the filter takes, by path."""
    known = {path: module for path, module in model.named_modules() if is_known(module)}
    swapped = list(swapped_routers(model))
    if not known and swapped:
        raise ValueError(
            f"model must have a learned router left, got {type(model).__name__} with all {len(swapped)} swapped "
            f"({_some(swapped)}): call revert first to swap them anew"
        )
    if not known:
        raise ValueError(
            f"model must be of a supported type ({', '.join(MODEL_TYPES)}), got {type(model).__name__} of type "
            f"{model.config.model_type} {_others(model)}: use one of those"
        )
    if layers is None:
        return known
    if callable(layers):
        chosen = [path for path in known if layers(path)]
        if not chosen:
            raise ValueError(f"layers must take at least one router, got none of {list(known)}: mend the predicate")
        return {path: known[path] for path in chosen}
    if isinstance(layers, str | int):
        raise TypeError(
            f"layers must be a list of paths or indices, a predicate or None, got {layers!r}: write [{layers!r}]"
        )
    chosen = []
    for wanted in layers:
        matches = [path for path in known if wanted in (path, _layer_index(path))]
        before = [path for path in swapped if wanted in (path, _layer_index(path))]
        if before and not matches:
            raise ValueError(
                f"layers must name learned routers, got {wanted!r}, {before[0]} that is swapped: call revert first, "
                f"or name those that are left, {list(known)}"
            )
        if not matches:
            raise ValueError(f"layers must name routers, got {wanted!r}: there are {list(known)}")
        chosen += matches
    if not chosen:
        raise ValueError("layers must name at least one router, got none: pass None for all of them")
    return {path: known[path] for path in chosen}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _others(model: nn.Module) -> str:
    """What seems to be a router, and is of no known class."""
    found = [(path, type(module).__name__) for path, module in model.named_modules()]
    alike = _some([f"{name} at {path}" for path, name in found if re.search(r"(Router|Gate|Gating)$", name)])
    return f"with {alike} for a router" if alike else "without a router"


def _layer_index(path: str) -> int | None:
    found = re.search(r"\.(\d+)\.", f".{path}.")
    return int(found[1]) if found else None


def _contract(model: Any, path: str, router: nn.Module) -> Contract:
    """What the router promises; refuses what would never call it, or calls it with something in between."""
    block = model.get_submodule(path.rpartition(".")[0])
    problem = None
    if type(block).__name__.startswith("Mxfp4") or type(getattr(block, "experts", None)).__name__.startswith("Mxfp4"):
        problem = "MXFP4 experts, which compute the routing themselves: load with Mxfp4Config(dequantize=True)"
    elif "gpt_oss" in type(block).__module__ and any(getattr(m, "use_kernels", False) for m in _pretrained(model)):
        problem = "use_kernels=True, whose MegaBlocks layer never calls the router: load with use_kernels=False"
    elif "forward" in block.__dict__ or "forward" in router.__dict__:
        problem = "a forward that something has replaced (kernels, accelerate): swap before that"
    elif not hasattr(block, "experts"):
        problem = f"no experts beside it in {type(block).__name__}: use a supported model"
    if problem:
        raise RuntimeError(f"{path} must be called by its block, got {problem}")
    return probe(path, router)


def _make(old: nn.Module, contract: Contract, options: dict[str, Any], from_gate: bool | None) -> TransformersRouter:
    gate = old.get_parameter(contract.gate_key)
    if from_gate is None:
        from_gate = bool(getattr(gate, "_is_hf_initialized", False)) and not gate.is_meta
    if from_gate:
        options = {"directions": "centroids", **options}
    router = router_class(type(old))(old, contract, **options)
    router.chosen_options = _saved_options(options) | router.chosen_options
    if from_gate:
        try:
            router.set_centroids(gate)
        except ValueError as error:
            raise ValueError(f"{options['name']}: {error}; or pass from_gate=False") from error
    return router


def _saved_options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in NOT_SAVED}


def swap(model: Any, routers: dict[str, TransformersRouter]) -> Summary:
    """Put finished routers in; from here on nothing raises."""
    if not isinstance(model.config, KMeansConfig):
        model.__dict__["_kmeans_configs"] = copied_configs(model)
        to_kmeans(model.config)
    swaps = []
    for path, router in routers.items():
        model.set_submodule(path, router)
        block = model.get_submodule(path.rpartition(".")[0])
        keep_from_kernels(block)
        experts = block.experts
        router.handles = [experts.register_forward_pre_hook(zero_bad_rows)]
        owner, inner = _owner(model, path)
        if "_kmeans_masks" not in owner.__dict__:
            owner.__dict__["_kmeans_masks"] = Masks(owner)
            owner.__dict__["_init_weights"] = functools.partial(_init_weights, owner)
        router.masks = owner.__dict__["_kmeans_masks"]
        for holder, prefix in ((model, path), (owner, inner)):
            keys = {re.escape(f"{prefix}.{state}") for state in router.FP32_STATE}
            holder._keep_in_fp32_modules_strict = set(holder._keep_in_fp32_modules_strict or ()) | keys
        swaps.append(Swap(path, router.original_class.__name__, router))
    model.__dict__.setdefault("_kmeans_aux_loss", []).extend(_silence_aux_loss(model))
    model.config.kmeans_route = _section(model)
    return Summary(swaps)


def _init_weights(model: Any, module: nn.Module) -> None:
    """In the place of a model's own: learned routers' weights are drawn anew, ours are taken as loaded."""
    if isinstance(module, TransformersRouter):
        module.take_loaded()
    else:
        type(model)._init_weights(model, module)


def _owner(model: Any, path: str) -> tuple[Any, str]:
    """The innermost model around a path: its forward is called also where an outer one's is passed by, as in PEFT."""
    around = [p for p, m in model.named_modules() if isinstance(m, PreTrainedModel) and path.startswith(f"{p}.")]
    inner = max(around, key=len, default="")
    return model.get_submodule(inner), path.removeprefix(f"{inner}.")


def _silence_aux_loss(model: Any) -> list[tuple[Any, str, Any]]:
    """Switch the auxiliary loss off wherever a config or a module holds it; returns what was there."""
    configs = {id(c): c for m in _pretrained(model) for c in (m.config, m.config.get_text_config())}
    changed = []
    for owner in [*configs.values(), *_pretrained(model)]:
        for name, silent in (("output_router_logits", False), ("router_aux_loss_coef", 0.0)):
            old = getattr(owner, name, None)
            if old:
                changed.append((owner, name, old))
                setattr(owner, name, silent)
    return changed


def _section(model: Any) -> dict[str, Any]:
    """What config.json says: the options of every router but `NOT_SAVED`, by its path in the innermost model."""
    routers = {}
    for path, router in swapped_routers(model).items():
        routers[_owner(model, path)[1]] = {
            "class": router.original_class.__name__,
            **{name: getattr(router, name) for name in SHAPE},
            "options": router.chosen_options,
        }
    return {"version": SECTION_VERSION, "routers": routers}


def saved_routers(model: Any, section: dict[str, Any]) -> dict[str, TransformersRouter]:
    """The routers that a checkpoint's `kmeans_route` section names, by path, still without their state.

    Raises:
        ValueError: the section does not fit the model. RuntimeError: a path that bypasses the router.
    """
    known = {_owner(model, p)[1]: (p, m) for p, m in model.named_modules() if is_known(m)}
    made = {}
    for inner, entry in section["routers"].items():
        if inner not in known:
            raise ValueError(f"the kmeans_route section must name routers of {type(model).__name__}, got {inner!r}")
        path, old = known[inner]
        contract = _contract(model, path, old)
        for name in SHAPE:
            if entry[name] != getattr(contract, name):
                raise ValueError(
                    f"{name} of {inner} in the kmeans_route section must be {getattr(contract, name)} as in the "
                    f"model, got {entry[name]}: one of the two was changed, before the model was saved or since"
                )
        # Sections once held the backend too.
        made[path] = _make(old, contract, {"directions": "centroids", **_saved_options(entry["options"])}, False)
    return made
