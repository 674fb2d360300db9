"""route on the fast backend against the fp64 truth: ids exactly, values no worse than plain PyTorch in the dtype."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kmeans_route import directions, route
from kmeans_route.backends import chunks
from tests.helpers import oracle
from tests.helpers.compare import (
    EPS,
    LOW,
    OPTIONS,
    ROUND,
    assert_ids,
    assert_no_worse,
    assert_same_bits,
    generator,
    make_inputs,
    numpy,
    plain_weights,
    truth,
    upstream_of,
)

# (T, D, E, K): each T, D, E and K that matters once or more, no power of two among most.
SHAPES = [
    (0, 24, 13, 2),
    (1, 8, 1, 1),
    (1, 2880, 160, 6),
    (7, 24, 13, 6),
    (7, 2880, 60, 2),
    (7, 8, 13, 13),
    (63, 100, 60, 6),
    (63, 8, 160, 1),
    (63, 24, 60, 60),
    (63, 2880, 13, 1),
    (255, 100, 13, 2),
    (255, 24, 1, 1),
    (255, 8, 160, 6),
    (255, 2880, 160, 2),
    (63, 100, 160, 160),
]


def check_against_truth(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    bias: Tensor | None,
    *,
    mask: Tensor | None = None,
    which: tuple[str, ...] = ("d_weights", "d_selected", "d_scores"),
    backend: str = "torch",
    **kwargs: Any,
) -> int:
    """Every field and dx of one call; returns the number of rows whose ids differ in a near-tie."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    got = route(leaf, weight, top_k, bias, mask=mask, return_scores=True, backend=backend, **kwargs)
    assert got.scores is not None
    assert got.weights.dtype == got.selected_scores.dtype == got.scores.dtype == got.inv_norm.dtype == torch.float32
    by_score, _ = truth(x, weight, top_k, bias, mask=mask, **kwargs)
    differing = assert_ids(got.indices, by_score, bias)
    # Near-ties settled: from here on the truth is that of the ids that were chosen.
    want, unit_rows = truth(x, weight, top_k, bias, mask=mask, indices=got.indices, **kwargs)
    options = oracle.Options(**kwargs)
    valid, ids = torch.from_numpy(want.valid), got.indices
    np.testing.assert_array_equal(got.valid.numpy(), want.valid)
    np.testing.assert_array_equal(got.tokens_per_expert.numpy(), want.tokens_per_expert)
    np.testing.assert_allclose(numpy(got.inv_norm), want.inv_norm, rtol=8 * ROUND)

    plain = plain_weights(
        x.detach()[valid], directions(weight, x.dtype), ids[valid], options, torch.from_numpy(want.candidates)[valid]
    )
    score_tolerance = 8 * ROUND
    gate_tolerance = (
        16 * ROUND * max(1.0, options.scaling) * max(1.0, 1 / options.tau if options.gate != "cosine" else 1e3)
    )
    for name, tolerance, other in zip(
        ("weights", "selected_scores", "scores"),
        (gate_tolerance, score_tolerance, score_tolerance),
        plain,
        strict=True,
    ):
        field, exact = getattr(got, name), getattr(want, name)
        assert_no_worse(field[valid], other, exact[want.valid], tolerance, name)
        assert (field[~valid] == 0).all(), name
        # The products are accumulated in fp32 whatever the dtype of x: no error of the size of bf16 is left.
        assert np.abs(numpy(field)[want.valid] - exact[want.valid]).max(initial=0) <= 4 * tolerance, name

    upstream = upstream_of(len(x), top_k, weight.shape[0])
    outputs = {"d_weights": got.weights, "d_selected": got.selected_scores, "d_scores": got.scores}
    if not any(outputs[key].requires_grad for key in which):
        assert options.gate == "uniform"
        return differing
    torch.autograd.backward([outputs[key] for key in which], [upstream[key] for key in which])
    assert leaf.grad is not None
    assert leaf.grad.dtype == x.dtype
    exact_dx = oracle.route_backward(
        numpy(x), unit_rows, want, options=options, **{key: upstream[key].numpy() for key in which}
    )
    steep = options.scaling / (options.tau if options.gate in ("softmax", "sigmoid") else 1.0)
    size = (
        sum(float(upstream[key].abs().max()) * (steep if key == "d_weights" else 1) for key in which) if len(x) else 0
    )
    row_scale = np.abs(exact_dx).max(axis=1, initial=0) + want.inv_norm * size * 1e-3
    error = np.abs(numpy(leaf.grad) - exact_dx).max(axis=1, initial=0)
    # One rounding to x's dtype after fp32 arithmetic: plain PyTorch in fp16 and bf16 comes nowhere near.
    worse = error > (EPS[x.dtype] + 200 * ROUND) * row_scale
    assert not worse.any(), f"dx of tokens {np.flatnonzero(worse)}: {error[worse]} at sizes {row_scale[worse]}"
    assert (leaf.grad[~valid] == 0).all()
    return differing


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    num_tokens, hidden_size, num_experts, top_k = shape
    x, weight, bias = make_inputs(num_tokens, hidden_size, num_experts, dtype)
    differing = check_against_truth(x, weight, top_k, bias)
    # K = E orders every expert, far down where many lie close together.
    assert differing <= (1 if top_k < num_experts else 2)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name: str, dtype: torch.dtype) -> None:
    x, weight, bias = make_inputs(63, 40, 12, dtype)
    x[3] = 0
    mask = torch.rand(63, generator=generator(1)) < 0.8
    assert check_against_truth(x, weight, 4, bias * 3, mask=mask, **OPTIONS[name]) == 0
    assert check_against_truth(x, weight, 4, None, which=("d_weights",), **OPTIONS[name]) == 0


