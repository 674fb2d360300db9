"""torchtitan: its debug-size DeepSeek-V3 with the flag, on the CPU."""

import copy
import importlib.metadata
import importlib.util
import inspect
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torchtitan.models.deepseek_v3", exc_type=ImportError)  # its models need a torch after 2.11
pytest.importorskip("kmeans_route.integrations.torchtitan", exc_type=ImportError)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchtitan.components.optimizer import default_adamw
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.moe import TokenChoiceTopKRouter
from torchtitan.models.common.moe_sharding import set_moe_sharding_config
from torchtitan.models.deepseek_v3 import model_registry

from kmeans_route import KMeansRouter, route
from kmeans_route.integrations import torchtitan as adapter
from kmeans_route.integrations.torchtitan import KMeansRouting, KMeansTokenChoiceRouter, kmeans_routing
from kmeans_route.reference import whitened_reference
from tests.helpers.compare import assert_same_bits, routers_of
from tests.helpers.examples import run_example

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*determinis")
D, E, K = 256, 8, 3
LENGTH = 32
FLAT = "x_TD" in inspect.signature(TokenChoiceTopKRouter.forward).parameters
"""torchtitan's main branch: a model takes the tokens of all rows as one dimension."""


class PlainAttention(ScaledDotProductAttention):
    """FlexAttention has no backward pass on the CPU. Flat tokens are rows of LENGTH here, in place of a mask."""

    @dataclass(kw_only=True, slots=True)
    class Config(ScaledDotProductAttention.Config):
        pass

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if q.dim() == 4:
            return super().forward(q, k, v, **options)
        rows = [part.unflatten(0, (-1, LENGTH)) for part in (q, k, v)]
        return super().forward(*rows, **options).flatten(0, 1)


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """torchtitan makes a mesh of one rank, too, and that needs a process group."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def debug_spec(num_layers: int) -> Any:
    """The debug flavor with plain attention."""
    spec = model_registry("debugmodel", attn_backend="flex")
    spec.model.layers = spec.model.layers[:num_layers]
    for layer in spec.model.layers:
        layer.attention.inner_attention = PlainAttention.Config()
    return spec


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """(rows * LENGTH, vocabulary), of either kind of model."""
    if not FLAT:
        return model(tokens).flatten(0, 1)
    return model(tokens.flatten(), torch.arange(LENGTH).repeat(len(tokens)))


def train(model: nn.Module, spec: Any, num_steps: int, micro_batches: int = 1) -> list[float]:
    optimizers = default_adamw(lr=1e-3).build(model_parts=[model])
    one = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "world_size"), 1)
    spec.post_optimizer_build_fn(optimizers, [model], ParallelDims(**one))
    torch.manual_seed(1)
    tokens, losses = torch.randint(0, 2048, (2, LENGTH + 1)), []
    for _ in range(num_steps):
        total = 0.0
        for part in tokens.split(2 // micro_batches):
            logits = logits_of(model, part[:, :-1]).float()
            loss = F.cross_entropy(logits, part[:, 1:].flatten()) / micro_batches
            loss.backward()
            total += float(loss)
        optimizers.step()
        optimizers.zero_grad()
        losses.append(total)
    return losses


def make(num_layers: int = 2, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    spec = kmeans_routing(debug_spec(num_layers), **options)
    model = spec.model.build()
    model.init_states()
    return model, spec


def router(**options: Any) -> KMeansTokenChoiceRouter:
    old = debug_spec(2).model.layers[1].moe.router
    return KMeansRouting.Config(options=options).build()._router("here", old).build()


@pytest.mark.parametrize(("num_layers", "num_steps"), [(2, 4), pytest.param(6, 20, marks=pytest.mark.slow)])
def test_the_debug_model_trains_with_the_flag(num_layers: int, num_steps: int) -> None:
    model, spec = make(num_layers)
    model.verify_module_protocol()
    losses = train(model, spec, num_steps)
    assert losses[-1] < losses[0] - 1
    assert len(routers_of(model)) == num_layers - 1  # the first layer is dense
    for one in routers_of(model):
        assert int(one.steps) == num_steps - 1  # the first commit sets the centroids
        assert int(one.tokens_per_expert.sum()) == 2 * LENGTH * K
        assert int(one.pending.num_tokens) == 0
        assert not one.expert_bias.any()  # the block has the bias
    assert model.layers["1"].moe.expert_bias_E.any()
    assert not [name for name, _ in model.named_parameters() if "router" in name]


def test_a_learned_offset_trains_from_a_meta_device_build() -> None:
    with torch.device("meta"):
        spec = kmeans_routing(debug_spec(2), learned_offset=True)
        model = spec.model.build()
    model.to_empty(device="cpu")
    model.init_weights(buffer_device=torch.device("cpu"))
    model.verify_module_protocol()
    (one,) = routers_of(model)
    assert one.offset is not None
    assert not one.offset.any()
    losses = train(model, spec, 4)
    assert losses[-1] < losses[0] - 1
    assert one.offset.any(1).all()
    assert int(one.steps) == 3


def test_buffers_go_to_their_own_device_and_the_offset_stays() -> None:
    one = router(learned_offset=True)
    before = one.state_dict()
    one._init_self_buffers(buffer_device=torch.device("meta"))
    assert one.weight.is_meta
    assert one.pending.sums.is_meta
    assert not one.offset.is_meta
    one._init_self_buffers(buffer_device=torch.device("cpu"))
    for name, value in before.items():
        assert_same_bits(one.state_dict()[name], value, name)


def test_two_micro_batches_commit_as_one_batch() -> None:
    whole, halves = make(), make()
    train(*whole, 1)
    train(*halves, 1, micro_batches=2)
    for one, two in zip(routers_of(whole[0]), routers_of(halves[0]), strict=True):
        assert_same_bits(two.weight, one.weight, "weight")
        assert_same_bits(two.tokens_per_expert, one.tokens_per_expert, "loads")


def test_activation_checkpointing_counts_each_token_once() -> None:
    model, spec = make()
    model.layers["1"] = checkpoint_wrapper(model.layers["1"])
    train(model, spec, 2)
    plain, spec = make()
    train(plain, spec, 2)
    for got, want in zip(routers_of(model), routers_of(plain), strict=True):
        assert_same_bits(got.tokens_per_expert, want.tokens_per_expert, "loads")
        assert_same_bits(got.weight, want.weight, "weight")


@pytest.mark.parametrize("lead", [(2, 5), (10,)], ids=["rows", "flat"])
def test_the_blocks_bias_chooses_and_never_weighs(lead: tuple[int, ...]) -> None:
    one = router(tau=0.1, seed=4).eval()
    x, bias = torch.randn(*lead, D), torch.zeros(E)
    bias[6] = 3.0
    weights, ids, scores = one(x, bias)
    assert (weights.shape, ids.shape, scores.shape) == ((*lead, K), (*lead, K), (*lead, E))
    want = route(x, one.weight, K, bias, tau=0.1, return_scores=True)
    assert torch.equal(ids.view(-1, K), want.indices)
    assert (ids == 6).any(-1).all()
    assert_same_bits(weights.view(-1, K), want.weights, "weights")
    assert_same_bits(scores.view(-1, E), want.scores, "scores")
    assert not (one(x)[1] == 6).any(-1).all()


def test_bias_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expert_bias must have shape \(8,\), got \(7,\)"):
        router().eval()(torch.randn(1, 2, D), torch.zeros(7))


def test_meta_device_then_init_is_the_state_of_a_direct_build() -> None:
    direct = routers_of(make()[0])[0]
    with torch.device("meta"):
        model = kmeans_routing(debug_spec(2)).model.build()
    assert routers_of(model)[0].weight.is_meta
    model.to_empty(device="cpu")
    model.init_weights(buffer_device=torch.device("cpu"))
    got = routers_of(model)[0]
    for name, value in direct.state_dict().items():
        assert_same_bits(got.state_dict()[name], value, name)
    assert not got.pending.sums.is_meta
    assert not got.pending.sums.any()


def test_state_dict_and_casts() -> None:
    model, spec = make()
    train(model, spec, 2)
    state = copy.deepcopy(model.state_dict())
    other, _ = make()
    other.to(torch.bfloat16).load_state_dict(state)
    one = routers_of(other)[0]
    assert one.weight.dtype == torch.float32
    assert_same_bits(one.weight, routers_of(model)[0].weight, "weight")
    assert bool(one.initialized)


def test_a_rule_of_the_router_takes_the_place_of_the_blocks() -> None:
    model, spec = make(balance="proportional")
    assert model.layers["1"].moe.expert_bias_E is None
    train(model, spec, 2)
    assert routers_of(model)[0].expert_bias.any()


def test_the_block_compiles_whole() -> None:
    model, _ = make()
    moe = model.layers["1"].moe.eval()
    x = torch.randn(*(() if FLAT else (1,)), 16, D)
    want = moe(x)
    got = torch.compile(moe, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("ep", [False, True])
def test_every_buffer_and_input_has_a_layout(ep: bool) -> None:
    spec = kmeans_routing(debug_spec(2))
    moe = spec.model.layers[1].moe
    set_moe_sharding_config(moe, enable_ep=ep, enable_sp=True, expert_param_layout={})
    moe.router.learned_offset = True
    one = moe.router.build()
    layouts = one._sharding_config
    assert set(layouts.state_shardings) == {*one._buffers, "offset"}
    with pytest.raises(ValueError, match="learned_offset must be False under tensor parallelism, got True with tp=2"):
        one._distribute_states(SimpleNamespace(tp=2))
    assert set(layouts.in_dst_shardings) == {"x", "expert_bias_E"}
    assert layouts.in_dst_shardings["x"] == moe.router.gate.sharding_config.in_dst_shardings["input"]
    assert len(layouts.out_src_shardings) == 3
    assert layouts.local_map is not None


def test_options_and_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"options must be of .*, got temperature"):
        kmeans_routing(debug_spec(2), temperature=1.0)
    with pytest.raises(ValueError, match="balance must be one of 'block'"):
        kmeans_routing(debug_spec(2), balance="aux")
    with pytest.raises(ValueError, match="must have MoE blocks"):
        kmeans_routing(debug_spec(1))
    twice = kmeans_routing(debug_spec(2))
    with pytest.raises(ValueError, match=r"layers\.1\.moe\.router must be a TokenChoiceTopKRouter, got KMeans"):
        kmeans_routing(twice)
    spec = kmeans_routing(debug_spec(2))
    spec.model.layers[1].moe.router._debug_force_load_balance = True
    with pytest.raises(ValueError, match="_debug_force_load_balance must be False"):
        spec.model.build()


def test_the_example_of_the_page_does_what_it_shows() -> None:
    names = run_example("torchtitan")
    assert isinstance(names["model"].layers["1"].moe.router, KMeansRouter)


def test_whitened_directions_train_through_the_converter() -> None:
    assert router(directions="centroids").options.tau == 0.2
    model, spec = make()
    train(model, spec, 4)
    for one in routers_of(model):
        assert (one.commit_options.directions, one.options.tau) == ("whitened", 0.1)
        want = whitened_reference(one.centroids.double(), one.weight.double())
        torch.testing.assert_close(one.weight.double(), want, rtol=0, atol=1e-4)


def test_main_is_taken_and_the_release_of_its_number_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.2.2")
    assert runpy.run_path(adapter.__file__)["SUPPORTED"] == ">=0.3,<0.4"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"torchtitan must be a supported version, >=0\.3,<0\.4, got 0\.2\.2"):
        runpy.run_path(adapter.__file__)
