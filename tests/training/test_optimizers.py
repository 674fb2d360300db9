"""Which optimizer really steps: wrappers are looked through, whatever does not step is refused before anything changes.

The wrappers are small ones of the same making as accelerate's, Lookahead, schedule-free, SAM and DeepSpeed's.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from kmeans_route import KMeansRouter, MoE, attach
from kmeans_route.training.optimizers import clocks_of, num_running_steps, parameters_of
from tests.helpers.compare import assert_same_bits, generator

D, T = 16, 64
NUM_STEPS = 4
REFUSED = r"optimizer must be a torch\.optim\.Optimizer whose step runs its hooks, or hold one, got "
pytestmark = pytest.mark.filterwarnings("error:.*router")


def make() -> MoE:
    torch.manual_seed(7)
    return MoE(D, 8, 6, 2)


def batch(seed: int) -> Tensor:
    return torch.randn(T, D, generator=generator(seed)) + 0.3


def router_of(model: MoE) -> KMeansRouter:
    assert isinstance(model.router, KMeansRouter)
    return model.router


class Named:
    """No Optimizer, and no hook; the inner one under any name: ScheduleFreeWrapper has `base`, Megatron `optimizer`."""

    def __init__(self, inner: Any, name: str = "base") -> None:
        self.__dict__[name], self.name = inner, name
        self.param_groups = getattr(inner, "param_groups", [])

    def step(self, closure: Any = None) -> Any:
        return getattr(self, self.name).step(closure)

    def zero_grad(self) -> None:
        getattr(self, self.name).zero_grad()


class WithoutInit(Optimizer):
    """An Optimizer that leaves __init__ out, and so takes hooks at most and runs none: accelerate, timm's Lookahead."""

    def __init__(self, inner: Any, *, takes_hooks: bool) -> None:
        if takes_hooks:
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._base_optimizer = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:
        loss = self._base_optimizer.step(closure)
        with torch.no_grad():
            for parameter in parameters_of([self]):
                parameter.mul_(0.999)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._base_optimizer.zero_grad(set_to_none)


class Delegating:
    """Hands out whatever the inner one has, which no attribute holds."""

    def __init__(self, inner: Any) -> None:
        self.get = lambda: inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.get(), name)


class Engine(Named):
    """Holds the optimizer that steps, and one that holds it too, as DeepSpeed's engine does."""

    def __init__(self, inner: Any) -> None:
        super().__init__(Named(inner, "optimizer"), "optimizer")
        self.basic_optimizer = inner


class Around(Optimizer):
    """Runs hooks of its own, and holds another of the same parameters: pytorch_optimizer's Lookahead and SAM."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.param_groups, self.base_optimizer = inner.param_groups, inner

    def step(self, closure: Any = None) -> Any:
        return self.base_optimizer.step(closure)

    @torch.no_grad()
    def first_step(self) -> None:
        """SAM's climb, which no hook tells of."""
        for parameter in parameters_of([self]):
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=1e-3)
        self.zero_grad()

    def second_step(self) -> None:
        self.base_optimizer.step()
        self.zero_grad()


class Superior(SGD):
    """Its step calls the one of its class, which has hooks too as soon as anybody has made an SGD."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Sharing(Around):
    """Has taken over the attributes of what it wraps, its hooks too."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner)
        self._optimizer_step_post_hooks = inner._optimizer_step_post_hooks


class Part(Optimizer):
    """Each rank steps a part of the parameters by an inner one: ZeRO, or a container of optimizers."""

    def __init__(self, inner: Optimizer) -> None:
        parameters = parameters_of([inner])
        super().__init__(parameters, {})
        self.optim = SGD(parameters[:1], 1e-3)
        self.rest = SGD(parameters[1:], 1e-3)

    def step(self, closure: Any = None) -> None:
        self.optim.step()
        self.rest.step()


class OfList(Named):
    def __init__(self, inner: list[Any]) -> None:
        super().__init__(inner, "optimizers")

    def step(self, closure: Any = None) -> None:
        for each in self.__dict__["optimizers"]:
            each.step(closure)

    def zero_grad(self) -> None:
        for each in self.__dict__["optimizers"]:
            each.zero_grad()


