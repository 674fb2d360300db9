"""The reference backend, the definition itself, against the oracle in fp64: every field, option and gradient."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kmeans_route import centroid_sums, combine, dispatch, route
from kmeans_route import reference as ref
from kmeans_route.checks import check_route_options
from tests.helpers import oracle
from tests.helpers.compare import OPTIONS, generator, make_inputs, numpy, truth

REFERENCE: dict[str, Any] = {"backend": "reference"}
T, D, E, K = 33, 16, 12, 4
SHAPES = [(0, 8, 4, 2), (1, 8, 1, 1), (7, 24, 13, 6), (9, 5, 3, 3), (63, 8, 60, 1), (20, 100, 13, 13), (5, 1, 4, 2)]


def assert_routing(got: Any, want: oracle.OracleRouting, tolerance: float = 1e-12) -> None:
    """Every field of a Routing against the oracle's, ids exactly."""
    np.testing.assert_array_equal(got.indices.numpy(), want.indices)
    np.testing.assert_array_equal(got.tokens_per_expert.numpy(), want.tokens_per_expert)
    np.testing.assert_array_equal(got.valid.numpy(), want.valid)
    for name in ("weights", "selected_scores"):
        np.testing.assert_allclose(numpy(getattr(got, name)), getattr(want, name), rtol=0, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(numpy(got.inv_norm), want.inv_norm, rtol=tolerance)
    if got.scores is not None:
        np.testing.assert_allclose(numpy(got.scores), want.scores, rtol=0, atol=tolerance, err_msg="scores")
    assert got.indices.dtype == got.tokens_per_expert.dtype == torch.int64
    assert got.valid.dtype == torch.bool


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name: str, with_bias: bool, with_mask: bool) -> None:
    x, weight, bias = make_inputs(T, D, E, torch.float64)
    x[5] = 0
    mask = torch.rand(T, generator=generator(1)) < 0.7 if with_mask else None
    expert_bias = bias * 5 if with_bias else None
    got = route(x, weight, K, expert_bias, mask=mask, return_scores=True, **OPTIONS[name], **REFERENCE)
    want, _ = truth(x, weight, K, expert_bias, mask=mask, **OPTIONS[name])
    assert_routing(got, want)
    assert got.weights.dtype == got.selected_scores.dtype == got.inv_norm.dtype == torch.float64
    assert not got.valid[5]
    assert got.scores is not None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["softmax", "softmax-all-candidates", "sigmoid", "cosine-raw", "uniform"])
def test_every_shape(name: str, shape: tuple[int, int, int, int]) -> None:
    num_tokens, hidden_size, num_experts, top_k = shape
    x, weight, bias = make_inputs(num_tokens, hidden_size, num_experts, torch.float64, seed=3)
    got = route(x, weight, top_k, bias, return_scores=True, **OPTIONS[name], **REFERENCE)
    want, _ = truth(x, weight, top_k, bias, **OPTIONS[name])
    assert_routing(got, want)


def test_one_expert_a_token() -> None:
    """K = 1: a normalised gate is exactly `scaling`; the softmax over all candidates is what still depends on x."""
    x, weight, bias = make_inputs(T, D, E, torch.float64)
    for gate in ("softmax", "sigmoid", "cosine", "uniform"):
        got = route(x, weight, 1, bias, gate=gate, scaling=1.5, **REFERENCE)
        np.testing.assert_allclose(numpy(got.weights), 1.5, rtol=1e-15)
    over_all = route(x, weight, 1, bias, normalize=False, **REFERENCE)
    want, _ = truth(x, weight, 1, bias, normalize=False)
    assert_routing(over_all, want)
    assert over_all.weights.max() < 1
    assert over_all.weights.std() > 0.01


def test_bias_enters_selection_only() -> None:
    x, weight, _ = make_inputs(T, D, E, torch.float64)
    bias = torch.zeros(E)
    bias[[2, 9]] = 5.0
    got = route(x, weight, 2, bias, return_scores=True, **REFERENCE)
    assert (got.indices.sort(dim=1).values == torch.tensor([2, 9])).all()
    unbiased = route(x, weight, 2, indices=got.indices, return_scores=True, **REFERENCE)
    assert torch.equal(got.weights, unbiased.weights)
    assert torch.equal(got.scores, unbiased.scores)


