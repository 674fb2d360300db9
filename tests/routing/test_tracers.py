"""What makes a program of a model: in eval mode it gives the layer's values, in training mode it is refused by name."""

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from kmeans_route import KMeansRouter, MoE, attach, backends, ops, route
from kmeans_route.reference import exporting_onnx
from tests.helpers.compare import assert_same_bits, generator

T, D, E, K = 32, 16, 4, 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*nothing commits its statistics", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning"),
]
X = torch.randn(T, D, generator=generator(0))
OTHER = torch.randn(7, D, generator=generator(1))
KINDS: dict[str, dict[str, Any]] = {
    "kmeans": {"num_shared_experts": 1},
    "groups": {"n_group": 2, "topk_group": 1, "normalize": False},
    "sigmoid gate": {"gate": "sigmoid", "return_scores": True},
    "softmax": {"router": "softmax"},
    "sigmoid": {"router": "sigmoid"},
}


def make(kind: str = "kmeans", **options: Any) -> MoE:
    torch.manual_seed(5)
    layer = MoE(D, 12, E, K, **KINDS[kind], **options).eval()
    if isinstance(layer.router, KMeansRouter):
        layer.router.initialize(torch.randn(200, D))
        layer.router.expert_bias.copy_(torch.linspace(-0.1, 0.1, E))
    return layer


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = make(name="a"), make(name="b")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        return y


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_serves_any_number_of_tokens(kind: str, grad_mode: bool) -> None:
    """jit.trace checks its own program under no_grad: with other branches taken there it refused."""
    layer = make(kind)
    with torch.set_grad_enabled(grad_mode):
        traced = torch.jit.trace(layer, (X,))
    loads = layer.tokens_per_expert.clone()
    traced(OTHER)
    assert torch.equal(layer.tokens_per_expert, loads), "a program writes nothing"
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for program in (traced, torch.jit.load(file)):
        for x in (OTHER, X[:1], torch.full((3, D), torch.nan)):
            assert_same_bits(program(x), layer(x))


def test_a_trace_reads_the_state() -> None:
    """A frozen router's pinned directions would be a constant of the program."""
    layer = make()
    layer.router.freeze()
    layer(X)
    traced = torch.jit.trace(layer, (X,))
    state = copy.deepcopy(layer.state_dict())
    state["router.weight"] = state["router.weight"].roll(1, 0)
    traced.load_state_dict(state, strict=False)  # jit knows no buffers that are not saved
    layer.load_state_dict(state)
    assert_same_bits(traced(OTHER), layer(OTHER))


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_program_serves_any_number_of_tokens(kind: str) -> None:
    layer = make(kind)
    program = torch.export.export(layer, (X,), dynamic_shapes=({0: Dim("T")}, None, None)[:1]).module()
    assert_same_bits(program(OTHER), layer(OTHER))


def test_make_fx_gives_the_layer() -> None:
    layer = make()
    assert_same_bits(make_fx(layer)(X)(X), layer(X))


def test_pipeline_stages_of_a_model_in_eval_mode() -> None:
    model = Two().eval()
    stages = pipeline(model, mb_args=(X,), split_spec={"b": SplitPoint.BEGINNING})
    assert_same_bits(stages.get_stage_module(1)(stages.get_stage_module(0)(X)), model(X))


TRACERS: dict[str, Callable[[nn.Module], Any]] = {
    "jit.trace": lambda module: torch.jit.trace(module, (X,)),
    "make_fx": lambda module: make_fx(module)(X),
    "export": lambda module: torch.export.export(module, (X,), strict=False),
    "strict export": lambda module: torch.export.export(module, (X,), strict=True),
    "pipeline": lambda module: pipeline(module, mb_args=(X,)),
}
TRACED = {"jit.trace": r"traced by torch\.jit", "make_fx": "traced by make_fx"}


def causes(error: BaseException | None) -> str:
    """What an error and those that led to it say; tracers put their own in front."""
    return "" if error is None else f"{error} {causes(error.__cause__ or error.__context__)}"


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("kind", ["kmeans", "sigmoid"])
def test_refused_in_training(kind: str, tracer: str, attached: bool) -> None:
    layer = make(kind, name="layers.3").train()
    if attached:
        attach(layer, torch.optim.SGD(layer.parameters(), 0.1))
    with pytest.raises(Exception) as caught:  # noqa: PT011 (each tracer has its own)
        TRACERS[tracer](layer)
    how = TRACED.get(tracer, "exported")
    want = rf"router 'layers\.3' must be in eval mode to be {how}, got training mode.*call model\.eval\(\) first"
    assert re.search(want, causes(caught.value))
    assert int(layer.router.pending.num_tokens) == 0


