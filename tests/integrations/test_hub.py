"""The hub layout: self-contained, loaded by Hugging Face's `kernels`, with the bits of the package."""

import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kmeans_route import route
from tests.helpers.compare import assert_same_bits

ROOT = Path(__file__).parents[2]
D, E, K = 16, 6, 2


def build_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_build", ROOT / "hub" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    build_module().write(folder)
    return folder


def test_each_variant_is_self_contained(layout: Path) -> None:
    variants = sorted(path.name for path in (layout / "build").iterdir())
    assert variants == ["torch-cpu", "torch-cuda", "torch-rocm"]
    for variant in variants:
        folder = layout / "build" / variant
        assert {"__init__.py", "layers.py", "metadata.json"} <= {path.name for path in folder.iterdir()}
        assert (folder / "kernels").exists() == (variant != "torch-cpu")
        for path in folder.rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.findall(r"^\s*(?:from|import) kmeans_route", text, re.MULTILINE), path
            assert "kmeans_route::" not in text
            for level, name in re.findall(r"^\s*from (\.+)(\w+)", text, re.MULTILINE):
                base = path.parent if level == "." else path.parent.parent
                assert (
                    (base / f"{name}.py").exists()
                    or (base / name).is_dir()
                    or (variant, name) == ("torch-cpu", "kernels")
                ), path
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        assert metadata["backend"] == {"type": variant.removeprefix("torch-")}


def test_it_runs_without_the_package_and_beside_it(layout: Path) -> None:
    code = f"""
        import importlib.util, sys, torch
        def load(variant):
            spec = importlib.util.spec_from_file_location(variant, r"{layout}/build/" + variant + "/__init__.py",
                                                          submodule_search_locations=[r"{layout}/build/" + variant])
            module = sys.modules[variant] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
        torch.manual_seed(0)
        x, c = torch.randn(9, 16, requires_grad=True), torch.randn(6, 16)
        for variant in ("torch-cpu", "torch-cuda"):
            hub = load(variant)
            routing = hub.route(x, c, 2)
            sent = hub.dispatch(x, routing)
            hub.combine(sent.x_sorted, routing, sent).square().sum().backward()
            hub.centroid_sums(x, routing)
        assert not [name for name in sys.modules if name.split(".")[0] == "kmeans_route"]
        import kmeans_route
        assert torch.equal(kmeans_route.route(x, c, 2).weights, routing.weights)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


class Gate(nn.Module):
    """A router of someone else's, with the signature of the layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.register_buffer("weight", torch.randn(E, D))
        self.register_buffer("expert_bias", torch.zeros(E))
        self.top_k, self.route_options = K, {"tau": 0.2}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise AssertionError("the layer from the hub takes the place of this")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_kernels_loads_the_layer_and_puts_it_in(layout: Path) -> None:
    kernels: Any = pytest.importorskip("kernels")
    if not hasattr(kernels, "LocalLayerRepository"):  # the repository's own folder of that name
        pytest.skip("kernels is not installed")
    repository = kernels.LocalLayerRepository(layout, layer_name="KMeansRoute")
    assert repository.load().__name__ == "KMeansRoute"
    gate_class = kernels.use_kernel_forward_from_hub("KMeansRoute")(Gate)
    model = nn.Sequential(gate_class())
    mapping = {"KMeansRoute": {"cpu": {kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE: repository}}}
    with kernels.use_kernel_mapping(mapping):
        model = kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    x = torch.randn(3, 5, D, requires_grad=True)
    mask = torch.rand(3, 5) < 0.7
    weights, indices = model[0](x, mask)
    want = route(x, model[0].weight, K, mask=mask, tau=0.2)
    assert torch.equal(indices, want.indices)
    assert_same_bits(weights, want.weights, "weights")
    (grad,) = torch.autograd.grad(weights[:, 0].sum(), x)
    (grad_want,) = torch.autograd.grad(want.weights[:, 0].sum(), x)
    assert_same_bits(grad, grad_want, "gradient")


def test_the_make_target_writes_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "hub/build.py", str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "build" / "torch-cpu" / "layers.py").exists()
    assert "hub/build.py" in (ROOT / "Makefile").read_text(encoding="utf-8")