@pytest.mark.parametrize("group_score", ["top2", "max"])
def test_groups_choose_differently_from_experts(group_score: str) -> None:
    """Group scores by hand: e0 = (0.9, -0.9), e1 = (0.5, 0.5): "max" takes the first group, "top2" the second."""
    x = torch.eye(4, dtype=torch.float64)[:1]
    cosines = torch.tensor([0.9, -0.9, 0.5, 0.5], dtype=torch.float64)
    rest = torch.sqrt(1 - cosines**2)
    unit_rows = torch.stack([cosines, rest, torch.zeros(4), torch.zeros(4)], dim=1)
    got = route(
        x, unit_rows, 1, n_group=2, topk_group=1, group_score=group_score, directions=unit_rows.double(), **REFERENCE
    )
    assert got.indices.item() == (0 if group_score == "max" else 2)


def test_experts_outside_the_groups_are_minus_infinity() -> None:
    """Cosines are negative here: an expert outside the groups that counted as 0 would win."""
    x, weight, _ = make_inputs(T, D, 8, torch.float64)
    away = -x.mean(dim=0, keepdim=True) + 0.01 * weight
    x = x.abs() + 1
    away = -away.abs() - 1
    got = route(x, away, 3, n_group=4, topk_group=2, return_scores=True, **REFERENCE)
    assert got.scores is not None
    assert (got.scores < 0).all()
    want, _ = truth(x, away, 3, n_group=4, topk_group=2)
    assert_routing(got, want)
    assert (got.indices // 2).unique(dim=1).shape[1] <= 3
    for row in got.indices // 2:
        assert len(row.unique()) == 2


def test_equal_groups_go_to_the_lower() -> None:
    x = torch.ones(3, 4, dtype=torch.float64)
    weight = torch.ones(12, 4)
    for group_score in ("top2", "max"):
        got = route(x, weight, 4, n_group=4, topk_group=2, group_score=group_score, **REFERENCE)
        assert (got.indices == torch.tensor([0, 1, 2, 3])).all()
    bias = torch.zeros(12)
    bias[[5, 11]] = 0.5
    got = route(x, weight, 4, bias, n_group=4, topk_group=2, **REFERENCE)
    assert (got.indices == torch.tensor([5, 11, 3, 4])).all()


@pytest.mark.parametrize("name", ["softmax", "softmax-all-candidates", "sigmoid", "sigmoid-raw", "cosine", "uniform"])
def test_replay_gates_given_ids(name: str) -> None:
    """Replayed ids keep their order, whatever s + b says, and take their gates from the same scores."""
    x, weight, bias = make_inputs(T, D, E, torch.float64)
    x[4] = torch.nan
    indices = torch.stack([torch.randperm(E, generator=generator(t))[:K] for t in range(T)])
    indices[4] = torch.arange(K)
    got = route(x, weight, K, bias, indices=indices, return_scores=True, **OPTIONS[name], **REFERENCE)
    want, _ = truth(x, weight, K, bias, indices=indices, **OPTIONS[name])
    assert_routing(got, want)
    np.testing.assert_array_equal(got.indices.numpy(), indices.numpy())


@pytest.mark.parametrize("name", OPTIONS)
def test_replay_of_own_ids_changes_nothing(name: str) -> None:
    x, weight, bias = make_inputs(T, D, E, torch.float64)
    first = route(x, weight, K, bias, return_scores=True, **OPTIONS[name], **REFERENCE)
    again = route(x, weight, K, bias, indices=first.indices, return_scores=True, **OPTIONS[name], **REFERENCE)
    assert_routing(again, truth(x, weight, K, bias, **OPTIONS[name])[0])
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_given_directions_replace_the_weight() -> None:
    x, weight, bias = make_inputs(T, D, E, torch.float64)
    unit_rows = torch.from_numpy(oracle.directions(numpy(weight)))
    got = route(x, torch.full_like(weight, torch.nan), K, bias, directions=unit_rows, **REFERENCE)
    want, _ = truth(x, weight, K, bias)
    assert_routing(got, want)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_is_the_formula(name: str) -> None:
    """dx through weights, selected_scores and scores together, and through each alone."""
    x, weight, bias = make_inputs(T, D, E, torch.float64)
    x[3] = 0
    gen = generator(2)
    upstream = {
        "d_weights": torch.randn(T, K, generator=gen, dtype=torch.float64),
        "d_selected": torch.randn(T, K, generator=gen, dtype=torch.float64),
        "d_scores": torch.randn(T, E, generator=gen, dtype=torch.float64),
    }
    want, unit_rows = truth(x, weight, K, bias, **OPTIONS[name])
    options = oracle.Options(**OPTIONS[name])
    for chosen in (list(upstream), ["d_weights"], ["d_selected"], ["d_scores"]):
        leaf = x.clone().requires_grad_()
        got = route(leaf, weight, K, bias, return_scores=True, **OPTIONS[name], **REFERENCE)
        outputs = {"d_weights": got.weights, "d_selected": got.selected_scores, "d_scores": got.scores}
        # A uniform gate does not depend on x and may come back without a graph: an anchor keeps backward legal.
        loss = (leaf * 0).sum() + sum((outputs[key] * upstream[key]).sum() for key in chosen)
        loss.backward()
        arguments = {key: upstream[key].numpy() for key in chosen}
        expected = oracle.route_backward(x.numpy(), unit_rows, want, options=options, **arguments)
        np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-9, atol=1e-11, err_msg=str(chosen))


