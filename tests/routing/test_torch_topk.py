"""Top-k of the torch backend against its definition: a stable sort."""

import pytest
import torch
from torch import Tensor

from kmeans_route.backends import torch_topk
from kmeans_route.backends.torch_topk import MIN_ROUNDS_SIZE, exact_topk
from kmeans_route.reference import stable_topk


def cosines(num_tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    return torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the rounds got, and how many of these it did again."""
    taken: list[int] = []
    whole, again = torch_topk._by_rounds, torch_topk._by_topk
    monkeypatch.setattr(torch_topk, "_by_rounds", lambda r, k: taken.append(len(r)) or whole(r, k))
    monkeypatch.setattr(torch_topk, "_by_topk", lambda r, k: taken.append(-len(r)) or again(r, k))
    return taken


@pytest.mark.parametrize(
    ("num_experts", "k"), [(2, 1), (3, 2), (16, 2), (60, 6), (64, 8), (128, 8), (256, 16), (513, 10), (1024, 8)]
)
def test_rounds_give_the_ids_of_a_stable_sort(num_experts: int, k: int, rounds: list[int]) -> None:
    ranking = cosines(4 * MIN_ROUNDS_SIZE // num_experts + 1, num_experts)
    ids = exact_topk(ranking, k)
    assert torch.equal(ids, stable_topk(ranking, k))
    assert ids.is_contiguous()
    assert ids.dtype == torch.int64
    assert rounds[0] == len(ranking)
    assert sum(-n for n in rounds if n < 0) < 0.05 * len(ranking)


@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_ties_go_to_the_lower_id(steps: int, rounds: list[int]) -> None:
    """Few values, so that most rows are tied within the top k or at its end, and some rows are all equal."""
    ranking = (cosines(4096, 64) * steps).round() / steps
    ranking[::100] = 0.25
    ranking[1::100] = -0.0
    ranking[1::100, ::2] = 0.0
    assert torch.equal(exact_topk(ranking, 8), stable_topk(ranking, 8))
    assert rounds[0] == 4096
    assert rounds[1] < 0


def test_values_one_rounding_apart_keep_their_order() -> None:
    ranking = torch.full((4096, 64), 0.3)
    for e in range(1, 64):
        up = torch.full((4096,), 2.0)
        ranking[:, e] = torch.nextafter(ranking[:, e - 1], up)
    ranking = ranking[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(exact_topk(ranking, 8), stable_topk(ranking, 8))


@pytest.mark.parametrize("largest", [1.9999999, -1.9999999])
def test_the_whole_range_is_right(largest: float, rounds: list[int]) -> None:
    ranking = cosines(4096, 64) * 1.9
    ranking[:, 7] = largest
    ranking[5] = torch.linspace(-1.9999, 1.9999, 64)
    assert torch.equal(exact_topk(ranking, 8), stable_topk(ranking, 8))
    assert rounds[0] == 4096


@pytest.mark.parametrize("value", [2.0, -2.0, 1e30, torch.inf, -torch.inf])
def test_what_is_out_of_range_goes_the_other_way(value: float, rounds: list[int]) -> None:
    ranking = cosines(4096, 64)
    ranking[17, 3] = value
    assert torch.equal(exact_topk(ranking, 8), stable_topk(ranking, 8))
    assert rounds == [-4096]


@pytest.mark.parametrize(("shape", "k", "dtype"), [
    ((100, 64), 8, torch.float32), ((4096, 64), 17, torch.float32), ((4096, 64), 8, torch.float64),
])  # fmt: skip
def test_few_tokens_many_experts_a_token_and_fp64_go_the_other_way(
    shape: tuple[int, int], k: int, dtype: torch.dtype, rounds: list[int]
) -> None:
    ranking = cosines(*shape).to(dtype)
    assert torch.equal(exact_topk(ranking, k), stable_topk(ranking, k))
    assert rounds == [-shape[0]]


def test_every_expert_is_a_sort(rounds: list[int]) -> None:
    ranking = cosines(20000, 8)
    assert torch.equal(exact_topk(ranking, 8), stable_topk(ranking, 8))
    assert rounds == []
