"""LearnedRouter, the baselines: gates against plain PyTorch, bias rules and auxiliary loss by hand, refusals."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kmeans_route import LearnedRouter, MoE, attach
from tests.helpers.compare import assert_same_bits, generator

D, E, K = 16, 6, 2
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics", "ignore:.*tokens pending")


def hidden_states(num_tokens: int, seed: int = 0) -> Tensor:
    gen = generator(seed)
    return torch.randn(num_tokens, D, generator=gen) + 0.5 * torch.randn(D, generator=gen)


def affinity(router: LearnedRouter, x: Tensor) -> Tensor:
    logits = x @ router.weight.T
    return logits.softmax(1) if router.kind == "softmax" else logits.sigmoid()


@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("kind", "balance"),
    [("softmax", "aux"), ("softmax", "none"), ("sigmoid", "sign"), ("sigmoid", "quantile"), ("sigmoid", "none")],
)
def test_gates_equal_plain_pytorch(kind: str, balance: str, masked: bool, scaling: float) -> None:
    router = LearnedRouter(D, E, K, kind=kind, balance=balance, scaling=scaling)
    x = hidden_states(50).requires_grad_()
    mask = torch.rand(50, generator=generator(1)) < 0.7 if masked else torch.ones(50, dtype=torch.bool)
    out = router(x, mask if masked else None)
    p = affinity(router, x)
    ids = torch.where(mask[:, None], p.topk(K).indices, torch.arange(K))
    chosen = p.gather(1, ids)
    want = torch.where(mask[:, None], scaling * chosen / chosen.sum(1, keepdim=True), 0.0)
    assert torch.equal(out.indices, ids)
    torch.testing.assert_close(out.weights, want)
    assert out.scores is not None
    torch.testing.assert_close(out.scores[mask], (x @ router.weight.T)[mask])
    leaves = [x, router.weight]
    coefficients = torch.randn(50, K, generator=generator(2))
    got_grads = torch.autograd.grad((out.weights * coefficients).sum(), leaves)
    for got, wanted in zip(got_grads, torch.autograd.grad((want * coefficients).sum(), leaves), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
        assert got.any()


def test_the_bias_chooses_but_never_weighs() -> None:
    router = LearnedRouter(D, E, K, kind="sigmoid")
    x = hidden_states(50)
    without = router(x)
    router.expert_bias.copy_(torch.tensor([0, 0, 0, 0, 2.0, 1.0]))
    out = router(x)
    assert torch.equal(out.indices, torch.tensor([[4, 5]]).expand(50, 2))
    assert not torch.equal(out.indices, without.indices)
    p = affinity(router, x)[:, 4:]
    torch.testing.assert_close(out.weights, p / p.sum(1, keepdim=True))
    assert out.scores is not None
    assert without.scores is not None
    assert_same_bits(out.scores, without.scores)


def test_equal_affinities_go_to_the_lower_expert() -> None:
    router = LearnedRouter(D, E, K, kind="sigmoid")
    with torch.no_grad():
        router.weight.zero_()
    router.expert_bias.copy_(torch.tensor([0, 0, 0.5, 0, 0.5, 0.5]))
    assert torch.equal(router(hidden_states(20)).indices, torch.tensor([[2, 4]]).expand(20, 2))


def test_sign_update_by_hand() -> None:
    router = LearnedRouter(D, E, K, kind="sigmoid", bias_rate=0.25)
    bias = torch.zeros(E)
    for step in range(3):
        counts = torch.zeros(E, dtype=torch.int64)
        for part in range(2):
            x, mask = hidden_states(60, 10 * step + part), torch.rand(60, generator=generator(step)) < 0.8
            counts += torch.bincount((affinity(router, x) + bias).topk(K).indices[mask].flatten(), minlength=E)
            router(x, mask)
        assert torch.equal(router.pending.counts, counts)
        router.commit()
        bias = bias + 0.25 * torch.sign(counts.double().mean() - counts).float()
        bias = bias - bias.mean()
        torch.testing.assert_close(router.expert_bias, bias)
        assert torch.equal(router.tokens_per_expert, counts)
        assert int(router.pending.num_tokens) == 0
    assert bias.abs().max() > 0.25


@pytest.mark.parametrize("num_tokens", [2, 5, 64, 2048])
def test_quantile_update_by_hand(num_tokens: int) -> None:
    router = LearnedRouter(D, E, K, kind="sigmoid", balance="quantile")
    bias = torch.tensor([0.2, -0.2, 0.1, -0.1, 0.05, -0.05])
    router.expert_bias.copy_(bias)
    x = hidden_states(num_tokens)
    rank = (affinity(router, x) + bias).detach().double()
    margin = rank.topk(K + 1).values[:, K:] - rank
    q = torch.quantile(margin, K / E, dim=0)
    router(x)
    router.commit()
    # b = 0.9 b + 0.1 (b + q), centred; each quantile to one of 1024 bins over [-2, 2].
    got = (router.expert_bias.double() - bias) / 0.1
    error = (got[:, None] - got) - (q[:, None] - q)
    assert float(error.abs().max()) <= 2 * 1.01 / 256


@pytest.mark.parametrize("balance", ["sign", "quantile"])
def test_balance_rules_lower_max_vio(balance: str) -> None:
    router = LearnedRouter(D, E, K, kind="sigmoid", balance=balance)
    violations = []
    for _ in range(150):
        counts = torch.bincount(router(hidden_states(400)).indices.flatten(), minlength=E)
        violations.append(float(counts.max() / counts.double().mean() - 1))
        router.commit()
    assert violations[0] > 0.5
    assert violations[-1] < 0.1


def test_no_rule_no_bias() -> None:
    for kind, balance in (("softmax", "aux"), ("softmax", "none"), ("sigmoid", "none")):
        router = LearnedRouter(D, E, K, kind=kind, balance=balance)
        router(hidden_states(60))
        counts = router.pending.counts.clone()
        router.commit()
        assert not router.expert_bias.any()
        assert torch.equal(router.tokens_per_expert, counts)


def test_pending_counts_tokens_and_what_was_masked_is_not_dropped() -> None:
    router = LearnedRouter(D, E, K, kind="sigmoid", balance="quantile")
    mask = torch.arange(60) < 40
    for part in range(2):
        router(hidden_states(60, part), mask)
    p = router.pending
    assert (int(p.num_tokens), int(p.num_dropped), int(p.counts.sum())) == (80, 0, 80 * K)
    assert torch.equal(p.margin_hist.sum(1), torch.full((E,), 80))


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode", "frozen", "route"])
def test_forwards_that_gather_nothing(mode: str) -> None:
    router = LearnedRouter(D, E, K, kind="sigmoid", balance="quantile")
    x = hidden_states(60)
    trained = router(x)
    if mode == "frozen":
        router.pending.clear_()
    before = {field: getattr(router.pending, field).clone() for field in router.pending.FIELDS}
    if mode == "eval":
        out = router.eval()(x)
    elif mode == "frozen":
        out = router.freeze()(x)
    elif mode == "route":
        out = router.route(x)
    else:
        with torch.no_grad() if mode == "no_grad" else torch.inference_mode():
            out = router(x)
    assert torch.equal(out.indices, trained.indices)
    for field, value in before.items():
        assert_same_bits(getattr(router.pending, field), value, field)


def test_a_skipped_commit_keeps_what_is_pending_and_freezing_drops_it() -> None:
    router = LearnedRouter(D, E, K, kind="sigmoid")
    router(hidden_states(50))
    with pytest.warns(UserWarning, match="drops 50 pending tokens: a frozen router commits nothing; call kmeans_r"):
        router.freeze()
    assert int(router.pending.num_tokens) == 0
    router.commit()
    router.freeze(False)
    router(hidden_states(60))
    router.commit(torch.tensor(True))
    assert not router.expert_bias.any()
    assert int(router.pending.num_tokens) == 60
    router.commit(torch.tensor(False))
    assert router.expert_bias.any()
    before = router.expert_bias.clone()
    router.commit()
    assert_same_bits(router.expert_bias, before)


def test_the_bias_stays_when_every_expert_is_chosen() -> None:
    for balance in ("sign", "quantile"):
        router = LearnedRouter(D, 3, 3, kind="sigmoid", balance=balance)
        router.expert_bias.copy_(torch.tensor([0.1, 0.2, -0.3]))
        before = router.expert_bias.clone()
        router(hidden_states(60))
        router.commit()
        assert_same_bits(router.expert_bias, before)


def test_auxiliary_loss_is_of_training_forwards_only() -> None:
    router = LearnedRouter(D, E, K, aux_loss_coef=0.5)
    x = hidden_states(60)
    router(x)
    p = affinity(router, x)
    f = torch.bincount(p.topk(K).indices.flatten(), minlength=E) / (60 * K)
    torch.testing.assert_close(router.aux_loss, 0.5 * E * (f * p.mean(0)).sum())
    router.eval()(x)
    assert router.aux_loss.item() == 0
    even = LearnedRouter(D, E, K, aux_loss_coef=1.0)
    with torch.no_grad():
        even.weight.zero_()
    even(x)
    assert even.aux_loss.item() == pytest.approx(1.0), "equal probabilities: E * sum f / E"


def test_weights_come_from_the_private_generator() -> None:
    before = torch.get_rng_state()
    router = LearnedRouter(256, 64, 2, seed=3, name="a")
    router(torch.zeros(2, 256))
    router.commit()
    assert torch.equal(torch.get_rng_state(), before)
    assert router.weight.std().item() == pytest.approx(1 / 16, rel=0.03)
    torch.manual_seed(99)
    assert_same_bits(LearnedRouter(256, 64, 2, seed=3, name="a").weight.detach(), router.weight.detach())
    for seed, name in ((4, "a"), (3, "b")):
        assert not torch.equal(LearnedRouter(256, 64, 2, seed=seed, name=name).weight, router.weight)
    with torch.no_grad():
        router.weight.fill_(torch.nan)
        router.expert_bias.fill_(1)
    router.reset_parameters()
    assert_same_bits(LearnedRouter(256, 64, 2, seed=3, name="a").weight.detach(), router.weight.detach())
    assert not router.expert_bias.any()


def test_metrics_are_flat_scalars() -> None:
    router = LearnedRouter(D, E, K, kind="sigmoid")
    router(hidden_states(60))
    router.commit()
    got, counts = router.metrics(), router.tokens_per_expert.double()
    assert all(type(value) is float for value in got.values())
    assert got["maxvio"] == pytest.approx(float(counts.max() / counts.mean() - 1), rel=1e-6)
    assert got["load_std"] == pytest.approx(float((counts / counts.sum()).std(unbiased=False)), rel=1e-5)
    assert got["bias_abs_max"] == pytest.approx(float(router.expert_bias.abs().max()))
    unit = torch.nn.functional.normalize(router.weight.detach()).numpy()
    assert got["direction_cosine"] == pytest.approx(((unit @ unit.T).sum() - E) / (E * (E - 1)), abs=1e-6)
    assert np.isfinite(list(got.values())).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ({"num_experts": 2.0}, TypeError, "num_experts must be an int, got float"),
        ({"top_k": 0}, ValueError, r"top_k must be in \[1, 6\], got 0"),
        ({"top_k": 7}, ValueError, r"top_k must be in \[1, 6\], got 7"),
        ({"kind": "kmeans"}, ValueError, "kind must be one of 'softmax', 'sigmoid', got 'kmeans'"),
        (
            {"balance": "proportional"},
            ValueError,
            "balance must be one of 'aux', 'sign', 'quantile', 'none', got 'proportional'",
        ),
        ({"aux_loss_coef": -1.0}, ValueError, r"aux_loss_coef must be in \[0, inf\), got -1.0"),
        ({"bias_rate": -0.5}, ValueError, r"bias_rate must be in \[0, 1e\+30\), got -0.5"),
        ({"scaling": 0.0}, ValueError, r"scaling must be in \[1e-30, 1e\+30\), got 0.0"),
    ],
    ids=str,
)
def test_options_are_refused_at_construction(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LearnedRouter(**{"hidden_size": D, "num_experts": E, "top_k": K, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(4, D + 1)}, ValueError, r"x must have shape \(\.\.\., 16\), got \(4, 17\)"),
        ({"x": torch.zeros(4, D, dtype=torch.int32)}, TypeError, "x must be floating point, got torch.int32"),
        ({"x": torch.zeros(4, D, device="meta")}, RuntimeError, "x is on meta but the router's state is on cpu"),
        ({"mask": torch.ones(4)}, TypeError, "mask must be a bool tensor, got torch.float32"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask must have shape \(4,\).*got \(3,\)"),
    ],
    ids=lambda value: "",
)
def test_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LearnedRouter(D, E, K)(**{"x": hidden_states(4), **arguments})


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_auxiliary_loss_that_trains_nothing_says_so_once(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 16), Recomputed(MoE(16, 8, 6, 2, "softmax"), reentrant))
    attach(model, torch.optim.SGD(model.parameters(), 0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(torch.randn(20, 16)).sum().backward()
    told = [str(w.message) for w in caught if "auxiliary loss" in str(w.message)]
    assert len(told) == reentrant
    assert all("use_reentrant=False" in message for message in told)


class Recomputed(nn.Module):
    """A layer under activation checkpointing."""

    def __init__(self, layer: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.layer, x, use_reentrant=self.reentrant)
        return y
