"""The table of bad input, as far as functions go: each row raises with argument, expected, got and remedy."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from kmeans_route import (
    KMeansRouter,
    LearnedRouter,
    MoE,
    attach,
    backends,
    centroid_sums,
    combine,
    directions,
    dispatch,
    route,
)

T, D, E, K = 5, 8, 6, 2
X = torch.randn(T, D, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(E, D, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[0, 1]] * T)


@contextmanager
def raises(error: type[Exception] | tuple[type[Exception], ...], match: str) -> Iterator[None]:
    """pytest.raises for messages that end in a remedy, after a colon."""
    with pytest.raises(error, match=f"(?s){match}") as caught:
        yield
    assert re.search(r": \w.{8,}$", str(caught.value)), f"no remedy: {caught.value}"


def swap(tensor: torch.Tensor, row: int, ids: list[int]) -> torch.Tensor:
    out = tensor.clone()
    out[row] = torch.tensor(ids)
    return out


OPTION_CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "K too large": ({"top_k": 7}, ValueError, r"top_k must be in \[1, 6\], got 7: lower top_k or raise num_experts"),
    "K zero": ({"top_k": 0}, ValueError, r"top_k must be in \[1, 6\], got 0"),
    "K negative": ({"top_k": -1}, ValueError, r"top_k must be in \[1, 6\], got -1"),
    "K not whole": ({"top_k": 2.0}, TypeError, r"top_k must be .*int.*got float"),
    "K a bool": ({"top_k": True}, TypeError, r"top_k must be .*int.*got bool"),
    "tau zero": ({"tau": 0.0}, ValueError, r"tau must be .*0.*got 0"),
    "tau negative": ({"tau": -0.05}, ValueError, r"tau must be .*0.*got -0\.05"),
    "tau NaN": ({"tau": float("nan")}, ValueError, r"tau must be .*got nan"),
    "tau next to zero": ({"tau": 1e-40}, ValueError, r"tau must be in \[1e-06, inf\), got 1e-40"),
    "tau next to zero, sigmoid": ({"tau": 9.9e-7, "gate": "sigmoid"}, ValueError, r"tau must be in \[1e-06, inf\)"),
    "scaling beyond fp32": ({"scaling": 1e39}, ValueError, r"scaling must be in \[1e-30, 1e\+30\), got 1e\+39"),
    "scaling below fp32": ({"scaling": 1e-46}, ValueError, r"scaling must be in \[1e-30, 1e\+30\), got 1e-46"),
    "scaling infinite": ({"scaling": float("inf")}, ValueError, r"scaling must be .*got inf"),
    "scaling NaN": ({"scaling": float("nan")}, ValueError, r"scaling must be .*got nan"),
    "gate": (
        {"gate": "relu"},
        ValueError,
        r"gate must be .*softmax.*sigmoid.*cosine.*uniform.*got 'relu'",
    ),
    "group score": (
        {"group_score": "mean", "n_group": 3, "topk_group": 2},
        ValueError,
        r"group_score must be .*top2.*max.*got 'mean'",
    ),
    "groups do not divide": ({"n_group": 4, "topk_group": 2}, ValueError, r"n_group must .*6.*got 4"),
    "no group": ({"n_group": 0, "topk_group": 1}, ValueError, r"n_group must .*got 0"),
    "negative groups": ({"n_group": -3, "topk_group": 1}, ValueError, r"n_group must .*got -3"),
    "no group kept": ({"n_group": 3, "topk_group": 0}, ValueError, r"topk_group must be in \[1, 3\], got 0"),
    "too many groups kept": ({"n_group": 3, "topk_group": 4}, ValueError, r"topk_group must be in \[1, 3\], got 4"),
    "groups too small": ({"n_group": 3, "topk_group": 1, "top_k": 3}, ValueError, r"topk_group.*at least.*3.*got 2"),
    "n_group alone": ({"n_group": 3}, ValueError, r"n_group and topk_group must be .*topk_group=None"),
    "topk_group alone": ({"topk_group": 3}, ValueError, r"n_group and topk_group must be .*n_group=None"),
    "backend": ({"backend": "cuda"}, ValueError, r"backend must be .*auto.*reference.*torch.*got 'cuda'"),
    "backend empty": ({"backend": ""}, ValueError, r"backend must be .*got ''"),
}


@pytest.mark.parametrize("case", OPTION_CASES)
def test_options(case: str) -> None:
    arguments, error, match = OPTION_CASES[case]
    arguments = dict(arguments)
    with raises(error, match):
        route(X, WEIGHT, arguments.pop("top_k", K), **arguments)


@pytest.mark.parametrize("balance", ["proportional", "sign", "quantile"])
def test_bias_steps_beyond_fp32_are_refused(balance: str) -> None:
    """Infinite times the 0 of a balanced expert would be NaN in the state."""
    with raises(ValueError, r"bias_rate must be in \[0, 1e\+30\), got 1e\+39"):
        KMeansRouter(D, E, K, balance=balance, bias_rate=1e39)
    if balance != "proportional":
        with raises(ValueError, r"bias_rate must be in \[0, 1e\+30\), got 1e\+39"):
            LearnedRouter(D, E, K, kind="sigmoid", balance=balance, bias_rate=1e39)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "cosine"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "edge", [{"tau": 1e-6}, {"tau": 1e30}, {"scaling": 9e29}, {"tau": 1e-6, "scaling": 9e29}], ids=str
)
def test_the_extremes_that_are_let_in_stay_finite(
    edge: dict[str, float], normalize: bool, gate: str, backend: str
) -> None:
    x = X.clone().requires_grad_()
    weights = route(x, WEIGHT, K, gate=gate, normalize=normalize, backend=backend, **edge).weights
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    if normalize:
        torch.testing.assert_close(weights.sum(1), torch.full((T,), edge.get("scaling", 1.0)))
    weights[:, 0].sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"bias_rate": 9e29},
        {"bias_rate": 9e29, "balance": "sign"},
        {"bias_rate": 9e29, "balance": "quantile"},
        {"decay": 1 - 1e-9},
        {"decay": 0.0},
    ],
    ids=str,
)
def test_extreme_steps_leave_a_finite_state(options: dict[str, Any]) -> None:
    router = KMeansRouter(D, E, K, **options)
    for _ in range(3):
        router(X.clone().requires_grad_()).weights.sum().backward()
        router.commit()
    assert router.weight.isfinite().all()
    assert router.expert_bias.isfinite().all()
    assert (router.expert_bias.abs() <= 2).all()


def test_top_k_message_word_for_word() -> None:
    with pytest.raises(ValueError, match=r"^top_k must be in \[1, 64\], got 65: lower top_k or raise num_experts$"):
        route(torch.ones(2, 4), torch.ones(64, 4), 65)


def test_triton_is_not_possible_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "INTERPRETED", False)
    calls: list[Callable[[], Any]] = [lambda: route(X, WEIGHT, K, backend="triton")]
    routing = route(X, WEIGHT, K)
    sent = dispatch(X, routing)
    calls.append(lambda: dispatch(X, routing, backend="triton"))
    calls.append(lambda: combine(sent.x_sorted, routing, sent, backend="triton"))
    calls.append(lambda: centroid_sums(X, routing, backend="triton"))
    for call in calls:
        with raises(RuntimeError, r"backend='triton' must get tensors on a GPU, got one on cpu: move the tensors"):
            call()


def test_triton_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON_INSTALLED", False)
    with raises(RuntimeError, r"got 'triton' without Triton: pip install"):
        route(X, WEIGHT, K, backend="triton")
    assert backends.choose("auto", torch.device("cuda")).NAME == "torch"


def test_triton_takes_no_fp64() -> None:
    with raises(TypeError, r"backend='triton' must get float32, float16 or bfloat16, got torch.float64"):
        route(X.double(), WEIGHT, K, backend="triton")
    assert backends.choose("auto", torch.device("cuda"), torch.float64).NAME == "torch"
    assert backends.choose("auto", torch.device("cuda"), torch.bfloat16).NAME == "triton"


@pytest.mark.parametrize("shape", [(T, D + 1), (T, D - 1), (T, 1), (2, 3, 7), (7,)])
def test_wrong_hidden_size_names_both_shapes(backend: str, shape: tuple[int, ...]) -> None:
    with raises(ValueError, rf"x must have shape \(\.\.\., {D}\), got {re.escape(str(shape))}"):
        route(torch.ones(shape), WEIGHT, K, backend=backend)


def test_x_without_dimensions(backend: str) -> None:
    with raises(ValueError, rf"x must have shape \(\.\.\., {D}\), got \(\)"):
        route(torch.tensor(1.0), WEIGHT, K, backend=backend)
    with raises(ValueError, r"x must .*got \(\)"):
        dispatch(torch.tensor(1.0), route(X, WEIGHT, K), backend=backend)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64], ids=str)
def test_x_not_floating(backend: str, dtype: torch.dtype) -> None:
    with raises(TypeError, rf"x must be floating point, got {dtype}"):
        route(torch.ones(T, D).to(dtype), WEIGHT, K, backend=backend)


def test_x_not_a_tensor() -> None:
    with raises(TypeError, r"x must be .*Tensor, got list"):
        route([[1.0] * D], WEIGHT, K)


@pytest.mark.parametrize("shape", [(D,), (2, E, D), ()])
def test_weight_not_a_matrix(shape: tuple[int, ...]) -> None:
    for call in (lambda w: route(X, w, 1), lambda w: directions(w, torch.float32)):
        with raises(ValueError, rf"weight must be .*\(E, D\).*got .*{re.escape(str(shape))}"):
            call(torch.ones(shape))


def test_weight_not_floating() -> None:
    for call in (lambda w: route(X, w, 1), lambda w: directions(w, torch.float32)):
        with raises((TypeError, ValueError), r"weight must be .*floating point.*got torch.int64"):
            call(torch.ones(E, D, dtype=torch.int64))


def test_directions_in_an_integer_dtype() -> None:
    """Rounded to integers every direction is zero: a clear error instead."""
    with raises((TypeError, ValueError), r"dtype must be .*floating.*got torch.int64"):
        directions(WEIGHT, torch.int64)


@pytest.mark.parametrize("shape", [(E + 1,), (1,), (E, 1), (1, E), ()])
def test_bias_of_the_wrong_shape(backend: str, shape: tuple[int, ...]) -> None:
    with raises(ValueError, rf"expert_bias must have shape \({E},\), got {re.escape(str(shape))}"):
        route(X, WEIGHT, K, torch.zeros(shape), backend=backend)


@pytest.mark.parametrize("shape", [(T + 1,), (T, 1), (1, T), (T, D), ()])
def test_mask_of_the_wrong_shape(backend: str, shape: tuple[int, ...]) -> None:
    with raises(ValueError, rf"mask must have shape \({T},\).*got {re.escape(str(shape))}"):
        route(X, WEIGHT, K, mask=torch.ones(shape).bool(), backend=backend)


def test_mask_transposed(backend: str) -> None:
    """(S, B) for x (B, S, D) has the right number of elements in the wrong order."""
    with raises(ValueError, r"mask must have shape \(2, 3\).*got \(3, 2\)"):
        route(torch.ones(2, 3, D), WEIGHT, K, mask=torch.ones(3, 2).bool(), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_mask_of_the_wrong_dtype(backend: str, dtype: torch.dtype) -> None:
    with raises(TypeError, rf"mask must be .*bool.*got {dtype}"):
        route(X, WEIGHT, K, mask=torch.ones(T).to(dtype), backend=backend)


@pytest.mark.parametrize("shape", [(T + 1, K), (T, K + 1), (T, 1), (T * K,), (K, T)])
def test_indices_of_the_wrong_shape(backend: str, shape: tuple[int, ...]) -> None:
    with raises(ValueError, rf"indices must have shape \({T}, {K}\), got {re.escape(str(shape))}"):
        route(X, WEIGHT, K, indices=torch.zeros(shape, dtype=torch.int64), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_indices_of_the_wrong_dtype(backend: str, dtype: torch.dtype) -> None:
    with raises(TypeError, rf"indices must be .*int64.*got {dtype}"):
        route(X, WEIGHT, K, indices=IDS.to(dtype), backend=backend)


@pytest.mark.parametrize("ids", [[0, E], [-1, 0], [10**9, 1], [-E, 2]])
def test_indices_out_of_range(backend: str, ids: list[int]) -> None:
    with raises(ValueError, rf"indices must be in \[0, {E - 1}\], got .*(?:{'|'.join(map(str, ids))})"):
        route(X, WEIGHT, K, indices=swap(IDS, 3, ids), backend=backend)


@pytest.mark.parametrize("ids", [[4, 1, 4], [2, 2, 3], [0, 5, 5]])
def test_repeated_indices(backend: str, ids: list[int]) -> None:
    indices = swap(torch.tensor([[3, 1, 0]] * T), 2, ids)
    with raises(ValueError, rf"indices must be distinct.*got {re.escape(str(ids))}"):
        route(X, WEIGHT, 3, indices=indices, backend=backend)


def test_given_directions_of_the_wrong_shape_or_dtype(backend: str) -> None:
    with raises(ValueError, rf"directions must .*\({E}, {D}\).*got \({E}, {D + 1}\)"):
        route(X, WEIGHT, K, directions=torch.ones(E, D + 1), backend=backend)
    with raises((TypeError, ValueError), r"directions must .*torch.float32.*got .*torch.bfloat16"):
        route(X, WEIGHT, K, directions=WEIGHT.bfloat16(), backend=backend)


DEVICE_CASES: dict[str, Callable[[], Any]] = {
    "x": lambda: route(X.to("meta"), WEIGHT, K),
    "weight": lambda: route(X, WEIGHT.to("meta"), K),
    "bias": lambda: route(X, WEIGHT, K, torch.zeros(E, device="meta")),
    "mask": lambda: route(X, WEIGHT, K, mask=torch.ones(T, device="meta").bool()),
    "indices": lambda: route(X, WEIGHT, K, indices=IDS.to("meta")),
    "directions": lambda: route(X, WEIGHT, K, directions=WEIGHT.to("meta")),
    "dispatch": lambda: dispatch(X.to("meta"), route(X, WEIGHT, K)),
    "combine": lambda: combine(
        torch.zeros(T * K, D, device="meta"), route(X, WEIGHT, K), dispatch(X, route(X, WEIGHT, K))
    ),
    "sums": lambda: centroid_sums(X.to("meta"), route(X, WEIGHT, K)),
}


@pytest.mark.parametrize("case", DEVICE_CASES)
def test_devices_are_named(case: str) -> None:
    with raises(RuntimeError, r"(?:meta.*cpu|cpu.*meta)"):
        DEVICE_CASES[case]()


@pytest.mark.parametrize("num_tokens", [T - 1, T + 1, 0])
def test_another_number_of_tokens_than_routed(backend: str, num_tokens: int) -> None:
    routing = route(X, WEIGHT, K, backend=backend)
    for call in (dispatch, centroid_sums):
        with raises(ValueError, rf"x must have the {T} tokens of the routing, got {num_tokens}"):
            call(torch.ones(num_tokens, D), routing, backend=backend)


@pytest.mark.parametrize("shape", [(T * K - 1, D), (T, D), (T, K, D), (T * K * D,)])
def test_expert_outputs_of_the_wrong_shape(backend: str, shape: tuple[int, ...]) -> None:
    routing = route(X, WEIGHT, K, backend=backend)
    sent = dispatch(X, routing, backend=backend)
    with raises(ValueError, rf"y_sorted must have shape \({T * K}, D\), got {re.escape(str(shape))}"):
        combine(torch.ones(shape), routing, sent, backend=backend)


def test_unknown_accumulate(backend: str) -> None:
    with raises(ValueError, r"accumulate must be .*unit.*raw.*got 'mean'"):
        centroid_sums(X, route(X, WEIGHT, K), accumulate="mean", backend=backend)


@pytest.mark.parametrize("call", [dispatch, centroid_sums])
def test_integer_hidden_states_after_routing(backend: str, call: Callable[..., Any]) -> None:
    with raises(TypeError, r"x must be floating point, got torch.int64"):
        call(torch.ones(T, D, dtype=torch.int64), route(X, WEIGHT, K), backend=backend)


def test_nothing_to_route_is_no_error(backend: str) -> None:
    empty = torch.zeros(0, D)
    routing = route(empty, WEIGHT, K, indices=torch.zeros(0, K, dtype=torch.int64), backend=backend)
    sent = dispatch(empty, routing, backend=backend)
    assert sent.x_sorted.shape == (0, D)
    assert sent.offsets.tolist() == [0] * (E + 1)
    assert combine(sent.x_sorted, routing, sent, backend=backend).shape == (0, D)
    sums, counts = centroid_sums(empty, routing, backend=backend)
    assert (sums == 0).all()
    assert sums.shape == (E, D)
    assert counts.tolist() == [0] * E


@pytest.mark.parametrize("call", ["route", "dispatch", "centroid_sums", "KMeansRouter", "LearnedRouter", "MoE"])
@pytest.mark.parametrize("kind", ["fp8", "nested"])
def test_hidden_states_that_no_backend_takes_are_refused_before_anything_counts(call: str, kind: str) -> None:
    x = torch.randn(32, 16)
    if kind == "fp8":
        bad, words = x.to(torch.float8_e4m3fn), r"x must have at least 16 bits an element, got torch\.float8_e4m3fn"
    else:
        bad = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=torch.jagged)
        words = "x must be a dense tensor, got a nested one"
    weight = torch.randn(4, 16)
    routing = route(x, weight, 2)
    modules: dict[str, Any] = {
        "KMeansRouter": KMeansRouter(16, 4, 2), "LearnedRouter": LearnedRouter(16, 4, 2), "MoE": MoE(16, 16, 4, 2),
    }  # fmt: skip
    calls: dict[str, Callable[[Any], Any]] = {
        "route": lambda x: route(x, weight, 2),
        "dispatch": lambda x: dispatch(x, routing),
        "centroid_sums": lambda x: centroid_sums(x, routing),
        **modules,
    }
    with pytest.raises(TypeError, match=words):
        calls[call](bad)
    for module in modules.values():
        assert int(getattr(module, "router", module).pending.num_tokens) == 0


@pytest.mark.parametrize("options", [{}, {"init": "normal"}, {"balance": "quantile"}], ids=str)
def test_a_default_device_changes_nothing(options: dict[str, Any]) -> None:
    """As set by a training script for what it makes itself; "meta" holds nothing, so a tensor made there would show."""

    def run() -> list[Tensor]:
        x = torch.randn(64, 16, device="cpu", generator=torch.Generator("cpu").manual_seed(0)).requires_grad_()
        router = KMeansRouter(16, 4, 2, device="cpu", **options)
        for _ in range(3):
            router(x).weights.sum().backward()
            router.commit()
        return [buffer.clone() for _, buffer in router.named_buffers()]

    want = run()
    torch.set_default_device("meta")
    try:
        got = run()
    finally:
        torch.set_default_device(None)
    for one, other in zip(got, want, strict=True):
        assert one.device.type == "cpu"
        assert torch.equal(one, other)


def test_export_in_training_mode_is_refused() -> None:
    layer, x = MoE(16, 16, 4, 2), torch.randn(32, 16)
    with pytest.raises(RuntimeError, match="must be in eval mode to be exported, got training mode"):
        torch.export.export(layer, (x,))
    attach(layer, torch.optim.SGD(layer.parameters()))
    with pytest.raises(RuntimeError, match="must be in eval mode to be exported, got training mode"):
        torch.export.export(layer, (x,))
    assert int(layer.router.pending.num_tokens) == 0
    torch.export.export(layer.eval(), (x,))
