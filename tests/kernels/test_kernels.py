"""The Triton kernels in Triton's interpreter: what the backend-wide tests and test_kernel_values do not reach.

Launch counts, counters that return to zero, layouts, repeated bits, offsets of 64 bits, the router's commit, tuning.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kmeans_route
from kmeans_route import KMeansRouter, MoE, functional
from kmeans_route.kernels import accumulate, directions, route_bwd, tune, workspace
from kmeans_route.kernels import combine as combine_kernels
from kmeans_route.kernels import commit as commit_kernels
from kmeans_route.kernels import dispatch as dispatch_kernels
from kmeans_route.kernels import route as route_kernels
from kmeans_route.kernels.configs import Config
from kmeans_route.testing import make_centroids, make_hidden_states
from tests.helpers.compare import EPS, ROUND, assert_same_bits, assert_same_routing, generator, make_inputs
from tests.helpers.inputs import lay_out

MODULES = (
    route_kernels,
    dispatch_kernels,
    accumulate,
    combine_kernels,
    route_bwd,
    commit_kernels,
    directions,
)
pytestmark = [
    pytest.mark.usefixtures("coarse_rows"),
    pytest.mark.filterwarnings("ignore:.*nothing commits its statistics"),
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched, in order."""
    names: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            names.append(self.name)
            return self.kernel[grid]

    for module in MODULES:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Counted(name.strip("_").removesuffix("_kernel"), kernel))
    return names


@pytest.mark.parametrize("num_tokens", [1, 70, 300])
def test_eval_routing_is_two_launches(launches: list[str], num_tokens: int) -> None:
    x, weight, bias = make_inputs(num_tokens, 40, 12, torch.float32)
    d = functional.directions(weight, x.dtype)
    kmeans_route.route(x, weight, 3, bias, directions=d, backend="triton")
    assert launches == ["route_fwd", "route_select"]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "groups"),
    [(61, 32, None), (128, 8, None), (130, 10, None), (256, 8, (8, 4)), (128, 10, (8, 1)), (132, 6, (4, 2))],
    ids=str,
)
def test_selection_from_many_experts(num_experts: int, top_k: int, groups: tuple[int, int] | None) -> None:
    """In two steps, by neighbours and then among them, or at once: the ids of PyTorch's backend, in ties too."""
    x, weight, bias = make_inputs(9, 64, num_experts, torch.float32)
    x[3] = torch.nan
    weight[1::2], bias[1::2] = weight[: num_experts - 1 : 2][: num_experts // 2], bias[::2][: num_experts // 2]
    options = {} if groups is None else {"n_group": groups[0], "topk_group": groups[1]}
    got, want = (kmeans_route.route(x, weight, top_k, bias, backend=name, **options) for name in ("triton", "torch"))
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.tokens_per_expert, want.tokens_per_expert)
    torch.testing.assert_close(got.weights, want.weights, rtol=1e-5, atol=1e-6)


def test_launches_of_a_training_step(launches: list[str]) -> None:
    """Forward: directions, routing, positions, dispatch, sums, combine; backward: combine, fused dx; commit: one."""
    torch.manual_seed(0)
    layer = MoE(16, 16, 4, 2, "kmeans", backend="triton", init="normal")
    x = torch.randn(40, 16, requires_grad=True)
    y = layer(x)
    routing = ["route_fwd", "route_select", "route_rank"]
    assert launches == ["directions", *routing, "positions", "dispatch_fwd", "accumulate", "combine_fwd"]
    launches.clear()
    y.square().sum().backward()
    assert launches == ["combine_bwd", "route_bwd"]
    launches.clear()
    assert isinstance(layer.router, KMeansRouter)
    layer.router.commit()
    assert launches == ["commit"]
    launches.clear()
    layer.eval()(x.detach())
    layer.router.freeze()
    layer(x.detach())
    layer(x.detach())
    one = [*routing, "positions", "dispatch_fwd", "combine_fwd"]
    assert launches == ["directions", *one, "directions", *one, *one], "pinned by freeze"


