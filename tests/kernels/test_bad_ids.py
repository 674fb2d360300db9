"""Whatever bias, centroids and replayed ids hold, a row's ids are distinct and in [0, E), and gates are finite."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kmeans_route
from kmeans_route import KMeansRouter, backends, functional, reference
from kmeans_route.backends import torch as torch_backend
from kmeans_route.checks import check_route_options
from kmeans_route.kernels import dispatch as dispatch_kernels
from kmeans_route.kernels import route as route_kernels
from kmeans_route.types import RouteInputs, Wanted
from tests.helpers.compare import assert_same_bits, make_inputs

pytestmark = pytest.mark.usefixtures("coarse_rows")
T, D, E, K = 37, 24, 13, 3
BODIES = ["reference", "torch", "triton", "triton-split"]
BIASES: dict[str, Any] = {
    "all NaN": [torch.nan] * E,
    "one NaN": [0.1, torch.nan] + [0.0] * (E - 2),
    "one inf": [0.0] * 5 + [torch.inf] + [0.0] * (E - 6),
    "all inf": [torch.inf] * E,
    "all -inf": [-torch.inf] * E,
    "two left": [0.0, 0.0] + [-torch.inf] * (E - 2),  # fewer than K
    "huge": [3e38, -3e38, 2000.0] + [0.0] * (E - 3),
}


def assert_usable(indices: Tensor, weights: Tensor) -> None:
    ordered = indices.sort(dim=1).values
    assert int(ordered[:, 0].min()) >= 0
    assert int(ordered[:, -1].max()) < E
    assert bool((ordered[:, 1:] != ordered[:, :-1]).all())
    assert bool(torch.isfinite(weights).all())


def route_body(
    body: str, monkeypatch: pytest.MonkeyPatch, indices: Tensor | None, bias: Tensor, options: dict[str, Any], *,
    want_hist: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ids and weights of one body below the checks that a CPU makes, where a GPU's call arrives unchecked."""
    x, weight, _ = make_inputs(T, D, E - E % options.get("n_group", 1), torch.float32)
    x[7], x[11, 2] = 0, torch.nan
    d, checked = functional.directions(weight, x.dtype), check_route_options(len(weight), K, **options)
    bias = bias[: len(weight)]
    if body == "reference":
        routing = reference.route_reference(x, d, bias, None, indices, checked)
        return routing.indices, routing.weights
    if body == "torch":
        out = torch_backend.route_fwd(
            RouteInputs(x, d, bias, None, None, indices), checked, Wanted(True, True, want_hist)
        )
        return out.indices, out.weights
    monkeypatch.setattr(route_kernels, "PROGRAMS", 64 if body == "triton-split" else 1)
    result = route_kernels.route_fwd(
        x, d, bias, None, indices, checked, want_scores=True, want_std=True, want_hist=want_hist, want_rank=True
    )
    return result.indices, result.weights


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", list(BIASES))
@pytest.mark.parametrize("options", [{}, {"n_group": 4, "topk_group": 2}, {"normalize": False}], ids=str)
def test_any_bias(monkeypatch: pytest.MonkeyPatch, body: str, name: str, options: dict[str, Any]) -> None:
    """Distinct ids in range and finite gates; a NaN bias ranks last, and of equals the lower id comes first."""
    bias = torch.tensor(BIASES[name])
    indices, weights = route_body(body, monkeypatch, None, bias, options)
    assert_usable(indices, weights)
    want, want_weights = route_body("reference", monkeypatch, None, bias, options)
    if name not in ("all NaN", "all inf", "all -inf"):  # there s + b is s rounded to steps of 1e-4
        assert torch.equal(indices[:, 0], want[:, 0])
        torch.testing.assert_close(weights, want_weights, rtol=0, atol=2e-3)
    if name == "one NaN" and not options:
        assert not bool((indices[8:11] == 1).any())


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("options", [{}, {"n_group": 4, "topk_group": 2}, {"normalize": False}], ids=str)
def test_rows_that_cannot_be_replayed_are_routed(
    monkeypatch: pytest.MonkeyPatch, body: str, options: dict[str, Any]
) -> None:
    """Ids of E, -1, 2^40, -2^63 or repeated: the row is as if none had been given; the other rows are replayed."""
    num_experts = E - E % options.get("n_group", 1)
    bias = torch.linspace(-0.05, 0.05, E)
    given = torch.stack([torch.randperm(num_experts)[:K] for _ in range(T)])
    bad = {0: (0, num_experts), 5: (2, -1), 6: (1, 1 << 40), 8: (0, -(1 << 63)), T - 1: (1, (1 << 32) + 3)}
    for row, (place, value) in bad.items():
        given[row, place] = value
    given[20, 2] = given[20, 0]
    given[21] = 4
    rows = torch.tensor([*bad, 20, 21])
    good = torch.ones(T, dtype=torch.bool)
    good[rows] = good[7] = good[11] = False
    indices, weights = route_body(body, monkeypatch, given, bias, options)
    assert_usable(indices, weights)
    assert torch.equal(indices[good], given[good])
    native, native_weights = route_body(body, monkeypatch, None, bias, options)
    assert torch.equal(indices[rows], native[rows])
    if "normalize" not in options:
        assert_same_bits(weights[rows], native_weights[rows])
    assert indices[7].tolist() == indices[11].tolist() == list(range(K)), "rows that are not valid"