@pytest.mark.parametrize(
    "name", ["softmax", "softmax-all-candidates", "sigmoid-raw", "cosine", "groups-all-candidates"]
)
@pytest.mark.parametrize("which", ["d_weights", "d_selected", "d_scores"])
def test_each_gradient_alone(name: str, which: str) -> None:
    x, weight, bias = make_inputs(31, 24, 12, torch.float32, seed=2)
    check_against_truth(x, weight, 3, bias, which=(which,), **OPTIONS[name])


@pytest.mark.not_interpreted
def test_reference_in_low_precision(backend: str) -> None:
    """Both backends obey the same rule in every dtype."""
    for dtype in LOW:
        x, weight, bias = make_inputs(40, 24, 13, dtype, seed=5)
        check_against_truth(x, weight, 3, bias, backend=backend)


@pytest.mark.parametrize("name", OPTIONS)
def test_fp64_equals_the_oracle(name: str) -> None:
    x, weight, bias = make_inputs(40, 24, 12, torch.float64, seed=6)
    x[7] = torch.inf
    upstream = {key: value.double() for key, value in upstream_of(40, 4, 12).items()}
    leaf = x.clone().requires_grad_()
    got = route(leaf, weight, 4, bias, return_scores=True, backend="torch", **OPTIONS[name])
    want, unit_rows = truth(x, weight, 4, bias, **OPTIONS[name])
    np.testing.assert_array_equal(got.indices.numpy(), want.indices)
    for field in ("weights", "selected_scores", "scores", "inv_norm"):
        assert getattr(got, field).dtype == torch.float64
        np.testing.assert_allclose(numpy(getattr(got, field)), getattr(want, field), rtol=1e-12, atol=1e-13)
    outputs = {"d_weights": got.weights, "d_selected": got.selected_scores, "d_scores": got.scores}
    torch.autograd.backward(list(outputs.values()), [upstream[key] for key in outputs])
    x[7] = 0
    expected = oracle.route_backward(
        x.numpy(),
        unit_rows,
        want,
        options=oracle.Options(**OPTIONS[name]),
        **{k: v.numpy() for k, v in upstream.items()},
    )
    np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "cosine", "uniform"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(gate: str, normalize: bool) -> None:
    x, weight, bias = make_inputs(4, 5, 6, torch.float64, seed=6)
    mask = torch.tensor([True, False, True, True])

    def outputs(leaf: Tensor) -> tuple[Tensor, ...]:
        got = route(
            leaf,
            weight,
            2,
            bias,
            mask=mask,
            gate=gate,
            normalize=normalize,
            tau=0.3,
            return_scores=True,
            backend="torch",
        )
        return got.weights + 0 * leaf.sum(), got.selected_scores, got.scores

    assert torch.autograd.gradcheck(outputs, (x.requires_grad_(),))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_near_ties_are_rare(dtype: torch.dtype) -> None:
    """Below 0.01% of rows of random data differ from fp64, and those by less than the rounding of fp32."""
    num_tokens, top_k = 20_000, 8
    x, weight, bias = make_inputs(num_tokens, 64, 64, dtype, seed=8)
    got = route(x, weight, top_k, bias, backend="torch")
    unit_rows = directions(weight, dtype).double()
    select = torch.nn.functional.normalize(x.double(), dim=1) @ unit_rows.T + bias.double()
    want = select.topk(top_k, dim=1).indices
    rows = (got.indices != want).any(dim=1).nonzero()[:, 0]
    assert len(rows) < 1e-4 * num_tokens
    gap = (select.gather(1, got.indices) - select.gather(1, want))[rows].abs()
    assert gap.numel() == 0 or gap.max() < 4 * ROUND


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["softmax", "softmax-all-candidates"])
def test_many_chunks(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than fit in one chunk, one of them not valid, against the reference in fp64."""
    monkeypatch.setattr(chunks, "BYTES", 100_000)
    x, weight, bias = make_inputs(1_001, 90, 20, dtype, seed=12)
    x[500] = torch.nan
    gen = generator(13)
    d_weights, d_scores = torch.randn(1_001, 4, generator=gen), torch.randn(1_001, 20, generator=gen) * 0.1
    unit_rows = directions(weight, dtype)
    for grads in ({"weights": d_weights}, {"weights": d_weights, "scores": d_scores}):
        leaf, exact_leaf = x.clone().requires_grad_(), x.double().requires_grad_()
        got = route(leaf, weight, 4, bias, return_scores=True, backend="torch", **OPTIONS[name])
        want = route(
            exact_leaf,
            weight,
            4,
            bias,
            indices=got.indices,
            directions=unit_rows.double(),
            return_scores=True,
            backend="reference",
            **OPTIONS[name],
        )
        assert ((got.scores - want.scores).abs() <= 8 * ROUND).all()
        assert ((got.weights - want.weights).abs() <= 16 * ROUND / 0.05).all()
        for routing, cast in ((got, torch.float32), (want, torch.float64)):
            torch.autograd.backward(
                [getattr(routing, field) for field in grads], [value.to(cast) for value in grads.values()]
            )
        size = exact_leaf.grad.abs().amax(dim=1, keepdim=True) + want.inv_norm[:, None] * 0.1
        assert ((leaf.grad.double() - exact_leaf.grad).abs() <= (EPS[dtype] + 200 * ROUND) * size).all()
        assert (leaf.grad[500] == 0).all()


def test_backward_twice_gives_the_same(backend: str) -> None:
    """What the forward saved is not used up or written over by the backward, nor is the upstream gradient."""
    x, weight, bias = make_inputs(30, 24, 12, torch.float32)
    x[3] = 0
    upstream = upstream_of(30, 4, 12)
    for name, options in OPTIONS.items():
        leaf = x.clone().requires_grad_()
        got = route(leaf, weight, 4, bias, return_scores=True, backend=backend, **options)
        outputs = [got.weights, got.selected_scores, got.scores]
        grads = []
        for _ in range(2):
            leaf.grad = None
            usable = [i for i, output in enumerate(outputs) if output.requires_grad]
            values = [upstream[key].clone() for key in ("d_weights", "d_selected", "d_scores")]
            torch.autograd.backward([outputs[i] for i in usable], [values[i] for i in usable], retain_graph=True)
            grads.append(leaf.grad)
            for i, key in enumerate(("d_weights", "d_selected", "d_scores")):
                assert_same_bits(values[i], upstream[key], key)
        assert_same_bits(grads[1], grads[0], name)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_small_temperature_stays_finite(backend: str, gate: str, normalize: bool) -> None:
    """tau 0.005 and cosines near -1: every sigmoid underflows in fp32, their ratio does not."""
    x, weight, _ = make_inputs(20, 24, 8, torch.float32)
    weight = weight * 0.05 - x[:1] / x[:1].norm()
    x = x[:1] + 0.1 * x
    leaf = x.clone().requires_grad_()
    options = {"gate": gate, "normalize": normalize, "tau": 0.005}
    got = route(leaf, weight, 3, backend=backend, **options)
    want, unit_rows = truth(x, weight, 3, indices=got.indices, **options)
    assert want.selected_scores[0].max() < -0.5
    np.testing.assert_allclose(numpy(got.weights), want.weights, rtol=0, atol=1e-3)
    upstream = upstream_of(20, 3, 8)["d_weights"]
    (got.weights * upstream).sum().backward()
    exact = oracle.route_backward(
        x.numpy(), unit_rows, want, d_weights=upstream.numpy(), options=oracle.Options(**options)
    )
    np.testing.assert_allclose(numpy(leaf.grad), exact, rtol=0, atol=1e-3 * max(np.abs(exact).max(), 1))


@pytest.mark.not_interpreted
def test_permuted_batch_gives_permuted_result(backend: str) -> None:
    x, weight, bias = make_inputs(3_000, 64, 32, torch.float32, seed=6)
    permutation = torch.randperm(3_000, generator=generator(7))
    first = route(x, weight, 4, bias, backend=backend)
    moved = route(x[permutation], weight, 4, bias, backend=backend)
    same = (moved.indices == first.indices[permutation]).all(dim=1)
    assert (~same).sum() <= 1
    np.testing.assert_allclose(numpy(moved.weights[same]), numpy(first.weights[permutation][same]), rtol=0, atol=1e-5)
