"""attach: one commit per optimizer step, whatever happens between two steps."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kmeans_route import KMeansRouter, LearnedRouter, MoE, attach
from kmeans_route.training.telemetry import over_routers
from tests.helpers.compare import assert_same_bits, generator, routers_of

D, E, K = 16, 6, 2
REMEDY = "kmeans_route.attach"
UNATTACHED = "ignore:.*nothing commits its statistics"


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    """A test says which warning it expects."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*deterministic")
        yield


class Model(nn.Module):
    """Two blocks with a mixture each. For blocks that are recomputed in the backward pass see test_recompute.py."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inward = nn.Linear(D, D)
        self.blocks = nn.ModuleList(MoE(D, 8, E, K, name=f"blocks.{i}", **options) for i in range(2))
        self.outward = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inward(x)
        for block in self.blocks:
            h = h + block(h)
        return self.outward(h).square().mean()


def make(**options: Any) -> Model:
    torch.manual_seed(7)
    return Model(**options)


def batch(seed: int, num_tokens: int = 120) -> Tensor:
    gen = generator(seed)
    return torch.randn(num_tokens, D, generator=gen) + 0.5 * torch.randn(D, generator=gen)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def pending_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{i}.{field}": getattr(router.pending, field).clone()
        for i, router in enumerate(routers_of(model))
        for field in router.pending.FIELDS
    }


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_same_bits(got[name], value, name)


def tokens_pending(model: nn.Module) -> list[int]:
    return [int(router.pending.num_tokens) for router in routers_of(model)]


def by_hand(model: nn.Module) -> None:
    for router in routers_of(model):
        router.commit()


def test_commits_once_per_step_and_only_then() -> None:
    attached, hand = make(), make()
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-2) for model in (attached, hand)]
    attach(attached, optimizers[0])
    by_hand(hand)
    for step in range(4):
        before = state_of(attached)
        for part in batch(step).split(40):
            for model in (attached, hand):
                (model(part) / 3).backward()
        assert_same(state_of(attached), before)
        assert tokens_pending(attached) == [120, 120]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        by_hand(hand)
        assert tokens_pending(attached) == [0, 0]
        assert_same(state_of(attached), state_of(hand))
    # The first commit sets the centroids, the other three are steps.
    assert [int(router.steps) for router in routers_of(attached)] == [3, 3]


def test_forwards_inside_the_step_count() -> None:
    """LBFGS runs its forwards inside step: the commit comes after all of them, once."""
    model = make()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)
    attach(model, optimizer)
    calls: list[list[int]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(batch(len(calls)))
        loss.backward()
        calls.append([int(router.steps) for router in routers_of(model)])
        return loss

    by_step = []
    for _ in range(3):
        optimizer.step(closure)
        by_step.append(len(calls))
        assert tokens_pending(model) == [0, 0]
    assert by_step[0] > 1
    assert [int(router.steps) for router in routers_of(model)] == [2, 2]
    # The state does not move between the closures of one step.
    assert calls == [[step, step] for step in (0, 0, 1) for _ in range(len(calls) // 3)]


def test_the_step_of_another_optimizer_does_not_commit() -> None:
    """Two optimizers over one model: the one attached to commits, once each time that it steps."""
    model, twin = make(), make()
    by_hand(twin)
    tied = torch.optim.AdamW(model.blocks.parameters(), 1e-2)
    other = torch.optim.SGD([*model.inward.parameters(), *model.outward.parameters()], 1e-2)
    attach(model, tied)
    for step in range(3):
        before = state_of(model)
        for each in (model, twin):
            each(batch(step)).backward()
        other.step()
        assert_same(state_of(model), before)
        assert_same(pending_of(model), pending_of(twin))
        tied.step()
        by_hand(twin)
        after = state_of(model)
        assert_same(after, state_of(twin))
        other.step()
        assert_same(state_of(model), after)
        assert [int(router.steps) for router in routers_of(model)] == [step, step]
        twin.load_state_dict(model.state_dict())  # the parameters: those of the twin have no optimizer
        model.zero_grad()
        twin.zero_grad()


def test_clipping_gradients_touches_neither_state_nor_pending() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    attach(model, optimizer)
    for step in range(2):
        (1e3 * model(batch(step))).backward()
        before, gathered = state_of(model), pending_of(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        torch.nn.utils.clip_grad_value_(model.parameters(), 1e-4)
        assert float(norm) > 1e-3
        assert_same(state_of(model), before)
        assert_same(pending_of(model), gathered)
        optimizer.step()
        optimizer.zero_grad()
    assert [int(router.steps) for router in routers_of(model)] == [1, 1]
    assert not any(router.weight.requires_grad for router in routers_of(model))


class Still(torch.optim.SGD):
    """Moves nothing, and like a fused optimizer leaves `found_inf` to the device: its step hooks always run."""

    found_inf: Tensor

    def step(self, closure: Any = None) -> None:
        pass


@pytest.mark.parametrize("first_data", [True, False], ids=["first_data", "later"])
def test_a_step_that_the_scaler_skips_joins_the_next_commit(first_data: bool) -> None:
    skipping, joined = make(), make()
    optimizers = [Still(model.parameters()) for model in (skipping, joined)]
    for model, optimizer in zip((skipping, joined), optimizers, strict=True):
        attach(model, optimizer)
        if not first_data:
            model(batch(0))
            optimizer.step()
    before = state_of(skipping)
    skipping(batch(1))
    gathered = pending_of(skipping)
    optimizers[0].found_inf = torch.tensor([1.0])
    optimizers[0].step()
    assert_same(state_of(skipping), before)
    assert_same(pending_of(skipping), gathered)
    optimizers[0].found_inf = torch.tensor([0.0])
    for part in (1, 2):
        if part == 2:
            skipping(batch(part))
        joined(batch(part))
    for optimizer in optimizers:
        optimizer.step()
    assert tokens_pending(skipping) == [0, 0]
    assert_same(state_of(skipping), state_of(joined))
    assert [int(router.steps) for router in routers_of(skipping)] == ([0, 0] if first_data else [1, 1])


@pytest.mark.parametrize("first_data", [True, False], ids=["first_data", "later"])
def test_every_n_steps_joins_what_n_steps_gathered(first_data: bool) -> None:
    """The state moves at each third step, a skipped one among them: it counts as a step, and its tokens count."""
    seldom, joined = make(), make()
    optimizers = [Still(model.parameters()) for model in (seldom, joined)]
    attach(seldom, optimizers[0], every_n_steps=3)
    attach(joined, optimizers[1])
    if not first_data:
        for model, optimizer in zip((seldom, joined), optimizers, strict=True):
            model(batch(0))
            for _ in range(3):
                optimizer.step()
    for commits in range(2):
        before = state_of(seldom)
        for step in range(1, 4):
            assert_same(state_of(seldom), before)
            assert tokens_pending(seldom) == [120 * (step - 1)] * 2
            for model in (seldom, joined):
                model(batch(10 * commits + step))
            optimizers[0].found_inf = torch.tensor([float(step == 2)])
            optimizers[0].step()
        optimizers[1].step()
        assert tokens_pending(seldom) == [0, 0]
        assert_same(state_of(seldom), state_of(joined))
        assert all(int(router.tokens_per_expert.sum()) == 3 * 120 * K for router in routers_of(seldom))
        steps = commits if first_data else commits + 1
        assert [int(router.steps) for router in routers_of(seldom)] == [steps, steps]


def test_a_commit_due_at_a_skipped_step_is_made_up_for() -> None:
    model = make()
    optimizer = Still(model.parameters())
    attach(model, optimizer, every_n_steps=2)
    for step in range(4):
        model(batch(step))
        optimizer.found_inf = torch.tensor([float(step == 1)])
        optimizer.step()
    assert tokens_pending(model) == [0, 0]
    assert all(int(router.tokens_per_expert.sum()) == 4 * 120 * K for router in routers_of(model))


@pytest.mark.parametrize("fused", [True, False])
def test_a_real_gradient_scaler(fused: bool) -> None:
    """A fused optimizer fires its hooks on a step that the scaler skips, an unfused one does not."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=fused)
    attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(batch(0))).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert all(router.initialized for router in routers_of(model))
    before = state_of(model)
    scaler.scale(model(batch(1)) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert_same(state_of(model), before)
    assert tokens_pending(model) == [120, 120]
    scaler.scale(model(batch(2))).backward()
    scaler.step(optimizer)
    assert tokens_pending(model) == [0, 0]
    assert [int(router.steps) for router in routers_of(model)] == [1, 1]
    for router in routers_of(model):
        assert int(router.tokens_per_expert.sum()) == 2 * 120 * K


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode", "frozen"])
def test_forwards_of_an_attached_model_that_do_not_count(mode: str) -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    attachment = attach(model, optimizer)
    model(batch(0)).backward()
    optimizer.step()
    if mode != "frozen":  # which drops what is pending
        model(batch(1)).backward()
    before, gathered = state_of(model), pending_of(model)
    if mode == "eval":
        model.eval()
        model(batch(2)).backward()
    elif mode == "frozen":
        for router in attachment.routers.values():
            router.freeze()
        model(batch(2)).backward()
        optimizer.step()
    else:
        with torch.no_grad() if mode == "no_grad" else torch.inference_mode():
            model(batch(2))
    assert_same(pending_of(model), gathered)
    assert_same(state_of(model), before)


def test_a_forward_that_raises_does_not_leave_the_flag_set() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    attach(model, optimizer)
    with pytest.raises(RuntimeError):
        model(torch.zeros(3, D + 1))
    with torch.no_grad():
        routers_of(model)[0](batch(0))
    assert tokens_pending(model) == [0, 0]
    routers_of(model)[0](batch(0))
    assert tokens_pending(model) == [120, 0]


def test_remove_ends_it_and_attaching_again_works() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    attachment = attach(model, optimizer)
    model(batch(0)).backward()
    optimizer.step()
    attachment.remove()
    before = state_of(model)
    with pytest.warns(UserWarning, match=REMEDY):
        model(batch(1)).backward()
    optimizer.step()
    assert_same(state_of(model), before)
    assert tokens_pending(model) == [120, 120]
    attach(model, optimizer)
    optimizer.step()
    assert tokens_pending(model) == [0, 0]
    assert [int(router.steps) for router in routers_of(model)] == [1, 1]


def test_what_attach_refuses() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with pytest.raises(ValueError, match="model must contain at least one router, got none in Linear"):
        attach(nn.Linear(2, 2), optimizer)
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed group, got object: call"):
        attach(model, optimizer, process_group=object())
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        attach(model, optimizer, every_n_steps=0)
    attach(model.blocks[1], optimizer)
    with pytest.raises(RuntimeError, match=r"router 'blocks\.1\.router' must not be attached twice"):
        attach(model, torch.optim.SGD(model.parameters(), 1e-2))
    attach(model.blocks[0], optimizer)  # a refused call ties nothing


def test_metrics_carry_the_names_of_the_model() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    attachment = attach(model, optimizer)
    for step in range(2):
        model(batch(step)).backward()
        optimizer.step()
    assert list(attachment.routers) == ["blocks.0.router", "blocks.1.router"]
    assert list(attachment.routers.values()) == routers_of(model)
    got = attachment.metrics()
    for i, router in enumerate(routers_of(model)):
        own = router.metrics()
        assert {name: got[f"blocks.{i}.router/{name}"] for name in own} == own
        assert own["steps"] == 1
    two = torch.tensor([router.metrics()["score_std"] for router in routers_of(model)], dtype=torch.float64)
    assert got["routers/score_std_min"] == float(two.min())
    assert got["routers/score_std_p50"] == pytest.approx(float(two.mean()))
    assert len(got) == (2 + 3) * len(own)
    assert set(attachment.metrics(max_keys=4 * len(own))) == {key for key in got if key.startswith("routers/")}
    assert list(attachment.metrics(["maxvio"], max_keys=5)) == [
        *(f"routers/maxvio_{percentile}" for percentile in ("min", "p50", "max")),
        *(f"blocks.{i}.router/maxvio" for i in range(2)),
    ]
    assert len(attachment.metrics(max_keys=3)) == 3
    root = KMeansRouter(D, E, K)
    alone = attach(root, torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1e-2))
    assert {name.partition("/")[0] for name in alone.metrics()} == {"router"}


