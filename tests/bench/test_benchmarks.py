"""The code behind the benchmarks: contestants compute what they claim, no time is shown unverified, memory is bounded.

The helpers of `kmeans_route.testing` and `tests.helpers.inputs`, which benchmarks and tests share, are tested here too.
"""

import importlib

import pytest
import torch
from torch import Tensor

from benchmarks.harness import checks, memory, rivals, shapes, steps
from benchmarks.harness.contest import Contest
from benchmarks.harness.truth import assert_close_to_truth
from kmeans_route import KMeansRouter, directions, dispatch, route, testing
from kmeans_route.backends.first import add_moments_, no_moments
from kmeans_route.bench import baselines
from kmeans_route.bench.contest import Contestant, NotVerifiedError
from kmeans_route.bench.problem import Problem
from kmeans_route.testing import BenchShape, assert_same_selection
from tests.helpers import inputs

TINY = BenchShape(96, 24, 8, 2)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def problem() -> Problem:
    return Problem(TINY)


@pytest.mark.parametrize("name", list(rivals.LEARNED))
def test_learned_baselines_are_the_learned_router(name: str, problem: Problem) -> None:
    checks.check_learned(name, rivals.LEARNED[name], problem)


def test_a_wrong_baseline_is_caught(problem: Problem) -> None:
    def forgets_to_renormalise(x: Tensor, weight: Tensor, top_k: int) -> baselines.LearnedResult:
        result = baselines.softmax_plain(x, weight, top_k)
        return result._replace(weights=result.weights * 0.999)

    with pytest.raises(AssertionError, match="weights: error"):
        checks.check_learned("wrong", forgets_to_renormalise, problem)


def test_switch_loss_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]])
    indices = torch.tensor([[0], [1]])
    # f = (1/2, 1/2, 0), P = (1/2, 3/8, 1/8): 3 * 0.01 * (1/4 + 3/16).
    torch.testing.assert_close(baselines.switch_loss(probabilities, indices), torch.tensor(0.03 * 7 / 16))


def test_kmeans_contestants_agree_with_the_reference(problem: Problem) -> None:
    router = steps.make_kmeans_router(problem)
    checks.check_kmeans(router, problem)
    checks.check_textbook(router, problem)


