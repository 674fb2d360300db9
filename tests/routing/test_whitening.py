"""directions="whitened": the rule, its commit, and that experts stay apart."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kmeans_route import KMeansRouter, MoE, attach, metrics
from kmeans_route.backends.whitening import inverse_root, scales_for, whitened
from kmeans_route.reference import whitened_reference
from tests.helpers.compare import assert_same_bits, generator
from tests.helpers.ranks import run_on_ranks

D, E, K = 16, 6, 2
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")


def some_centroids(num_experts: int, hidden_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Averages around an offset that all share, as those of hidden states are, and directions from before."""
    gen = generator(seed)
    centroids = 0.3 * torch.randn(num_experts, hidden_size, generator=gen) + torch.randn(hidden_size, generator=gen)
    return centroids, nn.functional.normalize(torch.randn(num_experts, hidden_size, generator=gen), dim=1)


def hidden_states(seed: int, num_tokens: int = 120, hidden_size: int = D) -> Tensor:
    gen = generator(seed)
    return torch.randn(num_tokens, hidden_size, generator=gen) + 0.5 * torch.randn(hidden_size, generator=gen)


SHAPES = [(1, 8), (2, 8), (6, 16), (16, 64), (32, 8), (64, 256), (128, 40)]


@pytest.mark.parametrize("kind", ["plain", "zero rows", "copies", "low rank", "huge", "tiny"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_alone_give_the_definition(shape: tuple[int, int], kind: str) -> None:
    centroids, weight = some_centroids(*shape)
    if kind == "zero rows":
        centroids[::3] = 0
    elif kind == "copies":
        centroids[-1] = centroids[0]
    elif kind == "low rank":  # the sum of squares of what is left out is 1e-6 of the whole
        centroids = centroids[:, :1] * centroids[:1] + 1e-3 * centroids
    elif kind in ("huge", "tiny"):
        centroids *= {"huge": 1e12, "tiny": 1e-9}[kind]
    got, want = whitened(centroids[None], weight[None])[0], whitened_reference(centroids.double(), weight.double())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-4 if kind == "low rank" else 2e-5)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(shape[0]), rtol=0, atol=1e-5)
    if kind == "zero rows":
        assert_same_bits(got[::3], weight[::3])
    if kind == "copies":
        torch.testing.assert_close(got[-1], got[0], rtol=0, atol=1e-5)


def test_the_definition_by_hand() -> None:
    """Three orthogonal differences of lengths that differ: the decorrelated ones are orthogonal and of one length."""
    eps = 0.01
    delta = torch.tensor([[3.0, 0, 0, 0], [-3.0, 0, 0, 0], [0, 1.0, 0, 0], [0, -1.0, 0, 0]]).double()
    mu = torch.tensor([0, 0, 2.0, 0]).double()
    gram = delta @ delta.T
    # The pairs +-3 and +-1 are the eigenvectors: W keeps their directions, so weight is mu + 2 e of each, at length 1.
    n = (3 + 3 + 1 + 1) / 4
    want = nn.functional.normalize(mu + n * nn.functional.normalize(delta, dim=1), dim=1)
    weight = torch.zeros(4, 4).double()
    torch.testing.assert_close(whitened_reference(delta + mu, weight), want)
    a = gram + eps * gram.trace() / 4 * torch.eye(4)
    root = inverse_root((a / a.norm()).float()[None])[0].double() / a.norm().sqrt()
    torch.testing.assert_close(root @ a @ root, torch.eye(4).double(), rtol=0, atol=1e-4)


def test_no_centroid_leaves_everything_and_one_keeps_its_direction() -> None:
    centroids, weight = some_centroids(4, 8)
    assert_same_bits(whitened(torch.zeros(1, 4, 8), weight[None])[0], weight)
    assert_same_bits(whitened_reference(torch.zeros(4, 8), weight), weight)
    centroids[1:] = 0
    got = whitened(centroids[None], weight[None])[0]
    torch.testing.assert_close(got[0], nn.functional.normalize(centroids[0], dim=0))


