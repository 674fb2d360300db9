"""The Triton kernels' values in Triton's interpreter, in fp32, fp16 and bf16, against the oracle and fp64.

The blocks and splits that only many tokens make, the fused operator and its one backward pass, many experts, exact
ties. Tolerances are roundings: to fp32 where sums are taken, to the dtype where a result is stored in it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import kmeans_route
from kmeans_route import functional, ops, reference
from kmeans_route.checks import check_route_options
from kmeans_route.kernels import combine as combine_kernels
from kmeans_route.kernels import common
from kmeans_route.kernels import directions as directions_kernels
from kmeans_route.kernels import route as route_kernels
from kmeans_route.kernels import route_bwd as route_bwd_kernels
from kmeans_route.kernels.configs import Config
from kmeans_route.testing import assert_same_selection
from kmeans_route.types import RouteOptions, Wanted
from tests.helpers.compare import (
    EPS,
    LOW,
    ROUND,
    assert_same_bits,
    generator,
    half_step,
    largest_error,
    make_inputs,
    numpy,
    tokens_of,
)
from tests.helpers.inputs import make_tied_rows
from tests.routing.test_route import check_against_truth

pytestmark = pytest.mark.usefixtures("coarse_rows")

CASES = [
    # T, D, E, K: one expert; many blocks and one split; several blocks and splits; one token; odd everything
    (5, 8, 1, 1),
    (3, 2880, 8, 2),
    (9, 24, 6, 6),
    (300, 24, 8, 2),
    (70, 136, 13, 3),
    (1, 40, 60, 8),
    (33, 72, 144, 4),
]


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["stream", "split"])
def test_both_routing_kernels(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int], dtype: torch.dtype, split: bool
) -> None:
    """Ids exact outside near-ties, fields and gradient no worse than plain PyTorch, whichever kernel is chosen."""
    num_tokens, hidden_size, num_experts, top_k = shape
    monkeypatch.setattr(route_kernels, "PROGRAMS", 64 if split else 1)
    wide = hidden_size > 1000  # else the interpreter would take a hundred steps
    tile, row_tile = Config(16 if split else 64, 128 if wide else 16, 4, 2), Config(32, 512 if wide else 32, 4, 2)
    monkeypatch.setattr(route_kernels, "route_config", lambda *_: tile)
    for module in (combine_kernels, route_bwd_kernels):
        monkeypatch.setattr(module, "row_config", lambda _: row_tile)
    monkeypatch.setattr(combine_kernels, "copies_config", lambda *_: row_tile)
    x, weight, bias = make_inputs(num_tokens, hidden_size, num_experts, dtype)
    mask = torch.arange(num_tokens) % 5 != 4
    differing = check_against_truth(
        x, weight, top_k, bias, mask=mask, which=("d_weights", "d_selected"), backend="triton"
    )
    assert differing <= 1


class Fused:
    """What the fused operator gives for fixed inputs, and dx of a fixed loss."""

    def __init__(
        self, x: Tensor, d: Tensor, bias: Tensor, mask: Tensor, options: RouteOptions, want_scores: bool, backend: str
    ) -> None:
        num_tokens, top_k = len(x), options.top_k
        gen = generator(4)
        self.d_rows = torch.randn(num_tokens * top_k, x.shape[1], generator=gen).bfloat16().to(x.dtype)
        d_weights = torch.randn(num_tokens, top_k, generator=gen)
        leaf = x.clone().requires_grad_()
        tokens = tokens_of(leaf, mask, backend=backend)
        self.routed, self.sent, partials = ops.route_dispatch(
            tokens, d, bias, options, Wanted(scores=want_scores, std=True, hist=True), "unit"
        )
        self.routing = self.routed.routing(want_scores=want_scores)
        if partials is None:
            r, num_experts = self.routing, len(d)
            partials = tokens.backend.centroid_sums(x, r.indices, r.inv_norm, r.valid, num_experts)
        self.sums = partials.sum(0).detach()
        loss = (self.sent.x_sorted * self.d_rows).sum() + (self.routing.weights * d_weights).sum()
        if self.routing.scores is not None:
            loss = loss + self.routing.scores.square().sum()
        (self.dx,) = torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize(
    "options", [{}, {"gate": "sigmoid"}, {"normalize": False}, {"n_group": 4, "topk_group": 2}], ids=str
)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_fused_operator_and_its_gradient(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Against the torch backend in fp64: statistics and centroid sums too."""
    num_tokens, num_experts, top_k = 90, 12, 3
    x, weight, bias = make_inputs(num_tokens, 40, num_experts, dtype)
    x[5], x[11, 3] = 0, torch.nan
    mask = torch.arange(num_tokens) % 7 != 3
    d = functional.directions(weight, dtype)
    checked = check_route_options(num_experts, top_k, **options)
    got = Fused(x, d, bias, mask, checked, not options, "triton")
    want = Fused(x.double(), d.double(), bias.double(), mask, checked, not options, "torch")
    for one, other in zip(
        [*got.routing, *got.sent[1:], got.routed.num_dropped],
        [*want.routing, *want.sent[1:], want.routed.num_dropped],
        strict=True,
    ):
        if one is not None and not one.is_floating_point() and one.shape != (num_experts, 1024):
            assert torch.equal(one, other)
    gate_tolerance = 16 * ROUND / checked.tau
    for name, tolerance in (("weights", gate_tolerance), ("selected_scores", 8 * ROUND), ("scores", 8 * ROUND)):
        field, exact = getattr(got.routing, name), getattr(want.routing, name)
        assert (field is None) == (exact is None), name
        assert field is None or largest_error(field, numpy(exact)) <= tolerance, name
    assert largest_error(got.routed.score_std, numpy(want.routed.score_std)) <= 8 * ROUND, (
        "standard deviations of the scores"
    )
    margins = [each.routed.margin_hist.cumsum(1) for each in (got, want)]
    assert (margins[0] - margins[1]).abs().max() <= 1, "at the edge of a bin they may fall on either side"
    assert_same_bits(got.sent.x_sorted, want.sent.x_sorted.to(dtype))
    rows = torch.where(want.routing.valid[:, None], x.double(), 0)
    sizes = torch.zeros_like(want.sums)
    for k in range(top_k):
        sizes.index_add_(0, want.routing.indices[:, k], (rows * want.routing.inv_norm[:, None]).abs())
    assert ((got.sums.double() - want.sums).abs() <= 16 * ROUND * sizes).all()
    # A gradient over all experts is added to that of the copies, both rounded: three roundings instead of one.
    roundings = 3 if not options or not checked.normalize else 1
    through_rows = want.d_rows[want.sent.positions].abs().sum(1)
    size = want.dx.abs() + (through_rows if roundings == 3 else 0)
    steep = want.routing.inv_norm[:, None] * 12 / checked.tau
    assert ((got.dx.double() - want.dx).abs() <= roundings * EPS[dtype] / 2 * size + 16 * ROUND * (size + steep)).all()
    assert not got.dx[~got.routing.valid].any()


