"""First data: the token reservoir, the first commit, initialize and set_centroids."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kmeans_route import KMeansRouter
from kmeans_route.backends.reservoir import EMPTY_HASH, hash_rows, kmeans_pp
from kmeans_route.reference import whitened_reference
from tests.helpers.compare import assert_same_bits, generator, numpy

D, E, K = 16, 6, 2
FROM_TOKENS = ["tokens", "kmeans++"]
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")


def hidden_states(num_tokens: int, seed: int = 0, size: int = D) -> Tensor:
    gen = generator(seed)
    x = torch.randn(num_tokens, size, generator=gen) + 0.5 * torch.randn(size, generator=gen)
    return x * (torch.rand(num_tokens, 1, generator=gen) * 3 + 0.2)


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.double())


def tokens_of(rows: Tensor, x: Tensor) -> list[int | None]:
    """For each row the token whose direction it has, or None."""
    cosine = unit(rows) @ unit(x).T
    return [int(row.argmax()) if float(row.max()) > 1 - 1e-6 else None for row in cosine]


def after_first_commit(parts: list[Tensor], **options: Any) -> KMeansRouter:
    router = KMeansRouter(D, E, K, **options)
    for x in parts:
        router(x)
    router.commit()
    return router


@pytest.mark.parametrize("init", FROM_TOKENS)
@pytest.mark.parametrize("num_tokens", [E, 20, 1000])
def test_centroids_are_distinct_unit_hidden_states(num_tokens: int, init: str, backend: str) -> None:
    x = hidden_states(num_tokens)
    router = after_first_commit([x], init=init, backend=backend)
    found = tokens_of(router.centroids, x)
    assert None not in found
    assert len(set(found)) == E
    torch.testing.assert_close(router.weight.norm(dim=1), torch.ones(E), rtol=0, atol=1e-6)
    want = whitened_reference(router.centroids.double(), router.weight.double())
    torch.testing.assert_close(router.weight.double(), want, rtol=0, atol=1e-5)
    of_the_paper = after_first_commit([x], init=init, backend=backend, directions="centroids")
    assert_same_bits(of_the_paper.centroids, router.centroids)
    torch.testing.assert_close(of_the_paper.weight.double(), unit(router.centroids), rtol=0, atol=1e-6)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("init", FROM_TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_order_nor_split_matters(init: str, dtype: torch.dtype, backend: str) -> None:
    x = hidden_states(700).to(dtype)
    want = after_first_commit([x], init=init, backend=backend).weight
    shuffled = x[torch.randperm(700, generator=generator(1))]
    for parts in (
        [shuffled],
        list(x.split(7)),
        list(shuffled.split(333)),
        [x.flip(0)[:1], x.flip(0)[1:]],
        [x.view(7, 100, D)],
    ):
        assert_same_bits(after_first_commit(parts, init=init, backend=backend).weight, want)


def test_normal_init_is_one_ordinary_step_in_any_order() -> None:
    x = hidden_states(700)
    want = after_first_commit([x], init="normal")
    got = after_first_commit(list(x[torch.randperm(700, generator=generator(1))].split(100)), init="normal")
    torch.testing.assert_close(got.weight, want.weight, rtol=0, atol=1e-6)
    start = KMeansRouter(D, E, K, init="normal")
    ids = start.route(x).indices
    for e in range(E):
        mine = (ids == e).any(1)
        mean = unit(x)[mine].mean(0) if mine.any() else torch.zeros(D)
        np.testing.assert_allclose(numpy(want.centroids[e]), numpy(mean), atol=1e-6)
    assert (int(want.steps), bool(want.initialized)) == (1, True)
    assert float(want.score_std) > 0


@pytest.mark.parametrize("init", FROM_TOKENS)
def test_duplicates_do_not_fill_the_reservoir(init: str, backend: str) -> None:
    x = hidden_states(E)
    many = [x[:1].expand(500, D), x[torch.arange(300) % E], x[1:2].expand(400, D), x.repeat_interleave(50, 0)]
    router = after_first_commit(many, init=init, backend=backend)
    assert sorted(found for found in tokens_of(router.centroids, x) if found is not None) == list(range(E))


@pytest.mark.parametrize("init", FROM_TOKENS)
@pytest.mark.parametrize("num_distinct", [1, 2, E - 1])
def test_fewer_tokens_than_experts_leave_gaussian_rows(num_distinct: int, init: str, backend: str) -> None:
    x = hidden_states(num_distinct)
    gaussian = KMeansRouter(D, E, K).weight
    bad = torch.tensor([torch.nan, 0.0, torch.inf])[:, None].expand(3, D)
    router = after_first_commit([torch.cat([bad, x, x])], init=init, backend=backend)
    found = tokens_of(router.centroids, x)
    assert sorted(token for token in found if token is not None) == list(range(num_distinct))
    for e, token in enumerate(found):
        if token is None:
            assert_same_bits(router.weight[e], gaussian[e])
            assert not router.centroids[e].any()
    assert bool(router.initialized)


@pytest.mark.parametrize("init", FROM_TOKENS)
def test_the_initialising_commit_sets_nothing_else(init: str) -> None:
    router = after_first_commit([hidden_states(300)], init=init, balance="quantile")
    assert bool(router.initialized)
    for name in ("steps", "expert_bias", "score_std"):
        assert not getattr(router, name).any(), name
    loads = KMeansRouter(D, E, K).route(hidden_states(300)).tokens_per_expert
    assert torch.equal(router.tokens_per_expert, loads), "of the Gaussian directions that routed them"
    for field in router.pending.FIELDS:
        assert not getattr(router.pending, field).any(), field
    weight = router.weight.clone()
    router.commit()
    assert_same_bits(router.weight, weight)
    router(hidden_states(300, 1))
    router.commit()
    # steps was 0, so beta is 0: the first average replaces the tokens.
    ids = KMeansRouter(D, E, K)
    with torch.no_grad():
        ids.weight.copy_(weight)
    member = ids.route(hidden_states(300, 1)).indices
    for e in range(E):
        np.testing.assert_allclose(
            numpy(router.centroids[e]), numpy(unit(hidden_states(300, 1))[(member == e).any(1)].mean(0)), atol=1e-6
        )
    assert int(router.steps) == 1
    assert router.expert_bias.any()


def test_first_data_waits_for_a_valid_token() -> None:
    router = KMeansRouter(D, E, K)
    gaussian = router.weight.clone()
    router(torch.zeros(50, D))
    router(hidden_states(9), torch.zeros(9, dtype=torch.bool))
    router.commit()
    assert not bool(router.initialized)
    assert_same_bits(router.weight, gaussian)
    x = hidden_states(100)
    router(x)
    router.commit()
    assert None not in tokens_of(router.centroids, x)
    assert int(router.dropped_total) == 50


def test_forward_routes_by_gaussian_directions_until_the_commit() -> None:
    router = KMeansRouter(D, E, K)
    gaussian, x = router.weight.clone(), hidden_states(200)
    before = router(x).weights
    assert_same_bits(router(x).weights, before)
    assert_same_bits(router.weight, gaussian)
    router.commit()
    assert not torch.equal(router(x).weights, before)


@pytest.mark.not_interpreted
@pytest.mark.parametrize(("init", "places"), [("tokens", E), ("kmeans++", 16 * E)])
def test_the_reservoir_keeps_the_smallest_hashes_and_no_more(init: str, places: int, backend: str) -> None:
    router = KMeansRouter(D, E, K, init=init, backend=backend)
    seen: set[int] = set()
    for step, x in enumerate(hidden_states(2000).split(250)):
        router(x)
        kept = router.pending.hashes
        assert kept.shape == (places,)
        assert (kept[1:] > kept[:-1]).all(), "sorted and distinct"
        assert int(kept[-1]) < EMPTY_HASH
        assert router.pending.rows.shape == (places, D)
        now = set(kept.tolist())
        # A hash that fell out never comes back, and one that stays is smaller than all that fell out.
        assert not step or max(now & seen, default=0) <= min(seen - now, default=EMPTY_HASH)
        seen |= now
    rows = tokens_of(router.pending.rows, hidden_states(2000))
    assert None not in rows
    assert len(set(rows)) == places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_hashes_tell_rows_apart_and_favour_none(dtype: torch.dtype) -> None:
    # Rows of three values, of which half are long and half short: little for a hash to go by.
    x = torch.randint(-1, 2, (40_000, D), generator=generator(0)).unique(dim=0)[:30_000]
    x = (x * torch.tensor([[1.0], [64.0]]).repeat(15_000, 1)).to(dtype)
    hashes = hash_rows(x, 7)
    assert hashes.unique().numel() == x.unique(dim=0).shape[0] > 29_000
    assert torch.equal(hash_rows(x.flip(0), 7).flip(0), hashes)
    assert (hash_rows(x, 8) != hashes).all()
    # Uniform in [0, 2^63): the mean of 15,000 has a standard deviation of 0.0024, each top byte 117 +- 11 rows.
    place = hashes.double() / 2**63
    assert float((place[::2].mean() - 0.5).abs()) < 0.01
    assert float((place[1::2].mean() - 0.5).abs()) < 0.01
    tops = torch.bincount((place * 256).long(), minlength=256)
    assert 60 < int(tops.min()) <= int(tops.max()) < 180


def test_the_sample_favours_no_place_in_the_batch() -> None:
    places = []
    for seed in range(20):
        router = KMeansRouter(D, E, K, init="kmeans++", seed=seed)
        x = hidden_states(1000, seed)
        router(x)
        places += [place for place in tokens_of(router.pending.rows, x) if place is not None]
    assert len(places) == 20 * 16 * E
    # Uniform over 1000 places: the mean of 1920 draws has a standard deviation of 6.6.
    assert abs(np.mean(places) - 499.5) < 30
    assert np.std(places) == pytest.approx(1000 / 12**0.5, rel=0.06)


def test_the_sample_depends_on_the_seed() -> None:
    x = hidden_states(1000)
    chosen = [set(tokens_of(after_first_commit([x], seed=seed).centroids, x)) for seed in range(4)]
    assert all(one != other for i, one in enumerate(chosen) for other in chosen[:i])


def clusters(num_clusters: int, num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tight clusters around axes, and the cluster of each token."""
    gen = generator(seed)
    member = torch.randint(num_clusters, (num_tokens,), generator=gen)
    return torch.eye(D)[member] + 0.02 * torch.randn(num_tokens, D, generator=gen), member


