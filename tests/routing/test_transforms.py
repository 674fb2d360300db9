"""torch.func and forward-mode derivatives over eval forwards: values of single calls, whatever the backend; refused by
name in training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap

from kmeans_route import KMeansRouter, LearnedRouter, MoE, attach, backends, route
from tests.helpers.compare import generator

B, T, D, E, K = 3, 7, 16, 4, 2
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")
BACKENDS = ["auto", "reference", "torch", "triton"]
KINDS: dict[str, dict[str, Any]] = {
    "kmeans": {},
    "groups": {"n_group": 2, "topk_group": 1, "normalize": False},
    "sigmoid gate": {"gate": "sigmoid", "scaling": 2.5},
    "learned offset": {"learned_offset": True},
    "softmax": {"router": "softmax"},
    "sigmoid": {"router": "sigmoid"},
}
X = torch.randn(B, T, D, generator=generator(1))


def make(kind: str = "kmeans", size: int = 12, **options: Any) -> MoE:
    torch.manual_seed(5)
    layer = MoE(D, size, E, K, num_shared_experts=1, **KINDS[kind], **options).eval()
    if isinstance(layer.router, KMeansRouter):
        layer.router.initialize(torch.randn(200, D))
        layer.router.expert_bias.copy_(torch.linspace(-0.1, 0.1, E))
    return layer


def loss_and_grads(layer: MoE, x: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a plain backward pass, of x and of the parameters."""
    x = x.clone().requires_grad_()
    loss = layer(x).square().mean()
    return torch.autograd.grad(loss, (x, *layer.parameters()), materialize_grads=True)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [(kind, backend) for kind in KINDS for backend in ([None] if "router" in KINDS[kind] else BACKENDS)],
)
def test_per_sample_gradients_equal_single_backwards(kind: str, backend: str | None) -> None:
    layer = make(kind, **({} if backend is None else {"backend": backend}))
    parameters = dict(layer.named_parameters())

    def loss(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        y: Tensor = functional_call(layer, parameters, (x,))
        return y.square().mean()

    dx, d_parameters = vmap(grad(loss, (0, 1)), in_dims=(0, None))(X, parameters)
    want = [loss_and_grads(layer, x) for x in X]
    for got, right in zip((dx, *d_parameters.values()), zip(*want, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(right), atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_equals_single_calls(kind: str) -> None:
    layer = make(kind)
    loads = layer.tokens_per_expert.clone()
    got = vmap(layer)(X)
    assert torch.equal(layer.tokens_per_expert, loads), "a transformed forward leaves nothing behind"
    torch.testing.assert_close(got, torch.stack([layer(x) for x in X]))


def test_vmap_of_masks_and_replayed_ids() -> None:
    layer, mask = make(), torch.rand(B, T, generator=generator(2)) > 0.3
    ids = torch.stack([torch.randperm(E, generator=generator(i))[:K] for i in range(B * T)]).view(B, T, K)
    got = vmap(lambda x, mask, ids: layer(x, mask, ids))(X, mask, ids)
    torch.testing.assert_close(got, torch.stack([layer(*each) for each in zip(X, mask, ids, strict=True)]))
    assert not got[~mask].any()


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_bad_rows_under_per_sample_gradients(bad: float) -> None:
    layer, x = make(), X.clone()
    x[:, 2] = bad
    dx = vmap(grad(lambda x: layer(x).square().mean()))(x)
    torch.testing.assert_close(dx, torch.stack([loss_and_grads(layer, each)[0] for each in x]))
    assert not dx[:, 2].any()


def test_an_ensemble_of_stacked_models() -> None:
    """Parameters and router state stacked: https://pytorch.org/tutorials/intermediate/ensembling.html's way."""
    layers = [make(seed=i) for i in range(3)]
    for i, layer in enumerate(layers):
        layer.router.initialize(torch.randn(200, D, generator=generator(i)))
    state = stack_module_state(layers)  # type: ignore[arg-type]
    got = vmap(lambda *state: functional_call(layers[0], state, (X[0],)))(*state)
    torch.testing.assert_close(got, torch.stack([layer(X[0]) for layer in layers]))


def test_a_frozen_router_pins_nothing_of_a_transform() -> None:
    layers = [make(), make()]
    layers[0].router.freeze()
    layers[1].router.initialize(torch.randn(200, D, generator=generator(9)))
    state = stack_module_state(layers)  # type: ignore[arg-type]
    want = torch.stack([layer(X[0]) for layer in layers])
    got = vmap(lambda *state: functional_call(layers[0], state, (X[0],)))(*state)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(layers[0](X[0]), want[0])


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "route": lambda x: route(x, CENTROIDS, K).weights,
    "router": lambda x: ROUTER(x).weights,
    "layer": lambda x: LAYER(x),
}
CENTROIDS = torch.randn(E, D, generator=generator(4))
ROUTER = KMeansRouter(D, E, K).eval()
LAYER = make()


@pytest.mark.parametrize("name", CALLS)
def test_forward_and_reverse_derivatives_agree(name: str) -> None:
    """jvp over an operator without a rule for it gave zeros, without a word."""
    call, x = CALLS[name], X[0]
    want = torch.autograd.functional.jacobian(call, x)
    assert want.abs().max() > 1e-3
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(call)(x), want, atol=1e-5, rtol=1e-4)
    v = torch.randn(T, D, generator=generator(6))
    along = (want.flatten(-2) @ v.flatten()).detach()
    torch.testing.assert_close(jvp(call, (x,), (v,))[1].detach(), along, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(linearize(call, x)[1](v).detach(), along, atol=1e-5, rtol=1e-4)
    dy = torch.randn(want.shape[:2], generator=generator(7))
    torch.testing.assert_close(vjp(call, x)[1](dy)[0], torch.einsum("tk,tksd->sd", dy, want), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_dual_numbers(name: str, grad_mode: bool) -> None:
    call, x, v = CALLS[name], X[0], torch.randn(T, D, generator=generator(6))
    want = torch.autograd.functional.jacobian(call, x).flatten(-2) @ v.flatten()
    with torch.set_grad_enabled(grad_mode), forward_ad.dual_level():
        assert backends.by_definition()
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, v))).tangent
        assert tangent is not None
        torch.testing.assert_close(tangent.detach(), want.detach(), atol=1e-5, rtol=1e-4)
    assert not backends.by_definition()


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("name", CALLS)
def test_vectorised_jacobians(name: str, strategy: str) -> None:
    """Batched gradients go through the operators' backward."""
    call, x = CALLS[name], X[0]
    got = torch.autograd.functional.jacobian(call, x, vectorize=True, strategy=strategy)
    torch.testing.assert_close(got, torch.autograd.functional.jacobian(call, x), atol=1e-5, rtol=1e-4)


