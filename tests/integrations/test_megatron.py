"""Megatron-Core's MoELayer with a K-Means router, on the CPU, where two functions of torch.cuda are patched."""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("megatron.core")
pytest.importorskip("kmeans_route.integrations.megatron", exc_type=ImportError)
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from kmeans_route import KMeansRouter, ops, route
from kmeans_route.integrations.megatron import VERL, FinalizeModelGrads, KMeansTopKRouter, with_kmeans_router
from kmeans_route.reference import whitened_reference
from tests.helpers.compare import assert_same_bits
from tests.helpers.examples import run_example
from tests.helpers.ranks import run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")
D, E, K = 16, 8, 2


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The one patch: Megatron asks for the current GPU wherever it makes a tensor. And for time, none of its fusing."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def config(**options: Any) -> TransformerConfig:
    fixed: dict[str, Any] = {
        "num_layers": 2, "hidden_size": D, "num_attention_heads": 2, "ffn_hidden_size": 32, "add_bias_linear": False,
        "num_moe_experts": E, "moe_router_topk": K, "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather", "use_cpu_initialization": True, "moe_aux_loss_coeff": 0.0,
    }  # fmt: skip
    return TransformerConfig(**{**fixed, **options})


def submodules_of(spec: Any) -> Any:
    """Of a ModuleSpec, or of the partial that later versions have in its place."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


class Chunk(nn.Module):
    """A model chunk: two MoE layers with residuals. `recompute` runs them under Megatron's checkpoint."""

    def __init__(self, cfg: TransformerConfig, recompute: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.config, self.recompute = cfg, recompute
        spec = with_kmeans_router(get_moe_module_spec(use_te=False, num_experts=E), **options)
        self.layers = nn.ModuleList(MoELayer(cfg, submodules_of(spec)) for _ in range(2))
        for number, layer in enumerate(self.layers, start=1):
            layer.set_layer_number(number)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            if self.recompute:
                x = x + tensor_parallel.checkpoint(lambda h, layer=layer: layer(h)[0], False, x)
            else:
                x = x + layer(x, padding_mask=padding_mask)[0]
        return x


def hidden(seed: int = 0, length: int = 20) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(length, 3, D) + 0.3


def train(model: Chunk, finalize: Any, num_steps: int, micro_batches: int = 1) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(num_steps):
        total = 0.0
        for part in hidden(step % 2).chunk(micro_batches):
            loss = (model(part.requires_grad_()) - part.detach().roll(1, -1)).square().mean() / micro_batches
            loss.backward()
            total += float(loss)
        finalize([model], None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def routers_of(model: nn.Module) -> list[KMeansTopKRouter]:
    return [m for m in model.modules() if isinstance(m, KMeansTopKRouter)]


def test_forward_backward_and_one_commit_a_step() -> None:
    called: list[Any] = []
    model = Chunk(config())
    finalize = FinalizeModelGrads(lambda *args, **kwargs: called.append((args, kwargs)), [model])
    losses = train(model, finalize, 12, micro_batches=2)
    assert losses[-2] < 0.9 * losses[0]
    assert len(called) == 12
    assert called[0] == (([model], None), {})
    assert [int(router.steps) for router in routers_of(model)] == [11, 11]
    assert int(routers_of(model)[0].tokens_per_expert.sum()) == 60 * K
    assert not [name for name, _ in model.named_parameters() if "router" in name]
    assert finalize.metrics()["layers.0.router/steps"] == 11
    finalize.remove()
    assert routers_of(model)[0]._scope is None


def test_micro_batches_commit_as_one_batch() -> None:
    states = []
    for micro_batches in (1, 4):
        model = Chunk(config())
        train(model, FinalizeModelGrads(lambda *_: None, model), 1, micro_batches)
        states.append(routers_of(model)[0].state_dict())
    for name, value in states[0].items():
        assert_same_bits(states[1][name], value, name)


@pytest.fixture
def no_random_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's checkpoint keeps the random states of a GPU, and there is none."""
    monkeypatch.setattr("megatron.core.tensor_parallel.random._get_all_rng_states", lambda: (0,), raising=False)
    monkeypatch.setattr("megatron.core.tensor_parallel.random._set_all_rng_states", lambda *_: None, raising=False)


@pytest.mark.usefixtures("no_random_states")
def test_megatrons_checkpoint_counts_each_token_once() -> None:
    """Its first forward runs without gradients; the entry of the chunk decides."""
    plain, recomputed = Chunk(config()), Chunk(config(), recompute=True)
    for model in (plain, recomputed):
        train(model, FinalizeModelGrads(lambda *_: None, model), 3)
    for got, want in zip(routers_of(recomputed), routers_of(plain), strict=True):
        assert_same_bits(got.tokens_per_expert, want.tokens_per_expert, "loads")
        torch.testing.assert_close(got.weight, want.weight)


def test_probabilities_and_map_are_those_of_route() -> None:
    router = KMeansTopKRouter(config(moe_router_topk_scaling_factor=2.5), seed=3, tau=0.2).eval()
    x = hidden()
    probs, routing_map = router(x)
    want = route(x, router.weight, K, tau=0.2, scaling=2.5)
    assert probs.shape == routing_map.shape == (60, E)
    assert (routing_map.sum(1) == K).all()
    assert torch.equal(routing_map, torch.zeros(60, E, dtype=torch.bool).scatter(1, want.indices, True))
    assert_same_bits(probs.gather(1, want.indices), want.weights, "weights")
    assert not probs[~routing_map].any()
    assert router(x.bfloat16())[0].dtype == torch.bfloat16
    assert KMeansTopKRouter(config(moe_router_dtype="fp32")).eval()(x.bfloat16())[0].dtype == torch.float32


def test_padding_is_routed_and_not_counted() -> None:
    x, padding = hidden(), torch.zeros(20, 3, dtype=torch.bool)
    padding[15:] = True
    x[padding] = 7.0
    masked, short = KMeansTopKRouter(config(), balance="quantile"), KMeansTopKRouter(config(), balance="quantile")
    with_mask, without = masked(x, padding), masked.route(x)
    assert_same_bits(with_mask[0].gather(1, without.indices), without.weights, "weights")
    short(x[:15])
    for field in masked.pending.FIELDS:
        if field not in ("sums", "std_sum", "num_dropped"):
            assert_same_bits(getattr(masked.pending, field), getattr(short.pending, field), field)
    torch.testing.assert_close(masked.pending.sums, short.pending.sums)
    assert int(masked.pending.num_tokens) == 45


def test_a_padded_batch_is_routed_once_and_leaves_the_statistics_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    x, padding = hidden(), torch.zeros(20, 3, dtype=torch.bool)
    padding[12:, 1] = True
    padding[5:, 2] = True
    model = Chunk(config(), balance="quantile")
    FinalizeModelGrads(lambda *_: None, model)
    alone = [KMeansRouter(D, E, K, balance="quantile") for _ in model.layers]
    routings, entered, route_op = [], [], ops.route

    def counted(*args: Any) -> Any:
        routings.append(args)
        return route_op(*args)

    monkeypatch.setattr(ops, "route", counted)
    for router, other in zip(routers_of(model), alone, strict=True):
        router.observe(lambda at, _routing: entered.append(at.x))
        with torch.no_grad():
            other.weight.copy_(router.weight)
    model(x.requires_grad_(), padding.T).square().mean().backward()  # Megatron's layers take (B, S)
    assert len(routings) == len(entered) == 2, "one call a layer"
    for router, other, x_TD in zip(routers_of(model), alone, entered, strict=True):
        assert x_TD.shape == (60, D), "padding is routed too"
        other._commits_by_hand = True
        other(x_TD.detach()[~padding.flatten()])
        assert int(other.pending.num_tokens) == 60 - 8 - 15
        for field in other.pending.FIELDS:
            got, want = getattr(router.pending, field), getattr(other.pending, field)
            if field in ("sums", "std_sum", "moments"):  # another order of the same terms
                torch.testing.assert_close(got, want)
            else:
                assert_same_bits(got, want, field)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.usefixtures("no_random_states")
def test_megatrons_replay_gives_the_gradients_of_what_was_recorded(recompute: bool) -> None:
    """Two micro-batches, forward both, then backward both: each recomputation gets the ids of its own forward."""
    RouterReplay.clear_global_router_replay_instances()
    model = Chunk(config(moe_enable_routing_replay=True), recompute)
    for router in routers_of(model):
        router.set_centroids(torch.randn(E, D))
        router.freeze()
    parts = hidden(1).chunk(2)

    def gradients(ids: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[Tensor]]:
        recorded, losses = [], []
        for place, part in enumerate(parts):
            RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
            if ids:
                RouterReplay.set_replay_data(ids[place])
                RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            losses.append(model(part.clone().requires_grad_()).square().mean())
            recorded.append(RouterReplay.get_recorded_data())
        if ids:
            RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
        for loss in losses:
            loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        RouterReplay.clear_global_router_replay_action()
        return recorded, grads

    recorded, want = gradients([])
    assert [ids.shape for ids in recorded[0]] == [(30, K)] * 2
    for router in routers_of(model):  # selection would differ now, and scores do not
        router.expert_bias.copy_(torch.linspace(-1, 1, E))
    assert not all(torch.equal(a, b) for a, b in zip(gradients([])[1], want, strict=True))
    got = gradients(recorded)[1]
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)
    RouterReplay.clear_global_router_replay_instances()


@pytest.fixture
def verl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """verl's module of router replay with its patch applied, and two functions of the module that uses it.

    Each from its file: verl itself imports ray.
    """
    found = importlib.util.find_spec("verl")
    if found is None or found.origin is None:
        pytest.skip("verl is not installed")
    folder = Path(found.origin).parent / "utils" / "megatron"
    spec = importlib.util.spec_from_file_location(VERL, folder / "router_replay_patch.py")
    assert spec is not None
    assert spec.loader is not None
    patch = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, VERL, patch)
    spec.loader.exec_module(patch)
    walk = ast.parse((folder / "router_replay_utils.py").read_text(encoding="utf-8"))
    named = ("iter_model_routers", "set_model_router_replay_action")
    walk.body = [part for part in walk.body if isinstance(part, ast.FunctionDef) and part.name in named]
    names = vars(patch)
    exec(compile(walk, "router_replay_utils.py", "exec"), names)

    places: list[Any] = [TopKRouter, TransformerConfig, MoEAlltoAllTokenDispatcher]
    before = [dict(vars(place)) for place in places]
    patch.apply_router_replay_patch()
    yield patch
    for place, had in zip(places, before, strict=True):
        for name, value in dict(vars(place)).items():
            if name not in had:
                delattr(place, name)
            elif value is not had[name]:
                setattr(place, name, had[name])
    del TransformerConfig.__init__.__signature__  # it is written on Megatron's function itself


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.usefixtures("no_random_states")
def test_verls_replay_reaches_the_routers(verl: Any, recompute: bool) -> None:
    """As its engine does it: a forward that records, then of each micro-batch forward and backward with its ids."""
    model = Chunk(config(enable_routing_replay=True), recompute)
    for router in routers_of(model):
        router.set_centroids(torch.randn(E, D))
        router.freeze()
    assert [number for number, _ in verl.iter_model_routers(model)] == [1, 2]
    assert [handle for _, handle in verl.iter_model_routers(model)] == verl.RouterReplay.router_instances
    parts = hidden(1).chunk(2)

    def gradients(ids: list[list[Tensor]], mask: Tensor | None = None) -> list[Tensor]:
        for place, part in enumerate(parts):
            if ids:
                verl.set_model_router_replay_action(model, verl.RouterReplayAction.REPLAY_FORWARD)
                for (_, handle), given in zip(verl.iter_model_routers(model), ids[place], strict=True):
                    handle.set_target_indices(given, replay_mask=mask)
            loss = model(part.clone().requires_grad_()).square().mean()
            if ids and recompute:
                verl.set_model_router_replay_action(model, verl.RouterReplayAction.REPLAY_BACKWARD)
            loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        verl.RouterReplay.clear_global_indices()
        verl.RouterReplay.clear_global_router_replay_action()
        return grads

    def recorded() -> list[list[Tensor]]:
        verl.RouterReplay.set_global_router_replay_action(verl.RouterReplayAction.RECORD)
        seen = []
        with torch.no_grad():
            for part in parts:
                model(part)
                seen.append(verl.RouterReplay.get_recorded_data())
        verl.RouterReplay.clear_global_router_replay_action()
        return seen

    ids, want = recorded(), gradients([])
    assert [given.shape for given in ids[0]] == [(30, K)] * 2
    for router in routers_of(model):
        router.expert_bias.copy_(torch.linspace(-1, 1, E))
    native = gradients([])
    assert not all(torch.equal(a, b) for a, b in zip(native, want, strict=True))
    for got, one in zip(gradients(ids), want, strict=True):
        assert_same_bits(got, one)
    for got, one in zip(gradients(ids, torch.zeros(30, dtype=torch.int64)), native, strict=True):
        assert_same_bits(got, one)


