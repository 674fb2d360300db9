"""What a newcomer gets wrong: an error names the argument, what was expected, what came and the remedy."""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kmeans_route
from kmeans_route import KMeansRouter, LearnedRouter, MoE, attach, route
from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.model import router_options

X, CENTROIDS = torch.randn(6, 16), torch.randn(4, 16)
NOTHING: Any = None


def made() -> tuple[MoE, torch.optim.Optimizer]:
    layer = MoE(16, 32, 4, 2)
    return layer, torch.optim.SGD(layer.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attach(made()[0], NOTHING), TypeError, "optimizer must be .* got NoneType: pass the one optimizer"),
        (lambda: attach(*reversed(made())), TypeError, r"model must be a torch.nn.Module, got SGD: .* in this order"),
        (lambda: attach(NOTHING, made()[1]), TypeError, "model must be a torch.nn.Module, got NoneType: call attach"),
        (
            lambda: kmeans_route.record(NOTHING).__enter__(),
            TypeError,
            "model must be a torch.nn.Module, got NoneType: pass the model",
        ),
        *(
            (call, TypeError, "model must be a torch.nn.Module, got NoneType: pass the model")
            for call in (
                lambda: kmeans_route.expert_parameters(NOTHING),
                lambda: kmeans_route.expert_parallel(NOTHING, NOTHING),
                lambda: kmeans_route.export_gates(NOTHING, [X]),
                lambda: kmeans_route.calibrate(NOTHING, made()[0], [X]),
            )
        ),
        (
            lambda: kmeans_route.calibrate(made()[0], NOTHING, [X]),
            TypeError,
            "target must be a model or a mapping from names to K-Means routers, got NoneType: pass the model with",
        ),
        (
            lambda: kmeans_route.dispatch(X, NOTHING),
            TypeError,
            "routing must be a Routing, got NoneType: pass what kmeans_route.route returns",
        ),
        (
            lambda: kmeans_route.dispatch(X, tuple(route(X, CENTROIDS, 2))),
            TypeError,
            "routing must be a Routing, got tuple: pass",
        ),
        (lambda: kmeans_route.centroid_sums(X, NOTHING), TypeError, "routing must be a Routing, got NoneType: pass"),
        (lambda: kmeans_route.combine(X, NOTHING, NOTHING), TypeError, "routing must be a Routing, got NoneType: pass"),
        (
            lambda: kmeans_route.combine(X, route(X, CENTROIDS, 1), NOTHING),
            TypeError,
            "dispatch must be a Dispatch, got NoneType: pass what kmeans_route.dispatch returns",
        ),
        (lambda: route(X, NOTHING, 2), TypeError, "weight must be a torch.Tensor, got NoneType: pass one centroid"),
        (lambda: route(NOTHING, CENTROIDS, 2), TypeError, "x must be a torch.Tensor, got NoneType: convert it"),
        (
            lambda: kmeans_route.directions(NOTHING, torch.float32),
            TypeError,
            "weight must be a torch.Tensor, got NoneType: pass one centroid a row",
        ),
        (
            lambda: route(X[:, :0], CENTROIDS[:, :0], 2),
            ValueError,
            r"weight must be .* at least one row and column, got torch.float32 \(4, 0\): pass one centroid a row",
        ),
        (
            lambda: kmeans_route.directions(CENTROIDS[:0], torch.float32),
            ValueError,
            r"weight must be .* at least one row and column, got torch.float32 \(0, 16\): pass",
        ),
        (lambda: KMeansRouter(0, 4, 2), ValueError, "hidden_size must be at least 1, got 0: pass a positive number"),
        (lambda: MoE(0, 32, 4, 2), ValueError, "hidden_size must be at least 1, got 0: pass a positive number"),
        (lambda: MoE(16, 32, 4, 2, dtype=torch.int8), TypeError, "dtype must be floating point, got torch.int8: pass"),
    ],
)
def test_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# Options by name


@pytest.mark.parametrize(
    ("make", "owner", "near"),
    [
        (lambda **options: MoE(16, 32, 4, 2, **options), "MoE(router='kmeans')", {"balanse": "balance"}),
        (lambda **options: MoE(16, 32, 4, 2, **options), "MoE(router='kmeans')", {"num_shared": "num_shared_experts"}),
        (lambda **options: MoE(16, 32, 4, 2, "softmax", **options), "MoE(router='softmax')", {"bias": "bias_rate"}),
        (lambda **options: MoE(16, 32, 4, 2, "sigmoid", **options), "MoE(router='sigmoid')", {"tau": ""}),
        (lambda **options: MoE(16, 32, 4, 2, "sigmoid", **options), "MoE(router='sigmoid')", {"kind": ""}),
        (
            lambda **options: KMeansRouter.from_linear(CENTROIDS, 2, **options),
            "KMeansRouter.from_linear",
            {"normalise": "normalize"},
        ),
    ],
)
def test_a_misspelt_option_is_told_by_whom_it_was_given_to(
    make: Callable[..., object], owner: str, near: dict[str, str]
) -> None:
    ((name, meant),) = near.items()
    remedy = re.escape(f"did you mean {meant!r}?") if meant else "leave it out"
    with pytest.raises(
        TypeError, match=rf"^{re.escape(owner)} must get options among .*, got '{name}': {remedy}$"
    ) as told:
        make(**{name: 1})
    assert "bias_rate" in str(told.value)
    assert ("tau" in str(told.value).partition("got")[0]) == ("softmax" not in owner and "sigmoid" not in owner)


