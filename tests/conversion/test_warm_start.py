"""Warm start: rows as directions, centroids from what learned routers send, agreement, loss; nothing moves on error."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kmeans_route
from kmeans_route import KMeansRouter, LearnedRouter, MoE, RouterOutput, calibrate, export_gates
from kmeans_route.conversion import compare as agreement
from kmeans_route.conversion.from_learned import balanced_bias
from kmeans_route.reference import GIVEN_TOKENS, whitened_reference
from tests.helpers.compare import assert_same_bits, generator

D, E, K = 16, 6, 2


class Model(nn.Module):
    """Two MoE layers over given hidden states; the loss is the distance from `y`."""

    def __init__(self, router: str = "softmax", **options: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layers = nn.ModuleList(
                MoE(D, 8, E, K, router, name=f"layer_{i}", **({} if i else options)) for i in range(2)
            )
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Any:
        for layer in self.layers:
            x = x + self.drop(layer(x, mask))
        return x if y is None else F.mse_loss(x, y)


def batches(count: int = 3, tokens: int = 64, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    gen = generator(seed)
    offset = torch.randn(D, generator=gen)
    return [
        (torch.randn(tokens, D, generator=gen) + offset, torch.randn(tokens, D, generator=gen)) for _ in range(count)
    ]


def with_kmeans(model: Model, top_k: int = K, **options: Any) -> Model:
    """A copy of the model whose routers are K-Means, with the old rows as directions where these may be centroids."""
    new = copy.deepcopy(model)
    for layer in new.layers:
        if options.get("accumulate") == "raw":
            layer.router = KMeansRouter(D, E, top_k, **options)
        else:
            layer.router = KMeansRouter.from_linear(layer.router, top_k, **options)
    return new


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def inputs_and_choices(model: Model, data: list[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
    """For each layer what its router gets and chooses, by calling the layers one by one."""
    seen: list[list[tuple[Tensor, Tensor]]] = [[], []]
    with torch.no_grad():
        for x, _ in data:
            for layer, part in zip(model.layers, seen, strict=True):
                part.append((x, layer.router.route(x).indices))
                x = x + layer.eval()(x)
    return seen


# from_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_linear_takes_rows_as_directions(dtype: torch.dtype) -> None:
    gate = nn.Linear(D, E).to(dtype)
    learned = LearnedRouter(D, E, K).to(dtype)
    with torch.no_grad():
        learned.weight.copy_(gate.weight)
    want = F.normalize(gate.weight.detach().float(), dim=1)
    for given in (gate, learned, gate.weight.detach()):
        router = KMeansRouter.from_linear(given, K, decay=0.99, name="a", tau=0.2)
        assert type(router) is KMeansRouter
        assert router.weight.dtype == torch.float32
        torch.testing.assert_close(router.weight, want, rtol=1e-6, atol=1e-7)
        assert (router.top_k, router.name, router.options.tau, int(router.steps)) == (K, "a", 0.2, 99)
        assert bool(router.initialized)
        assert not router.expert_bias.any()
        assert router.commit_options.directions == "centroids", "whitening would turn the rows"


def test_from_linear_whitens_where_that_is_named() -> None:
    gate = nn.Linear(D, E)
    router = KMeansRouter.from_linear(gate, K, directions="whitened")
    assert (router.commit_options.directions, router.options.tau) == ("whitened", 0.1)
    torch.testing.assert_close(router.weight, F.normalize(gate.weight.detach(), dim=1), rtol=1e-6, atol=1e-7)


def test_from_linear_keeps_the_class_and_chooses_like_rows_of_one_length() -> None:
    class Own(KMeansRouter):
        pass

    gate = nn.Linear(D, E, bias=False)
    with torch.no_grad():
        gate.weight.copy_(F.normalize(gate.weight, dim=1) * 3)
    router = Own.from_linear(gate, K).eval()
    assert type(router) is Own
    x = torch.randn(500, D)
    assert torch.equal(router(x).indices, gate(x).topk(K).indices)


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        (nn.ReLU(), TypeError, r"gate must be an \(E, D\) tensor or have one as its weight, got ReLU"),
        (torch.ones(3), ValueError, r"gate must have a weight \(E, D\), got \(3,\)"),
        (torch.eye(3)[:, :2], ValueError, "weight must have a direction in every row"),
        (torch.eye(3) * torch.nan, ValueError, "weight must have a direction in every row"),
    ],
)
def test_from_linear_refuses(gate: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KMeansRouter.from_linear(gate, 1)


# calibrate


@pytest.mark.parametrize("directions", ["centroids", "whitened"])
@pytest.mark.parametrize("accumulate", ["unit", "raw"])
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_centroids_are_means_of_what_the_old_routers_send(router: str, accumulate: str, directions: str) -> None:
    old, data = Model(router), batches()
    new = with_kmeans(old, accumulate=accumulate, directions=directions)
    calibrate(old, new, iter(data))
    for layer, part in zip(new.layers, inputs_and_choices(old, data), strict=True):
        x, ids = torch.cat([x for x, _ in part]).double(), torch.cat([i for _, i in part])
        rows = F.normalize(x, dim=1) if accumulate == "unit" else x
        for e in range(E):
            chosen = (ids == e).any(1)
            mean = rows[chosen].mean(0) if accumulate == "raw" else F.normalize(rows[chosen].mean(0), dim=0)
            torch.testing.assert_close(layer.router.centroids[e].double(), mean, rtol=1e-6, atol=3e-7)
            assert int(layer.router.tokens_per_expert[e]) == int(chosen.sum())
        centroids = layer.router.centroids
        want = F.normalize(centroids, dim=1)
        want = want if directions == "centroids" else whitened_reference(centroids, want)
        torch.testing.assert_close(layer.router.weight, want, rtol=0, atol=3e-7)
        assert int(layer.router.steps) == 999
        assert int(layer.router.pending.num_tokens) == 0


@pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")
@pytest.mark.parametrize("directions", ["centroids", "whitened"])
def test_training_goes_on_with_the_agreement_that_was_reported(directions: str) -> None:
    """A commit turns the directions hardly, and with them few of 1,000 choices; rows would be whitened only then."""
    gate, x = nn.Linear(D, E), torch.cat([x for x, _ in batches(10, tokens=100)])
    changed = {}
    for start in ("means", "rows"):
        router = KMeansRouter.from_linear(gate, K, directions=directions, balance="none")
        one = calibrate(nn.Sequential(gate), {"0": router}, [x], start=start).routers["0"]
        old, ids = gate(x).topk(K).indices, router.eval()(x).indices
        assert one.overlap == pytest.approx((old[:, :, None] == ids[:, None]).sum((1, 2)).float().mean() / K)
        router.train()(x[:4])
        router.commit()
        after = router.eval()(x).indices
        changed[start] = 1 - float((after[:, :, None] == ids[:, None]).sum((1, 2)).float().mean()) / K
    assert changed["means"] < 0.01
    assert changed["rows"] < 0.01 if directions == "centroids" else changed["rows"] > 0.05


def test_planted_clusters_are_recovered() -> None:
    """A gate of badly placed rows that still chooses by cluster: the centroids land on the clusters' own directions."""
    gen = generator(1)
    centres = F.normalize(torch.randn(E, D, generator=gen), dim=1)
    ids = torch.arange(600) % E
    x = (centres[ids] + 0.05 * torch.randn(600, D, generator=gen)) * (torch.rand(600, 1, generator=gen) + 0.5)
    gate = nn.Linear(D, E, bias=False)
    with torch.no_grad():  # the dual basis: row e is 0 on every other cluster, far from the cluster's own direction
        gate.weight.copy_(torch.linalg.pinv(centres).T * 5)
    assert torch.equal(gate(x).argmax(1), ids)
    router = KMeansRouter.from_linear(gate, 1)
    before = (router.weight * centres).sum(1)
    result = calibrate(nn.Sequential(gate), {"0": router}, [x])
    assert before.max() < 0.95
    assert (router.weight * centres).sum(1).min() > 0.998
    one = result.routers["0"]
    assert (one.top1, one.overlap, one.num_tokens) == (1.0, 1.0, 600)
    assert one.counts_after.tolist() == [100] * E
    assert result.loss_before is None
    assert result.loss_after is None


