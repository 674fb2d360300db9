"""State that survives casts, moves, copies and files, and state dicts that are refused."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kmeans_route import KMeansRouter, LearnedRouter, MoE
from tests.helpers.compare import assert_same_bits, generator

D, E, K = 16, 6, 2
NAMES = {"weight", "centroids", "expert_bias", "score_std", "steps", "dropped_total"}
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")


def hidden_states(num_tokens: int, seed: int) -> Tensor:
    gen = generator(seed)
    x = torch.randn(num_tokens, D, generator=gen) + 0.5 * torch.randn(D, generator=gen)
    x[0] = torch.nan  # one token in each batch is dropped
    return x


def train(router: KMeansRouter, start: int, stop: int, dtype: torch.dtype = torch.float32) -> None:
    for step in range(start, stop):
        router(hidden_states(150, step).to(dtype))
        router.commit()


def trained(**options: Any) -> KMeansRouter:
    router = KMeansRouter(D, E, K, **options)
    train(router, 0, 4)
    return router


def everything(module: nn.Module) -> dict[str, Tensor]:
    """All that a router or a layer holds: parameters, buffers and what is pending."""
    found = {name: value.detach().clone() for name, value in module.state_dict(keep_vars=True).items()}
    for name, child in module.named_modules():
        if isinstance(child, KMeansRouter | LearnedRouter):
            found |= {f"{name}.pending.{f}": getattr(child.pending, f).clone() for f in child.pending.FIELDS}
    return found


def assert_same(got: nn.Module, want: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = everything(got)
    assert held.keys() == want.keys()
    for name, value in want.items():
        assert held[name].device == value.device, name
        assert_same_bits(held[name], value, name)


CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(device, float16)": lambda m: m.to("cpu", torch.float16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "type(bfloat16)": lambda m: m.type(torch.bfloat16),
    "parent": lambda m: nn.Sequential(nn.Linear(2, 2), nn.ModuleList([m])).to(torch.bfloat16),
}


@pytest.mark.filterwarnings("ignore:.*tokens pending")
@pytest.mark.parametrize("name", CASTS)
def test_casts_leave_state_and_pending_alone(name: str) -> None:
    router = trained(average="cumulative", balance="quantile")
    router(hidden_states(70, 9))
    before = everything(router)
    CASTS[name](router)
    assert_same(router, before)
    train(router, 4, 6)
    router(hidden_states(150, 6).bfloat16())


@pytest.mark.parametrize("average", ["ema", "cumulative"])
def test_the_average_of_a_cast_model_does_not_stall(average: str) -> None:
    plain, cast = KMeansRouter(D, E, K, average=average), KMeansRouter(D, E, K, average=average).bfloat16()
    for router in (plain, cast):
        train(router, 0, 30, torch.bfloat16)
    assert_same(cast, everything(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_experts_are_cast_and_the_router_is_not(dtype: torch.dtype) -> None:
    layer = MoE(D, 8, E, K).to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.router.weight.dtype == layer.router.expert_bias.dtype == torch.float32
    y = layer(torch.randn(5, D, dtype=dtype))
    assert y.dtype == dtype
    learned = MoE(D, 8, E, K, router="sigmoid").to(dtype)
    assert learned.router.weight.dtype == dtype
    assert learned.router.expert_bias.dtype == torch.float32
    assert learned(torch.randn(5, D, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("assign", [False, True])
def test_a_half_precision_checkpoint_is_widened(assign: bool) -> None:
    source = trained()
    state = {k: v.bfloat16() if v.is_floating_point() else v.clone() for k, v in source.state_dict().items()}
    router = KMeansRouter(D, E, K)
    router.load_state_dict(state, assign=assign)
    for name in NAMES:
        got = getattr(router, name)
        assert got.dtype == getattr(source, name).dtype
        assert torch.equal(got, state[name].to(got.dtype)), name
    train(router, 4, 5)
    assert router.weight.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*tokens pending")
@pytest.mark.parametrize("average", ["ema", "cumulative"])
@pytest.mark.parametrize("built", ["context", "argument", "moved"])
def test_meta_device_then_reset_parameters(built: str, average: str) -> None:
    options: dict[str, Any] = {"average": average, "balance": "quantile", "seed": 3, "name": "layers.1"}
    if built == "argument":
        router = KMeansRouter(D, E, K, device="meta", **options)
    elif built == "context":
        with torch.device("meta"):
            router = KMeansRouter(D, E, K, **options)
    else:
        router = KMeansRouter(D, E, K, **options)
        train(router, 0, 2)
        router(hidden_states(20, 3))
        router = router.to("meta")
    assert {b.device.type for b in router.buffers()} == {"meta"}
    assert router.pending.sums.is_meta
    router.to_empty(device="cpu")
    router.reset_parameters()
    fresh = KMeansRouter(D, E, K, **options)
    assert_same(router, everything(fresh))
    for one in (router, fresh):
        train(one, 0, 3)
    assert_same(router, everything(fresh))
    assert router.metrics() == fresh.metrics()


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("kind", ["kmeans", "softmax", "sigmoid"])
def test_meta_device_then_load_with_assign(kind: str, steps: int) -> None:
    def run(layer: MoE, start: int, stop: int) -> None:
        for step in range(start, stop):
            layer(hidden_states(150, step)[1:])
            layer.router.commit()

    source = MoE(D, 8, E, K, router=kind)
    run(source, 0, steps)
    with torch.device("meta"):
        layer = MoE(D, 8, E, K, router=kind)
    layer.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    assert_same(layer, everything(source))
    for one in (source, layer):
        run(one, steps, steps + 2)
    assert_same(layer, everything(source))
    assert layer.router.metrics() == source.router.metrics()


@pytest.mark.parametrize("kind", ["kmeans", "softmax", "sigmoid"])
@pytest.mark.filterwarnings("ignore:.*tokens pending")
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_hold_the_same_and_share_nothing(how: str, kind: str) -> None:
    layer = MoE(D, 8, E, K, router=kind)
    for step in range(3):
        x = hidden_states(90, step)[1:].requires_grad_()
        (layer(x).square().mean() + layer.aux_loss).backward()
        if step < 2:
            layer.router.commit()
    layer.eval()(x)
    layer.train()
    layer(x.detach())  # the last training forward leaves its loss behind
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    before = everything(layer)
    assert int(layer.router.pending.num_tokens) == 178
    assert_same(other, before)
    other(hidden_states(90, 7)[1:])
    other.router.commit()
    assert_same(layer, before)
    layer(hidden_states(90, 7)[1:])
    layer.router.commit()
    assert_same(other, everything(layer))


@pytest.mark.parametrize("options", [{}, {"average": "cumulative"}, {"balance": "quantile", "init": "normal"}], ids=str)
def test_resuming_from_a_file_continues_bit_for_bit(options: dict[str, Any]) -> None:
    straight = KMeansRouter(D, E, K, **options)
    train(straight, 0, 6)
    for stop in (0, 1, 3):
        first = KMeansRouter(D, E, K, **options)
        train(first, 0, stop)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = KMeansRouter(D, E, K, **options)
        second.load_state_dict(torch.load(file, weights_only=True))
        train(second, stop, 6)
        assert_same(second, everything(straight))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_decides_whether_the_next_commit_initialises(assign: bool) -> None:
    old, fresh = trained(), KMeansRouter(D, E, K)
    blank = {name: value.clone() for name, value in fresh.state_dict().items()}

    router = KMeansRouter(D, E, K)
    router.load_state_dict(copy.deepcopy(old.state_dict()), assign=assign)
    router(hidden_states(150, 4))
    router.commit()
    assert int(router.steps) == int(old.steps) + 1, "an ordinary commit: the centroids are not set again"
    train(old, 4, 5)
    assert_same(router, everything(old))

    old.load_state_dict(blank, assign=assign)
    for one in (old, fresh):
        train(one, 0, 1)
    assert bool(old.initialized)
    assert not old.steps.any()
    assert_same(old, everything(fresh))


def test_state_dict_holds_the_persistent_state_and_no_pending() -> None:
    router = KMeansRouter(D, E, K)
    assert set(router.state_dict()) == NAMES == {name for name, _ in router.named_buffers()}
    assert set(KMeansRouter(D, E, K, average="cumulative").state_dict()) == NAMES | {"tokens_seen"}
    shapes = {name: (tuple(b.shape), b.dtype) for name, b in router.named_buffers()}
    assert shapes == {
        "weight": ((E, D), torch.float32),
        "centroids": ((E, D), torch.float32),
        "expert_bias": ((E,), torch.float32),
        "score_std": ((), torch.float32),
        "steps": ((), torch.int64),
        "dropped_total": ((), torch.int64),
    }


def test_saving_with_tokens_pending_warns() -> None:
    layer = nn.Sequential(MoE(D, 8, E, K, name="layers.0"))
    router = layer[0].router
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.state_dict()
    router(hidden_states(21, 0))
    with pytest.warns(UserWarning, match="router 'layers.0' is saved with 20 tokens pending.*call kmeans_route.attach"):
        layer.state_dict()
    router.commit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.state_dict()


def test_loading_drops_what_is_pending_and_says_so() -> None:
    state = trained().state_dict()
    router = trained()
    router(hidden_states(21, 0))
    with pytest.warns(UserWarning, match="drops 20 pending tokens"):
        router.load_state_dict(state)
    assert int(router.pending.num_tokens) == 0
    assert not router.pending.sums.any()


def spoiled(**entries: Tensor) -> dict[str, Tensor]:
    return {**trained().state_dict(), **entries}


def ending_in(value: float, *shape: int) -> Tensor:
    full = torch.ones(shape)
    full.view(-1)[-1] = value
    return full


REFUSED: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "experts": (lambda: KMeansRouter(D, E + 1, K).state_dict(), r"weight must have shape \(6, 16\), got \(7, 16\)"),
    "hidden_size": (lambda: KMeansRouter(D + 2, E, K).state_dict(), r"weight must have shape \(6, 16\), got \(6, 18\)"),
    "bias": (lambda: spoiled(expert_bias=torch.zeros(7)), r"expert_bias must have shape \(6,\), got \(7,\)"),
    "weight_nan": (lambda: spoiled(weight=ending_in(torch.nan, E, D)), "weight must be finite, got NaN or Inf"),
    "weight_inf": (lambda: spoiled(weight=ending_in(torch.inf, E, D)), "weight must be finite, got NaN or Inf"),
    "bias_inf": (lambda: spoiled(expert_bias=ending_in(-torch.inf, E)), "expert_bias must be finite"),
    "score_std_nan": (lambda: spoiled(score_std=torch.tensor(torch.nan)), "score_std must be finite"),
}


@pytest.mark.filterwarnings("ignore:.*tokens pending")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_foreign_or_broken_state_is_refused_by_name(name: str, assign: bool, strict: bool) -> None:
    make, message = REFUSED[name]
    router = trained()
    layer = nn.ModuleDict({"router": router})
    router(hidden_states(30, 8))
    before, loads = everything(layer), router.tokens_per_expert.clone()
    given = {f"router.{name}": value for name, value in make().items()}
    with pytest.raises(RuntimeError, match=f"router.{message}"):
        layer.load_state_dict(given, assign=assign, strict=strict)
    assert_same(layer, before)
    assert torch.equal(router.tokens_per_expert, loads)
    router.commit()
    assert int(router.steps) == 4


@pytest.mark.filterwarnings("ignore:.*tokens pending")
@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("weight", torch.zeros(E + 1, D), r"weight must have shape \(6, 16\), got \(7, 16\)"),
        ("weight", torch.full((E, D), torch.nan), "weight must be finite"),
        ("expert_bias", torch.full((E,), torch.inf), "expert_bias must be finite"),
    ],
    ids=["shape", "nan", "inf"],
)
def test_learned_routers_refuse_it_too(entry: str, value: Tensor, message: str) -> None:
    router = LearnedRouter(D, E, K, kind="sigmoid")
    router(hidden_states(30, 0)[1:])
    state = {name: torch.zeros_like(held) for name, held in LearnedRouter(D, E, K).state_dict().items()}
    before = everything(router)
    with pytest.raises(RuntimeError, match=message):
        router.load_state_dict({**state, entry: value})
    assert_same(router, before)
