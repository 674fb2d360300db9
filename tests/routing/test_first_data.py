"""First data: the moments of tokens, the first commit, initialize and set_centroids."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kmeans_route import KMeansRouter
from kmeans_route.backends.first import moments_dtype
from kmeans_route.reference import whitened_reference
from kmeans_route.routing import pending
from tests.helpers.compare import assert_same_bits, generator, numpy

D, E, K = 16, 6, 2
INITS = ["tokens", "normal"]
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")


def hidden_states(num_tokens: int, seed: int = 0, size: int = D) -> Tensor:
    gen = generator(seed)
    x = torch.randn(num_tokens, size, generator=gen) + 0.5 * torch.randn(size, generator=gen)
    return x * (torch.rand(num_tokens, 1, generator=gen) * 3 + 0.2)


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.double(), dim=-1)


def after_first_commit(parts: list[Tensor], **options: Any) -> KMeansRouter:
    router = KMeansRouter(D, E, K, **options)
    for x in parts:
        router(x)
    router.commit()
    return router


def drawn(u: Tensor, g: Tensor) -> Tensor:
    """The definition, expert by expert, of u (n, D) and g (E, D)."""
    mean = u.mean(0)
    spread = (u - mean).square().sum(1).mean().sqrt()
    kept: list[Tensor] = []
    for e in range(len(g)):
        shares = [(16 * D**0.5 * unit(u) @ unit(end)).softmax(0) for end in (g[e], -g[e])]
        one, other = (unit(share @ u - mean) for share in shares)
        near, far = (max([float(away @ each) for each in kept], default=-1.0) for away in (one, other))
        kept.append(other if near >= 0.5 and far < near - 0.1 else one)
    cosine = torch.stack(kept) @ torch.stack(kept).T
    parted = [
        unit(away + 0.1 * unit(g[e])) if (cosine[e, :e] > 1 - 1e-6).any() else away for e, away in enumerate(kept)
    ]
    return unit(mean + spread * torch.stack(parted)) * u.square().sum(1).mean().sqrt()


@pytest.mark.parametrize("accumulate", ["unit", "raw"])
@pytest.mark.parametrize("num_tokens", [3, 20, 300])
def test_first_centroids_are_those_of_the_definition(num_tokens: int, accumulate: str, backend: str) -> None:
    x = hidden_states(num_tokens)
    g = KMeansRouter(D, E, K).weight.double()
    router = after_first_commit([x], accumulate=accumulate, backend=backend)
    want = drawn(unit(x) if accumulate == "unit" else x.double(), g)
    torch.testing.assert_close(router.centroids.double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(router.weight.norm(dim=1), torch.ones(E), rtol=0, atol=1e-6)
    want = whitened_reference(router.centroids.double(), router.weight.double())
    torch.testing.assert_close(router.weight.double(), want, rtol=0, atol=1e-5)
    of_the_paper = after_first_commit([x], accumulate=accumulate, backend=backend, directions="centroids")
    assert_same_bits(of_the_paper.centroids, router.centroids)
    torch.testing.assert_close(of_the_paper.weight.double(), unit(router.centroids), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("offset", "dominant"), [(0, 1), (2, 1), (0, 8), (2, 8)])
def test_first_centroids_lie_where_tokens_do_and_apart(offset: float, dominant: float) -> None:
    """Tokens of 300 kinds, which share a mean, or an axis that most of their variance lies along."""
    gen, size, experts = generator(0), 256, 32
    kinds = torch.randn(300, size, generator=gen)
    kinds[:, 0] *= dominant
    x = kinds[torch.randint(300, (2000,), generator=gen)] + 0.3 * torch.randn(2000, size, generator=gen)
    x += offset * torch.randn(size, generator=gen)
    router = KMeansRouter(size, experts, 4)
    router(x)
    router.commit()
    centroids, mean = unit(router.centroids), unit(x).mean(0)
    nearest = (centroids @ unit(x).T).amax(1)
    assert float(nearest.median()) > 0.95
    assert float(nearest.min()) > 0.6, "where two tokens lie about as far along a direction, both count"
    axes = torch.linalg.svdvals(unit(centroids - mean)).square() / experts
    assert float(1 / axes.square().sum()) > experts / 4, "axes that the centroids spread along"


@pytest.mark.parametrize("directions", ["whitened", "centroids"])
@pytest.mark.parametrize("offset", [2.0, 100.0, 300.0])
def test_first_centroids_of_tokens_that_share_a_mean_are_even(offset: float, directions: str) -> None:
    """None lies nearer to the mean than others, where it would get all tokens, nor far from all of them."""
    gen, size, experts = generator(0), 64, 16
    x = torch.randn(2000, size, generator=gen) + offset * torch.randn(size, generator=gen)
    router = KMeansRouter(size, experts, 2, directions=directions)
    router(x)
    router.commit()
    off_mean = unit(x) - unit(x).mean(0)
    mine = (unit(router.centroids) - unit(x).mean(0)).norm(dim=1)
    near, far = torch.quantile(off_mean.norm(dim=1), torch.tensor([0.05, 0.95]).double())
    assert (near < mine).all()
    assert (mine < far).all()
    loads = router.route(x).tokens_per_expert.double()
    assert float(loads.sum() ** 2 / loads.square().sum()) > 0.75 * experts, "effective loads"


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_order_nor_split_matters(dtype: torch.dtype, backend: str) -> None:
    x = hidden_states(700).to(dtype)
    want = after_first_commit([x], backend=backend).centroids
    shuffled = x[torch.randperm(700, generator=generator(1))]
    for parts in (
        [shuffled],
        list(x.split(7)),
        list(shuffled.split(333)),
        [x.flip(0)[:1], x.flip(0)[1:]],
        [x.view(7, 100, D)],
    ):
        got = after_first_commit(parts, backend=backend).centroids
        torch.testing.assert_close(got, want, rtol=0, atol=1e-7)  # a rounding of fp32


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_rounding_moves_first_centroids_about_as_little_as_tokens(offset: float) -> None:
    x = hidden_states(700) + offset
    rounded = x.bfloat16().float()
    off_mean, moved = unit(x) - unit(x).mean(0), unit(rounded) - unit(x)
    one, other = (after_first_commit([each]).centroids.double() for each in (x, rounded))
    # The logarithm of a token's share moves by 16 sqrt(D) times as much as the token.
    assert float((one - other).norm(dim=1).max()) < 5 * float(moved.norm(dim=1).mean())
    assert float(off_mean.norm(dim=1).mean()) > 40 * float(moved.norm(dim=1).mean()), "the premise"


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


@pytest.mark.parametrize("num_distinct", [1, 2, E - 1])
def test_few_distinct_tokens_give_directions_that_differ(num_distinct: int, backend: str) -> None:
    x = hidden_states(num_distinct)
    bad = torch.tensor([torch.nan, 0.0, torch.inf])[:, None].expand(3, D)
    router = after_first_commit([torch.cat([bad, x, x])], backend=backend)
    assert bool(router.initialized)
    assert int(router.dropped_total) == 3
    cosine = unit(router.weight) @ unit(router.weight).T
    assert float(torch.tril(cosine, diagonal=-1).max()) < 1 - 1e-4
    clean = after_first_commit([x], backend=backend)
    torch.testing.assert_close(router.centroids, clean.centroids, rtol=0, atol=1e-6)


def test_the_initialising_commit_sets_nothing_else() -> None:
    router = after_first_commit([hidden_states(300)], balance="quantile")
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
    # steps was 0, so beta is 0: the first average replaces what was drawn.
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
    assert_same_bits(router.centroids, after_first_commit([x]).centroids)
    assert int(router.dropped_total) == 50


def test_forward_routes_by_gaussian_directions_until_the_commit() -> None:
    router = KMeansRouter(D, E, K)
    gaussian, x = router.weight.clone(), hidden_states(200)
    before = router(x).weights
    assert_same_bits(router(x).weights, before)
    assert_same_bits(router.weight, gaussian)
    router.commit()
    assert not torch.equal(router(x).weights, before)


def test_first_centroids_depend_on_the_seed() -> None:
    x = hidden_states(1000)
    one, other = (after_first_commit([x], seed=seed).centroids for seed in range(2))
    assert float((one - other).norm(dim=1).min()) > 0.1


def test_the_moments_are_freed_with_the_first_commit() -> None:
    router = KMeansRouter(D, E, K)
    assert router.pending.moments.shape == (2 * E + 2, D + 1)
    router(hidden_states(50))
    assert router.pending.moments.any()
    router.commit()
    assert router.pending.moments.shape == (0, D + 1)


def test_the_moments_move_to_a_device_without_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's "mps" has none, and refuses such a tensor; the meta device stands for it here."""
    assert (moments_dtype(torch.device("mps")), moments_dtype(torch.device("cuda"))) == (torch.float32, torch.float64)
    held = {"cpu": torch.float64, "meta": torch.float32}
    monkeypatch.setattr(pending, "moments_dtype", lambda device: held[device.type])
    router = KMeansRouter(D, E, K).to("meta")
    assert router.pending.moments.dtype == torch.float32
    router.to_empty(device="cpu")
    assert router.pending.moments.dtype == torch.float64
    router.reset_parameters()
    router(hidden_states(300))
    router.commit()
    assert_same_bits(router.centroids, after_first_commit([hidden_states(300)]).centroids)


