"""centroid_sums: exact enough, reproducible to the bit, and deaf to tokens that are not valid."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kmeans_route import centroid_sums, route
from kmeans_route.backends import torch_statistics
from tests.helpers import oracle
from tests.helpers.compare import EPS, LOW, assert_same_bits, generator, make_inputs, numpy, truth

SHAPES = [(0, 24, 13, 2), (1, 8, 1, 1), (7, 100, 13, 6), (63, 24, 60, 1), (255, 8, 160, 2), (33, 2880, 13, 13)]


def exact_sums(x: Tensor, want: oracle.OracleRouting, accumulate: str) -> tuple[Any, Any]:
    """The sums, and the sums of absolute values that bound their rounding."""
    rows = numpy(x).copy()
    rows[~want.valid] = 0
    return oracle.centroid_sums(rows, want, accumulate)[0], oracle.centroid_sums(np.abs(rows), want, accumulate)[0]


@pytest.mark.parametrize("accumulate", ["unit", "raw"])
@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_counts(backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype, accumulate: str) -> None:
    """Products and sums in fp32 (fp64): unit vectors are not rounded to x's dtype on the way. The kernels keep 16 bits
    of their mantissa in bf16, in two parts of 8."""
    num_tokens, hidden_size, num_experts, top_k = shape
    x, weight, bias = make_inputs(num_tokens, hidden_size, num_experts, dtype)
    x[num_tokens // 2 :][:1] = torch.nan
    mask = torch.rand(num_tokens, generator=generator(2)) < 0.8
    routing = route(x, weight, top_k, bias, mask=mask, backend=backend)
    want, _ = truth(x, weight, top_k, bias, mask=mask, indices=routing.indices)
    sums, counts = centroid_sums(x, routing, accumulate=accumulate, backend=backend)
    exact, sizes = exact_sums(x, want, accumulate)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts.numpy(), want.tokens_per_expert)
    in_two_parts = backend == "triton" and dtype == torch.bfloat16 and accumulate == "unit"
    rounding = 16 * EPS[sums.dtype] + (2**-17 if in_two_parts else 0)
    assert (np.abs(numpy(sums) - exact) <= rounding * sizes).all()
    assert (sums[counts == 0] == 0).all()


def test_unit_is_the_default(backend: str) -> None:
    x, weight, bias = make_inputs(40, 16, 7, torch.float32)
    routing = route(x, weight, 2, bias, backend=backend)
    sums, _ = centroid_sums(x, routing, backend=backend)
    assert_same_bits(sums, centroid_sums(x, routing, accumulate="unit", backend=backend)[0])
    assert (sums - centroid_sums(x, routing, accumulate="raw", backend=backend)[0]).abs().max() > 1


def test_raw_sums_of_long_rows_stay_finite(backend: str) -> None:
    x, weight, bias = make_inputs(40, 16, 7, torch.float32)
    x[5] = 1e30
    routing = route(x, weight, 2, bias, backend=backend)
    for accumulate in ("unit", "raw"):
        sums, counts = centroid_sums(x, routing, accumulate=accumulate, backend=backend)
        assert torch.isfinite(sums).all()
        assert sums.abs().max() < 1e3
        assert counts.sum() == 39 * 2


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("accumulate", ["unit", "raw"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_one_bad_token_among_ten_thousand(backend: str, bad: float, accumulate: str, dtype: torch.dtype) -> None:
    """No bit of the sums differs from the batch where that token is zero, or masked."""
    x, weight, bias = make_inputs(10_000, 48, 16, dtype, seed=5)
    victim = 4321
    zeroed, poisoned = x.clone(), x.clone()
    zeroed[victim] = 0
    poisoned[victim, 7] = bad
    others = torch.arange(10_000) != victim
    results = []
    for batch, mask in ((zeroed, None), (poisoned, None), (x, others), (poisoned, others)):
        routing = route(batch, weight, 2, bias, mask=mask, backend=backend)
        results.append(centroid_sums(batch, routing, accumulate=accumulate, backend=backend))
    assert results[0][1].sum() == 2 * 9_999
    for sums, counts in results[1:]:
        assert_same_bits(sums, results[0][0])
        assert_same_bits(counts, results[0][1])


def test_layouts(backend: str) -> None:
    x, weight, bias = make_inputs(24, 16, 7, torch.float32)
    routing = route(x, weight, 2, bias, backend=backend)
    want, _ = centroid_sums(x, routing, backend=backend)
    wide = torch.full((24, 32), torch.nan)
    wide[:, ::2] = x
    for view in (x.T.contiguous().T, wide[:, ::2], x.reshape(2, 12, 16)):
        np.testing.assert_allclose(
            centroid_sums(view, routing, backend=backend)[0].numpy(), want.numpy(), rtol=0, atol=2e-6
        )


def test_no_graph(backend: str) -> None:
    x, weight, bias = make_inputs(24, 16, 7, torch.float32)
    x.requires_grad_()
    routing = route(x, weight, 2, bias, backend=backend)
    sums, counts = centroid_sums(x, routing, backend=backend)
    assert not sums.requires_grad
    assert not counts.requires_grad


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("bag_bytes", [None, 1_000], ids=["bags together", "bags apart"])
def test_accuracy_at_size(dtype: torch.dtype, bag_bytes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sums: the error of one large expert stays that of fp32 accumulation in blocks, not of a naive chain."""
    if bag_bytes is not None:
        monkeypatch.setattr(torch_statistics, "BAG_BYTES", bag_bytes)
    x, weight, bias = make_inputs(20_000, 16, 4, dtype, seed=9)
    x[:, 0] += 3
    routing = route(x, weight, 2, bias, backend="torch")
    sums, _ = centroid_sums(x, routing, backend="torch")
    unit = x.double() * routing.inv_norm.double()[:, None]
    exact = torch.zeros(4, 16, dtype=torch.float64)
    for k in range(2):
        exact.index_add_(0, routing.indices[:, k], unit)
    sizes = torch.zeros(4, 16, dtype=torch.float64)
    for k in range(2):
        sizes.index_add_(0, routing.indices[:, k], unit.abs())
    assert ((sums - exact).abs() <= 1e-5 * sizes).all()
