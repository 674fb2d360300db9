"""combine: the weighted return to token order, its two gradients, and rows past the end that nobody may read."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kmeans_route import Dispatch, Routing, combine, dispatch, route
from kmeans_route.backends import chunks
from tests.helpers import oracle
from tests.helpers.compare import EPS, LOW, assert_same_bits, generator, half_step, make_inputs, numpy

SHAPES = [(0, 24, 13, 2), (1, 8, 1, 1), (7, 100, 13, 6), (63, 24, 60, 1), (255, 8, 160, 2), (33, 2880, 13, 13)]
FP32 = EPS[torch.float32]


def prepared(
    shape: tuple[int, int, int, int], dtype: torch.dtype, backend: str, share_valid: float = 0.8
) -> tuple[Routing, Dispatch, Tensor, int]:
    """A routing, its dispatch, expert outputs with NaN past the end, and the end."""
    num_tokens, hidden_size, num_experts, top_k = shape
    x, weight, bias = make_inputs(num_tokens, hidden_size, num_experts, dtype)
    mask = torch.rand(num_tokens, generator=generator(2)) < share_valid
    routing = route(x, weight, top_k, bias, mask=mask, scaling=1.5, tau=0.3, backend=backend)
    sent = dispatch(x, routing, backend=backend)
    y_sorted = torch.randn(num_tokens * top_k, hidden_size, generator=generator(3)).to(dtype)
    end = int(sent.offsets[-1])
    y_sorted[end:] = torch.nan
    return routing, sent, y_sorted, end


def check_weighted_sum_and_gradients(backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    top_k = shape[3]
    routing, sent, y_sorted, end = prepared(shape, dtype, backend)
    positions = sent.positions.numpy()
    y_leaf, w_leaf = y_sorted.clone().requires_grad_(), routing.weights.detach().clone().requires_grad_()
    y = combine(y_leaf, routing._replace(weights=w_leaf), sent, backend=backend)
    assert y.dtype == dtype
    assert y.shape == (shape[0], shape[1])
    weights = numpy(w_leaf)
    exact = oracle.combine(numpy(y_sorted), weights, positions, end)
    sizes = oracle.combine(np.abs(numpy(y_sorted)), weights, positions, end)
    arithmetic = min(EPS[dtype], FP32)
    # One rounding to the dtype at the end, fp32 (fp64) before.
    assert (np.abs(numpy(y) - exact) <= half_step(dtype, exact) + 2 * top_k * arithmetic * sizes).all()
    assert (y[~routing.valid] == 0).all()

    dy = torch.randn(y.shape, generator=generator(4)).to(dtype)
    dy[~routing.valid] = torch.nan
    y.backward(dy)
    dy_exact, dw_exact = oracle.combine_backward(numpy(dy), numpy(y_sorted), weights, positions, end)
    assert y_leaf.grad.dtype == dtype
    assert w_leaf.grad.dtype == routing.weights.dtype
    error = np.abs(numpy(y_leaf.grad) - dy_exact)
    assert (error <= half_step(dtype, dy_exact) + 2 * arithmetic * np.abs(dy_exact)).all()
    assert (y_leaf.grad[end:] == 0).all()
    _, dw_sizes = oracle.combine_backward(np.abs(numpy(dy)), np.abs(numpy(y_sorted)), weights, positions, end)
    assert (np.abs(numpy(w_leaf.grad) - dw_exact) <= 2 * arithmetic * np.sqrt(shape[1]) * dw_sizes).all()
    assert (w_leaf.grad[~routing.valid] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weighted_sum_and_gradients(backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_weighted_sum_and_gradients(backend, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_chunks(shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "BYTES", 1_000)
    check_weighted_sum_and_gradients("torch", shape, dtype)


def test_each_gradient_alone(backend: str) -> None:
    """Only what asks for a gradient gets one, and it is the same as when both do."""
    routing, sent, y_sorted, _ = prepared((40, 16, 7, 3), torch.float32, backend)
    dy = torch.randn(40, 16, generator=generator(5))

    def gradients(for_y: bool, for_w: bool) -> tuple[Tensor | None, Tensor | None]:
        y_leaf = y_sorted.clone().requires_grad_(for_y)
        w_leaf = routing.weights.detach().clone().requires_grad_(for_w)
        combine(y_leaf, routing._replace(weights=w_leaf), sent, backend=backend).backward(dy)
        return y_leaf.grad, w_leaf.grad

    both = gradients(True, True)
    only_y, only_w = gradients(True, False), gradients(False, True)
    assert only_y[1] is None
    assert only_w[0] is None
    assert_same_bits(only_y[0], both[0])
    assert_same_bits(only_w[1], both[1])


@pytest.mark.not_interpreted
def test_inverse_of_dispatch(backend: str) -> None:
    """With gates that sum to 1, an expert that changes nothing gives x back; tokens that are not valid give 0."""
    x, weight, bias = make_inputs(50, 16, 7, torch.float64)
    x[3] = torch.nan
    for top_k in (1, 3, 7):
        routing = route(x, weight, top_k, bias, backend=backend)
        sent = dispatch(x, routing, backend=backend)
        y = combine(sent.x_sorted, routing, sent, backend=backend)
        np.testing.assert_allclose(y[routing.valid].numpy(), x[routing.valid].numpy(), rtol=0, atol=1e-13)
        assert (y[3] == 0).all()


def test_output_size_may_differ_from_hidden_size(backend: str) -> None:
    routing, sent, _, end = prepared((20, 16, 7, 2), torch.float32, backend)
    y_sorted = torch.randn(40, 5, generator=generator(6))
    y_sorted[end:] = torch.inf
    y = combine(y_sorted, routing, sent, backend=backend)
    exact = oracle.combine(numpy(y_sorted), numpy(routing.weights), sent.positions.numpy(), end)
    np.testing.assert_allclose(numpy(y), exact, rtol=0, atol=1e-6)


def test_layouts(backend: str) -> None:
    routing, sent, y_sorted, _ = prepared((20, 16, 7, 2), torch.float32, backend)
    want = combine(y_sorted, routing, sent, backend=backend)
    wide = torch.full((40, 32), torch.nan)
    wide[:, ::2] = y_sorted
    for view in (y_sorted.T.contiguous().T, wide[:, ::2]):
        assert_same_bits(combine(view, routing, sent, backend=backend), want)
    leaf = y_sorted.clone().requires_grad_()
    # The gradient of a sum is an expanded scalar.
    combine(leaf, routing, sent, backend=backend).sum().backward()
    rows = torch.zeros(40).scatter(0, sent.positions.flatten(), routing.weights.detach().flatten())
    np.testing.assert_allclose(leaf.grad.numpy(), rows[:, None].expand(40, 16).numpy(), rtol=1e-6)


@pytest.mark.not_interpreted
def test_gradcheck(backend: str) -> None:
    routing, sent, y_sorted, end = prepared((6, 4, 5, 2), torch.float64, backend, share_valid=0.7)
    assert end < 12
    y_sorted[end:] = 0
    weights = routing.weights.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y, w: combine(y, routing._replace(weights=w), sent, backend=backend),
        (y_sorted.requires_grad_(), weights),
    )


@pytest.mark.not_interpreted
def test_whole_layer_gradient(backend: str) -> None:
    """route, dispatch, an expert, combine in fp64: x gets its gradient along both ways."""
    x, weight, bias = make_inputs(5, 4, 6, torch.float64, seed=7)
    mask = torch.tensor([True, True, False, True, True])

    def layer(leaf: Tensor) -> Tensor:
        routing = route(leaf, weight, 2, bias, mask=mask, tau=0.3, backend=backend)
        sent = dispatch(leaf, routing, backend=backend)
        return combine(sent.x_sorted * 1.5 + sent.x_sorted.square(), routing, sent, backend=backend)

    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30], ids=str)
def test_bad_token_stays_alone_in_a_whole_layer(backend: str, bad: float) -> None:
    """Output and gradient of every other token keep their bits; experts' weight gradients are finite."""
    clean, weight, bias = make_inputs(300, 16, 7, torch.float32)
    clean[17] = 0
    poisoned = clean.clone()
    poisoned[17, 2] = bad
    results = []
    for batch in (clean, poisoned):
        leaf = batch.clone().requires_grad_()
        expert = (torch.eye(16) * 1.25).requires_grad_()
        routing = route(leaf, weight, 2, bias, backend=backend)
        sent = dispatch(leaf, routing, backend=backend)
        end = int(sent.offsets[-1])
        y_sorted = sent.x_sorted @ expert
        # A grouped product leaves the rows past the last offset as they were in memory.
        y_sorted = torch.cat([y_sorted[:end], torch.full((600 - end, 16), torch.nan)])
        y = combine(y_sorted, routing, sent, backend=backend)
        y.square().sum().backward()
        results.append((y, leaf.grad, expert.grad))
    assert torch.isfinite(results[1][2]).all()
    for one, other in zip(results[0], results[1], strict=True):
        assert_same_bits(other, one)
    assert (results[1][0][17] == 0).all()
    assert (results[1][1][17] == 0).all()


@pytest.mark.not_interpreted
def test_mixed_dtypes(backend: str) -> None:
    """fp32 gates times bf16 rows: the products are not rounded to bf16 before they are summed."""
    routing, sent, y_sorted, end = prepared((64, 8, 13, 6), torch.bfloat16, backend, share_valid=1.1)
    y = combine(y_sorted, routing, sent, backend=backend)
    exact = oracle.combine(numpy(y_sorted), numpy(routing.weights), sent.positions.numpy(), end)
    rounded = torch.from_numpy(exact).to(torch.bfloat16)
    # fp32 sums round to the same bf16 number as exact ones but next to a boundary.
    assert (y != rounded).float().mean() < 0.01
