"""KMeansRouter in training: what a forward gathers and when, rows that are not valid, options and arguments refused."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kmeans_route
from kmeans_route import KMeansRouter
from kmeans_route.backends import torch as torch_backend
from kmeans_route.routing.loading import FIRST_NORM
from tests.helpers import oracle
from tests.helpers.compare import OPTIONS, assert_same_bits, assert_same_routing, generator, numpy

D, E, K = 16, 6, 2
STATE = ("weight", "centroids", "expert_bias", "score_std", "steps", "dropped_total", "initialized")
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")

BAD_ROWS: dict[str, float] = {
    "nan": torch.nan,
    "inf": torch.inf,
    "-inf": -torch.inf,
    "zero": 0.0,
    "1e30": 1e30,
    "subnormal": 1e-40,
    "tiny": 1e-17,
}


def pending_of(router: KMeansRouter) -> dict[str, Tensor]:
    return {field: getattr(router.pending, field).clone() for field in router.pending.FIELDS}


def assert_same_pending(router: KMeansRouter, want: dict[str, Tensor], *, but: tuple[str, ...] = ()) -> None:
    for field, value in pending_of(router).items():
        if field not in but:
            assert_same_bits(value, want[field], field)


def hidden_states(num_tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of different lengths around a common offset, as hidden states are."""
    gen = generator(seed)
    x = torch.randn(num_tokens, D, generator=gen) + torch.randn(D, generator=gen)
    return (x * (torch.rand(num_tokens, 1, generator=gen) * 3 + 0.2)).to(dtype)


def with_bias(router: KMeansRouter) -> KMeansRouter:
    router.expert_bias.copy_(torch.linspace(-0.1, 0.1, E))
    return router


class Gathered:
    """The sums over several forwards of what the oracle says each one gathers."""

    def __init__(self, router: KMeansRouter, **options: Any) -> None:
        self.router, self.options = router, oracle.Options(**options)
        self.sums, self.counts = np.zeros((E, D)), np.zeros(E, dtype=np.int64)
        self.hist = np.zeros((E, oracle.NUM_BINS), dtype=np.int64)
        self.std_sum, self.num_tokens, self.num_dropped = 0.0, 0, 0

    def add(self, x: Tensor, mask: Tensor | None = None, indices: Tensor | None = None) -> oracle.OracleRouting:
        router = self.router
        routing = oracle.route(
            numpy(x),
            numpy(kmeans_route.directions(router.weight, x.dtype)),
            K,
            numpy(router.expert_bias),
            mask=None if mask is None else mask.numpy(),
            indices=None if indices is None else indices.numpy(),
            options=self.options,
        )
        sums, counts = oracle.centroid_sums(numpy(x), routing, router.accumulate)
        self.sums += sums
        self.counts += counts
        self.std_sum += oracle.std_sum(routing)
        self.hist += oracle.margin_histogram(oracle.margins(routing, numpy(router.expert_bias), K))
        self.num_tokens += int(routing.valid.sum())
        self.num_dropped += (len(x) if mask is None else int(mask.sum())) - int(routing.valid.sum())
        return routing

    def check(self) -> None:
        p = self.router.pending
        scale = max(1.0, float(np.abs(self.sums).max()))
        np.testing.assert_allclose(p.sums.numpy(), self.sums, rtol=0, atol=2e-6 * scale)
        np.testing.assert_array_equal(p.counts.numpy(), self.counts)
        assert float(p.std_sum) == pytest.approx(self.std_sum, rel=3e-6)
        assert int(p.num_tokens) == self.num_tokens
        assert int(p.num_dropped) == self.num_dropped
        if p.margin_hist.numel():
            np.testing.assert_array_equal(p.margin_hist.numpy(), self.hist)
        assert p.sums.dtype == p.std_sum.dtype == torch.float32
        assert p.counts.dtype == p.num_tokens.dtype == p.num_dropped.dtype == torch.int64


