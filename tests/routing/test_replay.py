"""Replay: a forward with given ids is the forward that recorded them, in its result, its gradients, its statistics."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kmeans_route import KMeansRouter, MoE, attach, record, replay
from tests.helpers.compare import assert_same_bits

T, D, E, K, LAYERS = 24, 16, 8, 2, 2
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics", "ignore:None of the inputs have")


class Stack(nn.Module):
    """Mixture layers one after another, each recomputed in the backward pass where `how` says so."""

    def __init__(self, how: str = "", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.layers = nn.ModuleList(
            MoE(D, 8, E, K, name=f"layer.{i}", learned_offset=True, **options) for i in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.how:
                x = x + checkpoint(layer, x, use_reentrant=self.how == "reentrant")
            else:
                x = x + layer(x)
        return x


def hidden(seed: int = 1, tokens: int = T) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module) -> nn.Module:
    """After three steps, so that routing is no longer that of the first directions."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = attach(model, optimizer)
    for step in range(3):
        model(hidden(step).requires_grad_()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    attachment.remove()
    return model


def moved(model: nn.Module) -> nn.Module:
    """The same experts, centroids elsewhere: it would choose otherwise."""
    for layer in model.layers:
        layer.router.set_centroids(torch.randn(E, D, generator=torch.Generator().manual_seed(5)))
    return model


def ids_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    with record(model) as seen, torch.no_grad():
        model(x)
    return seen.ids


def grads_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.square().mean().backward()
    return {"y": y.detach(), "x": leaf.grad} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["", "saved", "reentrant"])
def test_gradients_are_those_of_the_forward_that_recorded(how: str) -> None:
    """Bit for bit, on the torch backend; with recomputation too, which is recorded once."""
    model = trained(Stack(how, backend="torch")).eval()
    again = copy.deepcopy(model)
    with record(model) as seen:
        want = grads_of(model, hidden())
    assert [tuple(ids.shape) for ids in seen.ids] == [(T, K)] * LAYERS
    for layer in again.layers:  # what would choose otherwise: replay must not look at the bias
        layer.router.expert_bias.normal_()
    assert not torch.equal(ids_of(again, hidden())[0], seen.ids[0])
    with replay(again, seen.ids):
        got = grads_of(again, hidden())
    assert set(got) == set(want)
    for name, value in want.items():
        assert_same_bits(got[name], value, name)


@pytest.mark.not_interpreted
def test_rows_that_are_not_given_are_routed(backend: str) -> None:
    """Outside of the mask, of -1, of ids out of range or repeated: as without replay; the others as given."""
    router = KMeansRouter(D, E, K, backend=backend).eval()
    router.set_centroids(torch.randn(E, D))
    x = hidden()
    native = router.route(x)
    given = (native.indices + 3) % E
    mask = torch.ones(T, dtype=torch.bool)
    mask[:3] = False
    ids = given.clone()
    ids[3], ids[4], ids[5] = -1, ids[4, 0], torch.tensor([0, E])
    with replay(router, [ids], mask):
        got = router.route(x)
    want = torch.where((torch.arange(T) < 6)[:, None], native.indices, given)
    assert torch.equal(got.indices, want)
    assert_same_bits(got.weights[:6], native.weights[:6])
    assert torch.equal(got.tokens_per_expert, torch.bincount(want.flatten(), minlength=E))
    assert torch.equal(router.route(x).indices, native.indices)  # it is over


@pytest.mark.parametrize("count", [True, False])
def test_statistics_count_what_was_used_by_choice(count: bool) -> None:
    router = KMeansRouter(D, E, K, backend="torch").train()
    router.set_centroids(torch.randn(E, D))
    x = hidden()
    ids = (router.route(x).indices + 3) % E
    with replay(router, [ids], count=count):
        router.route(x, gather=True)
    used = torch.bincount(ids.flatten(), minlength=E)
    assert torch.equal(router.pending.counts, used if count else torch.zeros_like(used))
    sums = torch.zeros(E, D).index_add_(0, ids.flatten(), nn.functional.normalize(x).repeat_interleave(K, 0))
    torch.testing.assert_close(router.pending.sums, sums if count else torch.zeros_like(sums))


