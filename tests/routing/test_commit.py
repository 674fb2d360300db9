"""commit: running averages, balance rules and counters against the oracle and against arithmetic by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kmeans_route
from kmeans_route import KMeansRouter
from kmeans_route.routing.loading import FIRST_NORM
from kmeans_route.routing.pending import Pending
from tests.helpers import oracle
from tests.helpers.compare import assert_same_bits, generator, numpy

D, E, K = 16, 6, 2
BALANCES = ["proportional", "sign", "quantile", "none"]
BIN = 4 / 1024
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")


def hidden_states(num_tokens: int, seed: int, size: int = D) -> Tensor:
    """Rows of different lengths around an offset that drifts with the seed."""
    gen = generator(seed)
    x = torch.randn(num_tokens, size, generator=gen) + torch.randn(size, generator=gen)
    return x * (torch.rand(num_tokens, 1, generator=gen) * 3 + 0.2)


def first_rows(router: KMeansRouter, rows: Tensor) -> None:
    """Start from these directions, as a checkpoint from before there was data brings them."""
    router.load_state_dict({**router.state_dict(), "weight": FIRST_NORM * rows})


def state_of(router: KMeansRouter) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in router.named_buffers()}


def assert_same_state(router: KMeansRouter, want: dict[str, Tensor], *, but: tuple[str, ...] = ()) -> None:
    for name, buffer in router.named_buffers():
        if name not in but:
            assert_same_bits(buffer, want[name], name)


def started(**options: Any) -> KMeansRouter:
    """A router whose every commit is an ordinary one, with a bias that matters."""
    router = KMeansRouter(D, E, K, init="normal", **options)
    router.expert_bias.copy_(torch.linspace(-0.05, 0.05, E))
    return router


def expected(router: KMeansRouter, batches: list[Tensor], masks: list[Tensor], **options: Any) -> oracle.State:
    """What a commit after forwards over these batches must make of the router's state, in fp64."""
    bias = numpy(router.expert_bias)
    sums, counts, margins = np.zeros((E, D)), np.zeros(E, dtype=np.int64), []
    std_sum, num_tokens, num_dropped = 0.0, 0, 0
    for x, mask in zip(batches, masks, strict=True):
        unit_rows = numpy(kmeans_route.directions(router.weight, x.dtype))
        routing = oracle.route(numpy(x), unit_rows, K, bias, mask=mask.numpy())
        more_sums, more_counts = oracle.centroid_sums(numpy(x), routing, router.accumulate)
        sums, counts, std_sum = sums + more_sums, counts + more_counts, std_sum + oracle.std_sum(routing)
        num_tokens += int(routing.valid.sum())
        num_dropped += int(mask.sum()) - int(routing.valid.sum())
        margins.append(oracle.margins(routing, bias, K))
    state = oracle.State(
        numpy(router.weight), numpy(router.centroids), bias, float(router.score_std), int(router.steps),
        int(router.dropped_total),
    )  # fmt: skip
    pending = oracle.Pending(sums, counts, std_sum, num_tokens, num_dropped, np.concatenate(margins))
    seen = None if router.tokens_seen is None else router.tokens_seen.numpy()
    return oracle.commit(state, pending, K, seen=seen, **options)


@pytest.mark.parametrize("accumulate", ["unit", "raw"])
@pytest.mark.parametrize("average", ["ema", "cumulative"])
@pytest.mark.parametrize("balance", BALANCES)
def test_commit_equals_the_oracle(balance: str, average: str, accumulate: str, backend: str) -> None:
    options = {"balance": balance, "average": average, "accumulate": accumulate, "backend": backend}
    router = started(**options, decay=0.6, directions="centroids")
    for step in range(4):
        batches = [hidden_states(30, 10 * step), hidden_states(21, 10 * step + 1)]
        batches[0][3] = torch.nan
        masks = [torch.ones(30, dtype=torch.bool), torch.rand(21, generator=generator(step)) < 0.7]
        want = expected(router, batches, masks, balance=balance, decay=0.6)
        for x, mask in zip(batches, masks, strict=True):
            router(x, mask)
        router.commit()
        scale = np.abs(want.centroids).max()
        np.testing.assert_allclose(numpy(router.centroids), want.centroids, rtol=0, atol=2e-6 * scale)
        np.testing.assert_allclose(numpy(router.weight), want.weight, rtol=0, atol=4e-6)
        # The quantile rule is allowed one bin; a tenth of it, the rate, reaches the bias, and the mean moves as much.
        tolerance = 0.1 * 2 * BIN if balance == "quantile" else 1e-6
        np.testing.assert_allclose(numpy(router.expert_bias), want.expert_bias, rtol=0, atol=tolerance)
        assert float(router.score_std) == pytest.approx(want.score_std, rel=1e-5)
        assert (int(router.steps), int(router.dropped_total)) == (want.steps, want.dropped_total)
        assert not any(getattr(router.pending, field).any() for field in Pending.FIELDS)
    assert (int(router.steps), int(router.dropped_total)) == (4, 4)


