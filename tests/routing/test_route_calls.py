"""Ways to call route: layouts, masks, replayed ids, given directions, no gradient, nothing to route."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kmeans_route import backends, route
from tests.helpers import oracle
from tests.helpers.compare import (
    EPS,
    LOW,
    OPTIONS,
    assert_ids,
    assert_same_bits,
    assert_same_routing,
    generator,
    make_inputs,
    numpy,
    truth,
    upstream_of,
)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_layouts_give_the_same(backend: str, dtype: torch.dtype) -> None:
    """Transposed, strided, offset, (..., D) and expanded inputs, values and gradients."""
    x, weight, bias = make_inputs(24, 40, 13, dtype, seed=3)
    want, _ = truth(x, weight, 3, bias)
    upstream = torch.randn(24, 3, generator=generator(4))

    def run(leaf: Tensor, view: Tensor) -> Tensor:
        got = route(view, weight, 3, bias, backend=backend)
        assert_ids(got.indices, want, bias)
        np.testing.assert_allclose(numpy(got.weights), want.weights, rtol=0, atol=1e-5)
        (got.weights * upstream).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    base = x.clone().requires_grad_()
    expected = run(base, base).float()
    allowed = 4 * EPS[dtype] * expected.abs().max()
    columns = x.T.contiguous().requires_grad_()
    assert (run(columns, columns.T).T.float() - expected).abs().max() <= allowed
    wide = torch.full((24, 80), torch.nan, dtype=dtype)
    wide[:, 1::2] = x
    wide.requires_grad_()
    grad = run(wide, wide[:, 1::2])
    assert (grad[:, 1::2].float() - expected).abs().max() <= allowed
    assert grad[:, ::2].abs().max() == 0
    cube = x.reshape(2, 3, 4, 40).permute(3, 2, 0, 1).contiguous().requires_grad_()
    grad = run(cube, cube.permute(2, 3, 1, 0))
    assert (grad.permute(2, 3, 1, 0).reshape(24, 40).float() - expected).abs().max() <= allowed

    row = x[:1].clone().requires_grad_()
    got = route(row.expand(24, 40), weight, 3, bias, backend=backend)
    assert (got.indices == got.indices[0]).all()
    (got.weights * upstream).sum().backward()
    one = x[:1].clone().requires_grad_()
    (route(one, weight, 3, bias, backend=backend).weights * upstream.sum(dim=0)).sum().backward()
    np.testing.assert_allclose(
        numpy(row.grad), numpy(one.grad), rtol=0, atol=float(24 * EPS[dtype] * expected.abs().max())
    )


def test_mask_takes_the_leading_shape(backend: str) -> None:
    x, weight, bias = make_inputs(12, 8, 6, torch.float32)
    mask = torch.rand(3, 4, generator=generator(5)) < 0.5
    got = route(x.reshape(3, 4, 8), weight, 2, bias, mask=mask, backend=backend)
    flat = route(x, weight, 2, bias, mask=mask.reshape(12), backend=backend)
    assert_same_routing(got, flat)
    assert torch.equal(got.valid, mask.reshape(12))
    strided = torch.stack([mask, ~mask], dim=-1)[..., 0]
    assert_same_routing(route(x.reshape(3, 4, 8), weight, 2, bias, mask=strided, backend=backend), flat)


@pytest.mark.not_interpreted
def test_full_mask_is_no_mask(backend: str) -> None:
    x, weight, bias = make_inputs(40, 24, 13, torch.float32)
    for name in OPTIONS:
        options = {key: value for key, value in OPTIONS[name].items() if key not in ("n_group", "topk_group")}
        got = route(x, weight, 3, bias, mask=torch.ones(40, dtype=torch.bool), backend=backend, **options)
        assert_same_routing(got, route(x, weight, 3, bias, backend=backend, **options))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_replay(dtype: torch.dtype) -> None:
    """Given ids in any order: the gates of the same scores, the gradient of these gates."""
    x, weight, bias = make_inputs(33, 24, 13, dtype, seed=7)
    indices = torch.stack([torch.randperm(13, generator=generator(t))[:4] for t in range(33)])
    for name in ("softmax", "softmax-all-candidates", "sigmoid", "cosine-raw"):
        leaf = x.clone().requires_grad_()
        got = route(leaf, weight, 4, bias, indices=indices, backend="torch", **OPTIONS[name])
        want, unit_rows = truth(x, weight, 4, bias, indices=indices, **OPTIONS[name])
        assert torch.equal(got.indices, indices)
        np.testing.assert_array_equal(got.tokens_per_expert.numpy(), want.tokens_per_expert)
        np.testing.assert_allclose(numpy(got.weights), want.weights, rtol=0, atol=1e-5)
        upstream = upstream_of(33, 4, 13)["d_weights"]
        (got.weights * upstream).sum().backward()
        exact = oracle.route_backward(
            numpy(x), unit_rows, want, d_weights=upstream.numpy(), options=oracle.Options(**OPTIONS[name])
        )
        np.testing.assert_allclose(numpy(leaf.grad), exact, rtol=0, atol=(EPS[dtype] + 1e-5) * np.abs(exact).max())


@pytest.mark.not_interpreted
def test_replay_of_own_ids_gives_the_same_bits(backend: str) -> None:
    """Recomputation: ids replayed from the first pass give its weights and gradient, bit for bit."""
    x, weight, bias = make_inputs(50, 24, 12, torch.float32, seed=7)
    x[11] = torch.nan
    for name, options in OPTIONS.items():
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        first = route(one, weight, 4, bias, return_scores=True, backend=backend, **options)
        again = route(other, weight, 4, bias, indices=first.indices, return_scores=True, backend=backend, **options)
        assert_same_routing(again, first)
        if first.weights.requires_grad:
            for got in (first, again):
                (got.weights.square().sum() + got.scores.square().sum()).backward()
            assert_same_bits(other.grad, one.grad, name)


@pytest.mark.not_interpreted
def test_given_directions_are_used(backend: str) -> None:
    x, weight, bias = make_inputs(20, 24, 13, torch.bfloat16)
    cached = backends.get(backend).directions(weight, torch.bfloat16)  # each has its own last bits
    want = route(x, weight, 3, bias, return_scores=True, backend=backend)
    got = route(x, torch.zeros_like(weight), 3, bias, directions=cached, return_scores=True, backend=backend)
    assert_same_routing(got, want)


@pytest.mark.not_interpreted
def test_scores_only_on_request(backend: str) -> None:
    x, weight, bias = make_inputs(20, 24, 13, torch.float32)
    for normalize in (True, False):
        without = route(x, weight, 3, bias, normalize=normalize, backend=backend)
        got = route(x, weight, 3, bias, normalize=normalize, return_scores=True, backend=backend)
        assert without.scores is None
        assert_same_routing(got._replace(scores=None), without)
        assert_same_bits(got.scores.gather(1, got.indices), got.selected_scores)


def test_inputs_and_global_generator_stay(backend: str) -> None:
    x, weight, bias = make_inputs(20, 24, 13, torch.float32)
    x[2] = torch.nan
    mask = torch.arange(20) != 5
    before = [tensor.clone() for tensor in (x, weight, bias, mask)]
    state = torch.get_rng_state()
    route(x, weight, 3, bias, mask=mask, backend=backend)
    for tensor, copy in zip((x, weight, bias, mask), before, strict=True):
        assert_same_bits(tensor, copy)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_graph_without_need(backend: str) -> None:
    x, weight, bias = make_inputs(20, 24, 13, torch.float32)
    weight.requires_grad_()
    assert not route(x, weight, 3, bias, backend=backend).weights.requires_grad
    with torch.no_grad():
        assert not route(x.requires_grad_(), weight, 3, bias, backend=backend).weights.requires_grad
    with torch.inference_mode():
        got = route(x, weight, 3, bias, return_scores=True, backend=backend)
        assert not got.weights.requires_grad
    got = route(x, weight, 3, bias, return_scores=True, backend=backend)
    for name in ("indices", "tokens_per_expert", "inv_norm", "valid"):
        assert not getattr(got, name).requires_grad, name
    (got.weights.square().sum() + got.scores.sum()).backward()
    assert weight.grad is None


def test_empty_batch(backend: str) -> None:
    for shape in ((0, 8), (2, 0, 8)):
        x = torch.zeros(shape, requires_grad=True)
        got = route(
            x, torch.eye(8), 3, torch.zeros(8), mask=torch.ones(shape[:-1]).bool(), return_scores=True, backend=backend
        )
        assert [tuple(field.shape) for field in got] == [(0, 3), (0, 3), (0, 3), (0, 8), (8,), (0,), (0,)]
        assert (got.tokens_per_expert == 0).all()
        (got.weights.sum() + got.scores.sum()).backward()
        assert x.grad is None or x.grad.shape == shape
