"""attach for a new optimizer, removal, and the forwards of several threads."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from kmeans_route import MoE, attach
from kmeans_route.routing.pending import CountingScope
from tests.helpers.compare import assert_same_bits, generator

D, T = 8, 32
pytestmark = pytest.mark.filterwarnings("error:.*router")


def make() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(MoE(D, 8, 4, 2, name="0"), MoE(D, 8, 4, 2, name="1"))


def batch(num_tokens: int = T) -> Tensor:
    return torch.randn(num_tokens, D, generator=generator(num_tokens))


def pending(model: nn.Sequential) -> list[int]:
    return [int(layer.router.pending.num_tokens) for layer in model]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(batch()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# Again


@pytest.mark.parametrize("how", ["remove", "replace"])
def test_a_new_optimizer(how: str) -> None:
    """What is pending stays; the old optimizer no longer commits, and the old attachment's remove() undoes nothing."""
    model = make()
    first, second = SGD(model.parameters(), 1e-3), SGD(model.parameters(), 1e-3)
    old = attach(model, first)
    train_step(model, first)
    model(batch()).square().mean().backward()
    if how == "remove":
        old.remove()
    new = attach(model, second, replace=how == "replace")
    first.step()
    assert pending(model) == [T, T]
    second.step()
    assert pending(model) == [0, 0]
    assert [int(layer.router.steps) for layer in model] == [1, 1]
    old.remove()
    train_step(model, second)
    assert pending(model) == [0, 0]
    assert [int(layer.router.steps) for layer in model] == [2, 2]
    assert not first._optimizer_step_post_hooks
    new.remove()
    new.remove()
    assert not any(layer.router.attached for layer in model)
    assert not any((model._forward_hooks, model._forward_pre_hooks, second._optimizer_step_post_hooks))


def test_replace_takes_several_attachments_for_one_and_none_for_new() -> None:
    model = make()
    optimizer = SGD(model.parameters(), 1e-3)
    parts = [attach(part, optimizer, replace=True) for part in model]
    whole = attach(model, optimizer, replace=True)
    train_step(model, optimizer)
    assert pending(model) == [0, 0]
    assert len(optimizer._optimizer_step_post_hooks) == 1
    assert not any(part._forward_hooks for part in model)
    for part in parts:
        part.remove()
    assert all(layer.router.attachment is whole for layer in model)


class Refusing:
    """Offers hooks and takes none."""

    def register_step_post_hook(self, hook: Any) -> Any:
        raise NotImplementedError("planted")


