"""DTensors, as inputs and as what distribute_module makes of a layer, are refused before anything is counted."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from kmeans_route import KMeansRouter, LearnedRouter, MoE, centroid_sums, combine, dispatch, expert_parallel, route

T, D, E, K = 32, 16, 4, 2
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")
X, WEIGHT = torch.randn(T, D), torch.randn(E, D)
TOKENS = r"must be a plain tensor, got a DTensor with .*: pass what this rank holds, {}\.to_local\(\)"
STATE = r"must be a plain tensor, got a DTensor with .*: keep routers and experts out of distribute_module"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """One rank is enough for a DTensor."""
    store: Path = tmp_path_factory.mktemp("ranks") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def pending(module: nn.Module) -> int:
    return int(getattr(module, "router", module).pending.num_tokens)  # type: ignore[arg-type]


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "route": lambda x: route(x, WEIGHT, K),
    "dispatch": lambda x: dispatch(x, route(X, WEIGHT, K)),
    "centroid_sums": lambda x: centroid_sums(x, route(X, WEIGHT, K)),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "KMeansRouter": lambda: KMeansRouter(D, E, K),
    "LearnedRouter": lambda: LearnedRouter(D, E, K),
    "MoE": lambda: MoE(D, 8, E, K),
    "MoE, reference": lambda: MoE(D, 8, E, K, backend="reference"),
    "MoE, sigmoid": lambda: MoE(D, 8, E, K, router="sigmoid"),
}


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(1)], ids=str)
@pytest.mark.parametrize("name", [*CALLS, *MODULES])
def test_hidden_states(mesh: DeviceMesh, name: str, placement: Any) -> None:
    x = distribute_tensor(X, mesh, [placement])
    call = CALLS.get(name) or MODULES[name]()
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode), pytest.raises(TypeError, match="x " + TOKENS.format("x")):
            call(x)
    if isinstance(call, nn.Module):
        assert pending(call) == 0
        call(x.to_local())
        assert pending(call) == T


def test_what_comes_with_them(mesh: DeviceMesh) -> None:
    def spread(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Replicate()])

    layer = MoE(D, 8, E, K)
    routing = route(X, WEIGHT, K)
    sent = dispatch(X, routing)
    mask, ids = torch.ones(T, dtype=torch.bool), routing.indices
    with pytest.raises(TypeError, match="mask " + TOKENS.format("mask")):
        layer(X, spread(mask))
    with pytest.raises(TypeError, match="indices " + TOKENS.format("indices")):
        layer(X, None, spread(ids))
    with pytest.raises(TypeError, match="count_mask " + TOKENS.format("count_mask")):
        layer.router(X, count_mask=spread(mask))
    with pytest.raises(TypeError, match="expert_bias " + TOKENS.format("expert_bias")):
        route(X, WEIGHT, K, spread(torch.zeros(E)))
    with pytest.raises(TypeError, match="weight " + STATE):
        route(X, spread(WEIGHT), K)
    with pytest.raises(TypeError, match="y_sorted " + TOKENS.format("y_sorted")):
        combine(spread(sent.x_sorted), routing, sent)
    assert pending(layer) == 0


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_a_distributed_module(mesh: DeviceMesh, name: str, train: bool) -> None:
    """Its weights and state are replicated DTensors; x may be plain, or one too."""
    module = distribute_module(MODULES[name]().train(train), mesh)
    for x in (X, distribute_tensor(X, mesh, [Replicate()])):
        with pytest.raises(TypeError, match="must be a plain tensor, got a DTensor"):
            module(x)
    assert pending(module) == 0
    with pytest.raises(TypeError, match="the router's state " + STATE):
        module(X)


@pytest.mark.parametrize("how", ["distribute_module", "parallelize_module"])
def test_distributed_experts_alone(mesh: DeviceMesh, how: str) -> None:
    """The router would route, and count, before the experts fail."""
    layer = MoE(D, 8, E, K)
    if how == "distribute_module":
        distribute_module(layer.experts, mesh)
    else:

        class Style(ParallelStyle):
            def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
                return distribute_module(module, device_mesh)

        parallelize_module(layer, mesh, {"experts": Style()})
    with pytest.raises(TypeError, match=r"experts\.gate_up " + STATE):
        layer(X)
    assert pending(layer) == 0


def test_divided_experts_still_run(mesh: DeviceMesh) -> None:
    """expert_parallel holds DTensors itself; padding comes back as zeros, in both directions."""
    torch.manual_seed(3)
    layer, mask = MoE(D, 8, E, K), torch.arange(T) < 20
    whole = layer(X, mask)
    expert_parallel(layer, mesh)
    seen: list[Tensor] = []
    layer.experts.register_forward_hook(lambda _module, _inputs, y: seen.append(y))
    x = X.clone().requires_grad_()
    y = layer(x, mask)
    y.square().sum().backward()
    torch.testing.assert_close(y, whole)
    assert not seen[0][20 * K :].any()
    assert x.grad is not None
    assert not x.grad[20:].any()
