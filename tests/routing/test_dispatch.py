"""dispatch: rows grouped by expert, invalid rows zero at the end, and a backward that never reads past it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kmeans_route import Dispatch, Routing, dispatch, route
from tests.helpers import oracle
from tests.helpers.compare import EPS, LOW, assert_same_bits, generator, half_step, make_inputs, numpy

SHAPES = [(0, 24, 13, 2), (1, 8, 1, 1), (7, 100, 13, 6), (63, 24, 60, 1), (255, 8, 160, 2), (33, 2880, 13, 13)]


def routed(x: Tensor, num_experts: int, top_k: int, backend: str, mask: Tensor | None = None, seed: int = 1) -> Routing:
    weight = torch.randn(num_experts, x.shape[-1], generator=generator(seed))
    return route(x, weight, top_k, mask=mask, backend=backend)


def expected_dispatch(x: Tensor, routing: Routing) -> oracle.OracleDispatch:
    """The oracle's dispatch of ids and validity as the routing has them."""
    ids, valid, counts = routing.indices.numpy(), routing.valid.numpy(), routing.tokens_per_expert.numpy()
    none = np.zeros((0, 0))
    plain = oracle.OracleRouting(ids, none, none, none, counts, none[0:0, 0:0].ravel(), valid, none.astype(bool))
    rows = numpy(x.reshape(-1, x.shape[-1])).copy()
    rows[~valid] = 0
    return oracle.dispatch(rows, plain)


def assert_dispatch(got: Dispatch, x: Tensor, routing: Routing) -> None:
    want = expected_dispatch(x, routing)
    assert got.x_sorted.dtype == x.dtype
    assert got.positions.dtype == got.token_of_row.dtype == torch.int64
    assert got.offsets.dtype == torch.int32
    for name, field, exact in zip(got._fields, got, want, strict=True):
        np.testing.assert_array_equal(numpy(field), exact, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_by_expert(backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    num_tokens, hidden_size, num_experts, top_k = shape
    x, _, _ = make_inputs(num_tokens, hidden_size, num_experts, dtype)
    mask = torch.rand(num_tokens, generator=generator(2)) < 0.8
    for chosen in (None, mask):
        routing = routed(x, num_experts, top_k, backend, chosen)
        assert_dispatch(dispatch(x, routing, backend=backend), x, routing)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0, 1e-40], ids=str)
def test_rows_of_invalid_tokens_are_zero_at_the_end(backend: str, bad: float) -> None:
    x, _, _ = make_inputs(20, 16, 5, torch.float32)
    x[[0, 7, 19]] = bad
    routing = routed(x, 5, 2, backend)
    got = dispatch(x, routing, backend=backend)
    assert_dispatch(got, x, routing)
    assert got.offsets[-1] == 17 * 2
    assert (got.x_sorted[34:] == 0).all()
    assert not torch.signbit(got.x_sorted[34:]).any()
    assert sorted(got.token_of_row[34:].tolist()) == [0, 0, 7, 7, 19, 19]


def test_empty_experts_and_one_that_takes_all(backend: str) -> None:
    x = torch.rand(9, 4) + 1
    weight = -torch.ones(6, 4)
    weight[3] = 1
    routing = route(x, weight, 1, backend=backend)
    got = dispatch(x, routing, backend=backend)
    assert got.offsets.tolist() == [0, 0, 0, 0, 9, 9, 9]
    assert_same_bits(got.x_sorted, x)
    assert got.positions[:, 0].tolist() == list(range(9))


def test_all_rows_invalid(backend: str) -> None:
    x = torch.full((4, 8), torch.nan)
    routing = route(x, torch.eye(8), 2, backend=backend)
    got = dispatch(x, routing, backend=backend)
    assert (got.offsets == 0).all()
    assert (got.x_sorted == 0).all()
    assert got.positions.flatten().sort().values.tolist() == list(range(8))
    assert (got.token_of_row[got.positions] == torch.arange(4)[:, None]).all()


