"""Tokens outside of count_mask: routed, gated and dispatched like any other, and counted nowhere."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kmeans_route import KMeansRouter, LearnedRouter, MoE, ops
from kmeans_route.routing.pending import Pending
from tests.helpers.compare import assert_same_bits, generator

T, D, E, K = 60, 24, 6, 2


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states with a row of NaN inside and outside of what counts; a mask; what counts."""
    x = torch.randn(T, D, generator=generator(0))
    x[4], x[9], x[11] = torch.nan, 0.0, torch.inf
    mask = torch.arange(T) % 7 != 3
    count_mask = (torch.arange(T) % 3 != 0) | (torch.arange(T) < 5)
    return x, mask, count_mask


def pair(backend: str, **options: Any) -> tuple[KMeansRouter, KMeansRouter]:
    """Two routers of one state, which has centroids or waits for its first data."""
    first = options.pop("first", False)
    routers = [KMeansRouter(D, E, K, backend=backend, seed=3, **options) for _ in range(2)]
    for router in routers:
        if not first:
            given = torch.randn(E, D, generator=generator(1))
            router.set_centroids(given, averages=options.get("accumulate") == "raw")
        router.expert_bias.copy_(torch.linspace(-0.1, 0.1, E))
        router.commit()  # by hand
    return routers[0], routers[1]


def assert_near_pending(got: Pending, want: Pending) -> None:
    """Sums may have been added up in other groups."""
    for name in Pending.FIELDS:
        one, other = getattr(got, name), getattr(want, name)
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)
        else:
            assert_same_bits(one, other, name)


@pytest.mark.parametrize(
    "options", [{}, {"balance": "quantile"}, {"accumulate": "raw"}, {"first": True, "accumulate": "raw"}], ids=str
)
@pytest.mark.parametrize("by", ["route", "route_dispatch", "forward"])
def test_statistics_are_those_of_the_counted_tokens(backend: str, by: str, options: dict[str, Any]) -> None:
    x, mask, count_mask = inputs()
    router, other = pair(backend, **options)
    plain = router.route(x, mask)
    how = {} if by == "forward" else {"gather": True}
    got = getattr(router, by)(x, mask, count_mask=count_mask, **how)
    got = got[0] if by == "route_dispatch" else got
    assert_same_bits(got.indices, plain.indices)
    assert_same_bits(got.weights, plain.weights)
    other.route(x[count_mask], mask[count_mask], gather=True)
    assert int(other.pending.num_dropped) == 2, "two of the three bad rows count"
    assert_near_pending(router.pending, other.pending)


@pytest.mark.parametrize("balance", ["proportional", "quantile"])
def test_commits_are_those_of_the_counted_tokens(backend: str, balance: str) -> None:
    x, mask, count_mask = inputs()
    router, other = pair(backend, balance=balance)
    router(x, mask, count_mask=count_mask)
    other(x[count_mask], mask[count_mask])
    for each in (router, other):
        each.commit()
        assert not bool(each.pending.counts.any())
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(router.get_buffer(name), buffer, rtol=1e-5, atol=1e-6, msg=name)


def test_nothing_that_counts(backend: str) -> None:
    x, mask, _ = inputs()
    router, other = pair(backend)
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    router(x, mask, count_mask=torch.zeros(T, dtype=torch.bool))
    router.commit()
    for name, buffer in before.items():
        assert_same_bits(router.get_buffer(name), buffer, name)
    other(x, mask, count_mask=torch.ones(T, dtype=torch.bool))
    router(x, mask)
    assert_near_pending(router.pending, other.pending)


def test_one_pass(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, right = [], ops.route
    monkeypatch.setattr(ops, "route", lambda *args: calls.append(1) or right(*args))
    x, mask, count_mask = inputs()
    pair(backend)[0](x, mask, count_mask=count_mask)
    assert calls == [1]


def test_learned_routers_refuse_it() -> None:
    x, _, count_mask = inputs()
    with pytest.raises(ValueError, match="count_mask must be None with router='softmax', got a mask: only K-Means"):
        LearnedRouter(D, E, K).route(x, count_mask=count_mask)


def test_its_checks() -> None:
    x, _, count_mask = inputs()
    router = KMeansRouter(D, E, K)
    with pytest.raises(TypeError, match=r"count_mask must be a bool tensor, got torch\.int64"):
        router(x, count_mask=count_mask.long())
    with pytest.raises(ValueError, match=r"count_mask must have shape \(60,\)"):
        router(x, count_mask=count_mask[:-1])


def test_gradients_do_not_change() -> None:
    x, mask, count_mask = inputs()
    router, _ = pair("torch")
    grads = []
    for counted in (None, count_mask):
        leaf = x.clone().requires_grad_()
        routing = router.route(leaf, mask, count_mask=counted, gather=True)
        (grad,) = torch.autograd.grad(routing.weights[:, 0].sum(), leaf)
        grads.append(grad)
    assert_same_bits(grads[0], grads[1])
    assert MoE(D, 8, E, K).router.attached is False
