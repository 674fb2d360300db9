"""A whole mixture-of-experts layer, forward and backward: K-Means routing against learned routing, equal experts."""

import pytest
import torch

from benchmarks.conftest import Bench
from kmeans_route import KMeansRouter, MoE
from kmeans_route.bench import checks, steps
from kmeans_route.bench.contest import Contest
from kmeans_route.testing import BenchShape, make_hidden_states

# Shape of the layer and intermediate size: a small model, and OLMoE's ratios at half its width.
LAYERS = {
    "T4096-D512-E16-K2-I1024": (BenchShape(4096, 512, 16, 2), 1024),
    "T1024-D1024-E64-K8-I512": (BenchShape(1024, 1024, 64, 8), 512),
}
ROUTERS = {"kmeans_route": "kmeans", "softmax + aux": "softmax", "sigmoid + bias": "sigmoid"}


def moe_contest(shape: BenchShape, intermediate_size: int) -> Contest:
    """All contestants at one shape, verified."""
    x = make_hidden_states(shape.num_tokens, shape.hidden_size, num_clusters=4 * shape.num_experts, requires_grad=True)
    dy = make_hidden_states(shape.num_tokens, shape.hidden_size, seed=1)
    layers = {}
    for name, router in ROUTERS.items():
        torch.manual_seed(0)  # the experts' weights come from the global generator
        layer = MoE(shape.hidden_size, intermediate_size, shape.num_experts, shape.top_k, router)
        if isinstance(layer.router, KMeansRouter):
            layer.router.initialize(x.detach())
        layer.router.commit()
        layers[name] = layer
    contest = Contest(
        f"MoE layer step, {shape}, I={intermediate_size}",
        [steps.moe_step(name, layer, x, dy) for name, layer in layers.items()],
        baselines=["softmax + aux"],
        note="loads differ between routers, and with them the time of the experts",
    )

    def check() -> None:
        for layer in layers.values():
            checks.check_moe(layer, x)

    contest.verify(check)
    return contest


@pytest.mark.parametrize(("shape", "intermediate_size"), LAYERS.values(), ids=LAYERS.keys())
def test_moe_step(shape: BenchShape, intermediate_size: int, bench: Bench) -> None:
    contest = moe_contest(shape, intermediate_size)
    bench.run(contest, {"shape": shape._asdict(), "intermediate_size": intermediate_size})