def test_groups_follow_megatrons_own_score() -> None:
    grouped = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
    assert KMeansTopKRouter(config(**grouped)).options.group_score == "max"
    top2 = KMeansTopKRouter(config(moe_router_topk=4, **grouped)).options
    assert (top2.n_group, top2.topk_group, top2.group_score) == (4, 2, "top2")
    with pytest.raises(ValueError, match="moe_router_topk / moe_router_group_topk must be 1 or 2, got 3"):
        KMeansTopKRouter(config(moe_router_topk=3, moe_router_num_groups=2, moe_router_group_topk=1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_router_enable_expert_bias", True),
        ("moe_aux_loss_coeff", 0.01),
        ("moe_z_loss_coeff", 0.001),
        ("moe_expert_capacity_factor", 1.0),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_input_jitter_eps", 0.1),
        ("moe_router_force_load_balancing", True),
    ],
)
def test_a_configuration_that_a_kmeans_router_replaces_is_refused(name: str, value: Any) -> None:
    cfg = config()
    setattr(cfg, name, value)
    with pytest.raises(ValueError, match=f"{name} must not be set with a K-Means router, got {value!r}"):
        KMeansTopKRouter(cfg)


def test_layers_start_from_directions_of_their_own_and_bf16_leaves_the_state() -> None:
    one, two = routers_of(Chunk(config()).bfloat16())
    assert one.weight.dtype == torch.float32
    assert not torch.equal(one.weight, two.weight)
    assert (one.name, two.layer_number) == ("layer.1", 2)
    x = hidden()
    one.initialize(x)
    before = one.weight.clone()
    one.set_layer_number(9)
    assert_same_bits(one.weight, before, "weight")