@pytest.mark.parametrize("train", [True, False])
def test_symbolic_trace_is_refused_by_name_or_keeps_the_layer_whole(train: bool) -> None:
    model = nn.Sequential(make().train(train), nn.Linear(D, D))
    with pytest.raises(
        TypeError, match=r"got Proxy: torch\.fx\.symbolic_trace sees no values; give torch\.fx\.Tracer an is_leaf"
    ):
        torch.fx.symbolic_trace(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return isinstance(m, MoE) or super().is_leaf_module(m, qualified_name)

    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert_same_bits(traced(X), model(X))


def test_nothing_is_traced_in_a_plain_or_compiled_forward() -> None:
    seen: list[str] = []
    layer = make().train()
    layer.router.observe(lambda tokens, routing: seen.append(ops.traced()))
    layer(X)
    torch.compile(layer, backend="eager")(X)
    assert set(seen) == {""}


def onnx_program(module: nn.Module, *args: Tensor) -> Any:
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    names = [{0: Dim("T")} for _ in args]
    return torch.onnx.export(module, args, dynamo=True, verbose=False, dynamic_shapes=names)


def run_onnx(program: Any, folder: Path, *args: Tensor) -> list[Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime")
    program.save(str(folder / "model.onnx"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    named = {given.name: arg.numpy() for given, arg in zip(session.get_inputs(), args, strict=True)}
    return [torch.from_numpy(out) for out in session.run(None, named)]


@pytest.mark.parametrize("backend", ["auto", "torch", "reference", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_gives_the_layer_at_another_batch_size(kind: str, backend: str, tmp_path: Path) -> None:
    if "router" in KINDS[kind] and backend != "auto":
        return  # learned routers have no backend
    layer = make(kind, **({} if "router" in KINDS[kind] else {"backend": backend}))
    program = onnx_program(layer, X)
    x = OTHER.clone()
    x[2] = 0.0
    (got,) = run_onnx(program, tmp_path, x)
    torch.testing.assert_close(got, layer(x).detach(), atol=2e-6, rtol=1e-5)


def test_onnx_router_gives_ties_to_the_lower_expert(tmp_path: Path) -> None:
    router = KMeansRouter(D, E, K).eval()
    router.weight.copy_(router.weight[[0, 1, 0, 1]])
    weights, ids = run_onnx(onnx_program(router, X), tmp_path, OTHER)
    want = router(OTHER)
    assert torch.equal(ids, want.indices)
    torch.testing.assert_close(weights, want.weights)


def test_onnx_with_a_mask(tmp_path: Path) -> None:
    layer, mask = make(), torch.arange(T) < 20
    program = onnx_program(layer, X, mask)
    other = torch.arange(7) % 3 > 0
    (got,) = run_onnx(program, tmp_path, OTHER, other)
    torch.testing.assert_close(got, layer(OTHER, other).detach(), atol=2e-6, rtol=1e-5)
    assert not got[~other].any()


def test_onnx_by_torchscript(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, file = make(), str(tmp_path / "model.onnx")
    torch.onnx.export(layer, (X,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "T"}})
    (got,) = onnxruntime.InferenceSession(file).run(None, {"x": OTHER.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), layer(OTHER).detach(), atol=2e-6, rtol=1e-5)


@pytest.fixture
def as_if_exporting_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag alone, where onnx is not installed."""
    import torch.onnx

    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_onnx_export_sees_is_operators_of_pytorch(kind: str, as_if_exporting_onnx: None) -> None:
    layer = make(kind)
    assert exporting_onnx()
    program = torch.export.export(layer, (X,), dynamic_shapes=({0: Dim("T")},))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in targets if name.startswith("kmeans_route") or "sort" in name]
    torch.testing.assert_close(program.module()(OTHER), layer(OTHER), atol=2e-6, rtol=1e-5)


def test_onnx_export_is_refused_in_training(as_if_exporting_onnx: None) -> None:
    with pytest.raises(RuntimeError, match="must be in eval mode to be exported"):
        make().train()(X)
    assert backends.choose("torch", X.device, X.dtype).NAME == "reference"


def test_dynamic_quantisation_touches_the_linear_layers_alone() -> None:
    """The shared expert's; routing and the routed experts stay to the bit."""
    layer = make()
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, torch.qint8)
    details, right = quantised.details(OTHER), layer.details(OTHER)
    assert_same_bits(details.routing.weights, right.routing.weights)
    assert torch.equal(details.routing.indices, right.routing.indices)
    assert_same_bits(details.y_sorted, right.y_sorted)
    assert layer.shared is not None
    difference = (quantised(OTHER) - layer(OTHER)) - (quantised.shared(OTHER) - layer.shared(OTHER))
    assert difference.abs().max() < 1e-6
    assert 0 < (quantised(OTHER) - layer(OTHER)).abs().max() < 0.2


def test_weight_only_quantisation() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    layer = make()
    quantised = copy.deepcopy(layer)
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    assert_same_bits(quantised.details(OTHER).y_sorted, layer.details(OTHER).y_sorted)
    assert 0 < (quantised(OTHER) - layer(OTHER)).abs().max() < 0.1


def test_route_in_a_trace() -> None:
    weight = torch.randn(E, D, generator=generator(3))
    traced = torch.jit.trace(lambda x: route(x, weight, K).weights, (X,))
    assert_same_bits(traced(OTHER), route(OTHER, weight, K).weights)
