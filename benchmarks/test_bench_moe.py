"""A whole mixture-of-experts layer, forward and backward: K-Means routing against learned routing, equal experts.

The goal: a step with K-Means routing takes no longer than one with softmax routing and its auxiliary loss.
"""

import torch

from benchmarks.conftest import Bench
from benchmarks.harness import checks, peers, steps
from benchmarks.harness.contest import Contest, Goal
from kmeans_route import KMeansRouter, MoE
from kmeans_route.testing import BenchShape, make_hidden_states

# A small model, and OLMoE's ratios at half its width.
SHAPES = {
    "T4096-D512-E16-K2-I1024": BenchShape(4096, 512, 16, 2),
    "T1024-D1024-E64-K8-I512": BenchShape(1024, 1024, 64, 8),
}
INTERMEDIATE_SIZES = {SHAPES["T4096-D512-E16-K2-I1024"]: 1024, SHAPES["T1024-D1024-E64-K8-I512"]: 512}
ROUTERS = {"kmeans_route": "kmeans", "softmax + aux": "softmax", "sigmoid + bias": "sigmoid"}


def moe_contest(shape: BenchShape, intermediate_size: int) -> Contest:
    """All contestants at one shape, verified."""
    x = make_hidden_states(shape.num_tokens, shape.hidden_size, num_clusters=4 * shape.num_experts)
    x.requires_grad_()
    dy = make_hidden_states(shape.num_tokens, shape.hidden_size, seed=1)
    layers = {}
    for name, router in ROUTERS.items():
        torch.manual_seed(0)  # the experts' weights come from the global generator
        layer = MoE(shape.hidden_size, intermediate_size, shape.num_experts, shape.top_k, router)
        if isinstance(layer.router, KMeansRouter):
            layer.router.initialize(x.detach())
        layer.router.commit()
        layers[name] = layer
    softmax = layers["softmax + aux"]
    leaves = [p.detach().clone().requires_grad_() for p in (softmax.experts.gate_up, softmax.experts.down)]
    running, not_run, versions = peers.split(peers.layers(shape, *leaves))
    others = {name: peer.function for name, peer in running.items() if peer.function}
    weight = softmax.router.weight.detach().clone().requires_grad_()
    contest = Contest(
        f"MoE layer step, {shape}, I={intermediate_size}",
        [
            *(steps.moe_step(name, layer, x, dy) for name, layer in layers.items()),
            *(steps.layer_step(name, function, x, dy, [weight, *leaves]) for name, function in others.items()),
        ],
        baselines=["softmax + aux"],
        note="loads differ between routers, and with them the time of the experts; transformers' blocks have no "
        "auxiliary loss here",
        goals=[Goal("kmeans_route", ("softmax + aux",), 1.0)],
        not_run=not_run,
        versions=versions,
    )

    def check() -> None:
        for layer in layers.values():
            checks.check_moe(layer, x)
        for name, function in others.items():
            checks.check_layer(name, function, softmax, x, dy)

    contest.verify(check)
    return contest


def test_moe_step(shape: BenchShape, bench: Bench) -> None:
    intermediate_size = INTERMEDIATE_SIZES.get(shape, 16)
    contest = moe_contest(shape, intermediate_size)
    bench.run(contest, {"shape": shape._asdict(), "intermediate_size": intermediate_size})
