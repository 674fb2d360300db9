"""The way back: equal choices without a bias, fitted ones with it, an honest report, targets filled or left alone."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kmeans_route
from kmeans_route import KMeansRouter, LearnedRouter, MoE, export_gates, to_linear
from tests.helpers.compare import assert_same_bits, generator

D, E, K = 32, 8, 2


class Model(nn.Module):
    """An RMS norm and an MoE layer; the loss is the distance from `y`."""

    def __init__(self, bias: float = 0.0, **options: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.norm = nn.RMSNorm(D)
            self.moe = MoE(D, 8, E, K, "kmeans", **options)
        router = self.moe.router
        router.set_centroids(shared() + torch.randn(E, D, generator=generator(1)))
        router.expert_bias.copy_(torch.linspace(-bias, bias, E)[torch.randperm(E, generator=generator(2))])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(x + self.moe(self.norm(x)), y)


def shared() -> Tensor:
    """What all hidden states have in common, as they do in trained models."""
    return 2 * torch.randn(D, generator=generator(7))


def batches(count: int = 3, tokens: int = 400, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    gen = generator(seed)
    return [
        (torch.randn(tokens, D, generator=gen) + shared(), torch.randn(tokens, D, generator=gen)) for _ in range(count)
    ]


def learned_copy(model: Model, kind: str, balance: str | None = None, **options: Any) -> Model:
    new = copy.deepcopy(model)
    new.moe.router = LearnedRouter(D, E, K, kind=kind, balance=balance, **options)
    return new


# to_linear


@pytest.mark.parametrize("scale", [None, 0.01, 1.0, 37.3])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "cosine", "uniform"])
def test_choices_are_equal_without_a_bias(gate: str, scale: float | None) -> None:
    router = KMeansRouter(D, E, 3, gate=gate).eval()
    router.set_centroids(torch.randn(E, D, generator=generator(0)) * 5)
    x = torch.randn(3000, D, generator=generator(1)) * (torch.rand(3000, 1, generator=generator(2)) * 9 + 0.1)
    linear = to_linear(router, scale)
    assert linear.bias is None
    assert linear.weight.dtype == torch.float32
    assert torch.equal(linear(x).topk(3).indices, router(x).indices)


def test_choices_differ_with_a_bias() -> None:
    model = Model(bias=0.1).eval()
    x = model.norm(batches()[0][0])
    assert not torch.equal(to_linear(model.moe.router)(x).topk(K).indices, model.moe.router(x).indices)


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_softmax_gates_are_equal_after_an_rms_norm(tau: float) -> None:
    router = Model(tau=tau).moe.router.eval()
    x = F.rms_norm(batches()[0][0], (D,))
    weights, indices, _ = router(x)
    gates = to_linear(router)(x).gather(1, indices).softmax(1)
    torch.testing.assert_close(gates, weights, rtol=0, atol=1e-4)
    # Another length of the rows makes other gates.
    assert (to_linear(router, 0.1)(x).gather(1, indices).softmax(1) - weights).abs().max() > 0.01


def test_to_linear_refuses() -> None:
    with pytest.raises(TypeError, match="router must be a KMeansRouter, got Linear"):
        to_linear(nn.Linear(4, 4))  # type: ignore[arg-type]
    for scale in (0.0, -1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match=r"scale must be in \(0, inf\)"):
            to_linear(KMeansRouter(D, E, K), scale)


# export_gates


def vanilla(gate: kmeans_route.VanillaGate, x: Tensor) -> tuple[Tensor, Tensor]:
    """As a serving engine would write it down."""
    logits = x @ gate.linear.weight.T
    if gate.linear.bias is not None:
        logits = logits + gate.linear.bias
    p = logits.softmax(1) if gate.kind == "softmax" else logits.sigmoid()
    ids = (p if gate.score_bias is None else p + gate.score_bias).topk(K).indices
    weights = p.gather(1, ids)
    return ids, weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "cosine", "uniform"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bias", ["none", "score"])
def test_without_a_bias_every_export_chooses_alike(kind: str, gate: str, bias: str) -> None:
    model = Model(gate=gate).eval()
    gates, comparison = export_gates(model, batches(), kind=kind, bias=bias, held_out=batches(1, seed=9))
    exported, one = gates["moe.router"], comparison.routers["moe.router"]
    x = model.norm(batches(1, seed=9)[0][0])
    ids = exported.linear(x).topk(K).indices
    assert torch.equal(ids.sort(1).values, model.moe.router(x).indices.sort(1).values)
    assert one.overlap >= (1.0 if kind == "softmax" else 0.995)  # sigmoids near 1 tie in fp32
    assert one.num_tokens == 400
    # All rows may share something, which changes no order; what tells them apart are the directions.
    apart = (exported.linear.weight - exported.linear.weight[0]) / exported.scale
    torch.testing.assert_close(apart, model.moe.router.weight - model.moe.router.weight[0], rtol=0, atol=1e-5)
    if (kind, gate) == ("sigmoid", "softmax"):
        assert one.gate_error < 0.05
    if (kind, gate) == ("softmax", "softmax"):
        assert exported.scale == pytest.approx(1 / (0.1 * D**0.5), rel=1e-3)
        assert one.gate_error < 1e-4
    if (kind, gate) == ("softmax", "uniform"):
        assert one.gate_error < 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_each_place_for_a_bias_recovers_choices(kind: str) -> None:
    """The report says what a hand count on other text says, and every place beats none."""
    model = Model(bias=0.15).eval()
    held = batches(2, seed=9)
    x = torch.cat([model.norm(x) for x, _ in held])
    gates_before, want, _ = model.moe.router(x)
    overlap = {}
    for bias in ("none", "rows", "score", "logit"):
        gates, comparison = export_gates(model, batches(), kind=kind, bias=bias, held_out=held)
        ids, weights = vanilla(gates["moe.router"], x)
        one = comparison.routers["moe.router"]
        overlap[bias] = one.overlap
        assert one.overlap == pytest.approx(float((ids[:, :, None] == want[:, None]).sum()) / want.numel(), abs=5e-3)
        counts = torch.bincount(ids.flatten(), minlength=E)
        assert int((one.counts_after - counts).abs().max()) <= 4
        assert torch.equal(one.counts_before, torch.bincount(want.flatten(), minlength=E))
        dense = torch.zeros(len(x), E)
        dense.scatter_(1, want, gates_before).scatter_add_(1, ids, -weights)
        assert one.gate_error == pytest.approx(float(dense.abs().sum(1).mean()) / 2, abs=5e-3)
    assert overlap["none"] < 0.8
    assert min(overlap["rows"], overlap["score"]) > overlap["none"] + 0.1
    assert overlap["logit"] > 0.999


def test_a_target_gets_the_gates_and_its_loss() -> None:
    model, held = Model(bias=0.1).eval(), batches(2, seed=9)
    target = learned_copy(model, "sigmoid", "sign")
    target.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gates, comparison = export_gates(
        model, batches(), target=target, held_out=held, kind="sigmoid", bias="score", progress=lambda: None
    )
    gate = gates["moe.router"]
    assert gate.score_bias is not None
    assert_same_bits(target.moe.router.expert_bias, gate.score_bias)
    assert_same_bits(target.moe.router.weight.detach(), gate.linear.weight.detach())
    assert target.training
    with torch.no_grad():
        want = sum(float(target.eval()(*batch)) for batch in held) / 2
        assert comparison.loss_after == pytest.approx(want, rel=1e-6)
        assert comparison.loss_before == pytest.approx(sum(float(model(*batch)) for batch in held) / 2, rel=1e-6)
    counts = sum(target.moe.router.route(model.norm(x)).tokens_per_expert for x, _ in held)
    assert torch.equal(comparison.routers["moe.router"].counts_after, counts)
    for name, value in before.items():
        assert_same_bits(model.state_dict()[name], value, name)


@pytest.mark.parametrize("bias", ["rows", "logit"])
def test_a_plain_linear_is_a_target_too(bias: str) -> None:
    router = Model(bias=0.1).moe.router.eval()
    data = [F.rms_norm(x, (D,)) for x, _ in batches()]
    target = nn.Sequential(nn.Linear(D, E, bias=bias == "logit"))
    gates, comparison = export_gates(nn.Sequential(router), data, target=target, bias=bias)
    assert torch.equal(target[0](data[0]), gates["0"].linear(data[0]))
    assert comparison.routers["0"].overlap > 0.9


def test_groups_and_gates_that_are_not_normalised() -> None:
    model = Model(bias=0.05, n_group=4, topk_group=2, normalize=False, scaling=2.5).eval()
    gates, comparison = export_gates(model, batches(), kind="sigmoid", bias="score")
    x = model.norm(batches()[0][0])
    ids, weights = gates["moe.router"].choose(x)
    assert ((ids // 2).sort(1).values.diff(dim=1) >= 0).all()
    assert all(len(set((row // 2).tolist())) <= 2 for row in ids)
    p = gates["moe.router"].linear(x).sigmoid()
    torch.testing.assert_close(weights, p.gather(1, ids) * 2.5)
    assert comparison.routers["moe.router"].overlap > 0.8


def test_rows_that_are_not_valid_are_left_out() -> None:
    router = Model(bias=0.1).moe.router.eval()
    x = F.rms_norm(batches()[0][0], (D,))
    dirty = torch.cat([x, torch.full((3, D), torch.nan), torch.zeros(2, D)])
    clean_gates, _ = export_gates(nn.Sequential(router), [x], bias="score")
    gates, comparison = export_gates(nn.Sequential(router), [dirty], bias="score")
    assert comparison.routers["0"].num_tokens == 400
    torch.testing.assert_close(gates["0"].linear.weight, clean_gates["0"].linear.weight)


# Refusals


def test_options_and_models_are_refused() -> None:
    model = Model()
    for arguments, message in (
        ({"kind": "tanh"}, "kind must be one of 'softmax', 'sigmoid'"),
        ({"bias": "rowz"}, "bias must be one of 'none', 'rows', 'score', 'logit'"),
        ({"batches": []}, "batches must hold at least one batch, got none"),
        ({"model": nn.Linear(2, 2)}, "model must contain at least one KMeansRouter, got none in Linear"),
    ):
        with pytest.raises(ValueError, match=message):
            export_gates(**{"model": model, "batches": batches(), **arguments})


@pytest.mark.parametrize(
    ("target", "arguments", "error", "message"),
    [
        (lambda m: m, {}, TypeError, "must have a LearnedRouter or an nn.Linear as 'moe.router', got KMeansRouter"),
        (lambda m: learned_copy(m, "sigmoid"), {}, ValueError, "must be of kind 'softmax'"),
        (lambda m: learned_copy(m, "softmax"), {"bias": "score"}, ValueError, "a place for bias='score'"),
        (lambda m: learned_copy(m, "softmax", "sign"), {"bias": "logit"}, ValueError, "a place for bias='logit'"),
        (lambda m: learned_copy(m, "softmax", scaling=2.0), {}, ValueError, "scaling=1, no groups"),
    ],
)
def test_a_target_that_does_not_fit_is_left_alone(
    target: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Model(bias=0.1)
    other = target(model)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(error, match=message):
        export_gates(model, batches(), target=other, **arguments)
    for name, value in other.state_dict().items():
        assert_same_bits(value, before[name], name)


def test_plain_targets_that_do_not_fit() -> None:
    model = nn.Sequential(Model().moe.router)
    with pytest.raises(ValueError, match=r"'0' must have a weight \(8, 32\), got \(7, 32\)"):
        export_gates(model, batches(), target=nn.Sequential(nn.Linear(D, 7, bias=False)))
    with pytest.raises(ValueError, match="'0' must have a place for bias='none'"):
        export_gates(model, batches(), target=nn.Sequential(nn.Linear(D, E)))


def test_a_target_that_fails_gets_its_own_gates_back() -> None:
    model = Model(bias=0.1).eval()
    target = learned_copy(model, "softmax")
    before = target.moe.router.weight.detach().clone()

    def forward(one: nn.Module, batch: Any) -> Any:
        if one is target:
            raise RuntimeError("the target fails")
        return one(*batch)

    with pytest.raises(RuntimeError, match="the target fails"):
        export_gates(model, batches(), target=target, forward=forward)
    assert_same_bits(target.moe.router.weight.detach(), before)