def test_a_wrong_router_is_caught(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    router = steps.make_kmeans_router(problem)
    original = router.forward

    def off_by_a_little(*args: object, **kwargs: object) -> object:
        routing = original(*args, **kwargs)  # type: ignore[arg-type]
        return routing._replace(weights=routing.weights * 1.0001)

    monkeypatch.setattr(router, "forward", off_by_a_little)
    with pytest.raises(AssertionError, match="weights: error"):
        checks.check_kmeans(router, problem)


def test_textbook_router_moves_each_centroid_towards_its_members() -> None:
    centroids = torch.eye(3)
    router = baselines.TextbookKMeansRouter(centroids, 1, decay=0.9)
    x = torch.tensor([[5.0, 0.1, 0.0], [3.0, 0.0, 0.2], [0.0, 2.0, 0.0]])
    unit = torch.nn.functional.normalize(x)
    router(x)
    torch.testing.assert_close(centroids[0], 0.9 * torch.eye(3)[0] + 0.1 * unit[:2].mean(0))
    torch.testing.assert_close(centroids[1], torch.eye(3)[1])
    assert torch.equal(centroids[2], torch.eye(3)[2])


@pytest.mark.parametrize("combine", [rivals.gather_combine, rivals.scatter_combine])
def test_exchanges_agree(combine: rivals.CombineFunction, problem: Problem) -> None:
    routing = route(problem.x.detach(), problem.weight, TINY.top_k)
    routing = routing._replace(weights=routing.weights.detach().requires_grad_())
    dy = testing.make_hidden_states(TINY.num_tokens, TINY.hidden_size, seed=9)
    exchange = steps.Exchange(problem.x, routing, dy)
    for name, function in {"package": steps.package_exchange, "plain": steps.plain_exchange(combine)}.items():
        checks.check_exchange(name, function, exchange)
    x_sorted, order = rivals.index_dispatch(problem.x, routing.indices)
    assert torch.equal(x_sorted, dispatch(problem.x, routing).x_sorted)
    assert torch.equal(order.sort().values, torch.arange(order.numel()))


def contest_of_two(note: str = "") -> Contest:
    return Contest("two", [Contestant("a", lambda: None), Contestant("b", lambda: None)], ["b"], note)


def test_nothing_is_shown_before_correctness() -> None:
    contest = contest_of_two()
    for use in (contest.round, contest.table, contest.record, contest.timings, lambda: contest.warm_up(1)):
        with pytest.raises(NotVerifiedError, match="correctness was not asserted"):
            use()

    def fails() -> None:
        raise AssertionError("wrong")

    contest.verify(lambda: None)
    contest.run(2)
    assert "ratio" in contest.table()
    with pytest.raises(AssertionError, match="wrong"):
        contest.verify(fails)
    with pytest.raises(NotVerifiedError, match="correctness was not asserted"):
        contest.table()


def test_rounds_alternate_and_ratios_are_of_medians() -> None:
    order: list[str] = []

    def contestant(name: str) -> Contestant:
        return Contestant(name, lambda: order.append(name), lambda: order.append(name.upper()))

    contest = Contest("order", [contestant(name) for name in "abc"], ["b", "c"], "a note")
    contest.verify(lambda: None)
    contest.run(30, warm_up=0)
    rounds = ["".join(order[i : i + 6]) for i in range(0, 180, 6)]
    assert {"".join(sorted(one)) for one in rounds} == {"ABCabc"}, "each once a round"
    assert all(one[0::2].lower() == one[1::2] for one in rounds), "the reset comes before its step"
    assert len(set(rounds)) == 6, "every order comes"
    contest.times_ms = {"a": [1.0, 9.0, 2.0], "b": [4.0, 4.0, 4.0], "c": [5.0, 3.0, 8.0]}
    assert contest.baseline() == "b"
    timing = contest.timings()["a"]
    assert (timing.median_ms, timing.min_ms, timing.ratio, timing.paired_ratio) == (2.0, 1.0, 0.5, 0.5)
    assert (timing.q1_ms, timing.q3_ms, timing.repeats) == (1.5, 5.5, 3)
    table = contest.table()
    assert "b *" in table
    assert "a note" in table
    assert contest.record()["baseline"] == "b"


def test_contests_are_checked() -> None:
    with pytest.raises(ValueError, match="different names"):
        Contest("x", [Contestant("a", lambda: None)] * 2, ["a"])
    with pytest.raises(ValueError, match="baselines must be among"):
        Contest("x", [Contestant("a", lambda: None)], ["b"])
    contest = contest_of_two()
    contest.verify(lambda: None)
    with pytest.raises(ValueError, match="no round has been run"):
        contest.table()


def test_all_contests_run_at_tiny_shapes() -> None:
    """The very contests of the benchmark files, correctness first, two rounds each."""
    names = ["test_bench_route", "test_bench_dispatch", "test_bench_commit", "test_bench_moe"]
    bench_route, bench_dispatch, bench_commit, bench_moe = (
        importlib.import_module(f"benchmarks.{name}") for name in names
    )
    contests = [
        bench_route.training_contest(TINY, compiles=False),
        bench_route.eval_contest(TINY),
        bench_dispatch.exchange_contest(TINY),
        bench_commit.commit_contest(TINY, compiles=False),
        bench_moe.moe_contest(TINY, 16),
    ]
    for contest in contests:
        contest.run(2, warm_up=1)
        assert "kmeans_route" in contest.table()
        assert all(timing.repeats == 2 for timing in contest.timings().values())


def test_peak_extra_bytes_counts_what_lives_together() -> None:
    x = torch.ones(1 << 18)  # 1 MiB

    def two_at_a_time() -> Tensor:
        y = x + 1
        z = y * 2
        del y
        return z - 1

    assert memory.peak_extra_bytes(two_at_a_time) == pytest.approx(2 << 20, rel=1e-3)
    assert memory.peak_extra_bytes(lambda: x.sum()) < 1024


@pytest.mark.usefixtures("plain_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [False, True])
def test_routing_makes_no_copy_of_x(dtype: torch.dtype, training: bool) -> None:
    """Peak extra memory of a forward is O(T E + E D) and a fixed scratch, while x would be T D."""
    num_tokens, hidden_size, num_experts = 2048, 4096, 8
    x = testing.make_hidden_states(num_tokens, hidden_size, dtype=dtype).requires_grad_(training)
    router = KMeansRouter(hidden_size, num_experts, 2)
    router.initialize(x.detach())
    router.commit()
    router.train(training)
    router(x)
    peak = memory.peak_extra_bytes(lambda: router(x))
    by_expert = 4 * (num_tokens * num_experts + num_experts * hidden_size)
    # 16-bit inputs go through fp32 chunk by chunk: two chunks of 4 MiB at most are alive at once.
    scratch = 0 if dtype == torch.float32 else 8 << 20
    copy_of_x = x.numel() * x.element_size()
    assert peak <= 8 * by_expert + scratch, f"{peak} bytes against {by_expert} for (T, E) and (E, D)"
    assert peak < 0.6 * copy_of_x


@pytest.mark.usefixtures("plain_empty")
def test_memory_grows_with_the_experts_not_with_the_hidden_size() -> None:
    peaks = []
    for hidden_size in (2048, 4096):
        x = testing.make_hidden_states(2048, hidden_size)
        weight = testing.make_centroids(8, hidden_size)
        d = directions(weight, x.dtype)
        route(x, weight, 2, directions=d)
        peaks.append(memory.peak_extra_bytes(lambda x=x, w=weight, d=d: route(x, w, 2, directions=d)))  # type: ignore[misc]
    assert peaks[1] - peaks[0] <= 4 * 8 * 2048, "the added columns of x must not add memory of their own"


@pytest.mark.usefixtures("plain_empty")
def test_memory_of_the_first_moments_does_not_grow_with_the_tokens() -> None:
    """Also where rows of x are far shorter than what they become: two fp64 weights an expert."""
    peaks = []
    for num_tokens in (4096, 16384):
        x, ones = torch.randn(num_tokens, 16), torch.ones(num_tokens)
        moments = no_moments(512, 16, x.device)
        directions = torch.randn(512, 16)
        peaks.append(
            memory.peak_extra_bytes(lambda x=x, f=ones, g=directions, m=moments: add_moments_(x, f, f > 0, g, m))  # type: ignore[misc]
        )
    assert peaks[1] - peaks[0] <= 16384, "a bool for each token is made by the test"


def test_named_shapes_are_those_of_the_models() -> None:
    assert testing.MODEL_SHAPES["OLMoE"] == (2048, 64, 8)
    assert testing.MODEL_SHAPES["DeepSeek-V3"] == (7168, 256, 8)
    assert len(testing.MODEL_SHAPES) == 6
    assert shapes.TOKEN_COUNTS == (1, 64, 512, 4096, 16384, 65536)
    for name, shape in shapes.CPU_BENCH_SHAPES.items():
        assert name == "T{}-D{}-E{}-K{}".format(*shape)


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_layouts_hold_the_same_values(layout: str) -> None:
    plain = testing.make_hidden_states(5, 7, seed=3)
    x = inputs.lay_out(plain, layout)
    expected = plain[:1].expand(5, -1) if layout == "expanded" else plain
    assert torch.equal(x, expected)
    assert x.is_contiguous() == (layout == "contiguous")
    assert inputs.lay_out(plain[:0], layout).shape == (0, 7)


def test_input_makers_do_what_they_say() -> None:
    before = torch.get_rng_state()
    x = testing.make_hidden_states(4000, 16, offset=3.0)
    assert 2.0 < float(x.mean(0).norm()) / 4 < 4.5, "the common direction has length 3 sqrt(D)"
    clustered = testing.make_hidden_states(4000, 64, num_clusters=3, spread=0.1)
    cosine = torch.nn.functional.normalize(clustered[:300]) @ torch.nn.functional.normalize(clustered[:300]).T
    assert ((cosine > 0.95) | (cosine < 0.6)).all(), "tokens share a centre or do not"
    assert testing.make_hidden_states(2, 3, dtype=torch.float16).dtype == torch.float16
    torch.testing.assert_close(testing.make_centroids(5, 9).norm(dim=1), torch.ones(5))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_tied_rows_tie_and_go_to_the_lower_id(dtype: torch.dtype) -> None:
    x, weight = inputs.make_tied_rows(200, 24, 12, dtype=dtype)
    routing = route(x, weight, 4, return_scores=True)
    assert routing.scores is not None
    assert (routing.scores[:, 1:] == routing.scores[:, :-1]).float().mean() > 0.2
    exact = x.double()[:, :12] / x.double().norm(dim=1, keepdim=True)
    assert assert_same_selection(routing.indices, exact, tolerance=0.0) == 0


def test_close_to_truth() -> None:
    truth = torch.linspace(-1, 1, 9, dtype=torch.float64)
    plain = truth.float() + 1e-6
    assert assert_close_to_truth(truth.float() - 1e-6, truth, plain) == pytest.approx(1e-6, rel=0.1)
    with pytest.raises(AssertionError, match=r"dx: error 2.*plain PyTorch 1"):
        assert_close_to_truth(truth.float() + 2e-6, truth, plain, name="dx")
    assert_close_to_truth(truth.float() + 2e-6, truth, plain, tolerance=1.2e-6)
    spoiled = truth.float()
    spoiled[3] = torch.nan
    with pytest.raises(AssertionError, match="1 values are not finite"):
        assert_close_to_truth(spoiled, truth, plain)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_truth(plain[1:], truth, plain)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close_to_truth(truth, truth, plain)
    with pytest.raises(AssertionError, match="must be fp64"):
        assert_close_to_truth(plain, plain, plain)
    with pytest.raises(AssertionError, match="the truth is not finite"):
        assert_close_to_truth(plain, truth / 0, plain)
    with pytest.raises(AssertionError, match="which is more than rounding"):
        assert_close_to_truth(plain, truth, truth.float() + 1e-2)
    assert assert_close_to_truth(plain[:0], truth[:0], plain[:0]) == 0


def test_same_selection_counts_near_ties_and_nothing_else() -> None:
    ranking = torch.tensor([[0.1, 0.5, 0.3, 0.2], [0.4, 0.4 - 1e-8, 0.1, 0.0]], dtype=torch.float64)
    assert assert_same_selection(torch.tensor([[1, 2], [0, 1]]), ranking) == 0
    assert assert_same_selection(torch.tensor([[1, 2], [1, 0]]), ranking) == 1
    with pytest.raises(AssertionError, match="differ outside near-ties, first row 0"):
        assert_same_selection(torch.tensor([[2, 1], [0, 1]]), ranking)
    with pytest.raises(AssertionError, match="differ outside near-ties, first row 1"):
        assert_same_selection(torch.tensor([[1, 2], [1, 0]]), ranking, tolerance=0.0)
    with pytest.raises(AssertionError, match="chose a worse expert"):
        assert_same_selection(torch.tensor([[1, 2], [0, 3]]), ranking)
    with pytest.raises(AssertionError, match="repeat an id"):
        assert_same_selection(torch.tensor([[1, 2], [0, 0]]), ranking)
    with pytest.raises(AssertionError, match="outside"):
        assert_same_selection(torch.tensor([[1, 4], [0, 1]]), ranking)
    with pytest.raises(AssertionError, match="near-ties, at most 1 may"):
        assert_same_selection(torch.tensor([[1, 0]] * 3), ranking[[1, 1, 1]])
    with pytest.raises(AssertionError, match="int64"):
        assert_same_selection(torch.tensor([[1, 2], [0, 1]], dtype=torch.int32), ranking)