def test_kmeans_pp_finds_every_cluster() -> None:
    hits = {"kmeans++": 0, "tokens": 0}
    for seed in range(10):
        x, member = clusters(E, 600, seed)
        for init in FROM_TOKENS:
            router = after_first_commit([x], init=init, seed=seed)
            found = {int(member[token]) for token in tokens_of(router.centroids, x) if token is not None}
            hits[init] += len(found) == E
    assert hits["kmeans++"] >= 9
    assert hits["tokens"] <= 3  # all six by chance: 6! / 6^6 = 1.5%


@pytest.mark.parametrize("num_found", [1, 3, 8, 40])
def test_kmeans_pp_draws_distinct_tokens_even_of_one_direction(num_found: int) -> None:
    hashes = torch.full((64,), EMPTY_HASH)
    hashes[:num_found] = torch.arange(num_found)
    rows = torch.ones(64, D)  # no distance between any two: every odd is 0
    chosen = kmeans_pp(hashes, rows, 8, generator(0))
    assert len(set(chosen.tolist())) == 8
    assert int((hashes[chosen] != EMPTY_HASH).sum()) == min(8, num_found)


@pytest.mark.parametrize("init", [*FROM_TOKENS, "normal"])
def test_initialize_is_a_forward_and_a_commit(init: str) -> None:
    x, mask = hidden_states(300), torch.rand(300, generator=generator(2)) < 0.8
    want = KMeansRouter(D, E, K, init=init)
    want(x, mask)
    want.commit()
    for prepare in ("train", "eval", "frozen"):
        got = KMeansRouter(D, E, K, init=init)
        got(hidden_states(50, 7))  # what was pending is dropped
        if prepare == "eval":
            got.eval()
        if prepare == "frozen":
            got.freeze()
        with torch.no_grad():
            got.initialize(x.view(3, 100, D), mask.view(3, 100))
        for (name, mine), (_, theirs) in zip(got.named_buffers(), want.named_buffers(), strict=True):
            assert_same_bits(mine, theirs, name)
        assert int(got.pending.num_tokens) == 0
        assert got.frozen == (prepare == "frozen")
    got.freeze(False)
    for router in (want, got):
        router(hidden_states(80, 3))
        router.commit()
    assert_same_bits(got.weight, want.weight)


