"""Say once that forwards go on counting while no commit comes."""

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from kmeans_route.training.optimizers import num_running_steps, parameters_of

MOST_UPDATES = 3
"""Updates of the parameters without a step of the optimizer attached to; with one more it is said."""
MOST_FORWARDS = 1024
"""Forwards without a step, where nothing tells that the parameters move."""
TIMES_USUAL = 4
"""Where more have come between two steps before, this many times as many are allowed."""
NUM_PROBES = 16


class Overdue:
    """What has happened since the optimizer that an attachment waits for has stepped, or a commit was called.

    Three things are told apart from the micro-batches of one step, which may be many:

    - Another optimizer steps the same parameters: the one attached to was rebuilt.
    - The parameters are written between two forwards: SAM's half steps, an update by hand. Of up to 16 parameters more
      than half must have changed by their version counters, which are read without a sync.
    - More forwards than any step would have: for those who write past the version counters.

    A fourth is that the optimizer steps and every forward with gradients so far was in eval mode, where nothing counts.

    Code that torch.compile has made of a whole forward tells only of the first.

    Args:
        clocks: the optimizers whose steps commit, as `clocks_of` gives them.
        parameters: whose writes are watched, where the clocks have none of their own.
        gathers: whether any router would gather and learn.
        idle: whether a router would learn in training mode, and none holds a token. Asked once at the most.
        names: of the routers, to tell.
    """

    def __init__(
        self,
        clocks: Sequence[Any],
        parameters: Iterable[Tensor],
        gathers: Callable[[], bool],
        idle: Callable[[], bool],
        names: Sequence[str] = (),
    ) -> None:
        # Weak: an optimizer that was rebuilt must be free to go, with its state.
        self._clocks, self._gathers, self._idle = [weakref.ref(clock) for clock in clocks], gathers, idle
        self._name = type(clocks[0]).__name__
        self._routers = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        trained = [p for p in parameters_of(clocks) or parameters if p.requires_grad and not p.is_inference()]
        self._parameters = [weakref.ref(p) for p in trained]
        self._probes = self._parameters[:: -(-len(trained) // NUM_PROBES) or 1]
        self._same_parameters: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self._most_forwards, self._most_updates = MOST_FORWARDS, MOST_UPDATES
        self._told = self._told_of_reentrant = self._told_of_eval = False
        self._forwards = self._updates = self._steps_of_another = 0
        self._counted, self._in_eval = False, ""
        self.stepped()

    def stepped(self) -> None:
        """The optimizer has stepped, or a commit was called: all is well."""
        self._most_forwards = max(self._most_forwards, TIMES_USUAL * self._forwards)
        self._most_updates = max(self._most_updates, TIMES_USUAL * self._updates, TIMES_USUAL * self._steps_of_another)
        self._forwards = self._updates = self._steps_of_another = 0
        self._looked = False
        self._versions: list[int] = []

    def looked(self) -> None:
        """The root was entered in training mode without gradients."""
        self._looked = True

    def in_eval(self, root: nn.Module) -> None:
        """The root was entered in eval mode with gradients."""
        self._in_eval = type(root).__name__

    def step_in_eval(self) -> None:
        """The optimizer has stepped: say once that no forward has counted, where all of them were in eval mode."""
        if not self._in_eval or self._counted or self._told_of_eval:
            return
        self._told_of_eval = True
        if self._idle():  # compiled forwards may have counted
            warnings.warn(
                f"{self._in_eval} must be in training mode for its routers to learn, got an optimizer step after "
                "forwards in eval mode alone, which count nothing: call model.train(), or freeze() the routers",
                stacklevel=4,
            )

    def forward(self) -> None:
        """A forward that counts begins."""
        self._counted = True
        self._forwards += 1
        if self._told:
            return
        versions = [p._version for ref in self._probes if (p := ref()) is not None]
        if len(versions) == len(self._versions):
            changed = sum(new != old for new, old in zip(versions, self._versions, strict=True))
            self._updates += 2 * changed > len(versions)
        self._versions = versions
        if self._updates > self._most_updates:
            self._tell(f"in {self._forwards} forwards that counted its parameters were updated {self._updates} times")
        elif self._forwards > self._most_forwards:
            self._tell(f"{self._forwards} forwards have counted since")

    def recomputation(self, root: nn.Module) -> None:
        """A forward of the root begins inside a backward pass: it counts nothing, the first pass should have."""
        if not self._looked or self._forwards or self._told_of_reentrant or not self._gathers():
            return
        self._told_of_reentrant = True
        warnings.warn(
            f"the routers of an attached {type(root).__name__} gather nothing: its forward ran without gradients, as "
            "reentrant activation checkpointing runs it: checkpoint the model with use_reentrant=False, or the blocks "
            "inside it in place of the whole",
            stacklevel=4,
        )

    def another_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """After each step of any optimizer but those that commit."""
        if self._told or any(ref() is optimizer for ref in self._clocks):
            return
        same = self._same_parameters.get(optimizer)
        if same is None:
            # Those of today, and those of then: the optimizer may be gone, or its parameters exchanged by a wrapper.
            own = {id(p) for p in (*parameters_of(self._those()), *(ref() for ref in self._parameters))} - {id(None)}
            same = self._same_parameters[optimizer] = any(id(p) in own for p in parameters_of([optimizer]))
        if same:
            self._steps_of_another += 1
            if self._steps_of_another > self._most_updates:
                name = type(optimizer).__name__
                self._tell(f"another {name} has stepped the same parameters {self._steps_of_another} times")

    def _those(self) -> list[Any]:
        return [clock for ref in self._clocks if (clock := ref()) is not None]

    def _tell(self, what: str) -> None:
        # Inside a step forwards and updates may be many: the closures of LBFGS.
        if not self._gathers() or num_running_steps(self._those()):
            return
        self._told = True
        warnings.warn(
            f"routers gather and nothing commits: attach waits for a step of {self._name}, and {what}: call "
            "attach(model, optimizer, replace=True) with the optimizer that steps now, or attachment.commit() after "
            f"each update (routers: {self._routers})",
            stacklevel=5,
        )


# One hook for all attachments, since an attachment that is garbage must not take its own out while torch walks them.
_watching: weakref.WeakSet[Overdue] = weakref.WeakSet()
_handles: list[RemovableHandle] = []


def watch_steps(overdue: Overdue) -> None:
    """Let `overdue` know of the steps of all optimizers."""
    _watching.add(overdue)
    if not _handles:
        _handles.append(register_optimizer_step_post_hook(_after_any_step))


def unwatch_steps(overdue: Overdue) -> None:
    """Undo `watch_steps`; the last one takes the hook away."""
    _watching.discard(overdue)
    while _handles and not _watching:
        _handles.pop().remove()


def _after_any_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for overdue in list(_watching):
        overdue.another_stepped(optimizer)
