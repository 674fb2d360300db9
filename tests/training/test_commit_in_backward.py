"""A commit that a backward pass asks for comes as that pass ends: what it recomputes is routed as its forward was."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from kmeans_route import KMeansRouter, MoE, attach, ops
from tests.helpers.compare import assert_same_bits, generator
from tests.helpers.ranks import run_on_ranks

D, E, T = 16, 8, 96
NUM_BLOCKS, NUM_STEPS = 3, 4
TIED = {"head": "head.bias", "last": "blocks.2.experts.gate_up", "first": "blocks.0.experts.gate_up"}
pytestmark = pytest.mark.filterwarnings("error:.*router")


class Model(nn.Module):
    """Blocks, and perhaps a head, that are recomputed in the backward pass."""

    def __init__(self, *, reentrant: bool, head: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.blocks = nn.ModuleList(MoE(D, 8, E, 2, name=str(i)) for i in range(NUM_BLOCKS))
        self.head = nn.Linear(D, 1)
        self.reentrant, self.checkpoint_head = reentrant, head
        self.ids: list[list[Tensor]] = [[] for _ in self.blocks]
        for block, ids in zip(self.blocks, self.ids, strict=True):
            block.router.observe(lambda _tokens, routing, ids=ids: ids.append(routing.indices.clone()))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        y: Tensor = checkpoint(self.head, x, use_reentrant=self.reentrant) if self.checkpoint_head else self.head(x)
        return y.square().mean()

    def routers(self) -> list[KMeansRouter]:
        return [block.router for block in self.blocks]

    def pending(self) -> list[int]:
        return [int(router.pending.num_tokens) for router in self.routers()]

    def take_ids(self) -> list[list[Tensor]]:
        taken = [list(ids) for ids in self.ids]
        for ids in self.ids:
            ids.clear()
        return taken


def batch(seed: int) -> Tensor:
    return (torch.randn(T, D, generator=generator(seed)) + 0.3).requires_grad_()


def step_in_backward(model: Model, kind: type[Optimizer] = AdamW, **options: Any) -> dict[str, Optimizer]:
    """One optimizer a parameter, stepped as its gradient is there."""
    made: dict[str, Optimizer] = {name: kind([p], **{"lr": 1e-3, **options}) for name, p in model.named_parameters()}  # type: ignore[call-arg]

    for name, parameter in model.named_parameters():

        def step(_parameter: Tensor, name: str = name) -> None:
            made[name].step()
            made[name].zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    return made


@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("head", [False, True], ids=["", "head checkpointed"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_an_optimizer_that_steps_in_the_backward_pass(reentrant: bool, head: bool, tied: str) -> None:
    """Reentrant checkpointing runs a backward pass inside the pass: the end of that one is not the end."""
    model, hand = Model(reentrant=reentrant, head=head), Model(reentrant=reentrant, head=head)
    attach(model, step_in_backward(model)[TIED[tied]])
    step_in_backward(hand)
    by_hand = attach(hand, SGD([nn.Parameter(torch.zeros(1))], 1e-3))
    for step in range(NUM_STEPS):
        for each in (model, hand):
            each(batch(step)).backward()
        for forward, again in model.take_ids():
            assert_same_bits(again, forward)
        assert hand.pending() == [T] * NUM_BLOCKS
        by_hand.commit()
        assert model.pending() == [0] * NUM_BLOCKS, "as the pass ends, not at the next forward"
        for name, value in hand.state_dict().items():
            assert_same_bits(model.state_dict()[name], value, name)
    assert [int(router.steps) for router in model.routers()] == [NUM_STEPS - 1] * NUM_BLOCKS


def test_every_n_steps_and_two_commits_in_one_pass() -> None:
    model = Model(reentrant=True, head=False)
    attachment = attach(model, step_in_backward(model)["head.bias"], every_n_steps=2)
    for step in range(4):
        model(batch(step)).backward()
        assert model.pending() == [0 if step % 2 else T] * NUM_BLOCKS
    model.head.weight.register_post_accumulate_grad_hook(lambda _: attachment.commit())
    steps = [int(router.steps) for router in model.routers()]
    for step in range(2):
        model(batch(step)).backward()
        assert model.pending() == [0] * NUM_BLOCKS
    assert [int(router.steps) for router in model.routers()] == [each + 2 for each in steps]


def test_a_backward_pass_that_raises_after_the_step_is_made_up_for_once() -> None:
    """The step has been taken: its commit comes before the next forward, and not once more."""
    model, hand = Model(reentrant=False, head=False), Model(reentrant=False, head=False)
    attachment = attach(model, step_in_backward(model)["head.bias"])
    by_hand = attach(hand, SGD([nn.Parameter(torch.zeros(1))], 1e-3))
    step_in_backward(hand)

    def raises(_gradient: Tensor) -> Tensor:
        raise ValueError("planted")

    for each in (model, hand):
        each(batch(0)).backward()
    by_hand.commit()
    for each in (model, hand):
        x = batch(1)
        x.register_hook(raises)
        with pytest.raises(ValueError, match="planted"):
            each(x).backward()
    assert model.pending() == hand.pending() == [T] * NUM_BLOCKS
    by_hand.commit()
    with torch.no_grad():
        model(batch(9))  # a look commits nothing
    assert model.pending() == [T] * NUM_BLOCKS
    for each in (model, hand):
        each(batch(2)).backward()
    by_hand.commit()
    for name, value in hand.state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)
    assert [int(router.steps) for router in model.routers()] == [2] * NUM_BLOCKS
    x = batch(1)
    x.register_hook(raises)
    with pytest.raises(ValueError, match="planted"):
        model(x).backward()
    attachment.remove()
    assert model.pending() == [0] * NUM_BLOCKS, "what waits is made up for before the tie goes"


class Found(SGD):
    """Leaves `found_inf` to the device, as a fused optimizer does."""

    found_inf: Tensor | None = None

    def step(self, closure: Any = None) -> None:
        pass


@pytest.mark.parametrize(
    ("flags", "pending"),
    [([1.0], T), ([0.0], 0), ([1.0, 0.0], 0), ([0.0, 1.0], 0), ([1.0, 1.0], T), ([1.0, None], 0), ([None, 1.0], 0)],
)
def test_a_skipped_step_is_skipped_at_the_end_too(flags: list[float | None], pending: int) -> None:
    """Of two commits that one pass asks for, one is made, unless both are skipped."""
    model = Model(reentrant=False, head=False)
    optimizer = Found(model.parameters(), lr=1e-3)
    attach(model, optimizer)

    def steps(_gradient: Tensor) -> None:
        for flag in flags:
            optimizer.found_inf = None if flag is None else torch.tensor([flag])
            optimizer.step()

    y = model(batch(0))
    y.register_hook(steps)
    y.backward()
    assert model.pending() == [pending] * NUM_BLOCKS


def test_a_thread_that_looks_does_not_commit_what_waits() -> None:
    """Only a forward that counts makes up for it: a look may run beside the backward pass."""
    model = Model(reentrant=False, head=False)
    attachment = attach(model, step_in_backward(model)["head.bias"])
    model(batch(0)).backward()
    model.take_ids()
    seen: list[Any] = []

    def look(gradient: Tensor) -> None:
        def run() -> None:
            with torch.no_grad():
                model(batch(5))
            seen.append(model.pending())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    x = batch(1)
    x.register_hook(look)
    model(x).backward()
    assert seen == [[T] * NUM_BLOCKS]
    assert model.pending() == [0] * NUM_BLOCKS
    assert attachment.routers["blocks.0.router"] is model.blocks[0].router


def test_a_routers_own_commit_is_refused_in_a_backward_pass() -> None:
    router = KMeansRouter(D, E, 2, name="layers.3")
    router.commit()
    x = batch(0)
    weights, _, _ = router(x)
    weights.register_hook(lambda _: router.commit())
    with pytest.raises(RuntimeError, match=r"router 'layers\.3' must commit outside of a backward pass, got commit"):
        weights.sum().backward()
    assert int(router.pending.num_tokens) == T
    router.commit()
    assert int(router.pending.num_tokens) == 0


class Nesting(torch.autograd.Function):
    """Its backward runs a backward pass, as reentrant checkpointing does, and asks for a call inside the deepest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, told: list[str]) -> Tensor:
        ctx.depth, ctx.told = depth, told
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        with torch.enable_grad():
            y = torch.ones(2, requires_grad=True, device=dy.device) * 2
            y = Nesting.apply(y, ctx.depth - 1, ctx.told) if ctx.depth > 1 else y
            if ctx.depth == 1:
                y.register_hook(lambda _: ops.call_after_backward(lambda: ctx.told.append("called")))
            y.sum().backward()
        ctx.told.append(f"{ctx.depth} deep ends")
        return dy, None, None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_call_comes_at_the_end_of_the_outermost_pass(depth: int, device: str) -> None:
    """What is read for it is private to PyTorch: this holds it for each version claimed."""
    told: list[str] = []
    x = torch.ones(2, requires_grad=True, device=device)
    z = x * 1
    z.register_hook(lambda _: told.append("the outermost goes on"))
    y = Nesting.apply(z, depth, told)
    for _ in range(2):  # nothing stays on a graph that is kept
        told.clear()
        y.sum().backward(retain_graph=True)
        nested = [f"{level} deep ends" for level in range(1, depth + 1)]
        assert told == [*nested, "the outermost goes on", "called"]