def test_cosine_gate_has_no_gradient_where_clamped() -> None:
    x = torch.tensor([[1.0, 0.2, -0.9]], dtype=torch.float64, requires_grad=True)
    got = route(x, torch.eye(3), 3, gate="cosine", **REFERENCE)
    assert got.indices.tolist() == [[0, 1, 2]]
    (got.weights[0, 2] / got.weights[0].sum()).backward()
    norm = x.detach().norm()
    p = torch.tensor([1.0, 0.2], dtype=torch.float64) / norm
    total = p.sum() + 1e-3
    ds = torch.tensor([-1e-3 / total**2, -1e-3 / total**2, 0.0], dtype=torch.float64)
    s = x.detach()[0] / norm
    np.testing.assert_allclose(x.grad[0].numpy(), ((ds - s * (ds * s).sum()) / norm).numpy(), rtol=1e-10, atol=1e-15)


def test_no_gradient_reaches_centroids_or_bias() -> None:
    x, weight, bias = make_inputs(T, D, E, torch.float64)
    weight.requires_grad_()
    bias.requires_grad_()
    got = route(x.requires_grad_(), weight, K, bias, return_scores=True, **REFERENCE)
    (got.weights.square().sum() + got.scores.sum()).backward()
    assert weight.grad is None
    assert bias.grad is None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("accumulate", ["unit", "raw"])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 6, 5, 2)], ids=str)
def test_dispatch_combine_and_sums(shape: tuple[int, int, int, int], accumulate: str) -> None:
    num_tokens, hidden_size, num_experts, top_k = shape
    x, weight, bias = make_inputs(num_tokens, hidden_size, num_experts, torch.float64, seed=4)
    mask = torch.arange(num_tokens) % 4 != 2
    routing = route(x, weight, top_k, bias, mask=mask, **REFERENCE)
    want, _ = truth(x, weight, top_k, bias, mask=mask)
    expected = oracle.dispatch(x.numpy(), want)
    got = dispatch(x, routing, **REFERENCE)
    assert got.offsets.dtype == torch.int32
    for field, exact in zip(got, expected, strict=True):
        np.testing.assert_array_equal(field.numpy(), exact)

    end = int(expected.offsets[-1])
    y_sorted = torch.randn(num_tokens * top_k, hidden_size, generator=generator(5), dtype=torch.float64)
    y_sorted[end:] = torch.nan
    y = combine(y_sorted, routing, got, **REFERENCE)
    np.testing.assert_allclose(
        y.numpy(), oracle.combine(y_sorted.numpy(), want.weights, expected.positions, end), rtol=0, atol=1e-12
    )
    sums, counts = centroid_sums(x, routing, accumulate=accumulate, **REFERENCE)
    want_sums, want_counts = oracle.centroid_sums(x.numpy(), want, accumulate)
    np.testing.assert_allclose(numpy(sums), want_sums, rtol=0, atol=1e-11)
    np.testing.assert_array_equal(counts.numpy(), want_counts)