def test_agreement_is_counted_by_hand() -> None:
    """Old choices written down, new ones set by axes: every figure has one right value."""

    class Told(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            ids = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]])
            weights = torch.tensor([[0.75, 0.25], [0.4, 0.6], [0.75, 0.25], [0.75, 0.25]])
            return x, weights, ids

    x = torch.tensor([[3.0, 2, 1, 0], [3.0, 2, 1, 0], [3.0, 2, 1, 0], [0, 3.0, 1, 2]])
    router = KMeansRouter.from_linear(torch.eye(4), 2, gate="uniform")
    result = calibrate(nn.Sequential(Told()), {"0": router}, [x], start="rows")
    one = result.routers["0"]
    # New: {0, 1} first 0; the same; the same; {1, 3} first 1. Old firsts by gate: 0, 0, 2, 3.
    assert one.top1 == 2 / 4
    assert one.overlap == (1 + 1 + 0 + 0.5) / 4
    assert one.gate_error == pytest.approx((0.25 + 0.1 + 1.0 + 0.5) / 4)
    assert one.counts_before.tolist() == [2, 2, 2, 2]
    assert one.counts_after.tolist() == [3, 4, 0, 1]
    assert result.mean("max_vio_after") == pytest.approx(1.0)
    assert "62.5%" in str(result)


