"""Tokens that are not valid, and tokens at the edge of it: left out, and without effect on any other."""

import numpy as np
import pytest
import torch

from kmeans_route import route
from tests.helpers import oracle
from tests.helpers.compare import (
    EPS,
    LOW,
    OPTIONS,
    assert_ids,
    assert_left_out,
    assert_same_bits,
    assert_same_routing,
    generator,
    make_inputs,
    numpy,
    truth,
    upstream_of,
)

BAD_ROWS = {
    "one NaN": lambda row: row.index_fill(0, torch.tensor([3]), torch.nan),
    "all NaN": lambda row: torch.full_like(row, torch.nan),
    "+Inf": lambda row: row.index_fill(0, torch.tensor([0]), torch.inf),
    "-Inf": lambda row: row.index_fill(0, torch.tensor([5]), -torch.inf),
    "Inf and -Inf": lambda row: torch.tensor([torch.inf, -torch.inf], dtype=row.dtype).repeat(len(row) // 2),
    "zero": torch.zeros_like,
    "-0": lambda row: -torch.zeros_like(row),
    "subnormal": lambda row: torch.full_like(row, 1e-40),
    "1e-20": lambda row: torch.full_like(row, 1e-20),
    "1e30": lambda row: torch.full_like(row, 1e30),
    "one 1e30": lambda row: row.index_fill(0, torch.tensor([1]), 1e30),
    "1e30 and NaN": lambda row: torch.full_like(row, 1e30).index_fill(0, torch.tensor([2]), torch.nan),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("name", ["softmax", "softmax-all-candidates", "sigmoid", "cosine-raw", "groups-top2"])
def test_rows_that_are_not_valid(backend: str, name: str, kind: str, dtype: torch.dtype) -> None:
    """Ids 0..K-1, weight 0, gradient 0 even from a NaN upstream, and nothing of it in any other row."""
    x, weight, bias = make_inputs(9, 16, 12, dtype)
    x[4] = BAD_ROWS[kind](x[4].float()).to(dtype)  # 1e30 becomes Inf in fp16
    clean = x.clone()
    clean[4] = 0
    results = []
    for batch, poison in ((x, torch.nan), (clean, 0.0)):
        leaf = batch.clone().requires_grad_()
        got = route(leaf, weight, 3, bias, return_scores=True, backend=backend, **OPTIONS[name])
        assert_left_out(got, 4, 3)
        assert got.tokens_per_expert.sum() == 8 * 3
        upstream = [torch.randn(field.shape, generator=generator(1)) for field in (got.weights, got.selected_scores)]
        upstream.append(torch.randn(9, 12, generator=generator(2)))
        for grad in upstream:
            grad[4] = poison
        torch.autograd.backward(
            [got.weights, got.selected_scores, got.scores], [grad.to(got.weights.dtype) for grad in upstream]
        )
        assert torch.isfinite(leaf.grad).all()
        assert (leaf.grad[4] == 0).all()
        assert leaf.grad[[0, 8]].abs().min(dim=1).values.max() > 0
        results.append((got, leaf.grad))
    assert_same_routing(results[0][0], results[1][0])
    assert_same_bits(results[0][1], results[1][1], "dx")


def test_masked_rows_are_left_out(backend: str) -> None:
    x, weight, bias = make_inputs(9, 16, 12, torch.float32)
    mask = torch.arange(9) != 4
    leaf = x.clone().requires_grad_()
    got = route(leaf, weight, 3, bias, mask=mask, return_scores=True, backend=backend)
    assert_left_out(got, 4, 3)
    (got.weights.square().sum() + got.scores.square().sum() + got.selected_scores.sum()).backward()
    assert (leaf.grad[4] == 0).all()
    zeroed = x.clone()
    zeroed[4] = 0
    assert_same_routing(got, route(zeroed, weight, 3, bias, return_scores=True, backend=backend))


def test_no_row_is_valid(backend: str) -> None:
    x = torch.full((5, 8), torch.nan, requires_grad=True)
    got = route(x, torch.eye(8), 2, return_scores=True, backend=backend)
    for row in range(5):
        assert_left_out(got, row, 2)
    assert got.tokens_per_expert.sum() == 0
    (got.weights.sum() + got.scores.sum()).backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_edges_of_validity(backend: str, dtype: torch.dtype) -> None:
    """Powers of two whose squares are exact: 2^-100 is below 1e-30 and 2^-98 above; 2^127 is finite and 2^128 not."""
    cases = {
        2.0**-50: False,
        2.0**-49: True,
        2.0**-60: False,
        2.0**63: True,
        2.0**64: False,
        2.0**100: False,
        1.0: True,
    }
    x = torch.tensor([[value, 0.0] for value in cases], dtype=dtype)
    got = route(x, torch.eye(2), 1, backend=backend)
    assert got.valid.tolist() == list(cases.values())
    np.testing.assert_allclose(
        numpy(got.inv_norm), [1 / value if fine else 0 for value, fine in cases.items()], rtol=1e-6
    )
    np.testing.assert_array_equal(numpy(got.selected_scores)[:, 0], np.asarray(list(cases.values()), dtype=float))
    # The sum over D decides, not a single element: four times 2^126 overflows.
    wide = torch.full((2, 4), 2.0**63, dtype=dtype)
    wide[1] = 2.0**62
    assert route(wide, torch.eye(4), 1, backend=backend).valid.tolist() == [False, True]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-14),
        (torch.float32, 1e17),
        (torch.bfloat16, 1e-14),
        (torch.bfloat16, 1e17),
        (torch.float16, 1e-4),
        (torch.float16, 2e3),
    ],
    ids=str,
)
def test_extreme_but_valid_rows_are_exact(dtype: torch.dtype, scale: float) -> None:
    """No power of the inverse norm beyond the first may overflow or vanish, forward or backward."""
    x, weight, bias = make_inputs(20, 24, 13, torch.float32, seed=4)
    x = (x * scale).to(dtype)
    leaf = x.clone().requires_grad_()
    got = route(leaf, weight, 3, bias, backend="torch")
    want, unit_rows = truth(x, weight, 3, bias)
    assert want.valid.all()
    assert assert_ids(got.indices, want, bias) == 0
    np.testing.assert_allclose(numpy(got.weights), want.weights, rtol=0, atol=1e-5)
    upstream = upstream_of(20, 3, 13)["d_weights"] * min(1.0, scale)
    (got.weights * upstream).sum().backward()
    exact = oracle.route_backward(numpy(x), unit_rows, want, d_weights=upstream.numpy())
    np.testing.assert_allclose(
        numpy(leaf.grad), exact, rtol=0, atol=(EPS[dtype] + 2e-5) * np.abs(exact).max() + torch.finfo(dtype).tiny
    )


