"""metrics.py against values worked out by hand, known extremes, and properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmeans_route import metrics

COUNT_METRICS = [metrics.max_vio, metrics.load_std, metrics.load_entropy, metrics.gini, metrics.dead_experts]
counts_of_experts = st.lists(st.integers(0, 10**6), min_size=1, max_size=40).map(torch.tensor)


def test_load_metrics_by_hand() -> None:
    counts = torch.tensor([1, 3, 0, 4])  # f = 1/8, 3/8, 0, 1/2, mean load 2
    torch.testing.assert_close(metrics.load(counts), torch.tensor([0.5, 1.5, 0.0, 2.0]))
    torch.testing.assert_close(metrics.max_vio(counts), torch.tensor(1.0))
    variance = (0.125**2 + 0.125**2 + 0.25**2 + 0.25**2) / 4
    torch.testing.assert_close(metrics.load_std(counts), torch.tensor(math.sqrt(variance)))
    entropy = -(0.125 * math.log(0.125) + 0.375 * math.log(0.375) + 0.5 * math.log(0.5)) / math.log(4)
    torch.testing.assert_close(metrics.load_entropy(counts), torch.tensor(entropy))
    # Sum over all pairs of |f_i - f_j| is 2 (1 + 3 + 4 + 2 + 3 + 1) / 8; Gini is that over 2 E^2 mean f = 2 E.
    torch.testing.assert_close(metrics.gini(counts), torch.tensor(2 * 14 / 8 / (2 * 4)))
    assert metrics.dead_experts(counts).item() == 1


@pytest.mark.parametrize("num_experts", [1, 2, 7, 64])
def test_extremes_of_the_load(num_experts: int) -> None:
    even = torch.full((num_experts,), 5)
    one_takes_all = torch.zeros(num_experts, dtype=torch.int64)
    one_takes_all[num_experts // 2] = 9
    for metric, when_even in [(metrics.max_vio, 0.0), (metrics.load_std, 0.0), (metrics.load_entropy, 1.0)]:
        torch.testing.assert_close(metric(even), torch.tensor(when_even), atol=1e-6, rtol=0)
    torch.testing.assert_close(metrics.gini(even), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(metrics.max_vio(one_takes_all), torch.tensor(num_experts - 1.0))
    torch.testing.assert_close(metrics.load_std(one_takes_all), torch.tensor(math.sqrt(num_experts - 1) / num_experts))
    torch.testing.assert_close(metrics.load_entropy(one_takes_all), torch.tensor(0.0 if num_experts > 1 else 1.0))
    torch.testing.assert_close(metrics.gini(one_takes_all), torch.tensor(1 - 1 / num_experts))
    assert metrics.dead_experts(one_takes_all).item() == num_experts - 1


def test_nothing_counted_is_balanced_and_dead() -> None:
    counts = torch.zeros(6, dtype=torch.int64)
    assert metrics.load(counts).tolist() == [1.0] * 6
    assert [metric(counts).item() for metric in COUNT_METRICS] == [0.0, 0.0, pytest.approx(1.0), 0.0, 6]


@pytest.mark.parametrize("metric", COUNT_METRICS)
def test_leading_dimensions_are_a_batch(metric: object) -> None:
    assert callable(metric)
    counts = torch.randint(0, 9, (3, 2, 5))
    counts[1, 0] = 0
    batched = metric(counts)
    assert batched.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            assert torch.equal(batched[i, j], metric(counts[i, j]))


@given(counts_of_experts)
def test_ranges_and_invariance(counts: Tensor) -> None:
    num_experts = counts.shape[0]
    assert 0 <= metrics.max_vio(counts) <= num_experts - 1 + 1e-4
    assert 0 <= metrics.load_std(counts) <= math.sqrt(num_experts - 1) / num_experts + 1e-6
    assert 0 <= metrics.load_entropy(counts) <= 1
    assert 0 <= metrics.gini(counts) <= 1 - 1 / num_experts + 1e-6
    assert metrics.dead_experts(counts) == counts.tolist().count(0)
    order = torch.randperm(num_experts)
    for metric in COUNT_METRICS:
        expected = metric(counts)
        torch.testing.assert_close(metric(counts[order]), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(metric(counts * 7), expected, atol=1e-5, rtol=1e-5)


@given(counts_of_experts)
def test_metrics_against_their_definitions(counts: Tensor) -> None:
    if counts.sum() == 0:
        return
    f = counts.double() / counts.sum()
    num_experts = len(f)
    torch.testing.assert_close(metrics.max_vio(counts).double(), f.max() * num_experts - 1, atol=1e-4, rtol=1e-5)
    mean_square = ((f - 1 / num_experts) ** 2).mean()
    torch.testing.assert_close(metrics.load_std(counts).double(), mean_square.sqrt(), atol=1e-6, rtol=1e-5)
    by_pairs = (f[:, None] - f).abs().sum() / (2 * num_experts)
    torch.testing.assert_close(metrics.gini(counts).double(), by_pairs, atol=1e-5, rtol=1e-5)


def test_large_counts_keep_their_digits() -> None:
    counts = torch.tensor([2**40 + 2**20, 2**40 - 2**20])
    torch.testing.assert_close(metrics.max_vio(counts.double()), torch.tensor(2.0**-20, dtype=torch.float64))
    assert metrics.max_vio(torch.full((3,), 2**24 + 1)).item() == pytest.approx(0, abs=2e-7)


def test_effective_experts_by_hand() -> None:
    pairs = torch.combinations(torch.arange(8), 2)  # every set of 2 of 8 once: nothing tells two experts apart
    assert metrics.effective_experts(pairs, 8).item() == pytest.approx(8, abs=1e-4)
    assert metrics.effective_experts(torch.arange(40)[:, None] % 5, 5).item() == pytest.approx(5, abs=1e-4)
    halves = torch.arange(8).view(2, 4).repeat(6, 1)[:, torch.tensor([2, 0, 3, 1])]
    assert metrics.effective_experts(halves, 8).item() == pytest.approx(2, abs=1e-5)
    assert metrics.effective_experts(torch.tensor([[1, 4]]).expand(9, -1), 6).item() == 1
    assert metrics.effective_experts(pairs[:0], 8).item() == 1
    # Experts 0 and 1 share half of the tokens as one, 2 and 3 the others apart: variances 1/4, 1/4, 3/16, 3/16.
    mixed = torch.tensor([[0, 1], [0, 1], [2, 4], [3, 4]])
    covariance = torch.cov(torch.zeros(4, 5).scatter(1, mixed, 1.0).T, correction=0)
    expected = 1 + covariance.trace() ** 2 / covariance.square().sum()
    torch.testing.assert_close(metrics.effective_experts(mixed, 5), expected)


def test_effective_experts_takes_layers_and_leaves_masked_tokens_out() -> None:
    indices = torch.rand(3, 50, 8).argsort(-1)[..., :3]
    mask = torch.arange(50) % 4 > 0
    each = torch.stack([metrics.effective_experts(layer[mask], 8) for layer in indices])
    torch.testing.assert_close(metrics.effective_experts(indices, 8, mask.expand(3, -1)), each)
    assert metrics.effective_experts(indices, 8, torch.zeros(3, 50, dtype=torch.bool)).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="indices must be"):
        metrics.effective_experts(torch.zeros(3, dtype=torch.int64), 8)


def test_pairwise_cosine_by_hand() -> None:
    weight = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -3.0], [0.0, 0.0]])
    half = math.sqrt(0.5)
    expected = torch.tensor([[1, half, 0, 0], [half, 1, -half, 0], [0, -half, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(metrics.pairwise_cosine(weight), expected)
    torch.testing.assert_close(metrics.mean_pairwise_cosine(weight[:3]), torch.tensor(0.0), atol=1e-7, rtol=0)
    torch.testing.assert_close(metrics.mean_pairwise_cosine(weight[:2]), torch.tensor(half))
    assert metrics.mean_pairwise_cosine(weight[:1]).item() == 0


def test_pairwise_cosine_extremes() -> None:
    same = torch.randn(1, 16).expand(5, -1) * torch.rand(5, 1)
    torch.testing.assert_close(metrics.mean_pairwise_cosine(same), torch.tensor(1.0))
    simplex = torch.eye(8) - 1 / 8  # the corners of a regular simplex have the least mean cosine there is
    torch.testing.assert_close(metrics.mean_pairwise_cosine(simplex), torch.tensor(-1 / 7))
    assert metrics.pairwise_cosine(torch.randn(2, 3, 4, 6, dtype=torch.float64)).shape == (2, 3, 4, 4)
    low = torch.randn(4, 8, dtype=torch.bfloat16)
    assert metrics.pairwise_cosine(low).dtype == torch.float32


@pytest.mark.parametrize("angle", [0.0, 1e-5, 0.1, 1.0, 3.0, math.pi])
def test_centroid_drift_is_the_angle(angle: float) -> None:
    before = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    drift = metrics.centroid_drift(before, (before * 7) @ turn.T)
    torch.testing.assert_close(drift, torch.full((2,), angle), atol=3e-7, rtol=1e-5)


def test_centroid_drift_without_a_direction() -> None:
    before = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    after = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(metrics.centroid_drift(before, after), torch.tensor([math.pi / 2, math.pi / 2, 0.0]))
    stacked = torch.randn(3, 4, 5)
    torch.testing.assert_close(metrics.centroid_drift(stacked, stacked * 2), torch.zeros(3, 4), atol=1e-6, rtol=0)


def test_coupling_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    norms = torch.tensor([[2.0, 1.0], [5.0, 4.0]])
    # Deviations: (-2, -1, 0, 3) and (-1, -2, 2, 1); products 2 + 2 + 0 + 3 = 7; squares 14 and 10.
    torch.testing.assert_close(metrics.coupling(scores, norms), torch.tensor(7 / math.sqrt(140)))
    torch.testing.assert_close(metrics.coupling(scores, 3 * scores + 1), torch.tensor(1.0))
    torch.testing.assert_close(metrics.coupling(scores, -scores), torch.tensor(-1.0))


def test_coupling_of_what_does_not_vary_is_zero() -> None:
    scores = torch.randn(6, 2)
    assert metrics.coupling(scores, torch.full((6, 2), 0.1)).item() == 0
    assert metrics.coupling(scores[:1, :1], scores[:1, :1]).item() == 0
    assert metrics.coupling(scores[:0], scores[:0]).item() == 0


def test_coupling_leaves_masked_pairs_out() -> None:
    scores, norms = torch.randn(20, 2), torch.rand(20, 2)
    mask = torch.arange(20) % 3 > 0
    expected = metrics.coupling(scores[mask], norms[mask])
    scores[~mask] = torch.nan
    norms[~mask] = torch.inf
    torch.testing.assert_close(metrics.coupling(scores, norms, mask[:, None]), expected)
    assert metrics.coupling(scores, norms, torch.zeros(20, 1, dtype=torch.bool)).item() == 0


@given(st.integers(2, 200), st.floats(-5, 5), st.floats(0.1, 10))
def test_coupling_is_pearson_and_ignores_scale(size: int, shift: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(size)
    pair = torch.randn(2, size, generator=generator, dtype=torch.float64)
    pair[1] += pair[0]
    expected = torch.corrcoef(pair)[0, 1]
    torch.testing.assert_close(metrics.coupling(pair[0], pair[1]), expected)
    torch.testing.assert_close(metrics.coupling(pair[0] * scale + shift, pair[1]), expected)


@pytest.mark.parametrize("metric", [metrics.load, *COUNT_METRICS])
@pytest.mark.parametrize("counts", [torch.tensor(3), torch.zeros(4, 0)])
def test_counts_need_experts(metric: object, counts: Tensor) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match="counts must be"):
        metric(counts)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="weight must be"):
        metrics.pairwise_cosine(torch.zeros(3))
    with pytest.raises(ValueError, match="before must be"):
        metrics.centroid_drift(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="must hold the same"):
        metrics.centroid_drift(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="must have one shape"):
        metrics.coupling(torch.zeros(3, 2), torch.zeros(3))


def test_differences_and_nearest_take_layers_at_once() -> None:
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, 8, generator=gen) + 4
    cosine = metrics.differences_cosine(weight)
    unit = torch.nn.functional.normalize(weight.double(), dim=-1)
    apart = torch.nn.functional.normalize(unit - unit.mean(1, keepdim=True), dim=-1)
    want = apart @ apart.mT
    torch.testing.assert_close(cosine.double(), want, rtol=0, atol=1e-5)
    for layer, got in enumerate(metrics.nearest_cosine(cosine)):
        rows = [max(float(want[layer, i, j]) for j in range(5) if j != i) for i in range(5)]
        assert float(got) == pytest.approx(sum(rows) / 5, abs=1e-5)
    assert metrics.nearest_cosine(torch.ones(2, 1, 1)).tolist() == [0, 0]


def test_no_metric_asks_the_device() -> None:
    """Under fake tensors a host sync raises: this is what keeps the metrics off the routing path's back."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        counts, weight = torch.zeros(4, 8, dtype=torch.int64), torch.zeros(8, 16)
        for metric in [metrics.load, *COUNT_METRICS]:
            metric(counts)
        metrics.mean_pairwise_cosine(weight)
        metrics.nearest_cosine(metrics.differences_cosine(weight))
        metrics.effective_experts(torch.zeros(5, 2, dtype=torch.int64), 8)
        metrics.centroid_drift(weight, weight)
        metrics.coupling(torch.zeros(5, 2), torch.zeros(5, 2), torch.ones(5, 1, dtype=torch.bool))