def test_losses_are_those_of_the_two_models() -> None:
    old, data, held = Model(), batches(), batches(2, seed=5)
    new = with_kmeans(old)
    ticks: list[int] = []
    result = calibrate(old, new, data, held_out=held, progress=lambda: ticks.append(1))
    with torch.no_grad():
        for model, loss in ((old, result.loss_before), (new, result.loss_after)):
            want = sum(float(model.eval()(*batch)) for batch in held) / 2
            assert loss == pytest.approx(want, rel=1e-6)
    assert result.loss_before != result.loss_after
    assert len(ticks) == 3 + 2 + 2
    assert {one.num_tokens for one in result.routers.values()} == {128}
    counts = new.layers[1].router.route(held[0][0] + new.layers[0](held[0][0])).tokens_per_expert
    counts = counts + new.layers[1].router.route(held[1][0] + new.layers[0](held[1][0])).tokens_per_expert
    assert torch.equal(result.routers["layers.1.router"].counts_after, counts)


def test_nothing_else_moves() -> None:
    old = Model()
    new = with_kmeans(old)
    old.train()
    old.layers[0].eval()
    new.train()
    new.drop.eval()
    before_old, before_new = state_of(old), state_of(new)
    modes = [[m.training for m in model.modules()] for model in (old, new)]
    random = torch.get_rng_state()
    calibrate(old, new, batches(), balance_steps=3, fit_tau=True)
    assert modes == [[m.training for m in model.modules()] for model in (old, new)]
    assert torch.equal(random, torch.get_rng_state())
    for name, value in before_old.items():
        assert_same_bits(old.state_dict()[name], value, name)
    for name, value in before_new.items():
        if ".router." not in name:
            assert_same_bits(new.state_dict()[name], value, name)
    assert all(int(m.pending.num_tokens) == 0 for m in new.modules() if isinstance(m, KMeansRouter))
    assert not any(m._forward_hooks for model in (old, new) for m in model.modules())


def test_masked_and_broken_rows_are_left_out() -> None:
    old, (batch, *_) = Model(), batches()
    x, y = batch
    clean, dirty = with_kmeans(old), with_kmeans(old)
    kept = torch.arange(64) % 3 > 0
    want = calibrate(old, clean, [(x[kept], y[kept])])
    x = x.clone()
    x[0], x[3], x[6] = torch.nan, torch.inf, 1e30
    got = calibrate(old, dirty, [{"x": x, "y": y, "mask": kept}])
    assert [one.num_tokens for one in got.routers.values()] == [int(kept.sum())] * 2
    torch.testing.assert_close(state_of(dirty), state_of(clean), rtol=0, atol=1e-6)
    assert got.mean("overlap") == pytest.approx(want.mean("overlap"))
    # Without a mask too, broken rows reach no centroid.
    linear = nn.Linear(D, E)
    router = KMeansRouter.from_linear(linear, K)
    x[9] = 0
    result = calibrate(nn.Sequential(linear), {"0": router}, [x])
    assert result.routers["0"].num_tokens == 60
    assert router.weight.isfinite().all()