def test_layouts() -> None:
    """(..., D), transposed, strided and expanded inputs give what a contiguous copy gives."""
    x, weight, bias = make_inputs(24, D, E, torch.float64)
    want, _ = truth(x, weight, K, bias)
    wide = torch.full((24, 2 * D), torch.nan, dtype=torch.float64)
    wide[:, ::2] = x
    cube = x.reshape(2, 3, 4, D)
    for view in (
        x.T.contiguous().T,
        wide[:, ::2],
        cube,
        cube.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        torch.stack([x, x])[0],
    ):
        assert_routing(route(view, weight, K, bias, **REFERENCE), want)
    one = route(x[:1].expand(6, D), weight, K, bias, **REFERENCE)
    assert (one.indices == one.indices[0]).all()
    np.testing.assert_allclose(numpy(one.weights), np.tile(want.weights[:1], (6, 1)), atol=1e-12)
    assert one.tokens_per_expert.sum() == 6 * K
    assert_routing(route(x, weight.T.contiguous().T, K, torch.stack([bias, bias], dim=1)[:, 0], **REFERENCE), want)
    single = route(x[0], weight, K, bias, **REFERENCE)
    np.testing.assert_array_equal(single.indices.numpy(), want.indices[:1])


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "cosine", "uniform"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(gate: str, normalize: bool) -> None:
    x, weight, bias = make_inputs(4, 5, 6, torch.float64, seed=6)

    def outputs(leaf: Tensor) -> tuple[Tensor, ...]:
        got = route(leaf, weight, 2, bias, gate=gate, normalize=normalize, tau=0.3, return_scores=True, **REFERENCE)
        return got.weights + 0 * leaf.sum(), got.selected_scores, got.scores

    assert torch.autograd.gradcheck(outputs, (x.requires_grad_(),))


def test_gradcheck_of_the_whole_layer() -> None:
    """route, dispatch, an elementwise expert, combine."""
    x, weight, bias = make_inputs(5, 4, 6, torch.float64, seed=7)
    mask = torch.tensor([True, True, False, True, True])

    def layer(leaf: Tensor) -> Tensor:
        routing = route(leaf, weight, 2, bias, mask=mask, tau=0.3, **REFERENCE)
        sent = dispatch(leaf, routing, **REFERENCE)
        return combine(sent.x_sorted * 1.5 + sent.x_sorted.square(), routing, sent, **REFERENCE)

    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),))


@pytest.mark.parametrize("groups", [{}, {"n_group": 4, "topk_group": 2}])
def test_margins_and_their_histogram(groups: dict[str, int]) -> None:
    x, weight, bias = make_inputs(T, D, E, torch.float64)
    bias = bias * 30  # wide enough to reach the clamped end bins
    mask = torch.arange(T) != 7
    routing = route(x, weight, K, bias, mask=mask, return_scores=True, **groups, **REFERENCE)
    want, _ = truth(x, weight, K, bias, mask=mask, **groups)
    margin = oracle.margins(want, bias.numpy(), K)
    options = check_route_options(E, K, **groups)
    got, among = ref.margins_reference(routing.scores, bias, routing.valid, options)
    hist = ref.margin_hist_reference(got, among)
    np.testing.assert_array_equal(among.numpy(), np.isfinite(margin))
    np.testing.assert_allclose(got[among].numpy(), margin[np.isfinite(margin)], atol=1e-12)
    np.testing.assert_array_equal(hist.numpy().sum(axis=1), T - 1)
    np.testing.assert_array_equal(hist.numpy(), oracle.margin_histogram(margin))
    assert (np.abs(margin[np.isfinite(margin)]) > 2).any()


