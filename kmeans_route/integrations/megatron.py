"""Megatron-Core: a K-Means router for MoESubmodules, committed where gradients are finalised.

An example stands in docs/integrations.md.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kmeans_route.integrations import require
from kmeans_route.routing.kmeans import KMeansRouter
from kmeans_route.routing.replay import usable_ids
from kmeans_route.training.attach import Attachment, attach
from kmeans_route.training.telemetry import over_routers

SUPPORTED = ">=0.16,<0.20"
TRIED = ("0.16.0", "0.16.1", "0.17.0", "0.18.0", "0.19.2")
require("megatron-core", SUPPORTED, "megatron.core")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.moe.router_replay import RouterReplay  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class KMeansTopKRouter(KMeansRouter):
    """A `KMeansRouter` with the interface of Megatron's routers: see `with_kmeans_router`.

    It balances by its own rule. Of the configuration it takes hidden_size, num_moe_experts, moe_router_topk, the
    groups, the scaling factor and the dtype of the probabilities; score function and pre-softmax do not apply, for the
    gate is an option here. Padding is routed as any token and left out of the statistics. Rows that are not finite get
    probability 0 but reach the experts: Megatron hands those the hidden states itself.

    With moe_enable_routing_replay it has a `RouterReplay` of Megatron's, or of verl's where verl has put its own in
    place, and records and replays as that is told to; a row of ids that are out of range, or with one twice, is routed.

    Args:
        config, pg_collection, is_mtp_layer: as Megatron passes them.
        options: of `KMeansRouter`; bind them with functools.partial.

    Raises:
        ValueError: the configuration asks for what a K-Means router replaces or does not have, see the message.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: Any = None, is_mtp_layer: bool = False, **options: Any
    ) -> None:
        _check_config(config)
        super().__init__(
            config.hidden_size,
            config.num_moe_experts,
            config.moe_router_topk,
            **{**_group_options(config), "scaling": config.moe_router_topk_scaling_factor or 1.0, **options},
        )
        self.config = config
        self.layer_number: int | None = None
        self._base_name = self.name
        self.router_replay = _replay_of(config)
        if self.offset is not None:  # as Megatron's own router marks its rows: gradients are summed over the sequence
            self.offset.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def set_layer_number(self, layer_number: int) -> None:
        """The layer's number gives each router Gaussian directions of its own, until it has its first data."""
        self.layer_number = layer_number
        self.name = f"{self._base_name or 'layer'}.{layer_number}"
        if self.router_replay is not None:  # later versions of it have a place for that
            self.router_replay.layer_number = layer_number
        if not self.has_data:
            self.reset_parameters()

    def forward(  # type: ignore[override]
        self, input: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Probabilities (T, E), zero where not chosen, and the boolean routing map (T, E), K true a row.

        Args:
            input: (S, B, H) hidden states.
            padding_mask: (S, B) bool, true for padding, as Megatron's code takes it.
        """
        counted = None if padding_mask is None else ~padding_mask.reshape(-1)
        routing = self.route(input, indices=self._given_ids(), count_mask=counted, gather=True)
        if _action(self.router_replay) == "RECORD":
            self.router_replay.record_indices(routing.indices.detach())
        dtype = DTYPES.get(self.config.moe_router_dtype or "", input.dtype)
        by_expert = (routing.indices.shape[0], self.num_experts)
        probs = routing.weights.new_zeros(by_expert).scatter(1, routing.indices, routing.weights)
        routing_map = torch.zeros(by_expert, dtype=torch.bool, device=input.device)
        return probs.to(dtype), routing_map.scatter(1, routing.indices, True)

    def _given_ids(self) -> Tensor | None:
        """What is to be replayed; each recomputation takes the oldest ids that none has taken.

        verl's handle has masks, too, and routes where it was given nothing: layers of multi-token prediction.
        """
        replay, action = self.router_replay, _action(self.router_replay)
        masks = getattr(replay, "replay_backward_mask_list", None)
        ids = mask = None
        if action == "REPLAY_FORWARD":
            ids, mask = replay.target_topk_idx, getattr(replay, "target_replay_mask", None)
        elif action == "REPLAY_BACKWARD" and (masks is None or replay.replay_backward_list):
            ids, mask = replay.replay_backward_list.pop(0), masks.pop(0) if masks else None
        return None if ids is None else usable_ids(self, ids, None if mask is None else mask.bool())


VERL = "verl.utils.megatron.router_replay_patch"


def _replay_of(config: TransformerConfig) -> Any:
    """verl's handle where verl has patched Megatron's router for its own, else Megatron's; None without replay.

    Read in verl 0.9.1. Its patch reaches only TopKRouter, and its walk over a model takes handles of that class alone.
    """
    if not (config.moe_enable_routing_replay or getattr(config, "enable_routing_replay", False)):
        return None
    if VERL in sys.modules and hasattr(TopKRouter, "_router_replay_patched"):
        TopKRouter.register(KMeansTopKRouter)
        return sys.modules[VERL].RouterReplay()
    return RouterReplay()


def _action(replay: Any) -> str | None:
    """By name: verl's enumeration is another than Megatron's."""
    return getattr(getattr(replay, "router_replay_action", None), "name", None)


def with_kmeans_router(spec: Any, **options: Any) -> Any:
    """The spec of a mixture layer, as `get_moe_module_spec` returns it, with a K-Means router; it is changed in place.

    spec: a ModuleSpec, or from Megatron-Core 0.18 on a functools.partial. options: of `KMeansRouter`.
    """
    submodules = spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules
    submodules.router = partial(KMeansTopKRouter, **options)
    return spec


def _check_config(config: TransformerConfig) -> None:
    coefficients = config.moe_aux_loss_coeff
    refused = {
        "moe_router_enable_expert_bias": (config.moe_router_enable_expert_bias, "False: the router has its own bias"),
        "moe_aux_loss_coeff": (
            any(coefficients) if isinstance(coefficients, list) else bool(coefficients),
            "0: nothing here would learn from an auxiliary loss but the hidden states",
        ),
        "moe_z_loss_coeff": (bool(config.moe_z_loss_coeff), "None: cosines are bounded"),
        "moe_expert_capacity_factor": (config.moe_expert_capacity_factor is not None, "None: no token is dropped"),
        "moe_router_load_balancing_type": (config.moe_router_load_balancing_type == "sinkhorn", "'none'"),
        "moe_input_jitter_eps": (config.moe_input_jitter_eps is not None, "None"),
        "moe_router_force_load_balancing": (config.moe_router_force_load_balancing, "False"),
    }
    for name, (asked, remedy) in refused.items():
        if asked:
            got = getattr(config, name)
            raise ValueError(f"{name} must not be set with a K-Means router, got {got!r}: set it to {remedy}")


def _group_options(config: TransformerConfig) -> dict[str, Any]:
    if not config.moe_router_group_topk:
        return {}
    per_group = config.moe_router_topk // config.moe_router_group_topk
    if per_group not in (1, 2):
        raise ValueError(
            f"moe_router_topk / moe_router_group_topk must be 1 or 2, got {per_group}: a group's score is the sum of "
            "that many experts, and the router knows these two"
        )
    return {
        "n_group": config.moe_router_num_groups,
        "topk_group": config.moe_router_group_topk,
        "group_score": "max" if per_group == 1 else "top2",
    }


class FinalizeModelGrads:
    """Megatron's finalize_model_grads_func with the exchange and commit of the centroids after it.

    Gradients are finalised once a step, after its last micro-batch and before the optimizer: a step that the optimizer
    then skips has been committed, as Megatron's own bias update has.

    Args:
        finalize: the function to call first, Megatron's finalize_model_grads.
        model: the model or its chunks, before or after they are wrapped; those without routers are left alone.
        process_group: the ranks that see different tokens. None for data and context parallel ones of this pipeline
            stage, and the tensor parallel ones too where sequence_parallel splits tokens between them.
        options: every_n_steps, wire, shard, overlap_after, as in `kmeans_route.attach`.

    Raises:
        ValueError, RuntimeError: as `attach`.
    """

    def __init__(
        self,
        finalize: Callable[..., Any],
        model: nn.Module | list[nn.Module],
        process_group: Any = None,
        **options: Any,
    ) -> None:
        self.finalize = finalize
        self._hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self.attachments: list[Attachment] = []
        for chunk in model if isinstance(model, list) else [model]:
            if any(isinstance(module, KMeansRouter) for module in chunk.modules()):
                group = _token_group(get_model_config(chunk)) if process_group is None else process_group
                # The clock that attach asks for is a step; here it is this function.
                self.attachments.append(attach(chunk, self, group, **options))  # type: ignore[arg-type]

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """What `attach` asks of an optimizer."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Finalise the gradients, then commit."""
        result = self.finalize(*args, **kwargs)
        for hook in list(self._hooks.values()):
            hook(self, args, kwargs)
        return result

    def metrics(self, names: Collection[str] | None = None, max_keys: int | None = None) -> dict[str, float]:
        """Flat scalars of all routers of this rank, as `Attachment.metrics`; with several chunks each router's name
        starts with its chunk's place."""
        several = len(self.attachments) > 1
        routers = {
            f"{place}.{name}" if several else name: router.metrics()
            for place, attachment in enumerate(self.attachments)
            for name, router in attachment.routers.items()
        }
        return over_routers(routers, names, max_keys)

    def remove(self) -> None:
        """Undo the tie; the function goes on calling the one it wraps."""
        for attachment in self.attachments:
            attachment.remove()


def _token_group(config: TransformerConfig) -> Any:
    if not parallel_state.model_parallel_is_initialized():
        return None
    if config.sequence_parallel or parallel_state.get_tensor_model_parallel_world_size() == 1:
        return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