def test_an_expert_that_gets_nothing_keeps_its_direction() -> None:
    linear = nn.Linear(D, E)
    with torch.no_grad():
        linear.bias[4] = -1e4
    router = KMeansRouter.from_linear(linear, K, average="cumulative")
    row = router.weight[4].clone()
    calibrate(nn.Sequential(linear), {"0": router}, [batches()[0][0]])
    torch.testing.assert_close(router.weight[4], row, rtol=0, atol=1e-7)
    assert router.tokens_seen is not None
    assert int(router.tokens_seen[4]) == GIVEN_TOKENS, "one token would take its place"
    assert int(router.tokens_seen.sum()) == GIVEN_TOKENS + 64 * K


@pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")
@pytest.mark.parametrize("directions", ["centroids", "whitened"])
def test_means_of_long_hidden_states_outlast_the_next_commits(directions: str) -> None:
    """With accumulate="raw" a centroid is as long as hidden states are; one of length 1 would be gone at once."""
    linear, data = nn.Linear(D, E), 256 * torch.cat([x for x, _ in batches(4)])
    with torch.no_grad():
        linear.bias[4] = -1e6  # nothing is sent there
    router = KMeansRouter(D, E, K, accumulate="raw", directions=directions, balance="none")
    calibrate(nn.Sequential(linear), {"0": router}, [data])
    before = router.weight.clone()
    lengths = torch.linalg.vector_norm(router.centroids, dim=1)
    assert 0.5 < float(lengths[4] / lengths[torch.arange(E) != 4].mean()) < 2
    for _ in range(3):
        router(256 * batches(1, seed=1)[0][0])
        router.commit()
    assert float(torch.linalg.vecdot(router.weight, before).min()) > 1 - 1e-4


def test_rows_that_are_no_averages_are_no_raw_centroids() -> None:
    gate = nn.Linear(D, E)
    with pytest.raises(ValueError, match=r"as long as hidden states with accumulate='raw', got rows of any length"):
        KMeansRouter.from_linear(gate, K, accumulate="raw")
    router = KMeansRouter(D, E, K, accumulate="raw")
    before = state_of(router)
    with pytest.raises(ValueError, match="use accumulate='unit', or pass averages"):
        calibrate(nn.Sequential(gate), {"0": router}, [batches()[0][0]], start="rows")
    for name, value in state_of(router).items():
        assert torch.equal(value, before[name]), name


def test_a_default_device_of_another_kind_changes_nothing() -> None:
    """As with torch.set_default_device("cuda") where the models stay on the CPU."""
    old, data = Model(), batches()
    want, got = with_kmeans(old), with_kmeans(old)
    reports = [calibrate(old, want, data, balance_steps=3, fit_tau=True)]
    try:
        torch.set_default_device("meta")
        reports.append(calibrate(old, got, data, balance_steps=3, fit_tau=True))
        export_gates(got, data, progress=False)
    finally:
        torch.set_default_device(None)
    assert [layer.router.options.tau for layer in want.layers] == [layer.router.options.tau for layer in got.layers]
    for name, value in want.state_dict().items():
        assert torch.equal(value, got.state_dict()[name]), name
    first, second = (list(report.routers.values()) for report in reports)
    assert [one.overlap for one in first] == [one.overlap for one in second]


def test_an_error_puts_a_learned_offset_back() -> None:
    gate, router = nn.Linear(D, E), KMeansRouter(D, E, K, learned_offset=True)
    assert router.offset is not None
    with torch.no_grad():
        router.offset.normal_()
    before, runs = state_of(router), []

    def once(model: nn.Module, batch: Tensor) -> Tensor:
        runs.append(model(batch))
        if len(runs) > 1:
            raise ValueError("no more")
        return torch.zeros(())

    with pytest.raises(ValueError, match="no more"):
        calibrate(nn.Sequential(gate), {"0": router}, [batches()[0][0]], forward=once)
    assert len(runs) == 2, "centroids were set"
    for name, value in state_of(router).items():
        assert torch.equal(value, before[name]), name