WRAPPERS: dict[str, Callable[[Optimizer], Any]] = {
    "plain": lambda inner: inner,
    **{name: lambda inner, name=name: Named(inner, name) for name in ("optimizer", "base", "_optimizer", "whatever")},
    "in a list of one": lambda inner: OfList([inner]),
    "without __init__": lambda inner: WithoutInit(inner, takes_hooks=False),
    "without __init__, with hooks": lambda inner: WithoutInit(inner, takes_hooks=True),
    "two deep": lambda inner: Named(WithoutInit(Named(inner), takes_hooks=True), "optimizer"),
    "by __getattr__": Delegating,
    "engine": Engine,
    "around": Around,
    "around twice": lambda inner: Around(Around(inner)),
    "named around": lambda inner: Named(Around(inner)),
    "superior": lambda inner: Superior(inner.param_groups, lr=1e-3),
    "around superior": lambda inner: Around(Superior(inner.param_groups, lr=1e-3)),
    "sharing hooks": Sharing,
    "part": Part,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_each_step_of_a_wrapper_commits_once(name: str) -> None:
    """every_n_steps=2 counts the steps: one that counted twice would commit each time."""
    SGD([nn.Parameter(torch.zeros(1))], 1e-3)  # the step of the class itself has hooks from now on
    model, hand = make(), make()
    optimizer = WRAPPERS[name](SGD(model.parameters(), 1e-3))
    attachment = attach(model, optimizer, every_n_steps=2)
    router_of(hand).commit()
    for step in range(2 * NUM_STEPS):
        hand.load_state_dict(dict(model.named_parameters()), strict=False)
        for each in (model, hand):
            each(batch(step)).square().mean().backward()
        optimizer.step()
        model.zero_grad()
        if step % 2:
            router_of(hand).commit()
        assert int(router_of(model).pending.num_tokens) == (0 if step % 2 else T)
    assert attachment.state_dict()["steps"] == 2 * NUM_STEPS
    assert int(router_of(model).steps) == NUM_STEPS - 1
    for key, value in router_of(hand).state_dict().items():
        assert_same_bits(router_of(model).state_dict()[key], value, key)
    attachment.remove()
    assert not any(clock._optimizer_step_post_hooks for clock in clocks_of(optimizer))


def test_the_two_half_steps_of_sam_commit_once() -> None:
    model = make()
    optimizer = Around(SGD(model.parameters(), 1e-3))
    attach(model, optimizer)
    for step in range(NUM_STEPS):
        model(batch(step)).square().mean().backward()
        optimizer.first_step()
        assert int(router_of(model).pending.num_tokens) == T
        model(batch(step)).square().mean().backward()
        optimizer.second_step()
        assert int(router_of(model).pending.num_tokens) == 0
    assert int(router_of(model).steps) == NUM_STEPS - 1


def test_a_step_that_raises_does_not_hold_up_the_next() -> None:
    model = make()
    optimizer = Around(SGD(model.parameters(), 1e-3))
    attach(model, optimizer)

    def closure() -> Tensor:
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        optimizer.step(closure)
    model(batch(0)).square().mean().backward()
    optimizer.second_step()
    assert int(router_of(model).pending.num_tokens) == 0


@pytest.mark.parametrize("cumulative", [1, 2])
def test_accelerate(cumulative: int) -> None:
    """Its optimizer is an Optimizer without hooks, which steps when gradients have been accumulated."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=cumulative)
    model = make()
    prepared, optimizer = accelerator.prepare(model, AdamW(model.parameters(), 1e-3))
    attach(prepared, optimizer)
    for step in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(batch(step)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        assert int(router_of(model).pending.num_tokens) == (0 if (step + 1) % cumulative == 0 else T)
    assert int(router_of(model).steps) == 4 // cumulative - 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("wrap", [lambda inner: inner, Named, Around], ids=["plain", "named", "around"])
def test_a_scaler_that_skips_the_inner_one_skips_the_commit(wrap: Callable[[Optimizer], Any], fused: bool) -> None:
    model = make()
    inner = AdamW(model.parameters(), 1e-3, fused=fused)
    attach(model, wrap(inner))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, factor in enumerate((1.0, torch.inf, 1.0)):
        scaler.scale(model(batch(step)).square().mean() * factor).backward()
        scaler.step(inner)
        scaler.update()
        inner.zero_grad()
        assert int(router_of(model).pending.num_tokens) == (T if step == 1 else 0)
    assert int(router_of(model).steps) == 1
    assert int(router_of(model).tokens_per_expert.sum()) == 2 * T * 2


def closures_of(model: MoE, optimizer: Optimizer, calls: Iterator[int]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(batch(next(calls))).square().mean()
        loss.backward()
        return loss

    return closure


def test_many_forwards_inside_a_step_commit_once_and_nothing_is_said() -> None:
    """LBFGS moves the parameters between its closures, far more often than makes a commit overdue."""
    model = make()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=12, tolerance_change=0, tolerance_grad=0)
    attach(model, Named(optimizer))
    calls = itertools.count()
    for _ in range(2):
        optimizer.step(closures_of(model, optimizer, calls))
        assert int(router_of(model).pending.num_tokens) == 0
    assert next(calls) > 16
    assert int(router_of(model).steps) == 1


def two(model: MoE) -> Named:
    wrapper = Named(AdamW(model.parameters(), 1e-3), "first")
    wrapper.second = SGD(model.parameters(), 1e-3)  # type: ignore[attr-defined]
    return wrapper


REFUSALS: dict[str, tuple[Callable[[MoE], Any], str]] = {
    "list": (lambda m: [SGD(m.parameters(), 1e-3)], "list of SGD: pass the one"),
    "dict": (lambda m: {"a": SGD(m.parameters(), 1e-3), "b": AdamW(m.parameters())}, "dict of SGD, AdamW: pass"),
    "scheduler": (lambda m: torch.optim.lr_scheduler.StepLR(SGD(m.parameters(), 1e-3), 1), "StepLR: pass the one"),
    "scaler": (lambda m: torch.amp.GradScaler("cpu"), "GradScaler: pass"),
    "class": (lambda m: SGD, "type: pass"),
    "none": (lambda m: None, "NoneType: pass"),
    "engine": (lambda m: m, "MoE: pass"),
    "several": (two, r"Named, which holds several \(AdamW, SGD\): pass the one optimizer whose steps are to commit"),
    "no inner": (lambda m: WithoutInit(m, takes_hooks=True), "WithoutInit: pass"),
    "around itself": (lambda m: _itself(), "Named: pass"),
}


def _itself() -> Named:
    wrapper, other = Named(None), Named(None)
    wrapper.base, other.base = other, wrapper  # type: ignore[attr-defined]
    return wrapper


@pytest.mark.parametrize("name", REFUSALS)
def test_what_runs_no_hooks_is_refused_by_name_and_nothing_is_marked(name: str) -> None:
    model = make()
    model.param_groups = []  # type: ignore[assignment]  # what "no inner" copies
    wrong, said = REFUSALS[name]
    with pytest.raises(TypeError, match=REFUSED + said):
        attach(model, wrong(model))
    assert not router_of(model).attached
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    right = SGD(model.parameters(), 1e-3)
    attach(model, right)
    model(batch(0)).square().mean().backward()
    right.step()
    assert int(router_of(model).pending.num_tokens) == 0


def test_a_hook_that_cannot_be_registered_marks_nothing() -> None:
    class Refusing(Named):
        def register_step_post_hook(self, hook: Any) -> Any:
            raise NotImplementedError("planted")

    model = make()
    with pytest.raises(NotImplementedError, match="planted"):
        attach(model, Refusing(None))
    assert not router_of(model).attached
    attach(model, SGD(model.parameters(), 1e-3))


def test_anything_with_step_post_hooks_is_a_clock() -> None:
    class Loop:
        def __init__(self) -> None:
            self.hooks: OrderedDict[int, Any] = OrderedDict()

        def register_step_post_hook(self, hook: Any) -> RemovableHandle:
            handle = RemovableHandle(self.hooks)
            self.hooks[handle.id] = hook
            return handle

    model, loop = make(), Loop()
    attachment = attach(model, loop)  # type: ignore[arg-type]
    model(batch(0)).square().mean().backward()
    for hook in loop.hooks.values():
        hook(loop, (), {})
    assert int(router_of(model).pending.num_tokens) == 0
    attachment.remove()
    assert not loop.hooks


def test_running_steps_are_told_by_the_stack() -> None:
    """What is read there is private to PyTorch: this holds it for each version claimed."""
    inner = SGD([nn.Parameter(torch.zeros(1))], 1e-3)
    outer, other = Around(inner), SGD([nn.Parameter(torch.zeros(1))], 1e-3)
    told = []
    for optimizer in (inner, outer, other):
        optimizer.register_step_post_hook(lambda *_: told.append(num_running_steps([outer, inner])))
    outer.step()
    assert told == [2, 1]
    other.step()
    assert told == [2, 1, 0]
    assert num_running_steps([outer, inner]) == 0
