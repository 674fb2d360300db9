"""route on the fast backend against the fp64 truth: ids exactly, values no worse than plain PyTorch in the dtype."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kmeans_route import Routing, directions, route, torch_backend
from tests import oracle
from tests.compare import (
    EPS,
    LOW,
    OPTIONS,
    assert_ids,
    assert_no_worse,
    assert_same_bits,
    assert_same_routing,
    generator,
    make_inputs,
    numpy,
    plain_weights,
    truth,
)

ROUND = EPS[torch.float32]
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


def upstream_of(num_tokens: int, top_k: int, num_experts: int) -> dict[str, Tensor]:
    gen = generator(9)
    return {
        "d_weights": torch.randn(num_tokens, top_k, generator=gen),
        "d_selected": torch.randn(num_tokens, top_k, generator=gen),
        "d_scores": torch.randn(num_tokens, num_experts, generator=gen),
    }


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


# Built ties: D = 16 and entries of +-1 make every norm and every product exact.


def exact_rows(num_experts: int, seed: int = 0) -> Tensor:
    """(E, 16) rows of +-1, duplicates likely only by design."""
    return torch.randint(0, 2, (num_experts, 16), generator=generator(seed)).float() * 2 - 1


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 3), (64, 1), (64, 8), (64, 64), (13, 6), (160, 2), (2, 1)])
def test_all_equal_scores_take_the_lowest_ids(backend: str, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
    """E equal centroids: torch.topk alone would give 44, 41, 42 here."""
    x = exact_rows(5, seed=1).to(dtype)
    weight = exact_rows(1).expand(num_experts, 16)
    for bias in (None, torch.zeros(num_experts), torch.full((num_experts,), 0.25)):
        got = route(x, weight, top_k, bias, backend=backend)
        assert (got.indices == torch.arange(top_k)).all()
        np.testing.assert_allclose(numpy(got.weights), 1 / top_k, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 7, 11, 12])
def test_duplicate_centroids(backend: str, top_k: int, dtype: torch.dtype) -> None:
    """Each centroid three times: ties inside the top K and across its edge, always to the lower id."""
    base = exact_rows(4, seed=3)
    weight = base[torch.tensor([2, 0, 1, 3, 2, 1, 0, 3, 0, 2, 3, 1])]
    x = exact_rows(40, seed=4).to(dtype)
    got = route(x, weight, top_k, torch.zeros(12), return_scores=True, backend=backend)
    want, _ = truth(x, weight, top_k, torch.zeros(12))
    np.testing.assert_array_equal(got.indices.numpy(), want.indices)
    select = np.sort(want.scores, axis=1)[:, ::-1]
    if top_k < 12:
        crossing = select[:, top_k - 1] == select[:, top_k]
        assert crossing.any() or top_k in (3,), "no tie crosses the edge: the case tests nothing"


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_ties_made_by_the_bias(backend: str, top_k: int, dtype: torch.dtype) -> None:
    """s differs, s + b is equal: scores of 0, 1/2 and 1, biases that complete them to 1."""
    weight = torch.eye(16)[:6]
    x = torch.zeros(3, 16)
    x[0, :4] = 1
    x[1, 3] = 1
    x[2, 1:5] = 1
    bias = torch.tensor([0.5, 0.5, 0.0, 0.5, 1.0, 1.0])
    got = route(x.to(dtype), weight, top_k, bias, backend=backend)
    want, _ = truth(x.to(dtype), weight, top_k, bias)
    np.testing.assert_array_equal(got.indices.numpy(), want.indices)
    # Row 0: s + b = 1, 1, 1/2, 1, 1, 1.
    assert got.indices[0].tolist() == [0, 1, 3, 4, 5][:top_k]


def test_ordered_by_score_and_bias(backend: str) -> None:
    """The order is that of s + b, not of s, not of the gates."""
    x = torch.tensor([[4.0, 3.0, 0.0]])
    got = route(x, torch.eye(3), 3, torch.tensor([0.0, 0.3, 1.0]), gate="cosine", normalize=False, backend=backend)
    assert got.indices.tolist() == [[2, 1, 0]]
    np.testing.assert_allclose(numpy(got.weights), [[1e-3, 0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_tied_groups(backend: str, top_k: int) -> None:
    x = exact_rows(6, seed=5)
    weight = exact_rows(1).expand(12, 16)
    for group_score in ("top2", "max"):
        options = {"n_group": 4, "topk_group": 2, "group_score": group_score}
        got = route(x, weight, top_k, torch.zeros(12), backend=backend, **options)
        assert (got.indices == torch.arange(top_k)).all()
        bias = torch.zeros(12)
        bias[[7, 10]] = 1.0
        got = route(x, weight, top_k, bias, backend=backend, **options)
        assert (got.indices == torch.tensor([7, 10, 6, 8])[:top_k]).all()


def test_negative_zero_ties_with_zero(backend: str) -> None:
    """-0.0 and 0.0 are equal: the lower id wins whichever sign it has."""
    weight = torch.eye(4)
    x = torch.tensor([[-1.0, 0.0, -0.0, 0.0], [-1.0, -0.0, 0.0, -0.0]])
    got = route(x, weight, 3, backend=backend)
    assert got.indices.tolist() == [[1, 2, 3], [1, 2, 3]]
    got = route(x, weight, 2, torch.tensor([0.0, -0.0, 0.0, -0.0]), backend=backend)
    assert got.indices.tolist() == [[1, 2], [1, 2]]


# Layouts.


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


def test_replayed_ids_of_an_invalid_token_are_ignored(backend: str) -> None:
    x, weight, bias = make_inputs(6, 24, 12, torch.float32)
    x[2] = torch.nan
    indices = torch.tensor([[7, 3]] * 6)
    got = route(x, weight, 2, bias, indices=indices, return_scores=True, backend=backend)
    assert_left_out(got, 2, 2)
    assert got.tokens_per_expert.tolist() == [0, 0, 0, 5, 0, 0, 0, 5, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["softmax", "softmax-all-candidates"])
def test_many_chunks(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than fit in one chunk, one of them not valid, against the reference in fp64."""
    monkeypatch.setattr(torch_backend, "CHUNK_BYTES", 100_000)
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