def test_a_call_of_a_plain_pass_comes_at_its_end() -> None:
    told: list[str] = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda _: told.append("first layer"))
    y = x * 2
    y.register_hook(lambda _: ops.call_after_backward(lambda: told.append("called")))
    y.sum().backward()
    assert told == ["first layer", "called"]


def test_a_commit_in_a_pass_that_a_hook_began_waits_for_the_next_forward() -> None:
    """Nothing tells the end of the outer pass there."""
    model = Model(reentrant=False, head=False)
    attachment = attach(model, SGD(model.parameters(), lr=1e-3))

    def begin(_gradient: Tensor) -> None:
        with torch.enable_grad():
            y = torch.ones(2, requires_grad=True) * 2
            y.register_hook(lambda _: attachment.commit())
            y.sum().backward()

    y = model(batch(0))
    y.register_hook(begin)
    y.backward()
    for forward, again in model.take_ids():
        assert_same_bits(again, forward)
    assert model.pending() == [T] * NUM_BLOCKS
    model(batch(1))
    assert model.pending() == [T] * NUM_BLOCKS, "of the second alone"
    assert all(router.has_data for router in model.routers())


def train_on_ranks(rank: int, num_ranks: int) -> list[dict[str, Tensor]]:
    """The state after steps inside the backward pass, and after steps behind it; under DDP, which exchanges too."""
    states = []
    for inside in (True, False):
        model = Model(reentrant=False, head=False)
        root = torch.nn.parallel.DistributedDataParallel(model)
        if inside:
            optimizer = step_in_backward(model, lr=0.0)["blocks.2.experts.gate_up"]
        else:
            optimizer = SGD(model.parameters(), lr=0.0)
        attachment = attach(root, optimizer, wire="bf16", overlap_after=1)
        for step in range(NUM_STEPS):
            root(batch(10 * step + rank).detach()).backward()
            for forward, again in model.take_ids():
                assert_same_bits(again, forward)
            if not inside:
                optimizer.step()
                model.zero_grad()
            assert model.pending() == [0] * NUM_BLOCKS
        attachment.remove()
        states.append({name: buffer.clone() for name, buffer in model.named_buffers()})
    return states


