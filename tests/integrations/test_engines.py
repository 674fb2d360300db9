"""The function that engines' MoE layers ask, and vLLM's router that asks it; SGLang's TopK could not be run."""

import pytest
import torch

from kmeans_route import KMeansRouter
from kmeans_route.integrations.engines import routing_function


def a_router() -> KMeansRouter:
    router = KMeansRouter(16, 8, 2, tau=0.3, scaling=1.5)
    router.set_centroids(torch.randn(8, 16))
    return router


def test_it_answers_as_the_router_does_and_gathers_nothing() -> None:
    router, x = a_router(), torch.randn(33, 16)
    weights, indices, _ = router.eval()(x)
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    choose = routing_function(router.train())
    got, ids = choose(hidden_states=x, gating_output=torch.randn(33, 8), topk=2, renormalize=False)  # type: ignore
    assert got.dtype == torch.float32
    assert ids.dtype == torch.int32
    assert got.equal(weights)
    assert ids.equal(indices.int())
    assert router.frozen
    assert all(buffer.equal(before[name]) for name, buffer in router.named_buffers())
    assert not router.tokens_per_expert.any()


def test_another_number_of_experts_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="topk must be that of router '', 2, got 4"):
        routing_function(a_router())(torch.randn(3, 16), torch.randn(3, 8), 4, True)


def test_vllm_asks_it() -> None:
    module = "vllm.model_executor.layers.fused_moe.router.custom_routing_router"
    asking = pytest.importorskip(module, exc_type=ImportError)
    router, x = a_router(), torch.randn(33, 16)
    asked = asking.CustomRoutingRouter(2, 8, routing_function(router))
    weights, ids = asked._compute_routing(x, torch.randn(33, 8), None)
    wanted, indices, _ = router(x)
    assert weights.equal(wanted)
    assert ids.equal(indices.int())