def test_given_directions_are_used(backend: str) -> None:
    x, weight, bias = make_inputs(20, 24, 13, torch.bfloat16)
    cached = directions(weight, torch.bfloat16)
    want = route(x, weight, 3, bias, return_scores=True, backend=backend)
    got = route(x, torch.zeros_like(weight), 3, bias, directions=cached, return_scores=True, backend=backend)
    assert_same_routing(got, want)


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


# Rows that are not valid, and rows at the edge of it.

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


def assert_left_out(got: Routing, row: int, top_k: int) -> None:
    assert not got.valid[row]
    assert got.indices[row].tolist() == list(range(top_k))
    assert (got.weights[row] == 0).all()
    assert (got.selected_scores[row] == 0).all()
    assert got.inv_norm[row] == 0
    for name, field in zip(got._fields, got, strict=True):
        assert field is None or torch.isfinite(field).all(), name


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


def test_permuted_batch_gives_permuted_result(backend: str) -> None:
    x, weight, bias = make_inputs(3_000, 64, 32, torch.float32, seed=6)
    permutation = torch.randperm(3_000, generator=generator(7))
    first = route(x, weight, 4, bias, backend=backend)
    moved = route(x[permutation], weight, 4, bias, backend=backend)
    same = (moved.indices == first.indices[permutation]).all(dim=1)
    assert (~same).sum() <= 1
    np.testing.assert_allclose(numpy(moved.weights[same]), numpy(first.weights[permutation][same]), rtol=0, atol=1e-5)


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