def test_subnormal_fp16_rows_are_valid(backend: str) -> None:
    """In fp16 the smallest numbers still pass 1e-30: finite, and right wherever fp16 can hold the gradient."""
    x = (torch.randint(1, 9, (6, 32), generator=generator(3)).double() * 2.0**-24).half()
    x[:, ::2] *= -1
    _, weight, _ = make_inputs(1, 32, 8, torch.float32)
    leaf = x.clone().requires_grad_()
    got = route(leaf, weight, 2, backend=backend)
    want, unit_rows = truth(x, weight, 2)
    assert want.valid.all()
    np.testing.assert_array_equal(got.indices.numpy(), want.indices)
    np.testing.assert_allclose(numpy(got.weights), want.weights, rtol=0, atol=1e-5)
    upstream = torch.randn(6, 2, generator=generator(4)) * 1e-3
    (got.weights * upstream).sum().backward()
    exact = oracle.route_backward(numpy(x), unit_rows, want, d_weights=upstream.numpy())
    assert np.abs(exact).max() > 100
    np.testing.assert_allclose(numpy(leaf.grad), exact, rtol=0, atol=2e-3 * np.abs(exact).max())


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_one_nan_among_ten_thousand(backend: str, dtype: torch.dtype) -> None:
    """No other token's routing and no other token's gradient changes by a bit."""
    x, weight, bias = make_inputs(10_000, 48, 16, dtype, seed=5)
    victim = 4321
    zeroed, poisoned = x.clone(), x.clone()
    zeroed[victim] = 0
    poisoned[victim, 7] = torch.nan
    everyone_else = torch.arange(10_000) != victim
    runs = []
    for batch, mask in ((x, None), (zeroed, None), (poisoned, None), (x, everyone_else), (poisoned, everyone_else)):
        leaf = batch.clone().requires_grad_()
        got = route(leaf, weight, 2, bias, mask=mask, return_scores=True, backend=backend)
        (got.weights.square().sum() + (got.scores.square()).sum()).backward()
        runs.append((got, leaf.grad))
    for got, grad in runs[1:]:
        for name in ("indices", "weights", "selected_scores", "scores", "inv_norm", "valid"):
            assert_same_bits(getattr(got, name)[everyone_else], getattr(runs[0][0], name)[everyone_else], name)
        assert_same_bits(grad[everyone_else], runs[0][1][everyone_else], "dx")
        assert (grad[victim] == 0).all()
        assert_same_bits(got.tokens_per_expert, runs[1][0].tokens_per_expert)
    lost = runs[0][0].tokens_per_expert - runs[1][0].tokens_per_expert
    assert lost.sum() == 2
    assert (lost[runs[0][0].indices[victim]] == 1).all()


def test_zero_centroid_scores_zero(backend: str) -> None:
    x, weight, _ = make_inputs(20, 24, 5, torch.float32)
    weight[2] = 0
    leaf = x.requires_grad_()
    got = route(leaf, weight, 5, return_scores=True, backend=backend)
    assert (got.scores[:, 2] == 0).all()
    got.scores[:, 2].sum().backward()
    assert (leaf.grad == 0).all()


def test_replayed_ids_of_an_invalid_token_are_ignored(backend: str) -> None:
    x, weight, bias = make_inputs(6, 24, 12, torch.float32)
    x[2] = torch.nan
    indices = torch.tensor([[7, 3]] * 6)
    got = route(x, weight, 2, bias, indices=indices, return_scores=True, backend=backend)
    assert_left_out(got, 2, 2)
    assert got.tokens_per_expert.tolist() == [0, 0, 0, 5, 0, 0, 0, 5, 0, 0, 0, 0]
