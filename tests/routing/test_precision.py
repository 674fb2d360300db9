"""Global precision settings, averaged copies and export: the state stays fp32, and routing stays what it was."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kmeans_route import KMeansRouter, LearnedRouter, MoE, attach
from tests.helpers.compare import assert_same_bits, generator

D, E, K = 16, 6, 2
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")
LOW_OR_DOUBLE = [torch.bfloat16, torch.float16, torch.float64]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "quantile": {"balance": "quantile", "average": "cumulative"},
    "sign": {"balance": "sign", "init": "normal", "accumulate": "raw", "gate": "sigmoid", "return_scores": True},
    "groups": {"n_group": 3, "topk_group": 2, "normalize": False},
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def hidden_states(num_tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    gen = generator(seed)
    offset = 0.5 * torch.randn(D, generator=gen, dtype=torch.float32)
    return (torch.randn(num_tokens, D, generator=gen, dtype=torch.float32) + offset).to(dtype)


def held_by(router: KMeansRouter | LearnedRouter) -> dict[str, Tensor]:
    found = {name: value.clone() for name, value in router.named_buffers()}
    found |= {f"pending.{field}": getattr(router.pending, field).clone() for field in router.pending.FIELDS}
    return found | {name: getattr(router, name).detach().clone() for name in router.PLAIN_TENSORS}


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        if isinstance(value, Tensor):
            assert_same_bits(got[name], value, name)
        else:
            assert got[name] == value, name


def train(
    router: KMeansRouter | LearnedRouter, dtype: torch.dtype = torch.float32, num_steps: int = 4
) -> dict[str, Any]:
    """Some steps, the first of which may set the centroids, and half of another: all that comes of it."""
    found: dict[str, Any] = {}
    for step in range(num_steps + 1):
        x = hidden_states(90, step, dtype).requires_grad_()
        weights, indices, scores = router(x, torch.arange(90) % 7 > 0)
        (weights.float().square().sum() + (0 if scores is None else scores.float().square().sum())).backward()
        found |= {f"{step}.weights": weights.detach(), f"{step}.indices": indices, f"{step}.x": x.grad}
        if step < num_steps:
            router.commit()
    return found | held_by(router) | router.metrics()


@pytest.mark.parametrize("dtype", LOW_OR_DOUBLE, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend_", ["torch", "reference"])
def test_the_default_dtype_changes_nothing(backend_: str, name: str, dtype: torch.dtype) -> None:
    options = {"backend": backend_, **OPTIONS[name]}
    want = train(KMeansRouter(D, E, K, **options))
    with default_dtype(dtype):
        got = train(KMeansRouter(D, E, K, **options))
    assert_same(got, want)


def test_the_default_dtype_changes_nothing_in_the_kernels(coarse_rows: None) -> None:
    want = train(KMeansRouter(D, E, K, backend="triton"), num_steps=2)
    with default_dtype(torch.float16):
        got = train(KMeansRouter(D, E, K, backend="triton"), num_steps=2)
    assert_same(got, want)


@pytest.mark.parametrize("dtype", LOW_OR_DOUBLE, ids=str)
@pytest.mark.parametrize("balance", ["sign", "quantile"])
def test_the_default_dtype_is_that_of_a_learned_weight_alone(balance: str, dtype: torch.dtype) -> None:
    plain = LearnedRouter(D, E, K, kind="sigmoid", balance=balance)
    with default_dtype(dtype):
        other = LearnedRouter(D, E, K, kind="sigmoid", balance=balance)
        assert_same_bits(other.weight.detach(), plain.weight.detach().to(dtype))
        other.float()
        plain.load_state_dict(other.state_dict())
        got = train(other)
    assert_same(got, train(plain))


@pytest.mark.parametrize("how", ["initialize", "set_centroids", "load_state_dict"])
def test_the_default_dtype_changes_nothing_on_the_way_in(how: str) -> None:
    source = nn.Linear(D, E, bias=False)
    saved = KMeansRouter(D, E, K)
    saved.initialize(hidden_states(50, 3))
    ways: dict[str, Callable[[KMeansRouter], Any]] = {
        "initialize": lambda router: router.initialize(hidden_states(50, 3)),
        "set_centroids": lambda router: router.set_centroids(source.weight),
        "load_state_dict": lambda router: router.load_state_dict(saved.state_dict()),
    }
    plain = KMeansRouter(D, E, K)
    ways[how](plain)
    with default_dtype(torch.bfloat16):
        other = KMeansRouter(D, E, K)
        ways[how](other)
    assert_same(held_by(other), held_by(plain))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_autocast_changes_nothing_in_training(name: str, dtype: torch.dtype, cast: torch.dtype) -> None:
    """Forward, backward and commit, for what comes in, be it fp32 or what autocast made upstream."""
    want = train(KMeansRouter(D, E, K, **OPTIONS[name]), dtype)
    with torch.autocast("cpu", cast):
        got = train(KMeansRouter(D, E, K, **OPTIONS[name]), dtype)
    assert_same(got, want)


class Small(nn.Module):
    def __init__(self, router: str = "kmeans", **options: Any) -> None:
        super().__init__()
        self.inward, self.layer = nn.Linear(D, D), MoE(D, 8, E, K, router, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.inward(x))
        return y


def test_autocast_around_a_model_in_training() -> None:
    """What a bf16 product upstream hands on is routed as it is, without autocast: state fp32, ids the same."""
    model = Small()
    twin = KMeansRouter(D, E, K)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    attach(model, optimizer)
    incoming: list[Tensor] = []
    model.inward.register_forward_hook(lambda _module, _args, h: incoming.append(h.detach()))
    ids: list[Tensor] = []
    model.layer.router.observe(lambda _tokens, routing: ids.append(routing.indices))
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(hidden_states(80, step)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert incoming[-1].dtype == torch.bfloat16
        assert_same_bits(ids[-1], twin(incoming[-1]).indices)
        twin.commit()
        assert_same(held_by(model.layer.router), held_by(twin))


def averaged(steps: int, **options: Any) -> tuple[Small, AveragedModel, list[Tensor]]:
    """A model after training, its average, and the centroids after each step."""
    model = Small(average="cumulative")
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    attach(model, optimizer)
    average = AveragedModel(model, **options)
    seen = []
    for step in range(steps):
        model(hidden_states(80, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        seen.append(model.layer.router.weight.clone())
    return model, average, seen


@pytest.mark.parametrize("rule", ["swa", "ema"])
def test_an_averaged_model_routes_by_the_latest_state(rule: str) -> None:
    """Made before the first data, never attached, gathering nothing; it may be trained on in place of the model."""
    model, average, _ = averaged(4, **({} if rule == "swa" else {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}))
    copy, router = average.module.layer.router, model.layer.router
    assert not torch.equal(average.module.inward.weight, model.inward.weight)
    assert dict(copy.named_buffers()).keys() == dict(router.named_buffers()).keys()
    for name, value in router.named_buffers():
        assert_same_bits(copy.get_buffer(name), value, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average.eval()(hidden_states(30, 9))
        average.state_dict()
    assert int(copy.pending.num_tokens) == 0
    x = hidden_states(30, 9)
    assert_same_bits(copy.eval()(x).indices, router.eval()(x).indices)


def test_an_average_of_the_buffers_too() -> None:
    """An EMA with use_buffers=True: centroids and directions are averaged, `steps` is rounded down."""
    decay = 0.5
    model, average, seen = averaged(4, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    copy = average.module.layer.router
    want = seen[0]
    for centroids in seen[1:]:
        want = want.lerp(centroids, 1 - decay)
    torch.testing.assert_close(copy.weight, want, rtol=0, atol=1e-6)
    assert copy.weight.dtype == torch.float32
    assert bool(copy.initialized)
    assert 0 <= int(copy.steps) <= int(model.layer.router.steps)
    routing = copy.eval().route(hidden_states(30, 9))
    twin = KMeansRouter(D, E, K).eval()
    twin.load_state_dict({**twin.state_dict(), "weight": copy.weight, "expert_bias": copy.expert_bias})
    assert_same_bits(routing.indices, twin(hidden_states(30, 9)).indices)


def test_the_plain_average_takes_the_buffers_too() -> None:
    """PyTorch's own SWA rule subtracts: a bool among the buffers would stop it."""
    _, average, seen = averaged(3, use_buffers=True)
    copy = average.module.layer.router
    torch.testing.assert_close(copy.weight, torch.stack(seen).mean(0), rtol=0, atol=1e-6)
    assert copy.has_data