def test_counters_return_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch borrows comes back as it was, or the next one would count wrongly."""
    made: list[Tensor] = []

    def remembered(device: torch.device, size: int) -> Tensor:
        made.append(torch.zeros(size, dtype=torch.int32))
        return made[-1]

    monkeypatch.setattr(workspace, "_space", remembered)
    x, weight, bias = make_inputs(50, 24, 6, torch.float32)
    x[3] = torch.nan
    routing = kmeans_route.route(x, weight, 2, bias, mask=torch.arange(50) != 7, backend="triton")
    kmeans_route.dispatch(x, routing, backend="triton")
    router = KMeansRouter(24, 6, 2, backend="triton", init="normal")
    router(x)
    router.commit()
    assert len(made) == 5, "route, rank; route, rank of the sums, commit"
    for counters in made:
        assert not counters.any()


def test_dispatch_without_copies(backend: str) -> None:
    x, weight, bias = make_inputs(40, 24, 6, torch.float32)
    routing = kmeans_route.route(x, weight, 2, bias, backend=backend)
    full = kmeans_route.dispatch(x, routing, backend=backend)
    index = kmeans_route.dispatch(x, routing, copies=False, backend=backend)
    assert index.x_sorted.shape == (0, 24)
    for one, other in zip(index[1:], full[1:], strict=True):
        assert_same_bits(one, other)
    assert_same_bits(x[index.token_of_row], full.x_sorted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["padded_rows", "every_second", "transposed", "expanded"])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """Strides change no bit."""
    x = lay_out(make_hidden_states(40, 24, dtype=dtype), layout)
    weight = make_centroids(6, 24)
    results = []
    for rows in (x, x.contiguous()):
        routing = kmeans_route.route(rows, weight, 2, backend="triton")
        sent = kmeans_route.dispatch(rows, routing, backend="triton")
        results.append((routing, [*sent, kmeans_route.centroid_sums(rows, routing, backend="triton")[0]]))
    assert_same_routing(results[0][0], results[1][0])
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("repeats", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_same_bits_every_time(repeats: int, dtype: torch.dtype) -> None:
    x, weight, bias = make_inputs(100, 40, 8, dtype)
    first: list[Tensor] = []
    for _ in range(repeats):
        routing = kmeans_route.route(x, weight, 2, bias, backend="triton")
        sums, _ = kmeans_route.centroid_sums(x, routing, backend="triton")
        now = [routing.indices, routing.weights, sums]
        for one, other in zip(first or now, now, strict=True):
            assert_same_bits(one, other)
        first = now


ROUTERS: list[tuple[dict[str, Any], torch.dtype]] = [
    ({}, torch.float32),
    ({}, torch.bfloat16),
    ({"balance": "sign"}, torch.float32),
    ({"balance": "quantile"}, torch.bfloat16),
    ({"balance": "none", "accumulate": "raw"}, torch.float32),
    ({"average": "cumulative", "init": "normal"}, torch.float32),
    ({"gate": "cosine", "detach_gates": True, "return_scores": True, "decay": 0.5}, torch.float32),
]


@pytest.mark.parametrize(("options", "dtype"), ROUTERS, ids=str)
def test_router_learns_as_on_the_torch_backend(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Five steps with a bad row, a mask, a skipped step and an empty commit: equal up to fp32 rounding, and up to what
    two parts of a unit vector leave out."""
    routers = [KMeansRouter(24, 6, 2, backend=backend, **options).train() for backend in ("torch", "triton")]
    for step in range(5):
        x = make_hidden_states(60, 24, seed=step, num_clusters=6, dtype=dtype)
        x[step] = torch.inf
        mask = torch.arange(60) % 11 != step
        for router in routers:
            weights, ids, _ = router(x, mask)
            router.commit(torch.tensor(step == 3))
            assert weights.shape == ids.shape == (60, 2)
        if step == 3:  # what the skipped commit left counts in the next one
            assert all(router.pending.num_tokens.item() > 0 for router in routers)
    for router in routers:
        router.commit()
        before = router.weight.clone()
        router.commit()
        assert_same_bits(router.weight, before)
    tolerance = 40 * ROUND + (0 if dtype == torch.float32 else EPS[dtype] ** 2 / 4)
    state, other = (router.state_dict() for router in routers)
    for name, value in state.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=tolerance if value.is_floating_point() else 0)
    a, b = (router.metrics() for router in routers)
    for name, number in a.items():
        assert b[name] == pytest.approx(number, abs=1e-4), name
    for field in routers[1].pending.FIELDS[:6]:
        assert not getattr(routers[1].pending, field).any(), field


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_trains_as_on_the_torch_backend(dtype: torch.dtype) -> None:
    """Output and every gradient of MoE, the router's fused path included: apart by a few roundings to the dtype."""
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(1)
        layer = MoE(24, 16, 6, 2, "kmeans", backend=backend).to(dtype)
        x = make_hidden_states(50, 24, seed=3, dtype=dtype).requires_grad_()
        mask = torch.arange(50) != 4
        y = layer(x, mask)
        assert y.dtype == dtype
        y.square().sum().backward()
        results.append([y, x.grad, layer.experts.gate_up.grad, layer.experts.down.grad, layer.router.pending.sums])
    for one, other in zip(*results, strict=True):
        scale = max(1.0, float(one.detach().abs().max()))
        torch.testing.assert_close(other, one, rtol=0, atol=(2 * EPS[dtype] + 160 * ROUND) * scale)


