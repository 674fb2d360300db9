"""torchtitan: the K-Means router behind a flag of the model's configuration.

An example stands in docs/integrations.md.

Tensor suffixes as in torchtitan's `models/common/moe.py`: E experts. A router's input has no suffix: 0.3 hands it
(batch, length, D), the main branch (tokens, D).
"""

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kmeans_route.checks import check_choice
from kmeans_route.integrations import require, version_of
from kmeans_route.routing.kmeans import BALANCES, KMeansRouter
from kmeans_route.training.attach import Attachment, attach

SUPPORTED = ">=0.3,<0.4"
TRIED = ("0.3.0",)
# What is installed from the main branch calls itself 0.2.2. The release of that number has no such module.
if version_of("torchtitan") != "0.2.2" or importlib.util.find_spec("torchtitan.protocols.sharding") is None:
    require("torchtitan", SUPPORTED)

import spmd_types as spmd  # noqa: E402
from torchtitan.models.common.decoder_sharding import dense_param_placement  # noqa: E402
from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter  # noqa: E402
from torchtitan.protocols.model import ModelConfigConverter  # noqa: E402
from torchtitan.protocols.module import Module  # noqa: E402
from torchtitan.protocols.sharding import LocalMapConfig, ShardingConfig  # noqa: E402