@pytest.mark.parametrize("accumulate", ["unit", "raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_pending_equals_the_oracle(backend: str, dtype: torch.dtype, accumulate: str) -> None:
    router = with_bias(KMeansRouter(D, E, K, accumulate=accumulate, balance="quantile", backend=backend))
    want = Gathered(router)
    for step, num_tokens in enumerate((40, 7, 1)):
        x = hidden_states(num_tokens, step, dtype)
        mask = torch.rand(num_tokens, generator=generator(9 + step)) < 0.8
        if num_tokens > 4:
            x[1], x[2], x[3] = torch.nan, 0.0, torch.inf
            mask[1], mask[2], mask[3] = True, True, False
        routing = want.add(x, mask)
        np.testing.assert_array_equal(router(x, mask).indices.numpy(), routing.indices)
        want.check()
    assert want.num_dropped == 4


@pytest.mark.parametrize("name", OPTIONS)
def test_pending_and_output_of_every_option(name: str) -> None:
    options = {"tau": 0.1, **OPTIONS[name], **({"n_group": 3, "topk_group": 2} if "n_group" in OPTIONS[name] else {})}
    router = with_bias(KMeansRouter(D, E, K, balance="quantile", return_scores=True, **options))
    x = hidden_states(50, 3)
    want = Gathered(router, **options)
    want.add(x)
    routing = router.route(x, gather=True)
    want.check()
    pure = kmeans_route.route(x, router.weight, K, router.expert_bias, return_scores=True, **options)
    assert_same_routing(routing, pure)


def test_replayed_ids_are_the_ones_gathered() -> None:
    router = KMeansRouter(D, E, K)
    x = hidden_states(20, 0)
    ids = torch.rand(20, E, generator=generator(1)).argsort(1)[:, :K]
    want = Gathered(router)
    want.add(x, indices=ids)
    assert torch.equal(router(x, indices=ids).indices, ids)
    want.check()


@pytest.mark.parametrize("backend_", ["torch", "reference"])
def test_micro_batches_gather_what_one_batch_gathers(backend_: str) -> None:
    whole, parts = (with_bias(KMeansRouter(D, E, K, balance="quantile", backend=backend_)) for _ in range(2))
    x = hidden_states(32, 0)
    x[5] = torch.nan
    whole(x)
    for rows in x.split(4):
        parts(rows)
    want = pending_of(whole)
    assert int(parts.pending.num_tokens) == 31
    assert_same_pending(parts, want, but=("sums", "std_sum", "moments"))
    torch.testing.assert_close(parts.pending.sums, want["sums"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.pending.std_sum, want["std_sum"], rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.pending.moments, want["moments"], rtol=1e-12, atol=1e-14)


def test_leading_dimensions_are_flattened() -> None:
    one, other = KMeansRouter(D, E, K), KMeansRouter(D, E, K)
    x = hidden_states(30, 0)
    mask = torch.rand(30, generator=generator(2)) < 0.5
    assert_same_routing(
        one.route(x.view(2, 3, 5, D), mask.view(2, 3, 5), gather=True),
        other.route(x, mask, gather=True),
    )
    assert_same_pending(one, pending_of(other))


def _eval(router: KMeansRouter) -> AbstractContextManager[None]:
    router.eval()
    return nullcontext()


def _frozen(router: KMeansRouter) -> AbstractContextManager[None]:
    router.freeze()
    return nullcontext()


@pytest.mark.parametrize(
    "mode",
    [_eval, _frozen, lambda _: torch.no_grad(), lambda _: torch.inference_mode()],
    ids=["eval", "frozen", "no_grad", "inference_mode"],
)
def test_forwards_that_gather_nothing(
    mode: Callable[[KMeansRouter], AbstractContextManager[None]], backend: str
) -> None:
    router = KMeansRouter(D, E, K, balance="quantile", backend=backend)
    x = hidden_states(30, 0)
    trained = router(x)
    if mode is _frozen:  # which drops what is pending
        router.pending.clear_()
    before = pending_of(router)
    with mode(router):
        outside = router(x)
    assert torch.equal(outside.indices, trained.indices)
    assert_same_bits(outside.weights, trained.weights)
    assert_same_pending(router, before)


def test_route_gathers_nothing_in_training(backend: str) -> None:
    router = KMeansRouter(D, E, K, backend=backend)
    x = hidden_states(30, 0)
    router(x)
    before = pending_of(router)
    routing = router.route(x, torch.arange(30) < 20)
    assert_same_pending(router, before)
    assert int(routing.tokens_per_expert.sum()) == 20 * K


def test_freezing_stops_commits_and_drops_what_is_pending() -> None:
    router = KMeansRouter(D, E, K, name="l")
    router.initialize(hidden_states(64, 0))
    router.commit()  # by hand
    x = hidden_states(21, 1)
    x[0] = torch.nan
    router(x)
    before = router.weight.clone()
    said = "router 'l' drops 20 pending tokens: a frozen router commits nothing; freeze right after an optimizer step"
    with pytest.warns(UserWarning, match=rf"^{said}, or call router.commit\(\) before$"):
        router.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router.freeze()
        router.state_dict()
        router(x)
        router.commit()
        router.freeze(False)
        router.commit()
    assert_same_bits(router.weight, before)
    assert (int(router.steps), int(router.dropped_total)) == (0, 0)
    router(x)
    router.commit()
    assert (int(router.steps), int(router.dropped_total)) == (1, 1)
    assert not torch.equal(router.weight, before)


def test_what_directions_gives_is_the_callers_own() -> None:
    router, x = KMeansRouter(D, E, K), hidden_states(20, 1)
    router.initialize(hidden_states(64, 0))
    router.freeze()
    before = router(x).weights.clone()
    router.directions().zero_()
    assert_same_bits(router(x).weights, before)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_hardly_any_tokens(num_tokens: int, backend: str) -> None:
    router = KMeansRouter(D, E, K, balance="quantile", backend=backend)
    out = router(hidden_states(num_tokens, 0).requires_grad_())
    assert out.weights.shape == out.indices.shape == (num_tokens, K)
    out.weights.sum().backward()
    assert int(router.pending.num_tokens) == num_tokens
    assert int(router.pending.counts.sum()) == num_tokens * K
    assert int(router.pending.margin_hist.sum()) == num_tokens * E
    before = router.weight.clone()
    router.commit()
    assert bool(router.initialized) == (num_tokens == 1)
    assert torch.equal(router.weight, before) == (num_tokens == 0)


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_leave_the_state_as_if_masked(kind: str, backend: str) -> None:
    options: dict[str, Any] = {"balance": "quantile", "backend": backend}
    given, masked = KMeansRouter(D, E, K, **options), KMeansRouter(D, E, K, **options)
    for step in range(3):  # first data, then two commits
        clean = hidden_states(100, step)
        bad = torch.rand(100, generator=generator(20 + step)) < 0.2
        x = torch.where(bad[:, None], BAD_ROWS[kind], clean).requires_grad_()
        out = given.route(x, gather=True)
        masked(clean, ~bad)
        assert torch.equal(out.valid, ~bad)
        assert torch.equal(out.indices[bad], torch.arange(K).expand(int(bad.sum()), K))
        assert not out.weights[bad].any()
        (out.weights[:, 0].sum() + out.weights.square().sum()).backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert not x.grad[bad].any()
        assert int(given.pending.num_dropped) == int(bad.sum())
        assert_same_pending(given, pending_of(masked), but=("num_dropped",))
        given.commit()
        masked.commit()
        for name in STATE:
            if name != "dropped_total":
                assert_same_bits(getattr(given, name), getattr(masked, name), name)
    assert int(given.dropped_total) > 0
    assert int(masked.dropped_total) == 0


def test_what_a_masked_row_holds_does_not_matter(backend: str) -> None:
    one, other = KMeansRouter(D, E, K, backend=backend), KMeansRouter(D, E, K, backend=backend)
    x = hidden_states(50, 0)
    mask = torch.rand(50, generator=generator(3)) < 0.6
    assert_same_routing(
        one.route(x, mask, gather=True), other.route(torch.where(mask[:, None], x, torch.nan), mask, gather=True)
    )
    assert_same_pending(one, pending_of(other))
    assert int(one.pending.num_dropped) == 0


@pytest.mark.parametrize("init", ["tokens", "normal"])
def test_one_nan_among_ten_thousand_tokens(init: str) -> None:
    num_tokens, bad = 10_000, 4_321
    routers = [KMeansRouter(D, E, K, init=init) for _ in range(3)]
    clean, nan, masked = routers
    for step in range(2):
        x = hidden_states(num_tokens, step)
        spoiled = x.clone()
        spoiled[bad, 3] = torch.nan
        others = torch.arange(num_tokens) != bad
        with torch.no_grad():
            clean.weight.copy_(nan.weight)
            clean.expert_bias.copy_(nan.expert_bias)  # the load of one token more
        results, grads = [], []
        for router, rows, mask in ((clean, x, None), (nan, spoiled, None), (masked, x, others)):
            leaf = rows.clone().requires_grad_()
            out = router(leaf, mask)
            out.weights[:, 0].sum().backward()
            assert leaf.grad is not None
            results.append(out)
            grads.append(leaf.grad)
        assert torch.equal(results[1].indices[others], results[0].indices[others])
        assert_same_bits(results[1].weights[others], results[0].weights[others])
        assert_same_bits(grads[1][others], grads[0][others])
        assert not grads[1][bad].any()
        for router in routers:
            router.commit()
        assert_same_bits(nan.weight, masked.weight)
        assert nan.weight.isfinite().all()
        # Against the clean batch one token in 10,000 is missing, and nothing else.
        assert float((nan.weight - clean.weight).abs().max()) < 1e-2


@pytest.mark.not_interpreted
def test_fp64_hidden_states_are_routed_in_fp64(backend: str) -> None:
    """Also the directions: c / ||c|| rounded to the dtype of x, not to that of the centroids on the way."""
    router = KMeansRouter(D, E, E, gate="cosine", normalize=False, backend=backend)
    x = hidden_states(40, 0, torch.float64)
    routing = router.route(x)
    unit = torch.nn.functional.normalize
    scores = (unit(x) @ unit(router.weight.double()).T).gather(1, routing.indices)
    torch.testing.assert_close(routing.selected_scores, scores, rtol=0, atol=1e-14)
    torch.testing.assert_close(routing.weights, scores.clamp_min(1e-3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype, backend: str) -> None:
    plain, cast = KMeansRouter(D, E, K, backend=backend), KMeansRouter(D, E, K, backend=backend)
    x = hidden_states(200, 0, dtype)
    grads = []
    for router, enabled in ((plain, False), (cast, True)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = router.route(leaf, gather=True)
        out.weights[:, 0].sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
        assert out.weights.dtype == torch.float32
    assert_same_bits(grads[1], grads[0])
    assert_same_pending(cast, pending_of(plain))


def test_gradient_reaches_x_but_not_through_detached_gates() -> None:
    x = hidden_states(10, 0).requires_grad_()
    router = KMeansRouter(D, E, K)
    assert list(router.parameters()) == []
    router(x).weights[:, 0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    detached = KMeansRouter(D, E, K, detach_gates=True)
    out = detached(x)
    assert not out.weights.requires_grad
    assert_same_bits(out.weights, router.route(x).weights.detach())
    assert int(detached.pending.num_tokens) == 10


def test_state_starts_as_seeded_gaussian_rows_of_one_length() -> None:
    router = KMeansRouter(D, E, K, seed=3, name="layers.0")
    torch.testing.assert_close(router.weight.norm(dim=1), torch.full((E,), FIRST_NORM))
    torch.manual_seed(99)
    assert_same_bits(KMeansRouter(D, E, K, seed=3, name="layers.0").weight, router.weight)
    for seed, name in ((4, "layers.0"), (3, "layers.1"), (3, "")):
        other = KMeansRouter(D, E, K, seed=seed, name=name).weight
        assert float(torch.cosine_similarity(other, router.weight).abs().max()) < 0.95
    for name in ("centroids", "expert_bias", "score_std", "steps", "dropped_total", "initialized"):
        assert not getattr(router, name).any()
    # Gaussian directions of many experts have mean 0 and covariance 1 / D.
    many = KMeansRouter(8, 4096, 1).weight / FIRST_NORM
    assert float(many.mean(0).abs().max()) < 0.03
    torch.testing.assert_close(many.T @ many / 4096, torch.eye(8) / 8, rtol=0, atol=0.01)


@pytest.mark.parametrize("init", ["tokens", "normal"])
def test_the_global_generator_is_never_touched(init: str) -> None:
    before = torch.get_rng_state()
    router = KMeansRouter(D, E, K, init=init)
    x = hidden_states(200, 0)
    router(x)
    router.commit()
    router(x)
    router.commit()
    router.initialize(x)
    router.reset_parameters()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("directions", ["centroids", "whitened"])
def test_eval_follows_the_centroids_however_they_change(directions: str) -> None:
    router = KMeansRouter(D, E, K, directions=directions).eval()
    x = hidden_states(50, 0)

    def want(x: Tensor) -> Tensor:
        return kmeans_route.route(x, router.weight, K, router.expert_bias, tau=router.options.tau).weights

    first = router(x).weights
    assert_same_bits(router(x).weights, first)
    router.initialize(x)
    assert not torch.equal(router(x).weights, first)
    assert_same_bits(router(x).weights, want(x))
    with torch.no_grad():
        router.weight.copy_(router.weight.flip(0))
    assert_same_bits(router(x).weights, want(x))
    assert_same_bits(router(x.bfloat16()).weights, want(x.bfloat16()))


def test_inference_mode_leaves_nothing_behind() -> None:
    router = KMeansRouter(D, E, K).eval()
    x = hidden_states(10, 0)
    with torch.inference_mode():
        router(x)
    leaf = x.clone().requires_grad_()
    router(leaf).weights[:, 0].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0


def test_inference_mode_follows_the_centroids_until_they_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    router, x, made = KMeansRouter(D, E, K).eval(), hidden_states(10, 0), []
    make = torch_backend.directions
    monkeypatch.setattr(torch_backend, "directions", lambda *args: made.append(1) or make(*args))
    with torch.inference_mode():
        router(x)
        router.weight.copy_(router.weight.flip(0))
        d = make(router.weight, x.dtype)
        want = kmeans_route.route(x, router.weight, K, tau=router.options.tau, directions=d).weights.clone()
        assert_same_bits(router(x).weights, want)
        assert len(made) == 2
        router.freeze()
        for _ in range(2):
            assert_same_bits(router(x).weights, want)
        assert len(made) == 3, "pinned by the first forward"
    leaf = x.clone().requires_grad_()
    router(leaf).weights[:, 0].sum().backward()  # autograd takes what inference mode has pinned
    assert len(made) == 3


def test_a_router_built_in_inference_mode_routes() -> None:
    x = hidden_states(10, 0)
    with torch.inference_mode():
        out = KMeansRouter(D, E, K).eval()(x)
    assert_same_bits(out.weights.clone(), KMeansRouter(D, E, K).eval()(x).weights)


def test_metrics_are_flat_scalars_of_the_last_step() -> None:
    router = KMeansRouter(D, E, K)
    router.initialize(hidden_states(200, 0))
    x = hidden_states(100, 1)
    x[0] = torch.nan
    routing = router.route(x, gather=True)
    counts = routing.tokens_per_expert.double()
    old = router.weight.double()
    router.commit()
    assert torch.equal(router.tokens_per_expert.double(), counts)
    got = router.metrics()
    assert all(type(value) is float for value in got.values())
    share = counts / counts.sum()
    unit = torch.nn.functional.normalize(router.weight.double())
    cosine = unit @ unit.T
    before = torch.nn.functional.normalize(old)
    want = {
        "maxvio": counts.max() / counts.mean() - 1,
        "load_std": share.std(unbiased=False),
        "load_entropy": -(share * share.clamp_min(1e-30).log()).sum() / np.log(E),
        "load_gini": (share[:, None] - share).abs().sum() / (2 * E),
        "dead_experts": (counts == 0).sum(),
        "effective_experts": kmeans_route.metrics.effective_experts(routing.indices, E, routing.valid),
        "bias_abs_max": router.expert_bias.abs().max(),
        "score_std": router.score_std,
        "direction_cosine": (cosine.sum() - E) / (E * (E - 1)),
        "centroid_drift": (before * unit).sum(1).clamp(-1, 1).acos().mean(),
        "steps": 1,
        "dropped_total": 1,
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_extra_repr_names_the_options() -> None:
    text = repr(KMeansRouter(D, E, K, n_group=3, topk_group=2, balance="sign", gate="sigmoid", name="layers.7"))
    for part in ("hidden_size=16", "num_experts=6", "top_k=2", "'sigmoid'", "'sign'", "0.001", "n_group=3", "layers.7"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ({"hidden_size": 2.0}, TypeError, "hidden_size must be an int, got float"),
        ({"num_experts": -1}, ValueError, "num_experts must be at least 1, got -1"),
        ({"num_experts": True}, TypeError, "num_experts must be an int, got bool"),
        ({"top_k": 0}, ValueError, r"top_k must be in \[1, 6\], got 0"),
        ({"top_k": 7}, ValueError, r"top_k must be in \[1, 6\], got 7"),
        ({"top_k": 1.0}, TypeError, "top_k must be an int, got float"),
        ({"top_k": "2"}, TypeError, "top_k must be an int, got str"),
        ({"decay": -0.1}, ValueError, r"decay must be in \[0, 1\), got -0.1"),
        ({"decay": 1.0}, ValueError, r"decay must be in \[0, 1\), got 1.0"),
        ({"decay": float("nan")}, ValueError, r"decay must be in \[0, 1\), got nan"),
        ({"tau": 0.0}, ValueError, r"tau must be in \[1e-06, inf\), got 0.0"),
        ({"tau": -1.0}, ValueError, r"tau must be in \[1e-06, inf\), got -1.0"),
        ({"tau": float("inf")}, ValueError, r"tau must be in \[1e-06, inf\), got inf"),
        ({"scaling": 0.0}, ValueError, r"scaling must be in \[1e-30, 1e\+30\), got 0.0"),
        ({"bias_rate": -1.0}, ValueError, r"bias_rate must be in \[0, 1e\+30\), got -1.0"),
        ({"bias_rate": float("nan")}, ValueError, r"bias_rate must be in \[0, 1e\+30\), got nan"),
        ({"average": "mean"}, ValueError, "average must be one of 'ema', 'cumulative', got 'mean'"),
        ({"accumulate": "sum"}, ValueError, "accumulate must be one of 'unit', 'raw', got 'sum'"),
        (
            {"balance": "aux"},
            ValueError,
            "balance must be one of 'proportional', 'sign', 'quantile', 'none', got 'aux'",
        ),
        (
            {"gate": "relu"},
            ValueError,
            "gate must be one of 'softmax', 'sigmoid', 'cosine', 'uniform', got 'relu'",
        ),
        ({"taus": 1.0}, TypeError, "KMeansRouter must get options among .*, got 'taus': did you mean 'tau'?"),
        ({"init": "zeros"}, ValueError, r"init must be one of 'tokens', 'normal', got 'zeros'"),
        ({"group_score": "sum"}, ValueError, "group_score must be one of 'top2', 'max', got 'sum'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'reference', 'torch', 'triton', got 'cuda'"),
        ({"n_group": 2}, ValueError, "n_group and topk_group must be given together"),
        ({"topk_group": 2}, ValueError, "n_group and topk_group must be given together"),
        ({"n_group": 4, "topk_group": 2}, ValueError, "n_group must divide num_experts=6, got 4"),
        ({"n_group": 0, "topk_group": 1}, ValueError, "n_group must divide num_experts=6, got 0"),
        ({"n_group": 3, "topk_group": 4}, ValueError, r"topk_group must be in \[1, 3\], got 4"),
        ({"n_group": 3, "topk_group": 0}, ValueError, r"topk_group must be in \[1, 3\], got 0"),
        ({"n_group": 6, "topk_group": 1}, ValueError, "must be at least top_k=2, got 1"),
        (
            {"n_group": 3, "topk_group": 1, "balance": "quantile"},
            ValueError,
            "balance='quantile' must have more candidates than top_k=2, got 2",
        ),
    ],
    ids=str,
)
def test_options_are_refused_at_construction(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KMeansRouter(**{"hidden_size": D, "num_experts": E, "top_k": K, **arguments})


IDS = torch.tensor([[0, 1]] * 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(4, D + 1)}, ValueError, r"x must have shape \(\.\.\., 16\), got \(4, 17\)"),
        ({"x": torch.zeros(())}, ValueError, r"x must have shape \(\.\.\., 16\), got \(\)"),
        ({"x": torch.zeros(4, D, dtype=torch.int64)}, TypeError, "x must be floating point, got torch.int64"),
        ({"x": [[0.0] * D]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(4, D, device="meta")}, RuntimeError, "x is on meta but the router's state is on cpu"),
        ({"mask": torch.ones(4)}, TypeError, "mask must be a bool tensor, got torch.float32"),
        ({"mask": [True] * 4}, TypeError, "mask must be a bool tensor, got list"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask must have shape \(4,\).*got \(5,\)"),
        ({"mask": torch.ones(4, D, dtype=torch.bool)}, ValueError, r"mask must have shape \(4,\).*got \(4, 16\)"),
        ({"mask": torch.ones(4, dtype=torch.bool, device="meta")}, RuntimeError, "mask is on meta but x is on cpu"),
        ({"indices": IDS.int()}, TypeError, "indices must be an int64 tensor, got torch.int32"),
        ({"indices": IDS[:, :1]}, ValueError, r"indices must have shape \(4, 2\), got \(4, 1\)"),
        ({"indices": IDS + 5}, ValueError, r"indices must be in \[0, 5\], got values from 5 to 6"),
        ({"indices": IDS - 1}, ValueError, r"indices must be in \[0, 5\], got values from -1 to 0"),
        ({"indices": IDS * 0}, ValueError, r"indices must be distinct in each row, got \[0, 0\] in row 0"),
    ],
    ids=lambda value: "",
)
def test_arguments_are_refused_and_change_nothing(
    arguments: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    router = KMeansRouter(D, E, K, backend=backend)
    router(hidden_states(5, 0))
    before = pending_of(router)
    with pytest.raises(error, match=message):
        router(**{"x": hidden_states(4, 1), **arguments})
    assert_same_pending(router, before)


def test_a_backend_that_is_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans_route.backends, "TRITON_INSTALLED", False)
    with pytest.raises(RuntimeError, match="backend must be one whose library is installed, got 'triton'"):
        KMeansRouter(D, E, K, backend="triton")


@pytest.mark.parametrize("with_dispatch", [False, True])
def test_a_given_selection_bias_takes_the_place_of_the_routers_own(backend: str, with_dispatch: bool) -> None:
    router = KMeansRouter(16, 6, 2, balance="none", backend=backend)
    own = KMeansRouter(16, 6, 2, balance="none", backend=backend)
    bias = torch.tensor([0.0, 0.0, 0.3, 0.0, -0.3, 0.0])
    own.expert_bias.copy_(bias)
    x = torch.randn(40, 16)
    name = "route_dispatch" if with_dispatch else "route"
    got = getattr(router, name)(x, expert_bias=bias, gather=True)
    want = getattr(own, name)(x, gather=True)
    got, want = (got[0], want[0]) if with_dispatch else (got, want)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.weights, want.weights)
    assert not torch.equal(got.indices, router.route(x).indices)
    assert torch.equal(got.indices, router.route(x, expert_bias=bias).indices)
    assert torch.equal(router.pending.counts, own.pending.counts)
    assert not router.expert_bias.any()
    with pytest.raises(ValueError, match=r"expert_bias must have shape \(6,\), got \(5,\)"):
        getattr(router, name)(x, expert_bias=bias[:5])
