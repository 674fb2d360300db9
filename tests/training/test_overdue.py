"""A router that gathers through many forwards without a commit says so once, and none that is committed does."""

import copy
import gc
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint

from kmeans_route import LearnedRouter, MoE, attach
from kmeans_route.training import overdue
from kmeans_route.training.overdue import MOST_FORWARDS, MOST_UPDATES, TIMES_USUAL
from tests.helpers.compare import generator

D, T = 8, 16
LOST = "routers gather and nothing commits: attach waits for a step of "
REMEDY = r"call attach\(model, optimizer, replace=True\) with the optimizer that steps now, or attachment.commit\(\)"
ANOTHER = rf"another {{}} has stepped the same parameters {MOST_UPDATES + 1} times: {REMEDY}"
UPDATED = rf"in {MOST_UPDATES + 2} forwards that counted its parameters were updated {MOST_UPDATES + 1} times: {REMEDY}"


def make(**options: Any) -> MoE:
    torch.manual_seed(7)
    return MoE(D, 8, 4, 2, **options)


def batch(seed: int = 0) -> Tensor:
    return torch.randn(T, D, generator=generator(seed))


def backward(model: Any, *_: Any) -> None:
    model(batch()).square().mean().backward()


def said_in(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "router" in str(w.message)]


class ByData(Optimizer):
    """Writes past the version counters, as many an optimizer from elsewhere does."""

    def __init__(self, parameters: Any, lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad.data, alpha=-group["lr"])


REBUILT: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD": lambda p: SGD(p, 1e-3),
    "AdamW": lambda p: AdamW(p, foreach=True),
    "AdamW, fused": lambda p: AdamW(p, fused=True),
    "ByData": ByData,
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "gone"])
@pytest.mark.parametrize("name", REBUILT)
def test_an_optimizer_that_was_rebuilt_is_named_once(name: str, kept: bool, compiled: bool) -> None:
    """Whether the first one is still there or not, and where the whole forward is one graph."""
    model = make()
    first = AdamW(model.parameters())
    attach(model, first)
    if not kept:
        del first
    optimizer = REBUILT[name](list(model.parameters()))
    forward = torch.compile(model, backend="eager", fullgraph=True) if compiled else model

    def train() -> None:
        for _ in range(3 * MOST_UPDATES):
            backward(forward)
            optimizer.step()

    (said,) = said_in(train)
    assert said.startswith(LOST + "AdamW, and another ")
    assert re.search(ANOTHER.format(name.partition(",")[0]), said)
    torch._dynamo.reset()


def half_steps(model: MoE, optimizer: Optimizer) -> None:
    """SAM by an optimizer whose step nobody calls, and that holds no other."""
    for sign in (1.0, -1.0):
        backward(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=sign * 1e-3)
        optimizer.zero_grad()


