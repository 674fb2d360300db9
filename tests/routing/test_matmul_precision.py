"""torch.set_float32_matmul_precision and its newer forms: what routing multiplies in fp32 stays exact to fp32.

"medium" rounds fp32 factors to bf16 on a CPU, where oneDNN has the instructions for it; these tests say nothing on
others, so the first asks.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from kmeans_route import KMeansRouter, centroid_sums, combine, dispatch, metrics, route
from kmeans_route.reference import product
from tests.helpers.compare import generator

T, D, E, K = 512, 256, 32, 2
BACKENDS = ["torch", "reference", "triton"]
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")
# Hidden states and centroids with an offset in common, as real ones have: margins are small against the products.
X = torch.randn(T, D, generator=generator(0)) + 1
WEIGHT = torch.randn(E, D, generator=generator(1)) * 0.5 + 1


@contextmanager
def low_precision(how: str) -> Iterator[None]:
    """The forms that this setting has."""
    if how == "set_float32_matmul_precision":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    matmul, owner = torch.backends.mkldnn.matmul, torch.backends.mkldnn
    if how == "mkldnn.matmul.fp32_precision":
        matmul.fp32_precision = "bf16"
    else:  # what "none" inherits
        matmul.fp32_precision, owner.fp32_precision = "none", "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision, owner.fp32_precision = "ieee", "none"


FORMS = ["set_float32_matmul_precision", "mkldnn.matmul.fp32_precision", "mkldnn.fp32_precision"]


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).abs().max() / truth.abs().max())


@pytest.fixture(params=FORMS)
def low(request: pytest.FixtureRequest) -> Iterator[None]:
    with low_precision(request.param):
        if error(X @ WEIGHT.T, X.double() @ WEIGHT.double().T) < 1e-5:
            pytest.skip("this CPU multiplies in fp32 all the same")
        yield


def with_gradients(dtype: torch.dtype, backend: str, how: str, **options: Any) -> dict[str, Tensor]:
    """What a routing gives and its gradients, for the gradient of gates or of all scores."""
    x = X.to(dtype).requires_grad_()
    d = torch.nn.functional.normalize(WEIGHT.double()).to(dtype).requires_grad_()
    r = route(x, WEIGHT.to(dtype), K, directions=d, return_scores=True, backend=backend, **options)
    assert r.scores is not None
    out = r.scores if how == "scores" else r.weights
    dx, dd = torch.autograd.grad((out * torch.randn(out.shape, generator=generator(3)).to(dtype)).sum(), (x, d))
    return {"scores": r.scores.detach(), "weights": r.weights.detach(), "dx": dx, "dd": dd, "ids": r.indices}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["weights", "scores"])
@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"gate": "sigmoid"}], ids=str)
def test_routing_and_its_gradients(low: None, options: dict[str, Any], how: str, backend: str) -> None:
    got = with_gradients(torch.float32, backend, how, **options)
    truth = with_gradients(torch.float64, "reference", how, **options)
    assert torch.equal(got.pop("ids"), truth.pop("ids"))
    for name, value in got.items():
        assert error(value, truth[name]) < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_and_the_gradients_of_gates(low: None, backend: str) -> None:
    routing = route(X, WEIGHT, K, backend=backend)
    sums, _ = centroid_sums(X, routing, backend=backend)
    right = torch.zeros(E, D, dtype=torch.float64)
    unit = torch.nn.functional.normalize(X.double())
    for k in range(K):
        right.index_add_(0, routing.indices[:, k], unit)
    assert error(sums, right) < 1e-5
    sent = dispatch(X, routing, backend=backend)
    weights = routing.weights.detach().requires_grad_()
    y = combine(sent.x_sorted, routing._replace(weights=weights), sent, backend=backend)
    dy = torch.randn(T, D, generator=generator(5))
    (d_weights,) = torch.autograd.grad(y, weights, dy)
    assert error(d_weights, (dy.double() * X.double()).sum(1, keepdim=True).expand(T, K)) < 1e-5


def test_long_inputs_go_by_chunks(low: None) -> None:
    x = torch.randn(9000, D, generator=generator(7)) + 1
    scores = route(x, WEIGHT, K, return_scores=True, backend="torch").scores
    assert scores is not None
    unit = torch.nn.functional.normalize
    assert error(scores, unit(x.double()) @ unit(WEIGHT.double()).T) < 1e-6


def test_training_commits_the_same_state(low: None) -> None:
    def train() -> dict[str, Tensor]:
        router = KMeansRouter(D, E, K)
        for step in range(3):
            router((X + 0.1 * step).requires_grad_()).weights.sum().backward()
            router.commit()
        return {name: value.clone() for name, value in router.state_dict().items()}

    got = train()
    with low_precision_off():
        want = train()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], atol=2e-6, rtol=1e-5)


@contextmanager
def low_precision_off() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_metrics_of_close_centroids(low: None) -> None:
    unit = torch.nn.functional.normalize(WEIGHT.double())
    assert error(metrics.pairwise_cosine(WEIGHT), unit @ unit.T) < 1e-6


def test_autocast_on_top(low: None) -> None:
    want = route(X, WEIGHT, K, return_scores=True).scores
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = route(X, WEIGHT, K, return_scores=True).scores
    assert want is not None
    assert got is not None
    assert torch.equal(got, want)


def test_the_setting_is_left_alone(low: None) -> None:
    """It belongs to all threads: another one must find it as it was at any moment."""
    stop, seen = threading.Event(), set()

    def watch() -> None:
        while not stop.is_set():
            seen.add(torch.backends.mkldnn.matmul.fp32_precision)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(20):
        with_gradients(torch.float32, "torch", "scores")
    stop.set()
    watcher.join()
    assert seen == {"bf16"}


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
@pytest.mark.parametrize("compiled", [False, True])
def test_product(setting: str, compiled: bool) -> None:
    call: Callable[[Tensor, Tensor], Tensor] = torch.compile(product, backend="eager") if compiled else product
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        got = call(X, WEIGHT.T)
    finally:
        torch.set_float32_matmul_precision(before)
    assert got.dtype == torch.float32
    assert error(got, X.double() @ WEIGHT.double().T) < 1e-6