def test_by_hand(backend: str) -> None:
    """E = D = 2, K = 1: every number of two commits on paper."""
    router = KMeansRouter(2, 2, 1, init="normal", backend=backend)
    first_rows(router, torch.eye(2))
    router(torch.tensor([[2.0, 0.0], [0.0, 3.0], [4.0, 0.0], [0.0, 0.0]]))
    router.commit()
    # beta = 0: c = mean unit row. Every score row is (1, 0): std 1/2. Load (4/3, 2/3): b = 0.05 * 0.5 * (-1/3, 1/3).
    assert_same_bits(router.centroids, torch.eye(2))
    assert float(router.score_std) == 0.5
    torch.testing.assert_close(router.expert_bias, torch.tensor([-1 / 120, 1 / 120]))
    assert (int(router.steps), int(router.dropped_total)) == (1, 1)
    router(torch.tensor([[3.0, 4.0], [-4.0, 3.0]]))
    router.commit()
    # Scores (0.6, 0.8) and (-0.8, 0.6) both go to expert 1; beta = 1/2, so c_1 = (0, 1)/2 + (-0.1, 0.7)/2.
    torch.testing.assert_close(router.centroids, torch.tensor([[1.0, 0.0], [-0.05, 0.85]]))
    length = math.hypot(0.05, 0.85)
    torch.testing.assert_close(router.weight, torch.tensor([[1.0, 0.0], [-0.05 / length, 0.85 / length]]))
    sigma = 0.99 * 0.5 + 0.01 * (0.1 + 0.7) / 2
    assert float(router.score_std) == pytest.approx(sigma, rel=1e-6)
    # Load (0, 2): 1 - E f = (1, -1).
    torch.testing.assert_close(router.expert_bias, torch.tensor([-1, 1]) / 120 + 0.05 * sigma * torch.tensor([1, -1]))


def test_raw_sums_by_hand() -> None:
    router = KMeansRouter(2, 2, 1, init="normal", accumulate="raw", balance="none")
    first_rows(router, torch.eye(2))
    router(torch.tensor([[2.0, 0.0], [0.0, 3.0], [4.0, 2.0]]))
    router.commit()
    assert_same_bits(router.centroids, torch.tensor([[3.0, 1.0], [0.0, 3.0]]))
    torch.testing.assert_close(router.weight, torch.tensor([[3.0, 1.0], [0.0, 10**0.5]]) / 10**0.5)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_ramp_to_the_decay(decay: float) -> None:
    """One expert: the centroid is a plain mean of the batch means, until beta reaches the decay."""
    router = KMeansRouter(D, 1, 1, init="normal", decay=decay)
    want = numpy(router.centroids)
    for step in range(5):
        x = hidden_states(20, step)
        router(x)
        router.commit()
        mean = numpy(x / x.norm(dim=1, keepdim=True)).mean(0)
        beta = min(decay, step / (step + 1))
        want = beta * want + (1 - beta) * mean
        np.testing.assert_allclose(numpy(router.centroids), want, atol=1e-6)


def test_ema_starts_as_the_plain_mean_of_the_steps() -> None:
    router = KMeansRouter(D, 1, 1, init="normal")
    means = []
    for step in range(6):
        x = hidden_states(20, step)
        means.append((x / x.norm(dim=1, keepdim=True)).mean(0))
        router(x)
        router.commit()
    torch.testing.assert_close(router.centroids[0], torch.stack(means).mean(0), rtol=0, atol=1e-6)


def test_cumulative_is_the_mean_of_every_token_so_far() -> None:
    router = KMeansRouter(D, E, K, init="normal", average="cumulative")
    sums, counts = torch.zeros(E, D, dtype=torch.float64), torch.zeros(E, dtype=torch.int64)
    for step, num_tokens in enumerate((200, 13, 50)):
        x = hidden_states(num_tokens, step)
        ids = router(x).indices
        for k in range(K):
            sums.index_add_(0, ids[:, k], torch.nn.functional.normalize(x.double()))
            counts += torch.bincount(ids[:, k], minlength=E)
        router.commit()
    assert router.tokens_seen is not None
    assert torch.equal(router.tokens_seen, counts)
    torch.testing.assert_close(router.centroids.double(), sums / counts.clamp_min(1)[:, None], rtol=0, atol=1e-6)