def test_ranks_commit_alike_at_the_end_of_their_backward_passes(tmp_path: Path) -> None:
    ranks = run_on_ranks(train_on_ranks, 2, tmp_path, 2)
    for inside, behind in ranks:
        for name, value in ranks[0][1].items():
            assert_same_bits(behind[name], value, name)
            assert_same_bits(inside[name], value, name)


def recompute_the_whole(rank: int) -> list[tuple[int, bool]]:
    """After each backward pass, the forwards counted, and whether the exchange that the forward began is under way."""
    model = Model(reentrant=False, head=False)
    optimizer = SGD(model.parameters(), lr=0.0)
    attachment = attach(model, optimizer, overlap_after=1)
    told = []
    for step in range(2):
        with set_checkpoint_early_stop(False):  # by default the last layers are not run again
            loss = checkpoint(model, batch(10 * step + rank), use_reentrant=False)
        loss.backward()
        assert attachment._exchange is not None
        told.append((attachment._forwards, attachment._exchange.under_way(model.routers())))  # type: ignore[arg-type]
        optimizer.step()
        assert model.pending() == [0] * NUM_BLOCKS
    return told


def test_the_recomputation_of_the_whole_is_no_forward_more(tmp_path: Path) -> None:
    """One that counted would give up the exchange that runs beside the backward pass."""
    assert run_on_ranks(recompute_the_whole, 2, tmp_path) == [[(1, True)] * 2] * 2