def test_second_derivatives() -> None:
    x = X[0, :2].double()

    def call(x: Tensor) -> Tensor:
        return route(x, CENTROIDS.double(), K).weights[:, 0].sum()

    want = torch.autograd.functional.hessian(
        lambda x: route(x, CENTROIDS.double(), K, backend="reference").weights[:, 0].sum(), x
    )
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(hessian(call)(x), want)


def test_compiled_transforms() -> None:
    layer = make()
    got = torch.compile(lambda x: vmap(layer)(x), backend="eager")(X)
    torch.testing.assert_close(got, torch.stack([layer(x) for x in X]))


TRAINING: dict[str, Callable[[Any, Tensor], Any]] = {
    "grad": lambda module, x: grad(lambda x: _first(module(x)).sum())(x),
    "vmap": lambda module, x: vmap(lambda x: _first(module(x)))(x[None]),
    "jvp": lambda module, x: jvp(lambda x: _first(module(x)), (x,), (x,)),
}


def _first(out: Any) -> Tensor:
    first: Tensor = out if isinstance(out, Tensor) else out.weights
    return first


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("how", TRAINING)
@pytest.mark.parametrize("kind", ["MoE", "KMeansRouter", "LearnedRouter"])
def test_refused_in_training(kind: str, how: str, attached: bool) -> None:
    module = {
        "MoE": make,
        "KMeansRouter": lambda: KMeansRouter(D, E, K),
        "LearnedRouter": lambda: LearnedRouter(D, E, K),
    }[kind]().train()
    router = getattr(module, "router", module)
    if attached:
        parameters = [*module.parameters(), torch.nn.Parameter(torch.zeros(1))]
        attach(module, torch.optim.SGD(parameters, 0.1))
    with pytest.raises(RuntimeError, match=r"must be in eval mode to be transformed by torch\.func, got training mode"):
        TRAINING[how](module, X[0])
    assert int(router.pending.num_tokens) == 0


def test_dual_numbers_are_refused_in_training() -> None:
    router = KMeansRouter(D, E, K)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="in eval mode to be differentiated forward"):
        router(forward_ad.make_dual(X[0], X[0]))
    assert int(router.pending.num_tokens) == 0