@pytest.mark.parametrize("which", ["eager", "compiled"])
def test_micro_batches_each_with_a_replay_of_its_own(which: str) -> None:
    """Accumulated gradients of two halves are those of the recorded halves."""
    model = trained(Stack(backend="torch")).eval()
    again = moved(copy.deepcopy(model))
    halves = hidden().split([T // 2, T - T // 2])
    recorded = [ids_of(model, half) for half in halves]
    by_hand = copy.deepcopy(again)
    run: Callable[[Tensor], Tensor] = torch.compile(again, backend="aot_eager") if which == "compiled" else again
    for half, ids in zip(halves, recorded, strict=True):
        with replay(again, ids):
            run(half).square().sum().backward()
        x = half
        for layer, given in zip(by_hand.layers, ids, strict=True):
            x = x + layer(x, indices=given)
        x.square().sum().backward()
    for got, want in zip(again.parameters(), by_hand.parameters(), strict=True):
        assert_same_bits(got.grad, want.grad)
    assert not torch.equal(ids_of(again, halves[0])[0], recorded[0][0])
    with torch.no_grad():
        assert_same_bits(run(halves[0]), again(halves[0]))


def test_a_compiled_forward_is_recorded() -> None:
    model = trained(Stack(backend="torch")).eval()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(hidden())
        with record(model) as seen:
            compiled(hidden())
            compiled(hidden(2))
    want = ids_of(model, torch.cat([hidden(), hidden(2)]))
    assert all(torch.equal(got, ids) for got, ids in zip(seen.ids, want, strict=True))


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.uint16])
def test_layouts_of_others(dtype: type) -> None:
    """An array (tokens, layers, K), as vLLM returns; a dict names some layers, and the others choose."""
    model = trained(Stack(backend="torch")).eval()
    ids = ids_of(moved(copy.deepcopy(model)), hidden())
    array = np.stack([given.numpy() for given in ids], axis=1).astype(dtype)
    with replay(model, torch.from_numpy(array).movedim(1, 0)):
        assert all(torch.equal(got, given) for got, given in zip(ids_of(model, hidden()), ids, strict=True))
    with replay(model, {"layers.0.router": torch.from_numpy(array)[:, 0]}):
        got = ids_of(model, hidden())
    assert torch.equal(got[0], ids[0])
    assert not torch.equal(got[1], ids[1])


def test_an_inner_replay_ends_and_so_does_one_that_raises() -> None:
    router = KMeansRouter(D, E, K).eval()
    router.set_centroids(torch.randn(E, D))
    x = hidden()
    native = router.route(x).indices
    one, other = (native + 1) % E, (native + 2) % E
    with replay(router, [one]):
        with replay(router, [other]):
            assert torch.equal(router.route(x).indices, other)
        assert torch.equal(router.route(x).indices, one)
        assert torch.equal(router.route(x, indices=native).indices, native)  # ids of a call come first
    with pytest.raises(ZeroDivisionError), replay(router, [one]):
        raise ZeroDivisionError
    assert torch.equal(router.route(x).indices, native)
    assert copy.deepcopy(router).replayed is None


@pytest.mark.parametrize("how", [copy.deepcopy, lambda router: pickle.loads(pickle.dumps(router))])
def test_a_copy_made_inside_of_a_replay_routes_by_itself(how: Callable[[KMeansRouter], KMeansRouter]) -> None:
    router, x = KMeansRouter(D, E, K).eval(), hidden()
    router.set_centroids(torch.randn(E, D))
    native = router.route(x).indices
    with replay(router, [(native + 1) % E]):
        assert torch.equal(router.route(x).indices, (native + 1) % E)
        copied = how(router)
    assert torch.equal(copied.route(x).indices, native)


@pytest.mark.parametrize("how", ["saved", "reentrant"])
def test_a_recomputation_after_the_end_is_refused(how: str) -> None:
    model = trained(Stack(how, backend="torch")).eval()
    x = hidden().requires_grad_()
    with replay(model, ids_of(model, x)):
        y = model(x)
    with pytest.raises(RuntimeError, match=r"'layer\.1' must recompute inside of the replay that its forward had"):
        y.square().mean().backward()
    model(x).square().mean().backward()  # a forward without replay recomputes as ever


def test_what_cannot_be_replayed_is_refused() -> None:
    model, x = Stack().eval(), hidden()
    ids = ids_of(model, x)
    refused: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (ids[:1], {}, ValueError, "one .* for each of the 2 routers, got 1"),
        ({"layers.7.router": ids[0]}, {}, ValueError, r"ids must name routers, got 'layers\.7\.router'"),
        ([ids[0].float(), ids[1]], {}, TypeError, r"ids of router 'layer\.0' must be integers, got torch.float32"),
        ([ids[0], ids[1][:, :1]], {}, ValueError, r"ids of router 'layer\.1' must have shape \(T, 2\)"),
        (ids, {"mask": torch.ones(T)}, TypeError, "mask must be a bool tensor"),
        (ids, {"mask": torch.ones(T - 1, dtype=torch.bool)}, ValueError, f"each of the {T} tokens of ids, got {T - 1}"),
    ]
    for given, options, error, message in refused:
        with pytest.raises(error, match=message), replay(model, given, **options):
            pass
        assert all(layer.router.replayed is None for layer in model.layers)
    with replay(model, ids), pytest.raises(ValueError, match=r"must have a row for each of the 3 tokens, got 24"):
        model(x[:3])
    with pytest.raises(ValueError, match="got none"), replay(nn.Linear(2, 2), []):
        pass
    with pytest.raises(ValueError, match="nothing to record"), record(nn.Linear(2, 2)):
        pass
    learned = MoE(D, 8, E, K, router="softmax")
    with pytest.raises(ValueError, match="only K-Means replays"), replay(learned, ids[:1]):
        pass
    with record(learned) as seen:
        learned.eval()(x)
    assert seen.ids[0].shape == (T, K)