def test_layouts(backend: str) -> None:
    x, _, _ = make_inputs(24, 16, 7, torch.float32)
    routing = routed(x, 7, 2, backend)
    want = dispatch(x, routing, backend=backend)
    wide = torch.full((24, 32), torch.nan)
    wide[:, ::2] = x
    cube = x.reshape(2, 3, 4, 16)
    for view in (x.T.contiguous().T, wide[:, ::2], cube, cube.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)):
        for field, exact in zip(dispatch(view, routing, backend=backend), want, strict=True):
            assert_same_bits(field, exact)
    row = x[:1].expand(24, 16)
    assert_same_bits(
        dispatch(row, routing, backend=backend).x_sorted, x[:1].expand(48, 16).contiguous(), "an expanded row"
    )


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient(backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """dx_t is the sum of its K rows; NaN in the rows past the end, which hold nobody's gradient, goes nowhere."""
    num_tokens, hidden_size, num_experts, top_k = shape
    x, _, _ = make_inputs(num_tokens, hidden_size, num_experts, dtype)
    mask = torch.arange(num_tokens) % 5 != 3
    routing = routed(x, num_experts, top_k, backend, mask)
    leaf = x.clone().requires_grad_()
    got = dispatch(leaf, routing, backend=backend)
    upstream = torch.randn(num_tokens * top_k, hidden_size, generator=generator(4)).to(dtype)
    end = int(got.offsets[-1])
    upstream[end:] = torch.nan
    got.x_sorted.backward(upstream)
    exact = oracle.dispatch_backward(numpy(upstream), num_tokens, got.positions.numpy(), end)
    sizes = oracle.dispatch_backward(np.abs(numpy(upstream)), num_tokens, got.positions.numpy(), end)
    # Summed in fp32 and rounded once; the reference, plain PyTorch, sums in the dtype itself.
    arithmetic = EPS[dtype] if backend == "reference" else min(EPS[dtype], EPS[torch.float32])
    bound = half_step(dtype, exact) + 2 * top_k * arithmetic * sizes
    assert leaf.grad.dtype == dtype
    assert (np.abs(numpy(leaf.grad) - exact) <= bound).all()
    assert (leaf.grad[~mask] == 0).all()
    assert end < num_tokens * top_k or num_tokens <= 1, "no row lies past the end: the case tests nothing"


def test_gradient_through_views(backend: str) -> None:
    x, _, _ = make_inputs(24, 16, 7, torch.float32)
    routing = routed(x, 7, 3, backend)
    upstream = torch.randn(72, 16, generator=generator(5))
    base = x.clone().requires_grad_()
    dispatch(base, routing, backend=backend).x_sorted.backward(upstream)
    cube = x.reshape(4, 6, 16).permute(2, 0, 1).contiguous().requires_grad_()
    dispatch(cube.permute(1, 2, 0), routing, backend=backend).x_sorted.backward(upstream)
    assert_same_bits(cube.grad.permute(1, 2, 0).reshape(24, 16), base.grad)
    row = x[:1].clone().requires_grad_()
    # An upstream that is itself expanded and not contiguous.
    dispatch(row.expand(24, 16), routing, backend=backend).x_sorted.sum().backward()
    np.testing.assert_allclose(row.grad.numpy(), np.full((1, 16), 72.0))


def test_only_x_sorted_has_a_graph(backend: str) -> None:
    x, _, _ = make_inputs(24, 16, 7, torch.float32)
    routing = routed(x, 7, 3, backend)
    assert not dispatch(x, routing, backend=backend).x_sorted.requires_grad
    got = dispatch(x.requires_grad_(), routing, backend=backend)
    assert got.x_sorted.requires_grad
    assert not any(field.requires_grad for field in got[1:])


@pytest.mark.not_interpreted
def test_gradcheck(backend: str) -> None:
    x, _, _ = make_inputs(6, 4, 5, torch.float64)
    mask = torch.tensor([True, True, False, True, True, True])
    routing = routed(x, 5, 2, backend, mask)
    assert torch.autograd.gradcheck(
        lambda leaf: dispatch(leaf, routing, backend=backend).x_sorted, (x.requires_grad_(),)
    )


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_many_rows_equal_the_reference(dtype: torch.dtype) -> None:
    """Large enough for every fast path of the sort and of the copies."""
    x, weight, bias = make_inputs(6_000, 32, 40, dtype, seed=6)
    x[100:120] = torch.inf
    routing = route(x, weight, 5, bias, backend="torch")
    for field, exact in zip(
        dispatch(x, routing, backend="torch"), dispatch(x, routing, backend="reference"), strict=True
    ):
        assert_same_bits(field, exact)
