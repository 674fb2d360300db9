"""Tie the routers of a model to its optimizer: one commit per optimizer step."""

from typing import Any

import torch
from torch import nn

from kmeans_route.checks import check_positive_int
from kmeans_route.state import CountingScope, Pending, StatefulRouter


class Attachment:
    """The tie that `attach` made. `routers` maps each router's name in the model to it; `remove()` undoes the tie."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        routers: dict[str, StatefulRouter],
        group: Any = None,
        every_n_steps: int = 1,
    ) -> None:
        self.routers, self.group, self.every_n_steps = routers, group, every_n_steps
        self._steps = 0
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
        self._steps += 1
        if self._steps % self.every_n_steps:
            return
        found_inf = getattr(optimizer, "found_inf", None)
        self.commit(None if found_inf is None else found_inf.reshape(()) > 0)

    def commit(self, skip: torch.Tensor | None = None) -> None:
        """Commit every router now; the optimizer's hook does this after each step. All ranks must call it.

        Args:
            skip: () bool; true leaves state and pending as they are. It must be the same on all ranks.
        """
        routers = [router for router in self.routers.values() if not router.frozen]
        batches: list[Pending | None] = [None] * len(routers)
        if self.group is not None:
            from kmeans_route.distributed import exchange

            batches = [*exchange(routers, self.group)]
        for router, batch in zip(routers, batches, strict=True):
            router.commit_pending(None if skip is None else skip.to(router.expert_bias.device), batch)

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


def attach(
    model: nn.Module, optimizer: torch.optim.Optimizer, process_group: Any = None, *, every_n_steps: int = 1
) -> Attachment:
    """Commit every router of `model` once after each step of `optimizer`.

    A forward of `model` counts when the model is in training mode and gradients are enabled as it is entered, also
    under activation checkpointing, where each token counts once however often it is recomputed.

    Args:
        model: the module whose forward is called in training; its routers are found among its submodules.
        optimizer: its step commits, after the update of the parameters. A step that a gradient scaler skips does not.
        process_group: the ranks that see different tokens, which commit their sum; None for all ranks. Each step
            exchanges E D + 1 fp32 and E + 2 int64 a router (and E x 1024 int32 for balance="quantile"). Every rank
            must step as often as the others; one without tokens still takes part.
        every_n_steps: optimizer steps to a commit, at least 1.

    Returns:
        Attachment with `routers`, `metrics()`, `commit()` and `remove()`.

    Raises:
        ValueError: the model has no router, or every_n_steps is below 1. RuntimeError: a router is attached already, or
            differs between the ranks. TypeError: process_group is none.
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
    check_positive_int("every_n_steps", every_n_steps)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if process_group is not None and not (distributed and isinstance(process_group, torch.distributed.ProcessGroup)):
        raise TypeError(
            f"process_group must be a torch.distributed group, got {type(process_group).__name__}: call "
            "init_process_group first, and pass the group of the ranks that see different tokens"
        )
    if process_group is None and distributed:
        process_group = torch.distributed.group.WORLD
    if process_group is not None and torch.distributed.get_world_size(process_group) > 1:
        from kmeans_route.distributed import check_same_routers

        check_same_routers(routers, process_group)
    else:
        process_group = None
    return Attachment(model, optimizer, routers, process_group, every_n_steps)