def test_the_first_commit_cannot_erase_it() -> None:
    old, data = Model(), batches()
    new = with_kmeans(old)
    calibrate(old, new, data)
    router = new.layers[0].router
    before = router.weight.clone()
    attachment = kmeans_route.attach(new, torch.optim.SGD(new.parameters()))
    new(torch.randn(64, D))
    attachment.commit()
    assert 0 < kmeans_route.metrics.centroid_drift(before, router.weight).max() < 1e-2


def test_balance_steps_even_the_load() -> None:
    old, data = Model(), batches(8)
    loads = {}
    for steps in (0, 15):
        new = with_kmeans(old)
        router = new.layers[0].router
        calibrate(old, {"layers.0.router": router}, data, balance_steps=steps)
        counts = sum(router.route(x).tokens_per_expert for x, _ in data)
        loads[steps] = float(kmeans_route.metrics.max_vio(counts))
        assert torch.equal(router.tokens_per_expert, counts) or not steps
    assert loads[0] > 0.3
    assert loads[15] < 0.05
    assert float(router.score_std) > 0
    assert float(router.expert_bias.mean()) == pytest.approx(0, abs=1e-6)


def test_balanced_bias_respects_groups_and_full_choice() -> None:
    scores = torch.randn(400, 8, generator=generator(0)) * 0.1 + torch.linspace(0, 0.3, 8)
    for options in ({"n_group": 4, "topk_group": 2}, {}):
        checked = kmeans_route.checks.check_route_options(8, 2, **options)
        bias, counts = balanced_bias(scores, checked, 40)
        ranking = scores + bias
        candidates = kmeans_route.reference.candidates_reference(ranking, checked)
        ids = ranking.masked_fill(~candidates, -torch.inf).topk(2).indices
        assert torch.equal(torch.bincount(ids.flatten(), minlength=8), counts)
        assert kmeans_route.metrics.max_vio(counts) < 0.15
    bias, _ = balanced_bias(scores, kmeans_route.checks.check_route_options(8, 8), 5)
    assert not bias.any()


def test_fit_tau_finds_the_temperature_that_made_the_gates() -> None:
    """K-Means to K-Means: the old gates have tau 0.2, the new router starts from 0.05."""
    old = nn.Sequential(KMeansRouter.from_linear(torch.randn(E, D), K, tau=0.2))
    new = KMeansRouter.from_linear(old[0], K, tau=0.05)
    result = calibrate(old, {"0": new}, [torch.randn(300, D)], start="rows", fit_tau=True)
    assert new.options.tau == pytest.approx(0.2, rel=0.07)
    assert result.routers["0"].overlap == 1.0
    assert result.routers["0"].gate_error < 0.01


def test_progress_bar_only_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(Model(), with_kmeans(Model()), batches())
    assert capsys.readouterr() == ("", "")


# Errors


def _nan_gate(old: Model, new: Model) -> dict[str, Any]:
    with torch.no_grad():
        old.layers[1].router.weight[0, 0] = torch.nan
    return {}