@pytest.mark.parametrize("directions", ["centroids", "whitened"])
def test_the_first_average_of_an_expert_stands_for_itself(directions: str, backend: str) -> None:
    """However late: a share of it would be short, and whitening would put it close to the mean of all."""
    router = KMeansRouter(D, E, K, init="normal", balance="none", directions=directions, backend=backend)
    late, x = torch.nn.functional.normalize(torch.randn(D), dim=0), hidden_states(60, 0)
    ids = torch.stack([torch.arange(60) % (E - 1), (torch.arange(60) + 1) % (E - 1)], 1)
    for _ in range(6):
        router(x, indices=ids)
        router.commit()
    assert not router.centroids[E - 1].any()
    router(torch.cat([x, late[None]]), indices=torch.cat([ids, torch.tensor([[E - 1, 0]])]))
    router.commit()
    torch.testing.assert_close(router.centroids[E - 1], late, rtol=0, atol=1e-6)
    assert int(router.eval()(late[None]).indices[0, 0]) == E - 1


@pytest.mark.parametrize("average", ["ema", "cumulative"])
@pytest.mark.parametrize("balance", BALANCES)
def test_an_expert_without_tokens_keeps_its_centroid(balance: str, average: str) -> None:
    router = started(balance=balance, average=average)
    x = hidden_states(40, 0)
    ids = torch.tensor([[0, 2]]).expand(40, 2)
    before = router.weight.clone()
    router(x, indices=ids)
    router.commit()
    moved = (router.weight != before).any(1)
    assert moved.tolist() == [True, False, True, False, False, False]
    assert router.weight.isfinite().all()
    if balance != "none":  # an idle expert becomes more attractive than a busy one
        assert float(router.expert_bias[1] - router.expert_bias[0]) > 0.02 - 1e-6


@pytest.mark.parametrize("init", ["tokens", "normal"])
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("commits_before", [0, 1, 3])
def test_nothing_pending_changes_no_bit(commits_before: int, balance: str, init: str, backend: str) -> None:
    router = KMeansRouter(D, E, K, balance=balance, init=init, backend=backend)
    for step in range(commits_before):
        router(hidden_states(200, step))
        router.commit()
    before, loads = state_of(router), router.tokens_per_expert.clone()
    router.commit()
    router(hidden_states(5, 9), torch.zeros(5, dtype=torch.bool))
    router.commit()
    router(hidden_states(0, 9))
    router.commit()
    assert_same_state(router, before)
    assert torch.equal(router.tokens_per_expert, loads)


def test_only_dropped_tokens_change_nothing_but_their_count() -> None:
    router = started()
    router(hidden_states(40, 0))
    router.commit()
    before = state_of(router)
    router(torch.full((5, D), torch.nan))
    router.commit()
    assert_same_state(router, before, but=("dropped_total",))
    router(hidden_states(40, 1))
    router.commit()
    assert int(router.dropped_total) == 5


@pytest.mark.parametrize("balance", ["proportional", "sign", "quantile"])
def test_bias_is_centred_and_clamped(balance: str) -> None:
    router = KMeansRouter(D, E, K, balance=balance, bias_rate=0.05 if balance == "quantile" else 100.0, init="normal")
    for step in range(3):
        router(hidden_states(60, step))
        router.commit()
        assert float(router.expert_bias.abs().max()) <= 2
    if balance != "quantile":
        assert float(router.expert_bias.abs().max()) == 2  # the rate is absurd: the clamp holds it
    calm = started(balance=balance)
    calm.expert_bias.add_(0.5)  # an offset common to all, which selection does not feel
    calm(hidden_states(60, 0))
    calm.commit()
    assert float(calm.expert_bias.mean()) == pytest.approx(0, abs=1e-7)
    assert float(calm.expert_bias.abs().max()) > 0.01


@pytest.mark.parametrize("balance", BALANCES)
def test_when_every_expert_is_chosen_the_bias_stays(balance: str) -> None:
    router = KMeansRouter(D, 4, 4, balance=balance, init="normal")
    bias = torch.tensor([0.1, -0.2, 0.3, -0.2])
    router.expert_bias.copy_(bias)
    weight = router.weight.clone()
    router(hidden_states(50, 0))
    router.commit()
    assert_same_bits(router.expert_bias, bias)
    assert not torch.equal(router.weight, weight)
    assert int(router.steps) == 1


def test_sign_leaves_an_exactly_balanced_expert() -> None:
    router = KMeansRouter(D, 3, 1, balance="sign", init="normal")
    router(hidden_states(6, 0), indices=torch.tensor([[0], [0], [0], [1], [1], [2]]))
    router.commit()
    torch.testing.assert_close(router.expert_bias, torch.tensor([-0.001, 0.0, 0.001]), rtol=0, atol=1e-9)


def test_proportional_step_is_clipped_at_one_step_of_sigma() -> None:
    router = KMeansRouter(D, 8, 1, init="normal", bias_rate=0.05)
    router(hidden_states(16, 0), indices=torch.zeros(16, 1, dtype=torch.int64))
    router.commit()
    step = 0.05 * float(router.score_std) * torch.tensor([-1.0] + [1.0] * 7)  # 1 - E f is -7 for expert 0, then 1
    torch.testing.assert_close(router.expert_bias, step - step.mean())