def test_initialize_again_starts_anew() -> None:
    router = after_first_commit([hidden_states(300)])
    for step in range(3):
        router(hidden_states(100, step))
        router.commit()
    x = hidden_states(300, 9)
    router.initialize(x)
    assert_same_bits(router.weight, after_first_commit([x]).weight)
    assert not router.steps.any()
    assert not router.expert_bias.any()


@pytest.mark.parametrize(
    "x", [torch.zeros(5, D), torch.full((5, D), torch.nan), torch.zeros(0, D)], ids=["zero", "nan", "empty"]
)
def test_initialize_refuses_data_without_a_valid_token(x: Tensor) -> None:
    router = after_first_commit([hidden_states(300)]).freeze()
    assert isinstance(router, KMeansRouter)
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    with pytest.raises(ValueError, match="x must hold at least one valid token, got none"):
        router.initialize(x)
    assert router.frozen
    for name, buffer in router.named_buffers():  # a refused call leaves the state that was there
        assert_same_bits(buffer, before[name], name)


def test_initialize_checks_its_arguments() -> None:
    router = KMeansRouter(D, E, K)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 16\), got \(4, 3\)"):
        router.initialize(torch.ones(4, 3))
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        router.initialize(torch.ones(4, D), torch.ones(4))
    with pytest.raises(RuntimeError, match="x is on meta but the router's state is on cpu"):
        router.initialize(torch.ones(4, D, device="meta"))