class Exported(nn.Module):
    """A module to export, called with a mask or without."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return self.inner(x, mask)


def in_training(kind: str, **options: Any) -> MoE:
    layer = MoE(D, 8, E, K, router=kind, **options)
    for step in range(3):
        layer(hidden_states(80, step))
        layer.router.commit()
    return layer.eval()


EXPORTS: dict[str, Callable[[], nn.Module]] = {
    "router": lambda: in_training("kmeans", return_scores=True).router,
    "router without scores": lambda: in_training("kmeans").router,
    "kmeans": lambda: in_training("kmeans", num_shared_experts=1),
    "sigmoid": lambda: in_training("sigmoid"),
    "softmax": lambda: in_training("softmax"),
}


@pytest.mark.usefixtures("plain_empty")
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize(("strict", "masked"), [(False, True), (True, False)])
@pytest.mark.parametrize("name", EXPORTS)
def test_an_exported_program_gives_the_same_bits(name: str, strict: bool, masked: bool) -> None:
    """In eval mode, for any number of tokens, and after a way through a file."""
    module = Exported(EXPORTS[name]()).eval()
    num_tokens = Dim("num_tokens", min=1, max=4096)
    shapes = {"x": {0: num_tokens}, "mask": {0: num_tokens} if masked else None}
    program = torch.export.export(module, inputs(10, masked), dynamic_shapes=shapes, strict=strict)
    assert not program.constants, "nothing but the state is in it"
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    calls = [program.module(), torch.export.load(file).module()]
    decomposed = program.run_decompositions().module()
    for count in (1, 10, 77):
        args = inputs(count, masked)
        want = results_of(module(*args))
        for call in calls:
            for one, other in zip(results_of(call(*args)), want, strict=True):
                assert_same_bits(one, other)
        for one, other in zip(results_of(decomposed(*args)), want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # silu in parts


def results_of(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [field for field in output if field is not None]


def inputs(num_tokens: int, masked: bool) -> tuple[Tensor, Tensor | None]:
    x = hidden_states(num_tokens, num_tokens)
    return x, torch.rand(num_tokens, generator=generator(5)) < 0.8 if masked else None