def test_offsets_are_computed_in_64_bits() -> None:
    """A row stride whose product with a token passes 2^31: only a 64-bit offset reads the right rows.

    The rows lie 2^28 elements apart in 4.6 GB of address space, of which only the touched pages exist.
    """
    num_tokens, stride = 9, 1 << 28
    base = torch.from_numpy(np.empty(num_tokens * stride, dtype=np.float16))
    x = base.as_strided((num_tokens, 8), (stride, 1))
    rows = torch.randn(num_tokens, 8, generator=generator(0)).half()
    x.copy_(rows)
    weight = torch.randn(4, 8, generator=generator(1))
    got, want = (kmeans_route.route(t, weight, 2, backend="triton") for t in (x, rows))
    assert_same_routing(got, want)
    assert_same_bits(kmeans_route.dispatch(x, got, backend="triton").x_sorted, rows[
        kmeans_route.dispatch(rows, want, backend="triton").token_of_row
    ])  # fmt: skip


def test_captured_launches_take_their_own_counters() -> None:
    """Slices for graphs never repeat, and come back zero when the pool is used up."""
    device = torch.device("cpu")
    workspace._for_graphs[device] = [torch.zeros(16, dtype=torch.int32)]
    try:
        first, second = workspace._captured(device, 8), workspace._captured(device, 8)
        assert first.data_ptr() != second.data_ptr()
        third = workspace._captured(device, 8)
        assert third.shape == (8,)
        assert not third.any()
    finally:
        del workspace._for_graphs[device]


def test_compiled_without_breaks_equals_eager() -> None:
    torch._dynamo.reset()
    results = []
    for compile_it in (False, True):
        torch.manual_seed(2)
        layer = MoE(16, 16, 4, 2, "kmeans", backend="triton", init="normal")
        call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compile_it else layer
        x = make_hidden_states(30, 16, seed=1).requires_grad_()
        call(x).square().sum().backward()
        assert isinstance(layer.router, KMeansRouter)
        results.append([x.grad, layer.experts.down.grad, layer.router.pending.sums.clone()])
    torch._dynamo.reset()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)


def test_tuning_takes_the_fastest_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a clock that favours one config and devices that refuse another; off, nothing is searched."""
    default, best, refused = Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(16, 32, 4, 2)
    tried: list[Config] = []

    def launch(config: Config) -> None:
        tried.append(config)
        if config == refused:
            raise RuntimeError("out of resources")

    def clock(call: Any) -> float:
        call()
        return 1.0 if tried[-1] == best else 2.0

    device = torch.device("cpu")
    assert tune.tuned("route_config", (8,), device, default, launch) == default
    assert tried == []
    monkeypatch.setattr(tune, "ENABLED", True)
    monkeypatch.setattr(tune, "time_ms", clock)
    monkeypatch.setattr(tune, "candidates", lambda: iter([refused, best]))
    monkeypatch.setattr(tune, "_winners", {})
    for _ in range(2):
        assert tune.tuned("route_config", (8,), device, default, launch) == best
    assert tried == [default, refused, best]
    assert "route_config('sm_90', 8): Config(BT=32" in capsys.readouterr().err