def test_what_replace_refuses_changes_nothing() -> None:
    model = make()
    optimizer = SGD(model.parameters(), 1e-3)
    attachment = attach(model, optimizer)
    with pytest.raises(RuntimeError, match=r"twice a step; call remove\(\).*, or attach\(\.\.\., replace=True\)"):
        attach(model, optimizer)
    with pytest.raises(RuntimeError, match=r"must cover every router .*, got a model without '1\.router': attach the"):
        attach(model[0], optimizer, replace=True)
    with pytest.raises(TypeError, match="got list of SGD"):
        attach(model, [optimizer], replace=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every_n_steps must be at least 1"):
        attach(model, optimizer, replace=True, every_n_steps=0)
    with pytest.raises(NotImplementedError, match="planted"):
        attach(model, Refusing(), replace=True)  # type: ignore[arg-type]
    assert all(layer.router.attachment is attachment for layer in model)
    train_step(model, optimizer)
    assert pending(model) == [0, 0]


def test_a_forward_that_was_interrupted_is_over_by_the_next_step() -> None:
    """An interrupt ends a forward past its hooks; what was entered must not count for what comes later."""
    model = make()
    optimizer = SGD(model.parameters(), 1e-3)
    attach(model, optimizer)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(batch())
    handle.remove()
    train_step(model, optimizer)
    with torch.no_grad():
        model[0](batch())
    assert pending(model) == [0, 0]


# Threads


def on_another_thread(run: Callable[[], object]) -> None:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.parametrize("kind", ["no_grad", "grad"])
def test_a_forward_beside_another_counts_by_its_own_mode(kind: str) -> None:
    """Inside the one forward, between its layers, all of the other runs on another thread."""
    model = make()
    attach(model, SGD(model.parameters(), 1e-3))
    beside = [True]

    def other(*_: Any) -> None:
        if beside and beside.pop():
            on_another_thread(run)

    def run() -> None:
        with torch.set_grad_enabled(kind == "grad"):
            model(batch(5))

    model[1].register_forward_pre_hook(other)
    with torch.set_grad_enabled(kind == "no_grad"):
        model(batch())
    assert pending(model) == ([T, T] if kind == "no_grad" else [5, 5])


def test_a_training_thread_beside_one_that_looks() -> None:
    model = make()
    attach(model, SGD(model.parameters(), 1e-3))
    stop = threading.Event()

    def look() -> None:
        with torch.no_grad():
            while not stop.is_set():
                model(batch(1))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(30):
            model(batch(100))
    finally:
        stop.set()
        thread.join(timeout=60)
    assert pending(model) == [3000, 3000]


def test_a_thread_that_calls_a_part_goes_by_its_own_modes() -> None:
    """It has entered no root, and a new thread begins with gradients enabled."""
    model = make()
    attach(model, SGD(model.parameters(), 1e-3))

    def part() -> None:
        model[0](batch(3))
        with torch.no_grad():
            model[0](batch(4))

    model[1].register_forward_pre_hook(lambda *_: on_another_thread(part))
    with torch.no_grad():
        model(batch())
    assert pending(model) == [3, 0]


def test_a_thread_with_reentrant_checkpointing_inside_its_root() -> None:
    class Model(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = checkpoint(layer, x, use_reentrant=True)
            return x

    model = Model(*make())
    attach(model, SGD(model.parameters(), 1e-3))
    on_another_thread(lambda: model(batch().requires_grad_()).sum().backward())
    assert pending(model) == [T, T]


def test_an_exception_on_a_thread_leaves_its_flag_clear() -> None:
    model = make()
    attachment = attach(model, SGD(model.parameters(), 1e-3))
    told: list[Any] = []

    def fails() -> None:
        with pytest.raises(ValueError, match="x must have"):
            model(torch.ones(2, D + 1))
        told.append(attachment._scope.entered)

    on_another_thread(fails)
    assert told == [()]


def test_scopes_are_copied_without_their_threads() -> None:
    scope = CountingScope(owner=object())
    scope.enter(True)
    for other in (copy.deepcopy(scope), pickle.loads(pickle.dumps(scope))):
        assert other.active is None
        assert other.owner is None


def test_compiled_code_sees_which_root_is_entered() -> None:
    scope = CountingScope()
    seen = torch.compile(lambda x: x + {None: 0, False: 1, True: 2}[scope.active], backend="eager", fullgraph=True)
    found = []
    for counts in (None, False, True):
        if counts is not None:
            scope.enter(counts)
        found.append(int(seen(torch.zeros(()))))
    assert found == [0, 1, 2]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_attached_model_trains_by_itself(how: Callable[[nn.Module], Any]) -> None:
    model = make()
    optimizer = SGD(model.parameters(), 1e-3)
    attach(model, optimizer)
    train_step(model, optimizer)
    other = how(model)
    second = SGD(other.parameters(), 1e-3)
    attach(other, second)
    train_step(other, second)
    assert pending(other) == [0, 0]
    assert [int(layer.router.steps) for layer in other] == [1, 1]
    assert [int(layer.router.steps) for layer in model] == [0, 0]


def test_compiled_code_goes_by_the_thread_that_runs_it() -> None:
    torch._dynamo.reset()
    model = make()
    for layer in model:
        layer.compile(fullgraph=True, backend="eager")
    attach(model, SGD(model.parameters(), 1e-3))
    model(batch())
    assert pending(model) == [T, T]

    def look() -> None:
        with torch.no_grad():
            model(batch())

    on_another_thread(look)
    assert pending(model) == [T, T]
    on_another_thread(lambda: model(batch()))
    assert pending(model) == [2 * T, 2 * T]
    plain = make()
    attach(plain, SGD(plain.parameters(), 1e-3))
    for _ in range(2):
        plain(batch())
    for layer, other in zip(model, plain, strict=True):
        assert_same_bits(layer.router.pending.counts, other.router.pending.counts)
    torch._dynamo.reset()
