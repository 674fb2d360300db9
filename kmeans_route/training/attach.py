"""Tie the routers of a model to its optimizer: one commit per optimizer step."""

import weakref
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kmeans_route import ops
from kmeans_route.checks import check_choice, check_module, check_positive_int
from kmeans_route.routing.base import StatefulRouter
from kmeans_route.routing.commit import point
from kmeans_route.routing.pending import CountingScope, Pending
from kmeans_route.training.optimizers import clocks_of, num_running_steps
from kmeans_route.training.overdue import Overdue, unwatch_steps, watch_steps
from kmeans_route.training.telemetry import over_routers

if TYPE_CHECKING:
    from kmeans_route.training.exchange import Exchange

WIRES = ("fp32", "bf16")
LEFT_OUT = ("left_of_sums", "left_of_chunk")
COMPILED = "_orig_mod"
"""What torch.compile puts between the names of a model's parts."""


class Attachment:
    """The tie that `attach` made. `routers` maps each router's name in the model to it; `remove()` undoes the tie."""

    def __init__(
        self,
        model: nn.Module,
        clocks: list[Any],
        routers: dict[str, StatefulRouter],
        exchange: "Exchange | None" = None,
        every_n_steps: int = 1,
        overlap_after: int = 0,
    ) -> None:
        self.routers, self.every_n_steps, self.overlap_after = routers, every_n_steps, overlap_after
        self._exchange = exchange
        self._steps = self._forwards = 0
        self._put_off: tuple[torch.Tensor | None] | None = None
        self._clocks = [weakref.ref(clock) for clock in clocks]
        # Wrappers that took over the attributes of what they wrap share its hooks.
        each_once = {id(getattr(clock, "_optimizer_step_post_hooks", clock)): clock for clock in clocks}.values()
        # First of all that marks something, since a foreign clock may refuse.
        self._handles = [clock.register_step_post_hook(self._after_step) for clock in each_once]
        self._scope = CountingScope(self)
        for router in routers.values():
            router.bind(self._scope)
        self._overdue: Overdue | None = Overdue(clocks, model.parameters(), self._gathers, self._idle, [*routers])
        watch_steps(self._overdue)
        self.watch(model)

    def __repr__(self) -> str:
        return f"Attachment({', '.join(map(repr, self.routers))}; {self._steps} steps)"

    def watch(self, module: nn.Module) -> None:
        """Take `module` too for a root, whose training mode and gradients as it is entered decide what counts.

        For a part of the model that the training loop calls by itself, past the forward of the whole.
        """
        self._handles += [
            module.register_forward_pre_hook(self._enter, prepend=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, root: nn.Module, _args: Any) -> None:
        outermost = not self._scope.entered
        counts = root.training and torch.is_grad_enabled()
        self._scope.enter(counts)
        if outermost and not torch.compiler.is_compiling():
            self._begin(root, counts)

    def _begin(self, root: nn.Module, counts: bool) -> None:
        """A forward of a root that is in no other; code that torch.compile makes of it leaves this out."""
        if self._overdue is None:  # a copy of an attached model
            return
        if ops.in_backward():
            if counts:
                self._overdue.recomputation(root)
        elif counts:
            self._make_up()
            if self._overlaps():
                self._exchange.wait()  # type: ignore[union-attr]  # more forwards than said: what is sent is not all
            self._overdue.forward()
        elif root.training:
            self._overdue.looked()
        elif torch.is_grad_enabled():
            self._overdue.in_eval(root)

    def _leave(self, _root: nn.Module, _args: Any, output: Any) -> None:
        counted = self._scope.leave()
        finished = output is not None and not self._scope.entered  # the output of a forward that raised is None
        if counted and finished and self._overlaps() and not ops.in_backward():
            self._forwards += 1
            if self._forwards == self.overlap_after:
                routers = self._learning()
                for router in routers:
                    router.before_commit()  # decides whether moments are sent
                self._exchange.start(routers)  # type: ignore[union-attr]

    def _overlaps(self) -> bool:
        """Not inside a compiled graph, which has no place for it: there the exchange starts after the step."""
        return self.overlap_after > 0 and self._exchange is not None and not torch.compiler.is_compiling()

    def _learning(self) -> list[StatefulRouter]:
        return [router for router in self.routers.values() if not router.frozen]

    def _gathers(self) -> bool:
        return any(router.training and router.learns for router in self._learning())

    def _idle(self) -> bool:
        learning = [router for router in self._learning() if router.learns]
        return bool(learning) and not any(int(router.pending.num_tokens) for router in learning)

    def _after_step(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        clocks = [clock for ref in self._clocks if (clock := ref()) is not None]
        if num_running_steps(clocks) > 1:
            return  # a step inside a step: the outer one commits as it ends
        if self._overdue is not None:
            self._overdue.step_in_eval()
        if not ops.in_backward():
            self._scope.forget()
            self._make_up()
        self._stepped()
        # A fused optimizer runs its hooks on a step that the gradient scaler skips; this flag stays on the device.
        self._steps += 1
        if self._steps % self.every_n_steps:
            return
        flags = [getattr(clock, "found_inf", None) for clock in (optimizer, *clocks)]
        found_inf = next((flag for flag in flags if flag is not None), None)
        self.commit(None if found_inf is None else found_inf.reshape(()) > 0)

    def _stepped(self) -> None:
        if self._overdue is not None:
            self._overdue.stepped()

    def commit(self, skip: torch.Tensor | None = None) -> None:
        """Commit every router now; the optimizer's hook does this after each step. All ranks must call it.

        Inside a backward pass, as by an optimizer that steps in a gradient hook, the commit waits for the end of the
        outermost pass, since whatever is recomputed until then must be routed as its forward was. If that pass raises,
        or is one that a hook began inside another, the commit is made as the next forward that counts begins.

        Args:
            skip: () bool; true leaves state and pending as they are. Where one rank skips, all do; all or none pass it.
        """
        self._stepped()
        if ops.in_backward():
            if self._put_off is not None:  # one commit for both, unless both are skipped
                (before,) = self._put_off
                skip = None if skip is None or before is None else skip & before
            self._put_off = (skip,)
            ops.call_after_backward(self._make_up)
            return
        self._make_up()
        self._commit(skip)

    def _make_up(self) -> None:
        """The commit that was put off, if one was."""
        if self._put_off is not None:
            (skip,) = self._put_off
            self._put_off = None
            self._commit(skip)

    def _commit(self, skip: torch.Tensor | None) -> None:
        routers, exchange = self._learning(), self._exchange
        self._forwards = 0
        for router in routers:
            router.before_commit()
        batches: list[Pending | None] = [None] * len(routers)
        if exchange is not None:
            if not exchange.under_way(routers):
                exchange.wait()
                exchange.start(routers)
            batches = [*exchange.finish()]
            skip = exchange.agree(skip)
        for router, batch in zip(routers, batches, strict=True):
            router.commit_pending(None if skip is None else skip.to(router.expert_bias.device), batch)
        if exchange is not None:
            exchange.settle(skip)
        point(routers)

    def state_dict(self) -> dict[str, Any]:
        """What a bit-for-bit resume needs beside the model's and the optimizer's state, of this rank alone.

        Only with every_n_steps, wire or shard is there any: the steps counted, and what rounding has left out of which
        routers. Without it a resume goes on from the rounded values.
        """
        exchange = self._exchange
        if exchange is None:
            return {"steps": self._steps}
        left_by = [name for left in exchange.left_by for name, router in self.routers.items() if router is left]
        left_out = {name: getattr(exchange, name).clone() for name in LEFT_OUT}
        return {"steps": self._steps, "left_by": left_by, **left_out}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave, on the same rank of as many.

        Raises:
            ValueError: it lacks an entry, and nothing is taken.
        """
        exchange = self._exchange
        wanted = ["steps"] if exchange is None else ["steps", "left_by", *LEFT_OUT]
        missing = [name for name in wanted if name not in state_dict]
        if missing:
            raise ValueError(
                f"state_dict must hold {wanted}, got none of {missing}: load what the attachment of this rank has saved"
            )
        self._steps = int(state_dict["steps"])
        if exchange is not None:
            exchange.wait()  # what is under way holds what was left out before
            exchange.left_by = [self.routers[name] for name in state_dict["left_by"] if name in self.routers]
            for name in LEFT_OUT:
                setattr(exchange, name, state_dict[name].clone())

    def metrics(self, names: Collection[str] | None = None, max_keys: int | None = None) -> dict[str, float]:
        """Flat scalars of all routers, named `<router's name in the model>/<metric>`, as any logger takes them.

        Of several routers also each metric's lowest, median and highest value, `routers/<metric>_max` and _min, _p50;
        of more than five its percentiles 10 and 90 too.

        Args:
            names: the metrics wanted, such as ["maxvio"]; None for all.
            max_keys: where there would be more keys, the single routers are left out; None for no limit.
        """
        return over_routers({name: router.metrics() for name, router in self.routers.items()}, names, max_keys)

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the model, which bring its hooks along: a copy is not attached."""
        none: dict[str, Any] = {"routers": {}, "_exchange": None, "_handles": [], "_clocks": []}
        return {**self.__dict__, **none, "_overdue": None, "_put_off": None}

    def remove(self) -> None:
        """Undo the tie: remove the hooks; the routers keep their state and may be attached again.

        A commit that waits for the end of a backward pass is made first, or at that end. A second call does nothing.
        """
        if not ops.in_backward():
            self._make_up()
        if self._exchange is not None:
            self._exchange.wait()
        for handle in self._handles:
            handle.remove()
        if self._overdue is not None:
            unwatch_steps(self._overdue)
        for router in self.routers.values():
            router.release(self._scope)


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    process_group: Any = None,
    *,
    every_n_steps: int = 1,
    overlap_after: int = 0,
    wire: str = "fp32",
    shard: bool = False,
    replace: bool = False,
) -> Attachment:
    """Commit every router of `model` once after each step of `optimizer`.

    A forward of `model` counts when the model is in training mode and gradients are enabled as it is entered, each
    thread for itself, also under activation checkpointing, where each token counts once however often it is
    recomputed. With use_reentrant=True that holds for parts of the model; checkpointed as a whole it gathers nothing,
    and says so.

    Where forwards go on counting and the optimizer does not step, while another optimizer steps the same parameters or
    something else updates them, a warning says so once.

    Args:
        model: the module whose forward is called in training; its routers are found among its submodules.
        optimizer: its step commits, after the update of the parameters; inside a backward pass, as that ends. A step
            that a gradient scaler skips does not. A wrapper whose own step runs no hooks (accelerate, Lookahead,
            schedule-free) is looked through to the one optimizer that it holds. Anything else will do that has
            register_step_post_hook(hook) and calls hook(it, args, kwargs) after each update.
        process_group: the ranks that see different tokens, which commit their sum: a torch.distributed group, or a
            DeviceMesh of one dimension; None for all ranks. Ranks that hold replicas of the same tokens (tensor
            parallel) must be in different groups. Each step exchanges E D + 1 fp32 and E + 2 int64 a router (and
            E x 1024 int32 for balance="quantile"), the first 2 E D fp64 more for init="tokens". Every rank must step
            as often as the others; one without tokens still takes part.
        every_n_steps: optimizer steps to a commit, at least 1.
        overlap_after: start the exchange when this many forwards of the model have counted since the last commit, so
            that it runs beside the backward pass of the last of them: the micro-batches of a step, times
            every_n_steps. The same bits as 0, which starts it after the step. All ranks then run as many forwards.
            With torch.compile, attach to the compiled model: a graph that holds the whole forward starts nothing.
        wire: how the sums travel: "fp32", or "bf16" with error feedback, which halves the bytes.
        shard: each rank commits its own part of the centroids in fp32, and the new ones travel in bf16; all ranks
            route by the rounded ones. A quarter fewer bytes than "fp32" alone, with exact sums.
        replace: remove the attachments that these routers have, as for a new optimizer. What is pending stays.

    Returns:
        Attachment with `routers`, `metrics()`, `commit()`, `state_dict()` and `remove()`.

    Raises:
        ValueError: the model has no router, or an option is out of its range. RuntimeError: a router is attached
            already, or differs between the ranks. TypeError: model is no module, process_group no group, or
            optimizer runs no step hooks and holds no one optimizer that does (a list, a scheduler, an engine). Whatever
            is raised, nothing changes.
    """
    check_module("model", model, "call attach(model, optimizer), in this order")
    routers = {
        ".".join(part for part in name.split(".") if part != COMPILED) or "router": module
        for name, module in model.named_modules()
        if isinstance(module, StatefulRouter)
    }
    if not routers:
        raise ValueError(
            f"model must contain at least one router, got none in {type(model).__name__}: add a KMeansRouter or an "
            "MoE; a framework's own model needs its adapter first, as apply_kmeans_routing(model) of "
            "kmeans_route.integrations.transformers"
        )
    former = _attachments_of(routers, replace=replace)
    clocks = clocks_of(optimizer)
    check_positive_int("every_n_steps", every_n_steps)
    if overlap_after:
        check_positive_int("overlap_after", overlap_after)
    check_choice("wire", wire, WIRES)
    group = _group_of(process_group)
    exchange = None
    if group is not None and torch.distributed.get_world_size(group) > 1:
        from kmeans_route.training.exchange import Exchange, check_same_routers

        options = f"every_n_steps={every_n_steps}, overlap_after={overlap_after}, wire={wire!r}, shard={shard}"
        check_same_routers(routers, options, group)
        exchange = Exchange(group, wire=wire, shard=shard)
    attachment = Attachment(model, clocks, routers, exchange, every_n_steps, overlap_after if exchange else 0)
    for each in former:  # last of all, since a foreign clock may refuse
        each.remove()
    return attachment


def _attachments_of(routers: dict[str, StatefulRouter], *, replace: bool) -> list[Attachment]:
    """Those that `replace` is to remove; an error where it is not said, or where routers would be left alone."""
    attached = {name: router for name, router in routers.items() if router.attached}
    if attached and not replace:
        raise RuntimeError(
            f"router {next(iter(attached))!r} must not be attached twice, got a second attach: it would commit twice a "
            "step; call remove() on the first attachment, or attach(..., replace=True) for a new optimizer"
        )
    former = {id(router.attachment): router.attachment for router in attached.values()}
    for attachment in former.values():
        for name, router in attachment.routers.items():
            if not any(router is each for each in routers.values()):
                raise RuntimeError(
                    f"replace=True must cover every router of the former attachment, got a model without {name!r}: "
                    "attach the model that holds them all, or call remove() on the first attachment"
                )
    return list(former.values())


def _group_of(process_group: Any) -> Any:
    """A torch.distributed group, the world's for None; None where nothing is distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        if process_group is None:
            return None
    elif process_group is None:
        return torch.distributed.group.WORLD
    elif isinstance(process_group, torch.distributed.ProcessGroup):
        return process_group
    else:
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(process_group, DeviceMesh) and process_group.ndim == 1:
            return process_group.get_group()
    dimensions = f" of {process_group.ndim} dimensions" if hasattr(process_group, "ndim") else ""
    raise TypeError(
        f"process_group must be a torch.distributed group, got {type(process_group).__name__}{dimensions}: call "
        "init_process_group first, and pass the group, or the DeviceMesh of one dimension, of the ranks that see "
        "different tokens"
    )
