"""The registered operators: opcheck on each, torch.compile against eager, autocast that changes nothing."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kmeans_route import KMeansRouter, MoE, centroid_sums, combine, directions, dispatch, ops, route
from kmeans_route.checks import check_route_options
from kmeans_route.types import Wanted
from tests.helpers import oracle
from tests.helpers.compare import (
    OPTIONS,
    assert_same_bits,
    assert_same_routing,
    generator,
    make_inputs,
    tokens_of,
    truth,
)

NAMESPACE = "kmeans_route"
T, D, E, K = 6, 8, 5, 2


def registered() -> list[str]:
    """Names of all operators of the namespace."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::")]
    return sorted(name.split("::")[1].split(".")[0] for name in names)


def sample_values(dtype: torch.dtype) -> dict[str, Any]:
    """A value for each argument name that a schema may use, from one real call of the layer."""
    x, weight, bias = make_inputs(T, D, E, dtype)
    x[3] = 0
    mask = torch.arange(T) != 1
    routing = route(x, weight, K, bias, mask=mask, return_scores=True)
    sent = dispatch(x, routing)
    y_sorted = torch.randn(T * K, D, generator=generator(1)).to(dtype)
    wide = routing.weights.dtype
    gen = generator(2)
    return {
        "x": x,
        "directions": directions(weight, dtype),
        "expert_bias": bias,
        "mask": mask,
        "indices": routing.indices,
        "top_k": K,
        "gate": "softmax",
        "tau": 0.1,
        "normalize": True,
        "scaling": 1.5,
        "n_group": 1,
        "topk_group": 1,
        "group_score": "top2",
        "want_scores": True,
        "want_std": True,
        "want_hist": True,
        "selected_scores": routing.selected_scores,
        "count_mask": torch.arange(T) != 4,
        "factor": routing.inv_norm,
        "counted": routing.valid,
        "inv_norm": routing.inv_norm,
        "valid": routing.valid,
        "scores": routing.scores,
        "candidates": torch.ones(T, E, dtype=torch.bool),
        "d_weights": torch.randn(T, K, generator=gen).to(wide),
        "d_selected_scores": torch.randn(T, K, generator=gen).to(wide),
        "d_scores": torch.randn(T, E, generator=gen).to(wide),
        "counts": routing.tokens_per_expert,
        "rows": y_sorted,
        "positions": sent.positions,
        "weights": routing.weights,
        "y_sorted": y_sorted,
        "token_of_row": sent.token_of_row,
        "offsets": sent.offsets,
        "dy": torch.randn(T, D, generator=gen).to(dtype),
        "num_experts": E,
        "accumulate": "unit",
        "batch_counts": routing.tokens_per_expert,
        "batch_score_std": torch.full((T,), 0.5, dtype=wide),
        "batch_num_dropped": torch.tensor(1),
        "partials": torch.randn(2, E, D, generator=gen),
        "d_x_sorted": torch.randn(T * K, D, generator=gen).to(dtype),
        "copies": True,
        "backend": "torch",
        "batch_margin_hist": torch.ones(E, 1024, dtype=torch.int32),
        "sums": torch.zeros(E, D),
        "std_sum": torch.zeros(()),
        "num_tokens": torch.zeros((), dtype=torch.int64),
        "num_dropped": torch.zeros((), dtype=torch.int64),
        "margin_hist": torch.zeros(E, 1024, dtype=torch.int32),
        "seed": 3,
        "pairs": torch.zeros(E, E),
        "dtype": torch.bfloat16,
        "moments": torch.zeros(2 * E + 2, D + 1, dtype=torch.float64),
        "weight": torch.randn(E, 16, D, generator=gen).to(dtype),
    }