MANY = [
    (300, 2, torch.float32),
    (80, 32, torch.bfloat16),
    pytest.param(300, 2, torch.bfloat16, marks=pytest.mark.slow),
    pytest.param(512, 2, torch.float32, marks=pytest.mark.slow),
    pytest.param(1024, 2, torch.bfloat16, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("num_experts", "top_k", "dtype"), MANY, ids=str)
def test_many_experts(num_experts: int, top_k: int, dtype: torch.dtype) -> None:
    """Ranks in chunks of 64, K = 32."""
    x, weight, bias = make_inputs(20, 16, num_experts, dtype)
    results = []
    for backend in ("torch", "triton"):
        routing = kmeans_route.route(x, weight, top_k, bias, backend=backend)
        sent = kmeans_route.dispatch(x, routing, backend=backend)
        results.append((routing, sent, kmeans_route.centroid_sums(x, routing, backend=backend)[0]))
    (routing, sent, sums), (other, other_sent, other_sums) = results
    d = functional.directions(weight, dtype).double()
    ranking = (x.double() @ d.T) / x.double().norm(dim=1, keepdim=True) + bias.double()
    assert_same_selection(other.indices, ranking, tolerance=8 * ROUND)
    assert torch.equal(other.indices, routing.indices), "what follows compares rows of the same experts"
    for one, two in zip(sent, other_sent, strict=True):
        assert torch.equal(one, two)
    most = float(routing.tokens_per_expert.max())
    torch.testing.assert_close(other_sums, sums, rtol=0, atol=2 * ROUND * most)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_exact_ties_go_to_the_lower_id(dtype: torch.dtype) -> None:
    x, weight = make_tied_rows(60, 32, 20, dtype=dtype)
    got = kmeans_route.route(x, weight, 5, backend="triton", return_scores=True)
    assert got.scores is not None
    assert torch.equal(got.indices, reference.stable_topk(got.scores, 5))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_directions(dtype: torch.dtype) -> None:
    """Rows of every size that fp32 can hold, within one rounding to the dtype; 0 where a row is none."""
    weight = torch.randn(9, 40, generator=generator(0)) * 10.0 ** torch.arange(-20, 25, 5)[:, None]
    weight = torch.cat([weight, torch.zeros(1, 40), torch.full((1, 40), 1e30)])
    weight = torch.cat([weight, torch.full((1, 40), torch.nan), torch.full((1, 40), torch.inf)])
    got = directions_kernels.directions(weight, dtype)
    exact = numpy(reference.directions_reference(weight.double(), torch.float64))
    assert (abs(numpy(got) - exact) <= half_step(dtype, exact) + 4 * ROUND * abs(exact)).all()
    assert not got[-2:].any()
    assert not got[9].any()
    assert got[:9][weight[:9].norm(dim=1) >= 1e-12].any(dim=1).all()


def test_constants_are_those_of_the_reference() -> None:
    for name in (
        "MIN_SQUARED_NORM", "MAX_SQUARED_NORM", "MIN_CENTROID_NORM", "MIN_COSINE_GATE", "MAX_BIAS", "NUM_MARGIN_BINS",
        "MARGIN_RANGE",
    ):  # fmt: skip
        assert getattr(common, name).value == getattr(reference, name), name