def test_score_std_is_the_population_deviation() -> None:
    x, weight, bias = make_inputs(T, D, E, torch.float64)
    x[2] = torch.inf
    routing = route(x, weight, K, bias, return_scores=True, **REFERENCE)
    want, _ = truth(x, weight, K, bias)
    assert routing.scores is not None
    np.testing.assert_allclose(ref.score_std_reference(routing.scores).sum().item(), oracle.std_sum(want), rtol=1e-12)


def run_commit(state: oracle.State, pending: oracle.Pending, options: ref.CommitOptions, seen: Any = None) -> ref.State:
    """commit_reference on the oracle's state and pending, in fp64."""
    margin = torch.from_numpy(pending.margin)
    return ref.commit_reference(
        ref.State(
            torch.from_numpy(state.weight),
            torch.from_numpy(state.centroids),
            torch.from_numpy(state.expert_bias),
            torch.tensor(state.score_std, dtype=torch.float64),
            torch.tensor(state.steps),
            None if seen is None else torch.from_numpy(seen),
        ),
        torch.from_numpy(pending.sums),
        torch.from_numpy(pending.counts),
        torch.tensor(pending.std_sum, dtype=torch.float64),
        torch.tensor(pending.num_tokens),
        ref.margin_hist_reference(margin, torch.isfinite(margin)),
        options,
    )


def some_pending(
    state: oracle.State, seed: int, num_tokens: int = 40, top_k: int = 2, groups: Any = None
) -> oracle.Pending:
    """Pending of one batch of tokens around one direction, so that some experts stay empty."""
    gen = np.random.default_rng(seed)
    hidden_size = state.weight.shape[1]
    x = gen.standard_normal((num_tokens, hidden_size)) + 4 * state.centroids[0]
    options = oracle.Options(**(groups or {}))
    routing = oracle.route(x, oracle.directions(state.weight), top_k, state.expert_bias, options=options)
    sums, counts = oracle.centroid_sums(x, routing)
    margin = oracle.margins(routing, state.expert_bias, top_k)
    return oracle.Pending(sums, counts, oracle.std_sum(routing), num_tokens, 3, margin)


def some_state(seed: int, num_experts: int = 8, hidden_size: int = 6) -> oracle.State:
    gen = np.random.default_rng(seed)
    centroids = gen.standard_normal((num_experts, hidden_size))
    weight = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    return oracle.State(weight, centroids, gen.standard_normal(num_experts) * 0.01, 0.0, 0, 0)


@pytest.mark.parametrize("average", ["ema", "cumulative"])
@pytest.mark.parametrize(("balance", "rate"), [("proportional", 0.05), ("sign", 0.001), ("quantile", 0.1), ("none", 0)])
def test_commit_over_steps(balance: str, rate: float, average: str) -> None:
    """Six commits in a row: the ramp of beta, empty experts, sigma, each rule, centring."""
    options = ref.CommitOptions(top_k=2, decay=0.75, average=average, balance=balance, bias_rate=rate)
    state = some_state(0)._replace(expert_bias=np.zeros(8))
    seen = np.zeros(8, dtype=np.int64) if average == "cumulative" else None
    had_empty = False
    for step in range(6):
        pending = some_pending(state, step)
        had_empty |= bool((pending.counts == 0).any())
        got = run_commit(state, pending, options, seen)
        want = oracle.commit(state, pending, 2, decay=0.75, balance=balance, seen=seen)
        np.testing.assert_allclose(got.centroids.numpy(), want.centroids, atol=1e-13)
        np.testing.assert_allclose(got.weight.numpy(), want.weight, atol=1e-13)
        # 0.1 of a bin width of 4 / 1024 for the histogram, nothing for the others.
        np.testing.assert_allclose(
            got.expert_bias.numpy(),
            want.expert_bias,
            rtol=0,
            atol=2 * 0.1 * 4 / 1024 if balance == "quantile" else 1e-15,
        )
        np.testing.assert_allclose(got.score_std.item(), want.score_std, rtol=1e-13)
        assert got.steps.item() == want.steps == step + 1
        if seen is not None:
            assert got.tokens_seen is not None
            seen = seen + pending.counts
            np.testing.assert_array_equal(got.tokens_seen.numpy(), seen)
        state = want
    assert had_empty
    assert balance == "none" or np.abs(state.expert_bias).max() > 1e-3