@pytest.mark.parametrize("average", ["ema", "cumulative"])
@pytest.mark.parametrize("init", [*FROM_TOKENS, "normal"])
def test_given_centroids_survive_the_first_commit(init: str, average: str) -> None:
    router = KMeansRouter(D, E, K, init=init, average=average)
    given = torch.randn(E, D, generator=generator(5), dtype=torch.float64) * torch.logspace(-3, 3, E)[:, None]
    router(hidden_states(100))  # pending of the state that is replaced
    router.set_centroids(given)
    torch.testing.assert_close(router.weight, unit(given).float(), rtol=0, atol=1e-6)
    assert bool(router.initialized)
    assert int(router.pending.num_tokens) == 0
    assert int(router.steps) == 999
    router(hidden_states(5000, 3))
    router.commit()
    turned = (unit(router.centroids) - unit(given)).norm(dim=1)
    assert float(turned.max()) < 1e-2
    assert float(turned.max()) > 0
    want = whitened_reference(router.centroids.double(), unit(given))
    torch.testing.assert_close(router.weight.double(), want, rtol=0, atol=1e-5)
    assert float(router.score_std) > 0


def test_given_centroids_are_refused_unless_each_is_a_direction() -> None:
    router = after_first_commit([hidden_states(300)])
    before = router.weight.clone()
    with pytest.raises(ValueError, match=r"weight must have shape \(6, 16\), got \(5, 16\)"):
        router.set_centroids(torch.ones(5, D))
    for bad in (0.0, torch.nan, torch.inf):
        weight = torch.ones(E, D)
        weight[2] = bad
        with pytest.raises(ValueError, match="weight must have a direction in every row"):
            router.set_centroids(weight)
    assert_same_bits(router.weight, before)