@pytest.mark.parametrize("init", INITS)
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
@pytest.mark.parametrize("init", INITS)
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


def test_what_is_written_between_forward_and_commit_moves_no_moment() -> None:
    """The first commit of a state without data takes the moments as they were taken, whatever scores now."""
    x, want = hidden_states(300), after_first_commit([hidden_states(300)])
    router = KMeansRouter(D, E, K)
    router(x)
    with torch.no_grad():
        router.weight.copy_(KMeansRouter(D, E, K, seed=1).weight)
    router.commit()
    assert_same_bits(router.centroids, want.centroids)


@pytest.mark.parametrize("scale", [1e-11, 1e-8, 1e8])
def test_first_centroids_of_raw_rows_have_directions_at_any_length(scale: float) -> None:
    x = hidden_states(200)
    want, got = (after_first_commit([each], accumulate="raw") for each in (x, x * scale))
    torch.testing.assert_close(got.weight, want.weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.centroids / scale, want.centroids, rtol=0, atol=1e-5)


def test_a_weight_that_is_not_finite_for_a_moment_reaches_no_centroid() -> None:
    router = KMeansRouter(D, E, K)
    whole = router.weight.clone()
    with torch.no_grad():
        router.weight[0, 0] = torch.nan
        router(hidden_states(200))
        router.weight.copy_(whole)
    router.commit()
    assert router.centroids.isfinite().all()
