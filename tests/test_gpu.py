"""Real sizes in bf16, streams, CUDA graphs, repeated bits. Needs a GPU and KMEANS_ROUTE_GPU_TESTS=1."""

import pytest
import torch
from torch import Tensor

import kmeans_route
from kmeans_route import KMeansRouter, MoE, attach
from kmeans_route.testing import MODEL_SHAPES, assert_same_selection, make_centroids, make_hidden_states

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def ranking_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = x.double()
    return rows @ kmeans_route.directions(weight, x.dtype).double().T / rows.norm(dim=1, keepdim=True) + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 33, 512, 5000, 20000])
@pytest.mark.parametrize("name", list(MODEL_SHAPES))
def test_named_shapes(name: str, num_tokens: int, dtype: torch.dtype) -> None:
    """Ids exact outside near-ties; copies bit for bit; sums against an fp32 one-hot product."""
    shape = MODEL_SHAPES[name]
    x = make_hidden_states(num_tokens, shape.hidden_size, dtype=dtype, device="cuda", offset=0.5)
    weight = make_centroids(shape.num_experts, shape.hidden_size, device="cuda")
    bias = torch.linspace(-0.02, 0.02, shape.num_experts, device="cuda")
    routing = kmeans_route.route(x, weight, shape.top_k, bias, backend="triton")
    # fp32 sums of up to 7168 products of 16-bit numbers: 2e-6 was allowed for, not measured.
    assert_same_selection(routing.indices, ranking_of(x, weight, bias), tolerance=2e-6, cap=0.02)
    sent = kmeans_route.dispatch(x, routing, backend="triton")
    assert torch.equal(sent.x_sorted, x[sent.token_of_row])
    assert torch.equal(
        sent.token_of_row[sent.positions], torch.arange(num_tokens, device="cuda")[:, None].expand_as(sent.positions)
    )
    sums, counts = kmeans_route.centroid_sums(x, routing, backend="triton")
    member = torch.zeros(num_tokens, shape.num_experts, device="cuda", dtype=torch.float64)
    member.scatter_(1, routing.indices, 1.0)
    want = member.T @ (x.double() * routing.inv_norm.double()[:, None])
    torch.testing.assert_close(sums.double(), want, rtol=0, atol=3e-5 * max(1.0, float(want.abs().max())))
    assert torch.equal(counts, member.sum(0).long())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_against_the_torch_backend(dtype: torch.dtype) -> None:
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(1)
        layer = MoE(256, 128, 16, 2, "kmeans", backend=backend).to(device="cuda", dtype=dtype)
        x = make_hidden_states(3000, 256, seed=3, dtype=dtype, device="cuda").requires_grad_()
        y = layer(x)
        y.float().square().sum().backward()
        assert isinstance(layer.router, KMeansRouter)
        results.append([y, x.grad, layer.experts.gate_up.grad, layer.experts.down.grad, layer.router.pending.sums])
    for one, other in zip(*results, strict=True):
        assert one is not None
        tolerance = 16 * torch.finfo(one.dtype).eps * max(1.0, float(one.detach().abs().max()))
        torch.testing.assert_close(other, one, rtol=0, atol=tolerance)


def test_same_bits_a_hundred_times() -> None:
    x = make_hidden_states(20000, 2048, dtype=torch.bfloat16, device="cuda", num_clusters=64)
    router = KMeansRouter(2048, 64, 8, device="cuda", init="normal", backend="triton").train()
    first: list[Tensor] = []
    for _ in range(100):
        router.pending.clear_()
        router(x)
        now = [router.pending.sums.clone(), router.pending.counts.clone(), router.pending.std_sum.clone()]
        for one, other in zip(first or now, now, strict=True):
            assert torch.equal(one, other)
        first = now


def test_streams_beside_each_other() -> None:
    """Each stream has counters of its own."""
    inputs = [make_hidden_states(64, 2048, seed=i, dtype=torch.bfloat16, device="cuda") for i in range(4)]
    weight = make_centroids(64, 2048, device="cuda")
    want = [kmeans_route.route(x, weight, 8) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        got = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(kmeans_route.route(x, weight, 8))
        torch.cuda.synchronize()
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one.indices, other.indices)
            assert torch.equal(one.tokens_per_expert, other.tokens_per_expert)


@pytest.mark.parametrize("num_tokens", [1, 64, 4096])
def test_graph_replay(num_tokens: int) -> None:
    """A captured routing gives the eager one's bits, for new values in the same memory, beside eager calls."""
    weight = make_centroids(64, 2048, device="cuda")
    x = make_hidden_states(num_tokens, 2048, dtype=torch.bfloat16, device="cuda")
    kmeans_route.route(x, weight, 8)  # compiles, and makes the counters
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kmeans_route.route(x, weight, 8)
        sent = kmeans_route.dispatch(x, captured)
    for seed in range(1, 6):
        x.copy_(make_hidden_states(num_tokens, 2048, seed=seed, dtype=torch.bfloat16))
        want = kmeans_route.route(x, weight, 8)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured.indices, want.indices)
        assert torch.equal(captured.tokens_per_expert, want.tokens_per_expert)
        assert torch.equal(sent.x_sorted, x[sent.token_of_row])


def test_graph_replay_follows_the_centroids() -> None:
    """A captured forward routes by the centroids of its replay, not by those of its capture."""
    router = KMeansRouter(2048, 64, 8, device="cuda", backend="triton")
    x = make_hidden_states(512, 2048, dtype=torch.bfloat16, device="cuda", num_clusters=64)
    router(x)
    router.commit()
    router.eval()(x)  # compiles, and makes the counters
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = router(x)
    for seed in range(1, 4):
        router.train()(make_hidden_states(4096, 2048, seed=seed, dtype=torch.bfloat16, device="cuda"))
        router.commit()
        want = router.eval()(x)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured.indices, want.indices)
        assert torch.equal(captured.weights, want.weights)


def test_no_synchronisation_on_the_routing_path() -> None:
    layer = MoE(256, 128, 16, 2, "kmeans", init="normal").to(device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(layer, optimizer)
    x = make_hidden_states(512, 256, dtype=torch.bfloat16, device="cuda")
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            layer(x).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert isinstance(layer.router, KMeansRouter)
    assert layer.router.steps.item() == 4