def own_values(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Values of arguments that mean something else in this operator than in the others."""
    if name == "route_dispatch":  # one operator on this backend alone
        return {"backend": "triton"}
    if name.startswith("grouped_linear"):  # rows past offsets[E] come out undefined: here there are none
        return {
            "offsets": torch.tensor([0, 3, 3, 7, 8, T * K], dtype=torch.int32),
            "dy": torch.randn(T * K, 16, generator=generator(3)).to(dtype),
        }
    return {}


# Other values for single arguments, by operator; the plain sample is always checked too.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "route": [
        {"expert_bias": None, "mask": None, "indices": None, "count_mask": None},
        {"indices": None, "normalize": False, "want_scores": False},
        {"indices": None, "gate": "sigmoid", "want_std": False, "want_hist": False, "want_scores": False},
        {"indices": None, "n_group": 5, "topk_group": 3, "group_score": "max", "gate": "cosine"},
        {"indices": None, "gate": "uniform", "x": torch.zeros(0, D), "mask": None, "count_mask": None},
    ],
    "route_bwd": [
        {"d_selected_scores": None, "d_scores": None},
        {"d_weights": None, "d_scores": None, "gate": "sigmoid"},
        {"d_weights": None, "d_selected_scores": None, "normalize": False},
        {"gate": "cosine", "normalize": False},
    ],
    "gather_sum": [{"weights": None}],
    "centroid_sums": [{"factor": None}],
    "accumulate": [
        {"partials": None},
        {"margin_hist": torch.zeros(0, 1024, dtype=torch.int32), "factor": None, "partials": None},
    ],
    "dispatch": [{"copies": False}],
    "route_dispatch": [
        {"indices": None, "expert_bias": None, "mask": None, "count_mask": None},
        {"indices": None, "normalize": False, "want_scores": False, "accumulate": "", "want_std": False},
        {"indices": None, "n_group": 5, "topk_group": 3, "gate": "cosine", "accumulate": "raw"},
    ],
}
for _name in (
    "route",
    "dispatch",
    "gather_sum",
    "combine",
    "combine_bwd",
    "centroid_sums",
    "accumulate",
):
    VARIANTS.setdefault(_name, []).append({"backend": "triton"})
VARIANTS["route_bwd"].append({"d_scores": None, "backend": "triton"})
DIFFERENTIABLE = {
    "route": ["x"],
    "route_dispatch": ["x"],
    "dispatch": ["x"],
    "combine": ["y_sorted", "weights"],
    "grouped_linear": ["rows", "weight"],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", registered())
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """Schema, fake, autograd registration and AOT dispatch with dynamic shapes; mutated and aliased arguments too."""
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    for variant in [{}, *VARIANTS.get(name, [])]:
        values = sample_values(dtype) | own_values(name, dtype) | variant
        unknown = [argument.name for argument in op._schema.arguments if argument.name not in values]
        assert not unknown, f"sample_values lacks {unknown}"
        arguments = [values[argument.name] for argument in op._schema.arguments]
        arguments = [value.detach().clone() if isinstance(value, Tensor) else value for value in arguments]
        if name in ("route", "route_dispatch"):
            # The AOT check adds all outputs up in place and fails on ids before floats, so it runs without gradients
            # here; the compiled layer below has them.
            torch.library.opcheck(op, tuple(arguments))
        for argument, value in zip(op._schema.arguments, arguments, strict=True):
            if argument.name in DIFFERENTIABLE.get(name, []):
                value.requires_grad_()
        utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        few = name in ("route", "route_dispatch")
        torch.library.opcheck(op, tuple(arguments), test_utils=utils[:3] if few else utils)


def test_unwritten_memory_shows() -> None:
    """The fixture under which all these tests run does what it says, in and below Python."""
    assert torch.empty(5).isnan().all()
    assert torch.ones(5).to(torch.bfloat16).new_empty(3).isnan().all()
    assert (torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_every_operator_of_the_layer_is_registered() -> None:
    assert {"route", "dispatch", "combine", "centroid_sums"} <= set(registered())


@pytest.mark.parametrize("groups", [{}, {"n_group": 4, "topk_group": 2}, {"n_group": 4, "topk_group": 1}], ids=str)
def test_statistics_for_the_router(groups: dict[str, int]) -> None:
    """Summed standard deviation and margin histogram, invalid rows left out; one group of K has no (K+1)-th score."""
    x, weight, bias = make_inputs(40, 16, 12, torch.float64)
    x[7] = torch.nan
    bias = bias * 30
    mask = torch.arange(40) % 9 != 4
    want, _ = truth(x, weight, 3, bias, mask=mask, **groups)
    options = check_route_options(12, 3, **groups)
    routed = ops.route(tokens_of(x, mask), directions(weight, x.dtype), bias, options, Wanted(std=True, hist=True))
    np.testing.assert_allclose(routed.score_std.sum().item(), oracle.std_sum(want), rtol=1e-12)
    assert routed.num_dropped.item() == 1
    hist = routed.margin_hist
    np.testing.assert_array_equal(hist.numpy(), oracle.margin_histogram(oracle.margins(want, bias.numpy(), 3)))
    assert hist.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_in_low_precision(dtype: torch.dtype) -> None:
    """Up to margins within fp32 rounding of the edge of a bin; equal scores far from 0 have no spread of their own."""
    x, weight, bias = make_inputs(300, 16, 12, dtype)
    want, _ = truth(x, weight, 3, bias)
    options = check_route_options(12, 3)
    routed = ops.route(tokens_of(x, None), directions(weight, dtype), bias, options, Wanted(std=True, hist=True))
    np.testing.assert_allclose(routed.score_std.sum().item(), oracle.std_sum(want), rtol=1e-5)
    hist = routed.margin_hist
    exact = oracle.margin_histogram(oracle.margins(want, bias.numpy(), 3))
    assert np.abs(hist.numpy().cumsum(axis=1) - exact.cumsum(axis=1)).max() <= 1
    assert np.abs(hist.numpy() - exact).sum() <= 8
    same = weight[:1].expand(12, 16)
    routed = ops.route(tokens_of(x, None), directions(same, dtype), None, options, Wanted(std=True, hist=False))
    assert routed.score_std.sum().item() < 1e-6 * 300


def layer(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Everything public in one graph."""
    routing = route(x, weight, 3, bias, mask=mask, return_scores=True, **options)
    sent = dispatch(x, routing)
    y = combine(sent.x_sorted * 2 + 1, routing, sent)
    sums, _ = centroid_sums(x, routing)
    assert routing.scores is not None
    return y, sums, routing.scores


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare_compiled(
    backend: str, dtype: torch.dtype, dynamic: bool | None = None, steps: int = 8, **options: Any
) -> None:
    """Values and dx of the compiled layer are the eager one's but for `steps` roundings of the largest."""
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    for num_tokens in (17, 30) if dynamic else (17,):
        x, weight, bias = make_inputs(num_tokens, 24, 12, dtype)
        mask = torch.arange(num_tokens) % 5 != 1
        results = []
        for function in (layer, compiled):
            leaf = x.clone().requires_grad_()
            y, sums, scores = function(leaf, weight, bias, mask, **options)
            (y.float().square().sum() + scores.square().sum()).backward()
            assert y.dtype == dtype
            results.append((y, sums, scores, leaf.grad))
        for eager, graph in zip(*results, strict=True):
            tolerance = steps * torch.finfo(eager.dtype).eps * eager.detach().abs().max().item()
            np.testing.assert_allclose(
                graph.detach().float().numpy(), eager.detach().float().numpy(), rtol=0, atol=tolerance
            )


@pytest.mark.parametrize("name", ["softmax", "softmax-all-candidates", "sigmoid", "groups-max"])
def test_compiled_without_breaks_equals_eager(fresh_dynamo: None, name: str) -> None:
    compare_compiled("aot_eager", torch.float32, **OPTIONS[name])


def test_compiled_in_low_precision(fresh_dynamo: None) -> None:
    compare_compiled("aot_eager", torch.bfloat16)


def test_compiled_for_any_number_of_tokens(fresh_dynamo: None) -> None:
    compare_compiled("aot_eager", torch.float32, dynamic=True)


def test_compiled_by_inductor(fresh_dynamo: None) -> None:
    try:
        torch._inductor.cpp_builder.get_cpp_compiler()
    except torch._inductor.exc.InvalidCxxCompiler:
        pytest.skip("inductor needs a C++ compiler")
    # Elementwise work around the operators is fused and rounded less often; 1 / tau carries that into dx.
    compare_compiled("inductor", torch.float32, steps=64)


def test_compiled_reference_equals_eager(fresh_dynamo: None) -> None:
    """The definition compiles as well: it has no branch on data."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        routing = route(x, weight, 3, bias, backend="reference")
        sent = dispatch(x, routing, backend="reference")
        return combine(sent.x_sorted, routing, sent, backend="reference"), routing.indices

    x, weight, bias = make_inputs(17, 24, 12, torch.float32)
    y, ids = torch.compile(forward, backend="aot_eager", fullgraph=True)(x, weight, bias)
    want, want_ids = forward(x, weight, bias)
    assert torch.equal(ids, want_ids)
    np.testing.assert_allclose(y.numpy(), want.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    """Autocast is off inside: the same bits in x's incoming dtype, forward and backward."""
    x, weight, bias = make_inputs(40, 24, 12, dtype)
    y_sorted = torch.randn(120, 24, generator=generator(3)).to(dtype)
    results = []
    for enabled in (False, True):
        leaf, y_leaf = x.clone().requires_grad_(), y_sorted.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            unit_rows = directions(weight, dtype)
            routing = route(leaf, weight, 3, bias, return_scores=True, backend=backend)
            sent = dispatch(leaf, routing, backend=backend)
            y = combine(y_leaf, routing, sent, backend=backend)
            sums, _ = centroid_sums(leaf, routing, backend=backend)
            loss = y.float().square().sum() + routing.scores.square().sum() + sent.x_sorted.float().square().sum()
        loss.backward()
        results.append((routing, [unit_rows, *sent, y, sums, leaf.grad, y_leaf.grad]))
    assert_same_routing(results[1][0], results[0][0])
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert_same_bits(other, one)


def test_backward_inside_autocast() -> None:
    """The operators' backward switches autocast off for itself, wherever it is called."""
    x, weight, bias = make_inputs(40, 24, 12, torch.float32)
    grads = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        routing = route(leaf, weight, 3, bias, return_scores=True, backend="torch")
        sent = dispatch(leaf, routing, backend="torch")
        loss = combine(sent.x_sorted, routing, sent, backend="torch").square().sum() + routing.scores.square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss.backward()
        grads.append(leaf.grad)
    assert_same_bits(grads[1], grads[0])


def test_no_silent_second_derivative() -> None:
    """The backward is an operator without a derivative of its own: asking for one must fail, not give zeros."""
    x, weight, bias = make_inputs(6, 8, 5, torch.float64)
    leaf = x.requires_grad_()
    got = route(leaf, weight, 2, bias, backend="torch")
    (grad,) = torch.autograd.grad(got.weights.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


class Seen(TorchDispatchMode):
    """Which operators of the namespace are called while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if namespace == NAMESPACE:
            self.names.add(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"learned_offset": True}, {"normalize": False, "detach_gates": True}], ids=str)
@pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")
def test_calls_past_the_dispatcher_equal_the_operators(backend: str, options: dict[str, Any]) -> None:
    """Who looks sees operators; nobody else gets to them, forward, and all bits are the same."""
    x, results, nodes, seen = torch.randn(9, 16, generator=generator(4)), [], [], Seen()
    for looks in (False, True):
        torch.manual_seed(2)
        layer = MoE(16, 8, 4, 2, backend=backend, balance="quantile", **options)
        assert isinstance(layer.router, KMeansRouter)
        leaf = x.clone().requires_grad_()
        if looks:
            with seen:
                y = layer(leaf)
        else:
            y = layer(leaf)
        nodes.append(str(y.grad_fn.next_functions[0][0]))
        y.square().sum().backward()
        p = layer.router.pending
        results.append([y, leaf.grad, *(w.grad for w in layer.parameters()), *(getattr(p, name) for name in p.FIELDS)])
    assert "function.combineBackward" in nodes[0]
    assert "GeneratedBackwardFor" in nodes[1]
    routed = {"route_dispatch"} if backend == "triton" else {"route", "dispatch"}
    assert seen.names >= routed | {"accumulate", "combine", "grouped_linear", "first_moments"}
    for direct, looked_at in zip(*results, strict=True):
        assert_same_bits(direct, looked_at)


@pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")
def test_a_profile_names_the_operators() -> None:
    layer, x = MoE(16, 8, 4, 2), torch.randn(9, 16, generator=generator(4))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    named = {event.key.removeprefix(f"{NAMESPACE}::") for event in profile.key_averages()}
    assert named >= {"route", "dispatch", "accumulate", "combine", "grouped_linear"}