def test_a_misspelt_option_of_a_run_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"among .*, got normalise: did you mean 'normalize'\?$"):
        router_options(TrainConfig(router_options={"normalise": True}))


# Device and dtype


@pytest.mark.parametrize("router", ["kmeans", "softmax", "sigmoid"])
@pytest.mark.parametrize("shared", [0, 1])
def test_a_layer_takes_device_and_dtype_as_every_module_does(router: str, shared: int) -> None:
    options: dict[str, Any] = {"num_shared_experts": shared}
    layer = MoE(16, 32, 4, 2, router, dtype=torch.bfloat16, device="cpu", **options)
    after = MoE(16, 32, 4, 2, router, **options).to(torch.bfloat16)
    assert {name: p.dtype for name, p in layer.named_parameters()} == {
        name: p.dtype for name, p in after.named_parameters()
    }
    assert {name: b.dtype for name, b in layer.named_buffers()} == {name: b.dtype for name, b in after.named_buffers()}
    assert layer.router.expert_bias.dtype == torch.float32
    assert layer.eval()(X.bfloat16()).dtype == torch.bfloat16
    meta = MoE(16, 32, 4, 2, router, device="meta", **options)
    held = [*meta.parameters(), *meta.buffers(), meta.tokens_per_expert, meta.router.tokens_per_expert]
    assert all(tensor.is_meta for tensor in held)
    assert all(tensor.dtype != torch.bfloat16 for tensor in held)
    torch.manual_seed(0)
    plain = MoE(16, 32, 4, 2, router, **options)
    torch.manual_seed(0)
    named = MoE(16, 32, 4, 2, router, device="cpu", dtype=torch.float32, **options)
    for one, other in zip(plain.state_dict().values(), named.state_dict().values(), strict=True):
        assert torch.equal(one, other)


# Before data


@pytest.mark.parametrize("router", ["kmeans", "softmax", "sigmoid"])
def test_metrics_before_data_are_no_numbers_that_mean_something(router: str) -> None:
    layer = MoE(16, 32, 4, 2, router)
    attachment = attach(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    before = attachment.metrics()
    of_tokens = {name for name, value in before.items() if math.isnan(value)}
    measured = {"maxvio", "load_std", "load_entropy", "load_gini", "dead_experts"}
    if router == "kmeans":
        measured |= {"effective_experts", "score_std", "centroid_drift"}
    assert of_tokens == {f"router/{name}" for name in measured}
    layer(torch.randn(64, 16)).sum().backward()
    attachment.commit()
    after = attachment.metrics()
    assert after.keys() == before.keys()
    if router != "softmax":  # whose loads nobody commits where the loss balances
        assert all(map(math.isfinite, after.values()))


# The least norm


def test_the_least_norm_is_the_documented_one(backend: str) -> None:
    directions = torch.nn.functional.normalize(X, dim=1).double()
    for norm, valid in ((1.001e-15, True), (0.999e-15, False), (1e-18, False), (1e15, True)):
        routing = route((directions * norm).float(), CENTROIDS, 2, backend=backend)
        assert routing.valid.tolist() == [valid] * 6, norm
    assert "at least 1e-30 (a norm of 1e-15)" in str(route.__doc__)


# Warnings name the router


def told(call: Callable[[], object]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (warning,) = caught
    return str(warning.message)


def test_warnings_name_the_router() -> None:
    x: Tensor = torch.randn(8, 16)
    named, unnamed = KMeansRouter(16, 4, 2, name="blocks.3"), KMeansRouter(16, 4, 2)
    assert told(lambda: named(x)).startswith("router 'blocks.3' trains but nothing commits its statistics: ")
    assert told(lambda: unnamed(x)).startswith("a KMeansRouter without a name (4 experts, hidden size 16) trains but ")
    model = nn.Sequential(nn.Identity(), MoE(16, 32, 4, 2))
    attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model(x)
    saved = told(model.state_dict)
    assert saved.startswith("router '1.router' is saved with 8 tokens pending")
    assert saved.endswith(": save right after an optimizer step, or call attachment.commit() before")
    another = torch.optim.SGD(model.parameters(), lr=0.0)
    model(x).sum().backward()
    assert told(lambda: [another.step() for _ in range(5)]).endswith("each update (routers: '1.router')")
    learned = LearnedRouter(16, 4, 2, kind="sigmoid")
    assert told(lambda: learned(x)).startswith("a LearnedRouter without a name (4 experts, hidden size 16) trains but ")
