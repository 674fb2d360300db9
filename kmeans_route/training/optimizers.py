"""Which optimizers really step: those whose hooks run, also behind wrappers that hold another one.

torch puts the hooks on as `Optimizer.__init__` wraps the class's step. A wrapper that leaves `__init__` out, as most
do, may have the method that registers a hook and never call one.
"""

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

# What `Optimizer.__init__` puts around step. Its code object tells a step that is on the stack; the wrapper and the
# name of its local are private to PyTorch: this is their only use, and a test holds them for each version claimed.
_STEP_CODE = Optimizer.profile_hook_step(lambda: None).__code__


def clocks_of(optimizer: Any) -> list[Any]:
    """The objects whose step hooks tell that `optimizer` has stepped, the outermost first.

    One as a rule. Two where an optimizer with hooks of its own holds another of the same parameters: SAM's two half
    steps call the inner one and never the outer.

    Raises:
        TypeError: no step hook would run, or several optimizers are held and none steps for all.
    """
    outermost = optimizer
    seen = {id(optimizer)}
    while not _runs_hooks(optimizer):
        inside = _held_by(optimizer)
        if len(inside) != 1 or id(inside[0]) in seen:
            raise TypeError(_refusal(outermost, inside))
        (optimizer,) = inside
        seen.add(id(optimizer))
    clocks = [optimizer]
    while isinstance(optimizer, Optimizer):
        inside = [
            held
            for held in _held_by(optimizer)
            if isinstance(held, Optimizer) and id(held) not in seen and _ids(held) == _ids(optimizer)
        ]
        if len(inside) != 1:
            break
        (optimizer,) = inside
        seen.add(id(optimizer))
        if _runs_hooks(optimizer):
            clocks.append(optimizer)
    return clocks


def parameters_of(clocks: Sequence[Any]) -> list[torch.Tensor]:
    """The parameters that these step, each once; none of an object that is no optimizer."""
    found = {id(p): p for clock in clocks for group in getattr(clock, "param_groups", ()) for p in group["params"]}
    return list(found.values())


def num_running_steps(clocks: Sequence[Any]) -> int:
    """How many calls of step of these are on this thread's stack, the one that calls a hook among them.

    Two or more where a step runs inside another: a subclass that calls super().step() runs its hooks twice.
    """
    frame: FrameType | None = sys._getframe()
    running = 0
    while frame is not None:
        if frame.f_code is _STEP_CODE:
            running += any(frame.f_locals.get("self") is clock for clock in clocks)
        frame = frame.f_back
    return running


def _runs_hooks(optimizer: Any) -> bool:
    """Whether a hook that is registered here runs. Anything of another kind that offers hooks is taken at its word."""
    if isinstance(optimizer, Optimizer):
        step = getattr(type(optimizer), "step", None)
        return bool(getattr(step, "hooked", False)) and hasattr(optimizer, "_optimizer_step_post_hooks")
    return callable(getattr(type(optimizer), "register_step_post_hook", None))


def _is_optimizer(value: Any) -> bool:
    """By what it can do: schedulers have no zero_grad, engines are modules, and a class is not there yet."""
    if isinstance(value, type | nn.Module):
        return False
    return callable(getattr(value, "step", None)) and callable(getattr(value, "zero_grad", None))


def _held_by(optimizer: Any) -> list[Any]:
    """The optimizers among its attributes, but for those that another of them holds in turn.

    Without any, the one whose register_step_post_hook it hands out as its own.
    """
    if not _is_optimizer(optimizer):
        return []
    held = _among_attributes(optimizer)
    deeper = {key for value in held.values() for key in _among_attributes(value)}
    if not held:
        owner = getattr(getattr(optimizer, "register_step_post_hook", None), "__self__", optimizer)
        held = {} if owner is optimizer else {id(owner): owner}
    return [value for key, value in held.items() if key not in deeper]


def _among_attributes(optimizer: Any) -> dict[int, Any]:
    found = {}
    for attribute in getattr(optimizer, "__dict__", {}).values():
        values = [attribute]
        if isinstance(attribute, list | tuple | dict):
            values = list(attribute.values() if isinstance(attribute, dict) else attribute)
        for value in values:
            if _is_optimizer(value) and value is not optimizer:
                found[id(value)] = value
    return found


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(p) for p in parameters_of([optimizer])}


def _refusal(optimizer: Any, inside: list[Any]) -> str:
    got = type(optimizer).__name__
    values = list(optimizer.values()) if isinstance(optimizer, dict) else optimizer
    if isinstance(values, list | tuple) and values:
        got += f" of {', '.join(type(value).__name__ for value in values)}"
    elif len(inside) > 1:
        got += f", which holds several ({', '.join(type(value).__name__ for value in inside)})"
    return (
        f"optimizer must be a torch.optim.Optimizer whose step runs its hooks, or hold one, got {got}: pass the one "
        "optimizer whose steps are to commit, or an object whose register_step_post_hook(hook) has hook called after "
        "each update"
    )