def by_foreach(model: MoE, optimizer: Optimizer) -> None:
    backward(model)
    parameters = [p for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        torch._foreach_add_(parameters, [p.grad for p in parameters], alpha=-1e-3)
    optimizer.zero_grad()


@pytest.mark.parametrize("update", [half_steps, by_foreach])
def test_updates_without_a_step_are_told_from_micro_batches(update: Callable[[MoE, Optimizer], None]) -> None:
    model = make()
    optimizer = SGD(model.parameters(), 1e-3)
    attachment = attach(model, optimizer)
    (said,) = said_in(lambda: [update(model, optimizer) for _ in range(4 * MOST_UPDATES)])
    assert said.startswith(LOST + "SGD, and ")
    assert re.search(UPDATED, said)
    again = make()
    attachment = attach(again, SGD(again.parameters(), 1e-3))
    assert said_in(lambda: [(update(again, optimizer), attachment.commit()) for _ in range(4 * MOST_UPDATES)]) == []


def test_forwards_beyond_any_number_of_micro_batches() -> None:
    model = make()
    optimizer = SGD(model.parameters(), 1e-3)
    attach(model, optimizer)
    assert said_in(lambda: [model(batch()) for _ in range(MOST_FORWARDS)]) == []
    (said,) = said_in(lambda: [model(batch()) for _ in range(3)])
    assert f"{MOST_FORWARDS + 1} forwards have counted since" in said


def test_the_number_of_micro_batches_that_is_usual_is_learned() -> None:
    model = make()
    optimizer = SGD(model.parameters(), 1e-3)
    attachment = attach(model, optimizer)
    usual = MOST_FORWARDS // 2
    for _ in range(usual):
        model(batch())
    optimizer.step()
    assert attachment._overdue is not None
    assert attachment._overdue._most_forwards == TIMES_USUAL * usual


@pytest.mark.parametrize("every_n_steps", [1, 5])
@pytest.mark.parametrize("parts", [1, 64])
def test_micro_batches_are_not_overdue(parts: int, every_n_steps: int) -> None:
    model = make()
    optimizer = SGD(model.parameters(), 1e-3)
    attach(model, optimizer, every_n_steps=every_n_steps)

    def train() -> None:
        for _ in range(2 * MOST_UPDATES):
            for _ in range(parts):
                backward(model)
            optimizer.step()

    assert said_in(train) == []


def test_other_optimizers_and_other_writes_are_not_overdue() -> None:
    """A critic that steps five times as often, and a temperature that each forward clamps."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe, self.critic, self.scale = make(), nn.Linear(D, 1), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.scale.clamp_(0, 1)
            return self.critic(self.moe(x) * self.scale)

    model = Model()
    tied = SGD([*model.moe.parameters(), model.scale], 1e-3)
    critic = SGD(model.critic.parameters(), 1e-3)
    attach(model, tied)

    def train() -> None:
        for _ in range(3):
            for _ in range(5 * MOST_UPDATES):
                backward(model)
                critic.step()
            tied.step()

    assert said_in(train) == []


def test_the_steps_of_another_that_are_usual_are_learned() -> None:
    """Actor and critic share a body: the critic steps as often as it did before."""
    model = make()
    actor, critic = SGD(model.parameters(), 1e-3), SGD(model.parameters(), 1e-3)
    attach(model, actor)

    def train(updates: int) -> None:
        for _ in range(updates):
            backward(model)
            critic.step()

    assert said_in(lambda: (train(MOST_UPDATES), actor.step(), train(TIMES_USUAL * MOST_UPDATES), actor.step())) == []
    (said,) = said_in(lambda: train(2 * TIMES_USUAL**2 * MOST_UPDATES))
    assert f"another SGD has stepped the same parameters {TIMES_USUAL**2 * MOST_UPDATES + 1} times" in said


@pytest.mark.parametrize("still", ["eval", "no_grad", "frozen", "softmax"])
def test_what_gathers_nothing_is_not_overdue(still: str) -> None:
    model = make(**({"router": "softmax"} if still == "softmax" else {}))
    attach(model, SGD(model.parameters(), 1e-3))
    optimizer = SGD(model.parameters(), 1e-3)
    if still == "frozen":
        model.router.freeze()
    if still == "eval":
        model.eval()
    if still == "softmax":
        assert isinstance(model.router, LearnedRouter)

    def train() -> None:
        for _ in range(4 * MOST_UPDATES):
            with torch.set_grad_enabled(still != "no_grad"):
                loss = model(batch()).square().mean()
            if still != "no_grad":
                loss.backward()
                optimizer.step()
                by_foreach(model, optimizer)

    assert said_in(train) == []


def test_a_copy_of_an_attached_model_is_not_overdue() -> None:
    model = make()
    attach(model, SGD(model.parameters(), 1e-3))
    other = copy.deepcopy(model).eval()
    optimizer = SGD(other.parameters(), 1e-3)
    assert said_in(lambda: [by_foreach(other, optimizer) for _ in range(4 * MOST_UPDATES)]) == []


def test_the_hook_of_all_optimizers_goes_with_the_last_attachment() -> None:
    gc.collect()
    hooks = torch_optimizer._global_optimizer_post_hooks
    before = len(hooks)
    models = [make(), make()]
    optimizers = [SGD(model.parameters(), 1e-3) for model in models]
    attachments = [attach(model, optimizer) for model, optimizer in zip(models, optimizers, strict=True)]
    assert len(hooks) <= before + 1
    told = weakref.ref(attachments[1])
    attachments[0].remove()
    attachments[0].remove()
    assert len(hooks) >= 1
    del models, attachments
    optimizers.pop()
    gc.collect()
    assert told() is None, "nothing of the process holds an attachment whose model is gone"
    last = attach(model := make(), optimizers[0])
    last.remove()
    assert not model._forward_hooks
    assert bool(hooks) == bool(overdue._watching), "attachments of other tests may be there"


def test_an_optimizer_that_is_gone_is_not_held() -> None:
    model = make()
    optimizer = AdamW(model.parameters())
    attach(model, optimizer)
    there = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert there() is None


# Reentrant checkpointing of the whole


class Blocks(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.moe, self.reentrant = make(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.moe, x, use_reentrant=self.reentrant)
        return y


NOTHING = "the routers of an attached {} gather nothing: its forward ran without gradients"


@pytest.mark.parametrize("plain_first", [True, False])
@pytest.mark.parametrize("inside", ["root", "parent"])
def test_reentrant_checkpointing_of_the_root_says_so_once(inside: str, plain_first: bool) -> None:
    """Also where steps without checkpointing have gathered before."""
    model = make()
    whole: nn.Module = nn.Sequential(model) if inside == "parent" else model
    optimizer = SGD(model.parameters(), 1e-3)
    attach(model, optimizer)

    def train() -> None:
        for _ in range(3):
            checkpoint(whole, batch().requires_grad_(), use_reentrant=True).square().mean().backward()
            optimizer.step()

    if plain_first:
        backward(model)
        optimizer.step()
    (said,) = said_in(train)
    assert said.startswith(NOTHING.format("MoE"))
    assert "use_reentrant=False, or the blocks inside it in place of the whole" in said


def test_a_watched_part_under_reentrant_checkpointing_says_so() -> None:
    model = nn.Sequential(make(), make())
    attachment = attach(model, SGD(model.parameters(), 1e-3))
    attachment.watch(model[0])
    x = batch().requires_grad_()
    (said,) = said_in(lambda: checkpoint(model[0], x, use_reentrant=True).square().mean().backward())
    assert said.startswith(NOTHING.format("MoE"))


def test_a_part_that_is_not_watched_says_so_too() -> None:
    model = nn.Sequential(make(name="0"), make(name="1"))
    attach(model, SGD(model.parameters(), 1e-3))
    x = batch().requires_grad_()
    run = lambda: checkpoint(model[0], x, use_reentrant=True).square().mean().backward()  # noqa: E731
    (said,) = said_in(lambda: [run() for _ in range(2)])
    assert said.startswith("router '0' gathers nothing")
    assert "attachment.watch(part)" in said


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("looks", [True, False])
def test_parts_and_the_other_kind_are_counted_and_nothing_is_said(reentrant: bool, looks: bool) -> None:
    """A look without gradients before the forward is no first pass of a checkpoint."""
    model: Any = Blocks(reentrant)
    optimizer = SGD(model.parameters(), 1e-3)
    attach(model, optimizer)

    def train() -> None:
        for _ in range(3):
            if looks:
                with torch.no_grad():
                    model(batch())
            x = batch().requires_grad_()
            y = model(x) if reentrant else checkpoint(model, x, use_reentrant=False)
            y.square().mean().backward()
            assert int(model.moe.router.pending.num_tokens) == T
            optimizer.step()

    assert said_in(train) == []
    assert int(model.moe.router.steps) == 2


def test_a_commit_between_a_forward_and_its_backward_pass_is_no_reentrant_checkpoint() -> None:
    model = make()
    attachment = attach(model, SGD(model.parameters(), 1e-3))

    def train() -> None:
        loss = checkpoint(model, batch().requires_grad_(), use_reentrant=False).square().mean()
        attachment.commit()
        loss.backward()

    assert said_in(train) == []


def test_training_in_eval_mode_is_told_once() -> None:
    model = make().eval()
    optimizer = SGD(model.parameters(), 1e-2)
    attach(model, optimizer)

    def steps() -> None:
        for _ in range(3):
            backward(model)
            optimizer.step()

    (said,) = said_in(steps)
    assert said == (
        "MoE must be in training mode for its routers to learn, got an optimizer step after forwards in eval mode "
        "alone, which count nothing: call model.train(), or freeze() the routers"
    )
    assert not said_in(steps)


@pytest.mark.parametrize("how", ["validation between", "frozen", "without gradients"])
def test_forwards_in_eval_mode_that_are_meant_are_not_told(how: str) -> None:
    model = make()
    optimizer = SGD(model.parameters(), 1e-2)
    attach(model, optimizer)
    if how == "frozen":
        model.router.freeze()

    def run() -> None:
        for _ in range(3):
            model.train(how == "validation between")
            if how == "without gradients":
                with torch.no_grad():
                    model(batch())
            else:
                backward(model)
            model.eval()
            if how == "validation between":
                model(batch())
            optimizer.step()

    assert not said_in(run)