def test_neither_scale_nor_order_of_experts_matters() -> None:
    centroids, weight = some_centroids(12, 20)
    want, order = whitened(centroids[None], weight[None])[0], torch.randperm(12, generator=generator(1))
    torch.testing.assert_close(whitened(7.5 * centroids[None], weight[None])[0], want, rtol=0, atol=1e-5)
    torch.testing.assert_close(whitened(centroids[order][None], weight[order][None])[0], want[order], rtol=0, atol=1e-5)
    for _ in range(3):
        assert_same_bits(whitened(centroids[None], weight[None])[0], want)


@pytest.mark.parametrize("num_experts", [1, 16, 17, 256, 1024])
def test_enough_steps_for_every_eigenvalue(num_experts: int) -> None:
    x = torch.logspace(math.log10(0.01 / num_experts / 1.01), 0, 1000, dtype=torch.float64)  # eigenvalues of Z Y
    for scale in scales_for(num_experts):
        x = scale**2 * x * (3 - scale**2 * x) ** 2 / 4
        assert 0.05 < x[-1] <= 1  # rounding of the largest must not be all that is left of it
    torch.testing.assert_close(x, torch.ones_like(x), rtol=0, atol=1e-7)


def test_a_compiler_that_knows_no_size_meets_no_loop_over_symbols() -> None:
    def step(router: KMeansRouter, x: Tensor) -> Tensor:
        weights = router(x).weights
        router.commit()
        return weights

    torch.compiler.reset()
    compiled, routers = torch.compile(step, backend="eager", dynamic=True), [KMeansRouter(16, 6, 2) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*lru_cache")
        for seed in range(2):
            x = torch.randn(60, 16, generator=generator(seed))
            torch.testing.assert_close(compiled(routers[0], x), step(routers[1], x))
    torch.testing.assert_close(routers[0].weight, routers[1].weight, rtol=0, atol=1e-5)


def test_a_centroid_that_is_not_finite_counts_as_none_in_the_definition_too() -> None:
    centroids, weight = some_centroids(6, 20)
    centroids[1, 3] = math.inf
    want = whitened(centroids[None], weight[None])[0]
    torch.testing.assert_close(whitened_reference(centroids, weight), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(want[1], weight[1])


@pytest.mark.parametrize("average", ["ema", "cumulative"])
@pytest.mark.parametrize("init", ["tokens", "normal"])
def test_a_commit_writes_the_whitened_directions(init: str, average: str, backend: str) -> None:
    router = KMeansRouter(D, E, K, directions="whitened", init=init, average=average, backend=backend)
    plain = KMeansRouter(D, E, K, directions="centroids", init=init, average=average, backend=backend)
    for step in range(3):
        weight, x = router.weight.clone(), hidden_states(step)
        ids = router(x).indices
        plain(x, indices=ids)
        router.commit()
        plain.commit()
        if step < 2:  # after it the two route differently, so the scale of their scores and the biases part
            assert_same_bits(router.centroids, plain.centroids)
        want = whitened_reference(router.centroids.double(), weight.double())
        torch.testing.assert_close(router.weight.double(), want, rtol=0, atol=1e-5)
        assert step == 0 or router.metrics()["centroid_drift"] > 0


def test_a_commit_of_nothing_leaves_what_was_written() -> None:
    router = KMeansRouter(D, E, K, directions="whitened")
    for step in range(2):
        router(hidden_states(step))
        router.commit()
    new = nn.functional.normalize(torch.randn(E, D, generator=generator(9)), dim=1)
    router.weight.data.copy_(new)
    router.commit()
    assert_same_bits(router.weight, new)
    router(hidden_states(3))
    router.commit(torch.tensor(True))
    assert_same_bits(router.weight, new)
    router.commit(torch.tensor(False))
    torch.testing.assert_close(
        router.weight.double(), whitened_reference(router.centroids.double(), new.double()), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("directions", ["centroids", "whitened"])
def test_first_centroids_that_are_equal_part(directions: str) -> None:
    """Tokens of one direction and different lengths are different tokens; as centroids they would stay equal."""
    router = KMeansRouter(D, E, K, directions=directions)
    gen = generator(0)
    x = torch.randn(1, D, generator=gen) * torch.rand(64, 1, generator=gen)
    router(x)
    router.commit()
    unit = nn.functional.normalize(router.centroids, dim=1)
    assert float((unit @ unit.T - 2 * torch.eye(E)).max()) < 1 - 1e-4
    for step in range(20):
        router(hidden_states(step))
        router.commit()
    assert float((router.weight @ router.weight.T - 2 * torch.eye(E)).max()) < 0.999


class Layers(nn.Module):
    """Two routers of one shape and one of another."""

    def __init__(self, directions: str = "whitened", **options: Any) -> None:
        super().__init__()
        shapes = [(E, K), (E, K), (2 * E, 1)]
        self.routers = nn.ModuleList(
            KMeansRouter(D, e, k, directions=directions, name=str(i), **options) for i, (e, k) in enumerate(shapes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([router(x).weights.sum() for router in self.routers]).sum()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def train(model: Layers, optimizer: Any, steps: range, rank: int = 0, num_ranks: int = 1) -> None:
    for step in steps:
        model(hidden_states(step)[rank::num_ranks].requires_grad_())
        optimizer.step()


def still() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)


def test_layers_of_one_shape_together_are_as_each_alone() -> None:
    together, alone, optimizer = Layers(), Layers(), still()
    attach(together, optimizer)
    for step in range(4):
        train(together, optimizer, range(step, step + 1))
        alone(hidden_states(step).requires_grad_())
        for router in alone.routers:
            router.commit()  # type: ignore[operator]
    for name, value in state_of(alone).items():
        torch.testing.assert_close(state_of(together)[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_resume_is_bit_for_bit(stop: int) -> None:
    straight, first, second = Layers(), Layers(), Layers()
    for model, steps in ((straight, range(6)), (first, range(stop))):
        optimizer = still()
        attach(model, optimizer)
        train(model, optimizer, steps)
    second.load_state_dict(first.state_dict())
    optimizer = still()
    attach(second, optimizer)
    train(second, optimizer, range(stop, 6))
    for name, value in state_of(straight).items():
        assert_same_bits(state_of(second)[name], value, name)


WIRES: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"wire": "bf16"}, "shard": {"shard": True}}


def on_ranks(rank: int, num_ranks: int) -> dict[str, dict[str, Tensor]]:
    warnings.simplefilter("ignore")
    states = {}
    for name, options in WIRES.items():
        model, optimizer = Layers(), still()
        attachment = attach(model, optimizer, **options)
        train(model, optimizer, range(5), rank, num_ranks)
        attachment.remove()
        states[name] = state_of(model)
    return states


def test_ranks_are_equal_and_agree_with_one_process(tmp_path: Path) -> None:
    first, second = run_on_ranks(on_ranks, 2, tmp_path, 2)
    model, optimizer = Layers(), still()
    attach(model, optimizer)
    train(model, optimizer, range(5))
    for name in WIRES:
        for key, value in first[name].items():
            assert_same_bits(second[name][key], value, f"{name} {key}")
        for i in range(3):
            made, centroids = (first[name][f"routers.{i}.{which}"].double() for which in ("weight", "centroids"))
            torch.testing.assert_close(made, whitened_reference(centroids, made), rtol=0, atol=1e-5)
    for key, value in state_of(model).items():
        torch.testing.assert_close(first["fp32"][key], value, rtol=0, atol=1e-5, msg=key)


def tokens_with_few_strong_axes(seed: int) -> Tensor:
    gen = generator(seed)
    return torch.randn(256, 32, generator=gen) * torch.logspace(0, -2, 32) + 0.3


@pytest.mark.parametrize("top_k", [2, 8])
def test_experts_stay_apart_where_plain_averages_become_one(top_k: int) -> None:
    """Averages of a token's K experts alike are a power iteration: they turn to the first axes of the data."""
    found = {}
    for directions in ("centroids", "whitened"):
        router = KMeansRouter(32, 16, top_k, directions=directions)
        for step in range(60):
            router(tokens_with_few_strong_axes(step))
            router.commit()
        ids = torch.cat([router.route(tokens_with_few_strong_axes(1000 + i)).indices for i in range(4)])
        found[directions] = float(metrics.effective_experts(ids, 16))
    assert found["whitened"] > (1.1 if top_k == 2 else 2.0) * found["centroids"], found
    assert found["whitened"] > 0.4 * 16, found


@pytest.mark.parametrize(("top_k", "want"), [(1, ("centroids", 0.2)), (2, ("whitened", 0.1)), (E, ("whitened", 0.1))])
def test_the_default_goes_by_the_number_of_experts_a_token(top_k: int, want: tuple[str, float]) -> None:
    learned = nn.Linear(D, E)
    given = {"directions": None}
    for router in (
        KMeansRouter(D, E, top_k),
        KMeansRouter(D, E, top_k, **given),
        MoE(D, 8, E, top_k).router,
        KMeansRouter.from_linear(learned, top_k, **given),
    ):
        assert (router.commit_options.directions, router.options.tau) == want
        assert f"directions={want[0]!r}" in repr(router)
    for directions, tau in (("centroids", 0.2), ("whitened", 0.1)):
        named = KMeansRouter(D, E, top_k, directions=directions)
        assert (named.commit_options.directions, named.options.tau) == (directions, tau)


@pytest.mark.parametrize("directions", ["centroids", "whitened"])
def test_given_averages_score_as_a_commit_has_them(directions: str) -> None:
    """Rows of a gate score as they are until the first commit, which then turns them; averages as they will."""
    given = some_centroids(E, D)[0]
    unit, turns = nn.functional.normalize(given.double(), dim=1), []
    for averages in (False, True):
        router = KMeansRouter(D, E, K, directions=directions)
        router.set_centroids(given, averages=averages)
        torch.testing.assert_close(router.centroids.double(), unit, rtol=0, atol=1e-6)
        want = whitened_reference(unit, unit) if averages and directions == "whitened" else unit
        torch.testing.assert_close(router.weight.double(), want, rtol=0, atol=1e-5)
        before = router.weight.clone()
        router(hidden_states(0, 4))
        router.commit()
        turns.append(float(metrics.centroid_drift(before, router.weight).max()))
    # 999 steps of weight: a commit moves a centroid by at most 2 / 1000, whitening by little more.
    assert 0 < turns[1] < 0.01
    assert turns[0] > 10 * turns[1] if directions == "whitened" else turns[0] < 0.01


def committed(steps: int, **options: Any) -> KMeansRouter:
    router = KMeansRouter(D, E, K, **options)
    for step in range(steps):
        router(hidden_states(step))
        router.commit()
    return router


@pytest.mark.parametrize("steps", [1, 4])
def test_a_state_of_the_paper_s_rule_is_told_of(steps: int) -> None:
    state = committed(steps, directions="centroids").state_dict()
    router = KMeansRouter(D, E, K, name="layers.3")
    with pytest.warns(
        UserWarning, match="router 'layers.3' must have the rule .* got directions='whitened' and a weight"
    ):
        router.load_state_dict(state)
    assert_same_bits(router.weight, state["weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KMeansRouter(D, E, K, directions="centroids").load_state_dict(state)
        router.load_state_dict({name: value for name, value in state.items() if name != "weight"}, strict=False)
    want = whitened_reference(state["centroids"].double(), state["weight"].double())
    torch.testing.assert_close(router.weight.double(), want, rtol=0, atol=1e-5)


def test_a_whitened_state_is_told_of_where_plain_directions_go_on() -> None:
    state = committed(4).state_dict()
    router = KMeansRouter(D, E, 1, name="layers.3")  # whose default is "centroids"
    with pytest.warns(UserWarning, match="got directions='centroids' and a weight that directions='whitened' has"):
        router.load_state_dict(state)
    assert_same_bits(router.weight, state["weight"])


def given_rows(averages: bool) -> KMeansRouter:
    router = KMeansRouter(D, E, K)
    router.set_centroids(some_centroids(E, D)[0], averages=averages)
    return router


def of_two_experts(directions: str) -> KMeansRouter:
    """Two differences from their mean are one another's opposites, which nothing decorrelates: the rules are one."""
    router = KMeansRouter(D, 2, 2, directions=directions)
    for step in range(2):
        router(hidden_states(step))
        router.commit()
    return router


OWN_STATES = {
    "no data": lambda: committed(0),
    "first data": lambda: committed(1),
    "trained": lambda: committed(4),
    "trained with a learned offset": lambda: committed(4, learned_offset=True),
    "trained from nothing": lambda: committed(4, init="normal", average="cumulative"),
    "just begun": lambda: committed(1),
    "rows of a gate": lambda: given_rows(averages=False),
    "averages": lambda: given_rows(averages=True),
    "two experts": lambda: of_two_experts("whitened"),
    "two experts of the other rule": lambda: of_two_experts("centroids"),
}


@pytest.mark.parametrize("kind", OWN_STATES)
def test_a_router_s_own_state_is_loaded_in_silence(kind: str) -> None:
    first = OWN_STATES[kind]()
    options = {"learned_offset": first.offset is not None, "average": first.average, "init": first.init}
    second = KMeansRouter(D, first.num_experts, K, directions="whitened", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(first.state_dict())
        second.to(torch.bfloat16).load_state_dict(
            {name: v.bfloat16().to(v.dtype) for name, v in first.state_dict().items()}
        )
        second.load_state_dict(first.state_dict())
    assert_same_bits(second.weight, first.weight)


def test_options() -> None:
    assert KMeansRouter(D, E, K, directions="whitened", tau=0.3).options.tau == 0.3
    assert "directions='whitened'" in repr(MoE(D, 8, E, K, directions="whitened"))
    with pytest.raises(ValueError, match="directions must be one of"):
        KMeansRouter(D, E, K, directions="white")


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_effective_experts_is_that_of_the_last_step(top_k: int) -> None:
    router = KMeansRouter(32, 16, top_k, directions="whitened")
    assert math.isnan(router.metrics()["effective_experts"])
    for step in range(4):
        ids = torch.cat([router(tokens_with_few_strong_axes(10 * step + part)).indices for part in range(2)])
        router.eval()(tokens_with_few_strong_axes(99))
        router.train()
        router.commit()
        want = float(metrics.effective_experts(ids, 16))
        assert router.metrics()["effective_experts"] == pytest.approx(want, rel=1e-5)
    router.commit()
    assert router.metrics()["effective_experts"] == pytest.approx(want, rel=1e-5)


def test_pairs_count_once_and_only_what_counts() -> None:
    router = KMeansRouter(D, E, K)
    x = hidden_states(0).requires_grad_()
    x.data[3] = torch.nan
    count_mask = torch.arange(120) % 3 > 0
    ids = router.route(x, count_mask=count_mask, gather=True).indices
    torch.utils.checkpoint.checkpoint(lambda x: router(x).weights, x, use_reentrant=False)[:, 0].sum().backward()
    want = torch.zeros(E, E)
    for seen in (count_mask, torch.ones(120, dtype=torch.bool)):
        for token in range(120):
            if seen[token] and token != 3:
                for one in ids[token]:
                    for other in ids[token]:
                        want[one, other] += 1
    assert_same_bits(router.pending.pairs, want)


def test_few_effective_experts_are_said_once() -> None:
    router = KMeansRouter(32, 16, 8, directions="centroids", name="layers.3")
    for step in range(60):
        router(tokens_with_few_strong_axes(step))
        router.commit()
    with pytest.warns(
        UserWarning, match=r"router 'layers.3' must not have .*, got [0-3]\.[0-9] effective experts of 16"
    ):
        router.metrics()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert router.metrics()["effective_experts"] < 4
