"""Tie the routers of a model to its optimizer: one commit per optimizer step."""

from typing import Any

import torch
from torch import nn

from kmeans_route.state import CountingScope, StatefulRouter


class Attachment:
    """The tie that `attach` made. `routers` maps each router's name in the model to it; `remove()` undoes the tie."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, routers: dict[str, StatefulRouter]) -> None:
        self.routers = routers
        self._scope = CountingScope()
        for router in routers.values():
            router._scope = self._scope
        self._handles = [
            model.register_forward_pre_hook(self._enter, prepend=True),
            model.register_forward_hook(self._leave, always_call=True),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _enter(self, root: nn.Module, _args: Any) -> None:
        self._scope.active = root.training and torch.is_grad_enabled()

    def _leave(self, _root: nn.Module, _args: Any, _output: Any) -> None:
        self._scope.active = None

    def _after_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        # A fused optimizer runs its hooks on a step that the gradient scaler skips; this flag stays on the device.
        found_inf = getattr(optimizer, "found_inf", None)
        self.commit(None if found_inf is None else found_inf.reshape(()) > 0)

    def commit(self, skip: torch.Tensor | None = None) -> None:
        """Commit every router now; the optimizer's hook does this after each step."""
        for router in self.routers.values():
            router.commit_pending(None if skip is None else skip.to(router.expert_bias.device))

    def metrics(self) -> dict[str, float]:
        """Flat scalars of all routers, named `<router's name in the model>/<metric>`, as any logger takes them."""
        return {
            f"{name}/{key}": value for name, router in self.routers.items() for key, value in router.metrics().items()
        }

    def remove(self) -> None:
        """Undo the tie: remove the hooks; the routers keep their state and may be attached again."""
        for handle in self._handles:
            handle.remove()
        for router in self.routers.values():
            router._scope = None


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, process_group: Any = None) -> Attachment:
    """Commit every router of `model` once after each step of `optimizer`.

    A forward of `model` counts when the model is in training mode and gradients are enabled as it is entered, also
    under activation checkpointing, where each token counts once however often it is recomputed.

    Args:
        model: the module whose forward is called in training; its routers are found among its submodules.
        optimizer: its step commits, after the update of the parameters. A step that a gradient scaler skips does not.
        process_group: the ranks that see different tokens. This version supports a single process.

    Returns:
        Attachment with `routers`, `metrics()`, `commit()` and `remove()`.

    Raises:
        ValueError: the model has no router. RuntimeError: a router is attached already, or there are several ranks.
    """
    routers = {name or "router": m for name, m in model.named_modules() if isinstance(m, StatefulRouter)}
    if not routers:
        raise ValueError(
            f"model must contain at least one router, got none in {type(model).__name__}: add a KMeansRouter or an MoE"
        )
    for name, router in routers.items():
        if router._scope is not None:
            raise RuntimeError(
                f"router {name!r} must not be attached twice, got a second attach: it would commit twice a step; call "
                "remove() on the first attachment"
            )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if process_group is not None or (distributed and torch.distributed.get_world_size() > 1):
        raise RuntimeError(
            "attach must run in a single process in this version, got a process group: ranks would drift apart; "
            "train on one rank"
        )
    return Attachment(model, optimizer, routers)