def test_distributed_checkpoint_knows_the_state() -> None:
    model = Chunk(config())
    train(model, FinalizeModelGrads(lambda *_: None, model), 2)
    sharded = model.layers[0].sharded_state_dict(prefix="mlp.")
    got = {name.removeprefix("mlp.router."): value for name, value in sharded.items() if ".router." in name}
    want = model.layers[0].router.state_dict()
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_same_bits(got[name].data.reshape(value.shape), value, name)


def steps_on_a_rank(rank: int) -> dict[str, Tensor]:
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment]
    torch.cuda.current_stream = lambda: None  # type: ignore[assignment,return-value]
    parallel_state.initialize_model_parallel()
    model = Chunk(config())
    finalize = FinalizeModelGrads(lambda *_: None, model)
    for step in range(3):
        model(hidden(step).chunk(2)[rank].requires_grad_()).square().mean().backward()
        finalize()
    parallel_state.destroy_model_parallel()
    return {name: value.clone() for name, value in routers_of(model)[0].state_dict().items()}


@pytest.mark.slow  # each process imports Megatron
def test_data_parallel_ranks_commit_the_tokens_of_both(tmp_path: Path) -> None:
    states = run_on_ranks(steps_on_a_rank, 2, tmp_path / "ranks")
    model = Chunk(config())
    finalize = FinalizeModelGrads(lambda *_: None, model)
    for step in range(3):
        model(hidden(step).requires_grad_()).square().mean().backward()
        finalize()
    for name, value in routers_of(model)[0].state_dict().items():
        assert_same_bits(states[0][name], states[1][name], name)
        torch.testing.assert_close(states[0][name], value, msg=name)


LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tensor parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "expert parallel": {"expert_model_parallel_size": 2},
}


def draw_experts(model: Chunk) -> None:
    """Weights that an expert has wherever it lives: Megatron draws those of the first experts on every rank."""
    for number, layer in enumerate(model.layers):
        for expert, mlp in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
            g = torch.Generator().manual_seed(100 * number + expert)
            for linear, split in ((mlp.linear_fc1, 0), (mlp.linear_fc2, 1)):
                shape = list(linear.weight.shape)
                num_parts = 32 // shape[split]
                shape[split] = 32
                part = dist.get_rank() if num_parts > 1 else 0
                linear.weight.data.copy_(torch.randn(shape, generator=g).chunk(num_parts, split)[part] / 4)


def steps_in_a_layout(rank: int, layout: str) -> dict[str, Tensor]:
    """Three steps with Megatron's own gradient buffers and finalisation: state and summed gradient of the routers."""
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment]
    torch.cuda.current_stream = lambda: None  # type: ignore[assignment,return-value]
    sizes = {name: value for name, value in LAYOUTS[layout].items() if name.endswith("_size")}
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)
    cfg = config(**LAYOUTS[layout])
    model = Chunk(cfg, learned_offset=True)
    draw_experts(model)
    wrapped = DistributedDataParallel(cfg, DistributedDataParallelConfig(), model)
    finalize = FinalizeModelGrads(finalize_model_grads, [wrapped])
    world = dist.get_world_size()
    # Data-parallel ranks average their gradients, those that share a sequence sum them.
    weight = 1 if "sequence_parallel" in LAYOUTS[layout] else world
    out = {}
    for step in range(3):
        wrapped.zero_grad_buffer()
        x = hidden(step)
        (wrapped(x.chunk(world)[rank].requires_grad_()).square().sum() * weight / 1000).backward()
        finalize([wrapped])
        with torch.no_grad():
            for number, router in enumerate(routers_of(model)):
                out[f"{step}.{number}.gradient"] = router.offset.main_grad.clone()
                router.offset -= router.offset.main_grad
    for number, router in enumerate(routers_of(model)):
        out |= {f"{number}.{name}": value.clone() for name, value in router.state_dict().items()}
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    return out