def _breaks_late(old: Model, new: Model) -> dict[str, Any]:
    def forward(model: nn.Module, batch: Any) -> Any:
        if model is new:
            raise RuntimeError("the new model fails")
        return model(*batch)

    return {"forward": forward}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_nan_gate, ValueError, r"router 'layers.1.router' of model must be finite, got NaN or Inf"),
        (_breaks_late, RuntimeError, "the new model fails"),
        (lambda old, new: {"batches": []}, ValueError, "batches must hold at least one batch, got none"),
        (lambda old, new: {"held_out": []}, ValueError, "held_out must hold at least one batch, got none"),
        (
            lambda old, new: {"target": old},
            ValueError,
            "target must contain at least one KMeansRouter, got none in Model",
        ),
        (lambda old, new: {"target": {}}, ValueError, "got none in the mapping"),
        (lambda old, new: {"target": {"x": KMeansRouter(D, E, K)}}, ValueError, "model must hold the old router 'x'"),
        (lambda old, new: {"target": {"drop": nn.ReLU()}}, TypeError, r"target\['drop'\] must be a KMeansRouter"),
        (lambda old, new: {"model": new}, ValueError, "must differ in model and target, got one and the same"),
        (lambda old, new: {"start": "seeds"}, ValueError, "start must be one of 'means', 'rows'"),
        (lambda old, new: {"balance_steps": -1}, ValueError, "balance_steps must be an int of at least 0, got -1"),
        (
            lambda old, new: {"batches": [(torch.zeros(4, D), torch.zeros(4, D))]},
            ValueError,
            "at least one valid token",
        ),
    ],
)
def test_after_an_error_nothing_has_changed(
    change: Callable[[Model, Model], dict[str, Any]], error: type[Exception], message: str
) -> None:
    old = Model()
    new = with_kmeans(old).train()
    kmeans_route.attach(new, torch.optim.SGD(new.parameters()))
    new(batches()[0][0])
    arguments: dict[str, Any] = {"model": old, "target": new, "batches": batches(), **change(old, new)}
    before = {name: value.clone() for name, value in new.named_buffers()}
    pending = [layer.router.pending.sums.clone() for layer in new.layers]
    with pytest.raises(error, match=message):
        calibrate(balance_steps=arguments.pop("balance_steps", 2), fit_tau=True, **arguments)
    for name, value in new.named_buffers():
        assert_same_bits(value, before[name], name)
    for layer, sums in zip(new.layers, pending, strict=True):
        assert_same_bits(layer.router.pending.sums, sums)
        assert layer.router.options.tau == 0.2
    assert not any(m._forward_hooks for m in old.modules())
    assert all(m.training for m in new.modules())


@pytest.mark.parametrize(
    ("num_experts", "top_k", "message"),
    [(E, 3, "give the new router the old one's top_k"), (E - 1, K, "as many experts")],
)
def test_routers_of_other_sizes_are_refused(num_experts: int, top_k: int, message: str) -> None:
    old = Model()
    target = {"layers.0.router": KMeansRouter(D, num_experts, top_k)}
    with pytest.raises((TypeError, ValueError), match=message):
        calibrate(old, target, batches())
    with pytest.raises(ValueError, match=r"x must have shape \(..., 8\)"):
        calibrate(old, {"layers.0.router": KMeansRouter(8, E, K)}, batches())


def test_fit_tau_needs_a_temperature() -> None:
    old = Model()
    with pytest.raises(ValueError, match="fit_tau must have gates with a temperature"):
        calibrate(old, with_kmeans(old, gate="cosine"), batches(), fit_tau=True)


def test_outputs_of_other_routers_are_read() -> None:
    """A `RouterOutput`, transformers' order, and torchtitan's, leading dimensions and all; else a TypeError."""
    x, ids = torch.randn(2, 3, D), torch.arange(12).view(2, 3, 2) % E
    weights, logits = torch.rand(2, 3, K), torch.randn(2, 3, E)
    router = agreement.Router(nn.Identity(), K, E)
    flat = (ids.view(6, K), weights.view(6, K))
    for output in (
        RouterOutput(weights.view(6, K), ids.view(6, K), None),
        (logits.view(6, E), *reversed(flat)),
        (weights, ids, logits),
    ):
        seen = agreement.read("r", router, (x,), {}, output)
        assert torch.equal(seen.x, x.view(6, D))
        assert torch.equal(seen.indices, flat[0])
        assert torch.equal(seen.weights, flat[1])
    seen = agreement.read("r", router, (), {"hidden_states": x}, logits)
    assert torch.equal(seen.indices, logits.view(6, E).topk(K).indices)
    assert torch.equal(seen.weights, logits.view(6, E).topk(K).values.softmax(1))
    with pytest.raises(TypeError, match=r"router 'r' must return int64 ids and weights \(..., 2\) or logits"):
        agreement.read("r", router, (x,), {}, (weights, ids.bool()))
