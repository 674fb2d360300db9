"""Built ties: D = 16 and entries of +-1 make every norm and every product exact; the lower id wins."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kmeans_route import route
from tests.helpers.compare import (
    LOW,
    generator,
    numpy,
    truth,
)


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