@pytest.mark.slow  # each process imports Megatron
@pytest.mark.parametrize("layout", ["tensor parallel", "expert parallel"])
def test_tensor_and_expert_parallel_ranks_train_as_one(layout: str, tmp_path: Path) -> None:
    states, want = run_on_ranks(steps_in_a_layout, 2, tmp_path / "ranks", layout), steps_in_a_layout(0, "one rank")
    assert want["2.0.gradient"].abs().max() > 1e-3
    for name, value in want.items():
        assert_same_bits(states[0][name], states[1][name], name)
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_example_of_the_page_does_what_it_shows() -> None:
    names = run_example("megatron")
    layer = MoELayer(config(), submodules_of(names["spec"]))
    cfg, called = config(), []
    model = Chunk(cfg)
    names["finalize_model_grads"] = lambda *args: called.append(args)
    names["before_training"](cfg, [model])
    assert isinstance(layer.router, KMeansTopKRouter)
    assert isinstance(cfg.finalize_model_grads_func, FinalizeModelGrads)
    model(hidden()).sum().backward()
    cfg.finalize_model_grads_func([model])
    assert len(called) == 1
    assert bool(routers_of(model)[0].initialized)


def test_directions_are_an_option_of_the_router() -> None:
    assert KMeansTopKRouter(config(), directions="centroids").options.tau == 0.2
    router = KMeansTopKRouter(config())
    for step in range(3):
        router(hidden(step).requires_grad_())
        router.commit()
    assert router.options.tau == 0.1
    want = whitened_reference(router.centroids.double(), router.weight.double())
    torch.testing.assert_close(router.weight.double(), want, rtol=0, atol=1e-4)