def test_commit_keeps_the_centroid_of_an_empty_expert() -> None:
    state = some_state(1)
    pending = some_pending(state, 0)
    counts = pending.counts.copy()
    counts[3] = 0
    sums = pending.sums.copy()
    sums[3] = 0
    options = ref.CommitOptions(top_k=2, decay=0.9, average="ema", balance="sign", bias_rate=0.001)
    got = run_commit(state, pending._replace(counts=counts, sums=sums), options)
    np.testing.assert_array_equal(got.centroids[3].numpy(), state.centroids[3])
    np.testing.assert_allclose(got.weight[3].numpy(), state.weight[3], rtol=1e-15)
    assert (got.centroids[0].numpy() != state.centroids[0]).all()


def test_commit_with_nothing_pending_changes_nothing() -> None:
    state = some_state(2)._replace(score_std=0.2, steps=7)
    pending = some_pending(state, 0)
    nothing = oracle.Pending(0 * pending.sums, 0 * pending.counts, 0.0, 0, 0, pending.margin[:0])
    for balance in ("proportional", "sign", "quantile", "none"):
        options = ref.CommitOptions(top_k=2, decay=0.9, average="ema", balance=balance, bias_rate=0.1)
        got = run_commit(state, nothing, options)
        np.testing.assert_array_equal(got.weight.numpy(), state.weight)
        np.testing.assert_array_equal(got.centroids.numpy(), state.centroids)
        np.testing.assert_array_equal(got.expert_bias.numpy(), state.expert_bias)
        assert got.score_std.item() == 0.2
        assert got.steps.item() == 7


@pytest.mark.parametrize("balance", ["proportional", "sign", "quantile"])
def test_no_bias_where_every_expert_is_taken(balance: str) -> None:
    state = some_state(3)._replace(expert_bias=np.zeros(8))
    pending = some_pending(state, 0, top_k=8)
    options = ref.CommitOptions(top_k=8, decay=0.9, average="ema", balance=balance, bias_rate=0.1)
    counts = pending.counts.copy()
    counts[2] += 50
    assert run_commit(state, pending._replace(counts=counts), options).expert_bias.abs().max() == 0


def test_bias_is_clamped_after_it_is_centred() -> None:
    state = some_state(4)._replace(expert_bias=np.array([3.0, -3.0, 1, -1, 0, 0, 0, 0]), score_std=0.5)
    pending = some_pending(state, 0)
    options = ref.CommitOptions(top_k=2, decay=0.9, average="ema", balance="sign", bias_rate=0.001)
    got = run_commit(state, pending, options).expert_bias.numpy()
    np.testing.assert_allclose(got, oracle.commit(state, pending, 2, decay=0.9, balance="sign").expert_bias, atol=1e-15)
    assert got.max() == 2.0
    assert got.min() == -2.0


# Two groups of two hold no more than four experts.
@pytest.mark.parametrize(
    ("top_k", "grouped"), [(1, False), (2, False), (3, False), (7, False), (1, True), (2, True), (3, True)]
)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 10, 101])
def test_histogram_quantile_is_within_a_bin(num_tokens: int, top_k: int, grouped: bool) -> None:
    """Also where the quantile falls between two margins that lie far apart."""
    groups = {"n_group": 4, "topk_group": 2} if grouped else None
    pending = some_pending(some_state(num_tokens), 1, num_tokens, top_k, groups)
    margin = torch.from_numpy(pending.margin)
    hist = ref.margin_hist_reference(margin, torch.isfinite(margin))
    q = top_k / 8
    want = torch.quantile(margin.clamp(-2, 2), q, dim=0)
    np.testing.assert_allclose(ref.hist_quantile(hist, q).numpy(), want.numpy(), rtol=0, atol=4 / 1024 + 1e-12)
