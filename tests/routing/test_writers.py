"""What routes is what lies in `weight` now, whoever wrote it, and however."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import kmeans_route
from kmeans_route import KMeansRouter
from tests.helpers.compare import assert_same_bits, generator
from tests.helpers.writers import WRITERS

D, E, K, T = 16, 8, 2, 64


def routes_by(router: KMeansRouter, x: Tensor) -> None:
    tau = router.options.tau
    want = kmeans_route.route(x, router.weight, K, router.expert_bias, tau=tau, backend=router.backend)
    for got in (router.route(x), router.route_dispatch(x)[0], router(x)):
        assert_same_bits(got.indices, want.indices)
        assert_same_bits(got.weights, want.weights)


@pytest.mark.parametrize("mode", ["eval", "train", "inference"])
@pytest.mark.parametrize("writer", WRITERS)
def test_the_next_forward_follows(backend: str, writer: str, mode: str) -> None:
    router = KMeansRouter(D, E, K, backend=backend)
    router.commit()
    router.train(mode == "train")
    x, gen = torch.randn(T, D, generator=generator(0)), generator(1)
    with torch.inference_mode(mode == "inference"), torch.no_grad():
        router(x)
        for _ in range(2):
            WRITERS[writer](router.weight, torch.randn(E, D, generator=gen))
            routes_by(router, x)


def test_functional_call_with_fresh_state_each_time(backend: str) -> None:
    """An address that memory of another use has taken is no sign of anything; freezing pins the own tensor alone."""
    router, x = KMeansRouter(D, E, K, backend=backend).eval(), torch.randn(T, D, generator=generator(0))
    own = kmeans_route.route(x, router.weight, K)
    for frozen in (False, True):
        router.freeze(frozen)
        assert torch.equal(router(x).indices, own.indices)
        for seed in range(10):
            state = {"weight": torch.randn(E, D, generator=generator(seed))}
            got = functional_call(router, state, (x,))
            assert torch.equal(got.indices, kmeans_route.route(x, state["weight"], K, backend=backend).indices)
            del state
        assert torch.equal(router(x).indices, own.indices)


def test_freezing_pins_until_it_is_said_again() -> None:
    router, x = KMeansRouter(D, E, K).eval().freeze(), torch.randn(T, D, generator=generator(0))
    first, new = router(x), torch.randn(E, D, generator=generator(1))
    router.weight.data.copy_(new)
    assert_same_bits(router(x).weights, first.weights)
    assert not torch.equal(router(x.double()).weights.float(), first.weights), "each dtype pins its own"
    router.freeze()
    routes_by(router, x)
    router.set_centroids(torch.randn(E, D, generator=generator(2)))
    routes_by(router, x)
    router.load_state_dict(KMeansRouter(D, E, K, seed=5).state_dict())
    routes_by(router, x)
    router.load_state_dict(KMeansRouter(D, E, K, seed=6).state_dict(), assign=True)
    routes_by(router, x)
    router.initialize(x)
    routes_by(router, x)
    router.restore(router.snapshot())
    router.freeze(False)
    router.weight.data.copy_(new)
    routes_by(router, x)


@pytest.mark.parametrize("first", [True, False], ids=["before first data", "after it"])
def test_a_snapshot_holds_what_was_there_and_may_be_put_back_twice(first: bool) -> None:
    router = KMeansRouter(D, E, K, balance="quantile")
    x = torch.randn(T, D, generator=generator(0))
    if not first:
        router(x)
        router.commit()
    router(x)
    kept = router.snapshot()
    want = {name: tensor.clone() for name, tensor in held_by(router).items()}
    for seed in (1, 2):
        router(torch.randn(T, D, generator=generator(seed)))
        router.commit()
        router(torch.randn(T, D, generator=generator(seed + 5)))
        router.options = router.options._replace(tau=0.7)
        router.restore(kept)
        assert router.options.tau == 0.1
        got = held_by(router)
        for name, tensor in want.items():
            assert_same_bits(got[name], tensor, name)
        routes_by(router, x)


def held_by(router: KMeansRouter) -> dict[str, Tensor]:
    """Buffers, pending, and the plain tensors of the last step."""
    pending = {name: getattr(router.pending, name) for name in router.pending.FIELDS}
    plain = {name: getattr(router, name) for name in router.PLAIN_TENSORS}
    return dict(router.named_buffers()) | pending | plain