def test_of_many_routers_come_percentiles() -> None:
    values = {str(i): {"maxvio": float(i)} for i in range(11)}
    got = over_routers(values, None, 5)
    assert got == {"routers/maxvio_min": 0, "routers/maxvio_p10": 1, "routers/maxvio_p50": 5, "routers/maxvio_p90": 9,
                   "routers/maxvio_max": 10}  # fmt: skip


def test_names_are_those_of_the_model_that_was_compiled() -> None:
    model = make()
    attachment = attach(torch.compile(model), torch.optim.SGD(model.parameters(), 1e-2))
    assert list(attachment.routers) == ["blocks.0.router", "blocks.1.router"]
    assert repr(attachment) == "Attachment('blocks.0.router', 'blocks.1.router'; 0 steps)"


def test_a_save_between_commits_is_told_when_to_come() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    attach(model, optimizer, every_n_steps=3)
    model(batch(0)).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"save right after a commit, every 3 optimizer steps, with attachment.state_"):
        model.state_dict()
    with pytest.warns(UserWarning, match=r"drops 120 pending .*; freeze right after a commit, every 3 optimizer"):
        routers_of(model)[0].freeze()


@pytest.mark.parametrize("how", ["attached", "unattached"])
@pytest.mark.parametrize("options", [{}, {"balance": "none"}, {"kind": "sigmoid", "balance": "aux"}], ids=str)
def test_a_router_that_no_commit_changes_is_saved_loaded_and_frozen_without_a_word(
    options: dict[str, str], how: str
) -> None:
    model = nn.Sequential(LearnedRouter(D, E, K, **options))
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    if how == "attached":
        attach(model, optimizer)
    model(batch(0))
    state = model.state_dict()
    model(batch(1))
    model.load_state_dict(state)
    model(batch(2))
    assert model[0].freeze().frozen


