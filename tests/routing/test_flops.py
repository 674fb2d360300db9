"""FLOPs as `torch.utils.flop_counter` tells them: every operator once, with the number that the formula gives."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kmeans_route import KMeansRouter, MoE, combine, dispatch, ops, route
from kmeans_route.ops.flops import FORMULAS
from tests.helpers.compare import generator

T, D, I, E, K = 24, 16, 8, 6, 2  # noqa: E741 (I is the intermediate size)
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")
SCORES, EXPERTS, COMBINE = 2 * T * E * D, 2 * (T * K) * D * 3 * I, 2 * T * K * D
FORWARD = SCORES + EXPERTS + COMBINE
BACKWARD = 2 * T * K * D + 2 * EXPERTS + 2 * COMBINE


def x_of() -> Tensor:
    return torch.randn(T, D, generator=generator(1)).requires_grad_()


def counted(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("size", [I, 6])  # one grouped_mm, and a product an expert
def test_a_layer_forward_and_backward(size: int, backend: str) -> None:
    layer, x = MoE(D, size, E, K, backend=backend), x_of()
    experts = EXPERTS * size // I
    results: list[Tensor] = []
    assert counted(lambda: results.append(layer(x).sum())) == SCORES + experts + COMBINE
    assert counted(lambda: results[0].backward()) == 2 * T * K * D + 2 * experts + 2 * COMBINE


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "train"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_forward_counts_the_same_in_every_mode(backend: str, mode: str) -> None:
    """Without gradients the functions of the backend run bare: their products would be counted, the rest would not."""
    layer = MoE(D, I, E, K, backend=backend).train(mode == "train")
    around = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "train": torch.enable_grad}[mode]

    x = x_of() if mode == "train" else x_of().detach()

    def call() -> None:
        with around():
            layer(x)

    assert counted(call) == FORWARD


@pytest.mark.parametrize("shared", [1, 2])
def test_shared_experts_are_counted_by_pytorch_and_once(shared: int) -> None:
    layer = MoE(D, I, E, K, num_shared_experts=shared)
    own = 2 * T * D * 3 * I * shared
    assert counted(lambda: layer(x_of()).sum().backward()) == FORWARD + BACKWARD + 3 * own


def test_the_definition_counts_its_products_once() -> None:
    layer = MoE(D, I, E, K, backend="reference")
    assert counted(lambda: layer(x_of())) == SCORES + EXPERTS


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("how", ["weights", "scores", "all candidates"])
def test_the_backward_of_route(how: str, backend: str) -> None:
    """K directions a token, or all E where a gradient comes for all scores."""
    x, weight = x_of(), torch.randn(E, D, generator=generator(2))
    r = route(x, weight, K, return_scores=how == "scores", normalize=how != "all candidates", backend=backend)
    out = r.scores if how == "scores" else r.weights
    assert out is not None
    assert counted(lambda: out.sum().backward()) == (2 * T * K * D if how == "weights" else 2 * T * E * D)


def test_the_backward_of_learned_directions() -> None:
    router = KMeansRouter(D, E, K, learned_offset=True)
    weights = router(x_of()).weights
    assert counted(lambda: weights[:, 0].sum().backward()) == 2 * T * K * D + 2 * T * E * D


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_copies_are_no_arithmetic(backend: str) -> None:
    x, weight = x_of(), torch.randn(E, D, generator=generator(2))
    routing = route(x, weight, K, backend=backend)
    sent = dispatch(x, routing, backend=backend)
    assert counted(lambda: dispatch(x, routing, backend=backend).x_sorted.sum().backward()) == 0
    assert counted(lambda: combine(sent.x_sorted, routing, sent, backend=backend)) == COMBINE


def test_counts_stand_at_the_module_that_made_them() -> None:
    layer = MoE(D, I, E, K)
    with FlopCounterMode(layer, display=False) as counter:
        layer(x_of())
    by_module = counter.get_flop_counts()
    assert sum(by_module["MoE.experts"].values()) == EXPERTS
    assert sum(by_module["MoE"].values()) == FORWARD


def test_shapes_alone_are_enough() -> None:
    with torch._subclasses.FakeTensorMode():
        layer = MoE(D, I, E, K).eval()
        assert counted(lambda: layer(torch.empty(T, D, requires_grad=True)).sum().backward()) == FORWARD + BACKWARD
    layer = MoE(D, I, E, K).to("meta").eval()
    x = torch.empty(T, D, device="meta", requires_grad=True)
    assert counted(lambda: layer(x).sum().backward()) == FORWARD + BACKWARD


def test_compiled_for_any_backend_that_runs_the_operators() -> None:
    layer = MoE(D, I, E, K)
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(x_of())
    assert counted(lambda: compiled(x_of()).sum().backward()) == FORWARD + BACKWARD


def test_recomputation_is_counted_as_what_it_is() -> None:
    layer = MoE(D, I, E, K)

    def call() -> None:
        torch.utils.checkpoint.checkpoint(layer, x_of(), use_reentrant=False).sum().backward()

    # Recomputation stops early: combine's result is not needed.
    assert FORWARD + BACKWARD + SCORES + EXPERTS <= counted(call) <= 2 * FORWARD + BACKWARD


ORDERS = {
    "counter imported last": "import kmeans_route as kr; from torch.utils.flop_counter import FlopCounterMode as F",
    "counter imported first": "from torch.utils.flop_counter import FlopCounterMode as F; import kmeans_route as kr",
}
USES = {
    "a layer": "m = kr.MoE(16, 8, 6, 2); f = F(display=False)\nwith f: m(x)",
    "a function": "f = F(display=False)\nwith f: kr.route(x, torch.ones(6, 16), 2)",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("use", USES)
def test_whenever_the_counter_comes(order: str, use: str) -> None:
    program = f"import torch, sys; {ORDERS[order]}; x = torch.randn(24, 16)\n{USES[use]}\nprint(f.get_total_flops())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == (FORWARD if use == "a layer" else SCORES)


def test_importing_the_package_imports_no_counter() -> None:
    program = "import kmeans_route, sys; kmeans_route.MoE(8, 8, 4, 2); print('torch.utils.flop_counter' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_formula_is_of_an_operator() -> None:
    ops.tell_flop_counters()
    assert [name for name in FORMULAS if not hasattr(torch.ops.kmeans_route, name)] == []