def test_a_centroid_that_is_not_finite_scores_nothing(backend: str) -> None:
    x, weight, bias = make_inputs(T, D, E, torch.float32)
    weight[4], weight[6, 3] = torch.nan, torch.inf
    routing = kmeans_route.route(x, weight, K, bias, return_scores=True, backend=backend)
    assert_usable(routing.indices, routing.weights)
    assert routing.scores is not None
    assert not bool(routing.scores[:, [4, 6]].any())
    assert bool(torch.isfinite(kmeans_route.centroid_sums(x, routing, backend=backend)[0]).all())


@pytest.mark.parametrize("split", [False, True], ids=["stream", "split"])
def test_directions_that_are_not_finite_in_the_kernels(monkeypatch: pytest.MonkeyPatch, split: bool) -> None:
    """Given directions are not looked at; K = E, so the expert without a direction is chosen too."""
    monkeypatch.setattr(route_kernels, "PROGRAMS", 64 if split else 1)
    x, weight, bias = make_inputs(T, D, K, torch.float32)
    d = functional.directions(weight, x.dtype)
    d[1, 5] = torch.nan
    result = route_kernels.route_fwd(x, d, bias, None, None, check_route_options(K, K))
    assert torch.equal(result.indices.sort(1).values, torch.arange(K).expand(T, K))
    assert bool(torch.isfinite(result.weights).all())


def test_public_calls_refuse_bad_ids_on_a_cpu(backend: str) -> None:
    x, weight, bias = make_inputs(4, D, E, torch.float32)
    for bad in (E, -1, 1 << 40):
        with pytest.raises(ValueError, match=r"indices must be in \[0, 12\]"):
            kmeans_route.route(x, weight, 2, bias, indices=torch.tensor([[0, bad]] * 4), backend=backend)
    with pytest.raises(ValueError, match="indices must be distinct in each row"):
        kmeans_route.route(x, weight, 2, bias, indices=torch.tensor([[0, 1], [2, 2], [0, 1], [0, 1]]), backend=backend)


def test_dispatch_of_any_ids_is_a_permutation() -> None:
    """Ids out of range count as the nearest expert, repeated ones get rows of their own: every row is written once."""
    x, _, _ = make_inputs(T, D, E, torch.float32)
    ids = torch.randint(-3, E + 3, (T, K))
    ids[3], ids[4, 1] = 5, 1 << 40
    valid = torch.arange(T) % 9 != 2
    ranks = dispatch_kernels.rank(ids, valid, E)
    sent = dispatch_kernels.dispatch_fwd(x, ids, valid, E, ranks, x.norm(dim=1).reciprocal(), want_sums=True)
    clamped = torch.where(valid[:, None], ids.clamp(0, E - 1), E).flatten()
    order = clamped.sort(stable=True).indices
    assert torch.equal(sent.token_of_row, order // K)
    assert torch.equal(sent.positions.flatten()[order], torch.arange(T * K))
    assert_same_bits(sent.x_sorted[: ranks.offsets[-1]], x[sent.token_of_row][: ranks.offsets[-1]])
    assert torch.equal(ranks.offsets[1:].long(), torch.bincount(clamped, minlength=E + 1)[:E].cumsum(0))
    assert bool(torch.isfinite(sent.partials).all())


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 512), (torch.bfloat16, 1024)], ids=str)
def test_too_many_experts_are_refused_by_name(dtype: torch.dtype, most: int) -> None:
    x, weight, _ = make_inputs(3, 8, most + 1, dtype)
    words = f"num_experts must be at most {most} for backend='triton' and {dtype}, got {most + 1}: use backend='auto'"
    with pytest.raises(ValueError, match=words):
        kmeans_route.route(x, weight, 2, backend="triton")
    routing = kmeans_route.route(x, weight, 2)
    for call in (kmeans_route.dispatch, kmeans_route.centroid_sums):
        with pytest.raises(ValueError, match=words):
            call(x, routing, backend="triton")
    with pytest.raises(ValueError, match="num_experts must be at most 1024 for backend='triton', got 1025: use"):
        KMeansRouter(8, 1025, 2, backend="triton")
    gpu = torch.device("cuda")
    if backends.TRITON_INSTALLED:
        assert backends.choose("auto", gpu, dtype, num_experts=most).NAME == "triton"
    assert backends.choose("auto", gpu, dtype, num_experts=most + 1).NAME == "torch"