def caught_in(forwards: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        forwards()
    return [str(w.message) for w in caught if "router" in str(w.message)]


def test_training_unattached_warns_once_with_the_remedy() -> None:
    router = KMeansRouter(D, E, K, name="layers.3")
    told = caught_in(lambda: [router(batch(step)) for step in range(3)])
    assert len(told) == 1
    assert "layers.3" in told[0]
    assert REMEDY in told[0]
    assert "commit()" in told[0]


def test_what_does_not_warn() -> None:
    committed, attached, evaluated, frozen = (KMeansRouter(D, E, K) for _ in range(4))
    committed.commit()
    assert caught_in(lambda: committed(batch(0))) == []
    attach(attached, torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1e-2))
    assert caught_in(lambda: attached(batch(0))) == []
    assert caught_in(lambda: evaluated.eval()(batch(0))) == []
    frozen.freeze()
    assert caught_in(lambda: frozen(batch(0))) == []
    # The softmax router has nothing to commit that would change it.
    assert caught_in(lambda: LearnedRouter(D, E, K)(batch(0))) == []
    assert len(caught_in(lambda: LearnedRouter(D, E, K, kind="sigmoid")(batch(0)))) == 1


def test_initialising_is_not_committing() -> None:
    router = KMeansRouter(D, E, K)
    router.initialize(batch(0))
    assert len(caught_in(lambda: router(batch(1)))) == 1