class KMeansTokenChoiceRouter(KMeansRouter, Module):
    """A `KMeansRouter` with the signature and protocol of torchtitan's TokenChoiceTopKRouter.

    The MoE block keeps its selection bias and its sign update; the router brings the centroids. Its whole state stays
    on every rank as plain tensors, under tensor and expert parallelism too, where it routes the rank's own tokens.
    Rows that are not finite get gates of 0 but reach the experts: torchtitan hands those the hidden states itself.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        """torchtitan's fields, of which score_func and route_norm name the gate, and those of `KMeansRouter`."""

        score_func: str = "softmax"
        route_norm: bool = True
        directions: str | None = None
        tau: float | None = None
        decay: float = 0.999
        average: str = "ema"
        accumulate: str = "unit"
        balance: str = "none"
        bias_rate: float | None = None
        init: str = "tokens"
        learned_offset: bool = False
        detach_gates: bool = False
        seed: int = 0
        name: str = ""
        backend: str = "auto"

    def __init__(self, config: Any) -> None:
        if config._debug_force_load_balance:
            raise ValueError(
                "_debug_force_load_balance must be False for a K-Means router, got True: force it with torchtitan's own"
            )
        super().__init__(
            config.gate.in_features,
            config.num_experts,
            config.top_k,
            gate=config.score_func,
            normalize=config.route_norm,
            scaling=config.route_scale,
            n_group=config.num_expert_groups,
            topk_group=config.num_limited_groups,
            return_scores=True,
            **{field: getattr(config, field) for field in OWN_FIELDS},
        )
        if config.gate.sharding_config is not None:
            self._sharding_config = _sharding(
                config.gate.sharding_config, [*self._buffers, *(name for name, _ in self.named_parameters())]
            )

    def forward(  # type: ignore[override]
        self, x: Tensor, expert_bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gates (..., K), expert ids (..., K) and cosines (..., E) of x (..., D)."""
        routing = self.route(x, expert_bias=expert_bias_E, gather=True)
        assert routing.scores is not None
        by_token = x.shape[:-1]
        return (
            routing.weights.view(*by_token, -1),
            routing.indices.view(*by_token, -1),
            routing.scores.view(*by_token, -1),
        )

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        if buffer_device is not None and torch.device(buffer_device) != self.weight.device:
            for name, buffer in self._buffers.items():
                self._buffers[name] = None if buffer is None else torch.empty_like(buffer, device=buffer_device)
        self.reset_parameters()

    def _distribute_states(self, parallel_dims: Any) -> None:
        if self.offset is not None and parallel_dims.tp > 1:
            raise ValueError(
                f"learned_offset must be False under tensor parallelism, got True with tp={parallel_dims.tp}: nothing "
                "here sums its gradient over the ranks that share a sequence"
            )
        # Replicas as DTensors would reach operators that take plain tensors; the exchange keeps plain ones equal.
        if parallel_dims.spmd_backend == "spmd_types":  # annotates plain tensors
            super()._distribute_states(parallel_dims)


OWN_FIELDS = sorted(
    {field.name for field in dataclasses.fields(KMeansTokenChoiceRouter.Config)}
    - {field.name for field in dataclasses.fields(TokenChoiceTopKRouter.Config)}
)


def _sharding(gate: Any, states: list[str]) -> Any:
    """The layouts of the gate that the router stands for, with a local region between: it takes no DTensors."""
    replicated = dense_param_placement(tp=spmd.R)
    out = gate.out_dst_shardings
    return ShardingConfig(
        state_shardings=dict.fromkeys(states, replicated),
        in_src_shardings={"x": gate.in_src_shardings["input"], "expert_bias_E": replicated},
        in_dst_shardings={"x": gate.in_dst_shardings["input"], "expert_bias_E": replicated},
        out_src_shardings=(out, out, out),
        local_map=LocalMapConfig(in_grad_placements=(gate.in_dst_shardings["input"], replicated)),
    )


class KMeansRouting(ModelConfigConverter):
    """The flag: a converter that gives every MoE block of a model's configuration a K-Means router.

    Pass its Config to a model registry's `converters`, or use `kmeans_routing`, which also attaches the routers.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        """balance: "block" keeps the block's bias and its sign update; a rule of `KMeansRouter` takes its place.

        options: fields of `KMeansTokenChoiceRouter.Config`. The gate is softmax over the chosen experts unless
        they say otherwise; groups, top_k and route_scale are those of the router that is replaced.
        """

        balance: str = "block"
        options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __init__(self, config: Any) -> None:
        check_choice("balance", config.balance, ("block", *BALANCES))
        allowed = {*OWN_FIELDS, "score_func", "route_norm"} - {"name", "balance"}
        unknown = sorted(set(config.options) - allowed)
        if unknown:
            raise ValueError(f"options must be of {', '.join(sorted(allowed))}, got {', '.join(unknown)}: correct them")
        self.config = config

    def convert(self, model_config: Any) -> Any:
        """Change the configuration in place and return it.

        Raises:
            ValueError: it has no MoE block with a TokenChoiceTopKRouter.
        """
        found = list(model_config.traverse(MoE.Config))
        for name, moe, _parent, _field in found:
            moe.router = self._router(f"{name}.router", moe.router)
            if self.config.balance != "block":
                moe.load_balance_coeff = None
        if not found:
            raise ValueError(
                f"model_config must have MoE blocks, got none in {type(model_config).__qualname__}: choose a flavor "
                "with experts"
            )
        return model_config

    def _router(self, name: str, old: Any) -> Any:
        if type(old) is not TokenChoiceTopKRouter.Config:
            raise ValueError(
                f"{name} must be a TokenChoiceTopKRouter, got {type(old).__qualname__}: this adapter replaces no other"
            )
        kept = {
            field.name: getattr(old, field.name)
            for field in dataclasses.fields(old)
            if field.init and field.name not in ("score_func", "route_norm")
        }
        balance = "none" if self.config.balance == "block" else self.config.balance
        return KMeansTokenChoiceRouter.Config(**kept, **self.config.options, balance=balance, name=name)


def kmeans_routing(spec: Any, *, balance: str = "block", **options: Any) -> Any:
    """A ModelSpec whose MoE blocks route by K-Means and are attached once the Trainer has made its optimizers.

    Args:
        spec: torchtitan's ModelSpec, as a model registry returns it. Its configuration is changed.
        balance, options: as in `KMeansRouting.Config`.

    Returns:
        ModelSpec for the Trainer's configuration.

    Raises:
        ValueError: the model has no MoE block, or an option is unknown.
    """
    model = KMeansRouting.Config(balance=balance, options=options).build().convert(spec.model)
    built = spec.post_optimizer_build_fn

    def after_optimizers(optimizers: Any, model_parts: list[nn.Module], parallel_dims: Any) -> None:
        if built is not None:
            built(optimizers, model_parts, parallel_dims)
        attach_routers(optimizers, model_parts, parallel_dims)

    return dataclasses.replace(spec, model=model, post_optimizer_build_fn=after_optimizers)


def attach_routers(optimizers: Any, model_parts: list[nn.Module], parallel_dims: Any) -> list[Attachment]:
    """Attach every part of the model that has routers: one commit per step, over the ranks that see other tokens."""
    group = _token_group(parallel_dims)
    with_routers = [part for part in model_parts if any(isinstance(m, KMeansRouter) for m in part.modules())]
    return [attach(part, optimizers, group) for part in with_routers]


def _token_group(parallel_dims: Any) -> Any:
    """The ranks of data and context parallelism, and of tensor parallelism where it splits the tokens of a sequence."""
    if not dist.is_initialized():
        return None
    if parallel_dims.ep_enabled and parallel_dims.tp > 1:
        if parallel_dims.pp > 1:
            raise RuntimeError(
                "expert with tensor and pipeline parallelism must not be combined for K-Means routers, got all three: "
                "attach each stage yourself, with a group of its ranks"
            )
        return None
    mesh = parallel_dims.get_optional_mesh("loss")
    return dist.new_subgroups(1)[0] if mesh is None else mesh.get_group()  # type: ignore[no-untyped-call]