@pytest.mark.parametrize("balance", ["sign", "proportional"])
def test_default_rates(balance: str) -> None:
    rate = {"sign": 0.001, "proportional": 0.05}[balance]
    default, given = (started(balance=balance, bias_rate=value) for value in (None, rate))
    for router in (default, given):
        router(hidden_states(50, 0))
        router.commit()
    assert_same_bits(default.expert_bias, given.expert_bias)


def test_sigma_is_the_first_spread_then_a_slow_average() -> None:
    router = started(balance="none")
    sigma = math.nan
    for step in range(5):
        parts = [hidden_states(n, 7 * step + n) for n in (20, 9)]
        for x in parts:
            router(x)
        scores = torch.cat(
            [
                torch.nn.functional.normalize(x.double()) @ torch.nn.functional.normalize(router.weight.double()).T
                for x in parts
            ]
        )
        spread = float(scores.std(1, unbiased=False).mean())
        sigma = spread if step == 0 else 0.99 * sigma + 0.01 * spread
        router.commit()
        assert float(router.score_std) == pytest.approx(sigma, rel=1e-5)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 16, 64, 4096])
def test_quantile_rule_is_within_a_bin_of_torch_quantile(num_tokens: int, grouped: bool) -> None:
    groups: dict[str, Any] = {"n_group": 3, "topk_group": 2} if grouped else {}
    router = KMeansRouter(D, E, K, balance="quantile", init="normal", **groups)
    bias = torch.tensor([0.3, -0.3, 0.1, -0.1, 0.2, -0.2])
    router.expert_bias.copy_(bias)
    x = hidden_states(num_tokens, 0)
    select = numpy(
        torch.nn.functional.normalize(x.double()) @ torch.nn.functional.normalize(router.weight.double()).T
        + bias.double()
    )
    margins = []
    for row in select:
        among = oracle.candidates_of(row, oracle.Options(**groups))
        alpha = sorted(row[among])[-K - 1]
        # Experts that are no candidates lie in the last bin.
        margins.append([alpha - row[e] if e in among else 2.0 for e in range(E)])
    quantile = torch.quantile(torch.tensor(margins).clamp(-2, 2), K / E, dim=0)
    router(x)
    router.commit()
    # b_new = 0.9 b + 0.1 (b + q), then centred: differences between experts hold q to a bin each, and no mean.
    q = (router.expert_bias.double() - bias) / 0.1
    got, want = q[:, None] - q, quantile[:, None] - quantile
    assert float((got - want).abs().max()) <= 2 * BIN * 1.01, (got - want).abs().max() / BIN


def test_a_skipped_commit_keeps_everything_and_the_next_one_takes_it_along() -> None:
    skipped, whole = started(balance="quantile"), started(balance="quantile")
    for router in (skipped, whole):
        router(hidden_states(40, 0))
        router.commit()
    before, gathered = state_of(skipped), skipped.pending
    skipped(hidden_states(30, 1))
    sums = gathered.sums.clone()
    skipped.commit(torch.tensor(True))
    assert_same_state(skipped, before)
    assert_same_bits(skipped.pending.sums, sums)
    assert int(skipped.pending.num_tokens) == 30
    skipped(hidden_states(20, 2))
    skipped.commit(torch.tensor(False))
    whole(hidden_states(30, 1))
    whole(hidden_states(20, 2))
    whole.commit()
    assert_same_state(skipped, state_of(whole))
    assert int(skipped.pending.num_tokens) == 0
    assert int(skipped.steps) == 2


def test_commit_twice_is_commit_once() -> None:
    once, twice = started(), started()
    for router in (once, twice):
        for step in range(3):
            router(hidden_states(40, step))
            router.commit()
            if router is twice:
                router.commit()
    assert_same_state(twice, state_of(once))
    assert torch.equal(twice.tokens_per_expert, once.tokens_per_expert)
    assert twice.metrics() == once.metrics()


def pending_addresses(pending: Pending) -> dict[str, int]:
    tensors = {field: getattr(pending, field) for field in Pending.FIELDS}
    return {field: tensor.data_ptr() for field, tensor in tensors.items() if tensor.numel()}


def test_state_changes_in_place() -> None:
    """Captured graphs and optimizer-side references hold the addresses of the buffers."""
    router = started(average="cumulative")
    addresses = {name: buffer.data_ptr() for name, buffer in router.named_buffers()}
    pending = pending_addresses(router.pending)
    for step in range(3):
        router(hidden_states(40, step))
        router.commit()
    assert {name: buffer.data_ptr() for name, buffer in router.named_buffers()} == addresses
    assert pending_addresses(router.pending) == pending