@pytest.mark.parametrize("kind", ["kmeans", "softmax", "sigmoid"])
def test_a_copy_is_not_attached(kind: str) -> None:
    model = make(router=kind)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    attach(model, optimizer)
    model(batch(0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    other = copy.deepcopy(model)
    assert_same(state_of(other), state_of(model))
    before = state_of(other)
    model(batch(1)).backward()
    optimizer.step()
    assert_same(state_of(other), before)
    second = torch.optim.SGD(other.parameters(), 1e-2)
    attach(other, second)
    after = state_of(model)
    other(batch(1)).backward()
    second.step()
    assert_same(state_of(model), after)
    if kind != "softmax":
        assert any(not torch.equal(b, before[name]) for name, b in other.named_buffers())


def test_learned_routers_commit_too() -> None:
    model = make(router="sigmoid")
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    attachment = attach(model, optimizer)
    for _ in range(2):
        model(batch(0)).backward()
    optimizer.step()
    for router in attachment.routers.values():
        assert isinstance(router, LearnedRouter)
        assert int(router.tokens_per_expert.sum()) == 2 * 120 * K
        assert router.expert_bias.any()
        assert float(router.expert_bias.abs().max()) <= 0.02 + 1e-6


def test_a_watched_part_decides_for_itself_when_it_is_called_past_the_whole() -> None:
    """A training loop that calls the blocks, not the model: a look without gradients counts nothing, however deep."""
    model = make()
    attachment = attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    attachment.watch(model.blocks[0])
    with torch.no_grad():
        model.blocks[0](batch(0))
    assert tokens_pending(model) == [0, 0]
    checkpoint(model.blocks[0], batch(0).requires_grad_(), use_reentrant=True)  # enters without gradients, like a look
    assert tokens_pending(model) == [0, 0]
    model.blocks[0](batch(0))
    assert tokens_pending(model) == [120, 0]
    model(batch(1))  # the whole is entered first, and decides for the block that is not watched
    assert tokens_pending(model) == [240, 120]
    assert attachment._scope.active is None
    attachment.remove()
    assert not model.blocks[0]._forward_pre_hooks
