"""Padding under tools that look for NaN: rows past the last offset are zero wherever somebody can look.

Memory that nobody wrote is NaN here (see conftest), as any allocator may hand it out.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kmeans_route import MoE
from kmeans_route.ops.grouped_linear import grouped_linear
from tests.helpers.compare import generator

D, E, K = 16, 4, 2
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*nothing commits its statistics", "ignore:Anomaly Detection has been enabled"
)
SIZES = [16, 6]  # grouped_mm takes the first, the second goes expert by expert
BACKENDS = ["torch", "reference", "triton"]


def batch(kind: str) -> tuple[Tensor, Tensor | None]:
    """(2, 9, D) with a tail of padding, or of rows that are not valid by themselves, or nothing but padding."""
    x = torch.randn(2, 9, D, generator=generator(3))
    mask = torch.ones(2, 9, dtype=torch.bool)
    if kind == "bad rows":
        x[:, 6:] = torch.nan
        return x.requires_grad_(), None
    mask[:, 0 if kind == "all padding" else 6 :] = False
    return x.requires_grad_(), mask


def floats_with_nan(values: Any) -> bool:
    return any(isinstance(v, Tensor) and v.is_floating_point() and bool(v.isnan().any()) for v in tree_leaves(values))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["padding", "bad rows", "all padding"])
def test_anomaly_mode(kind: str, size: int, backend: str) -> None:
    layer = MoE(D, size, E, K, num_shared_experts=1, backend=backend)
    x, mask = batch(kind)
    with torch.autograd.detect_anomaly(check_nan=True):
        layer(x, mask).square().sum().backward()
    assert x.grad is not None
    assert not x.grad.reshape(-1, D)[~layer.details(x, mask).routing.valid].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("router", ["kmeans", "softmax", "sigmoid"])
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward_hooks_see_no_nan(size: int, router: str) -> None:
    layer = MoE(D, size, E, K, router=router)
    x, mask = batch("padding")
    seen: list[bool] = []

    def forward(_module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(floats_with_nan((inputs, output)))

    def backward(_module: nn.Module, d_inputs: Any, d_outputs: Any) -> None:
        seen.append(floats_with_nan((d_inputs, d_outputs)))

    layer.experts.register_forward_hook(forward)
    layer.experts.register_full_backward_hook(backward)
    layer(x, mask).square().sum().backward()
    assert seen == [False, False]


@pytest.mark.parametrize("size", SIZES)
def test_saved_tensors_hold_no_nan(size: int) -> None:
    """As offloading and compressing hooks read them."""
    layer = MoE(D, size, E, K)
    x, mask = batch("padding")
    seen: list[bool] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(floats_with_nan(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, mask).square().sum().backward()
    assert len(seen) > 5
    assert not any(seen)


class NaNWatcher(TorchDispatchMode):
    """Every result of every operator, as TensorBoard plugins and debuggers watch them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if floats_with_nan(out) and "empty" not in str(func):
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_no_operator_returns_nan(size: int, train: bool) -> None:
    layer = MoE(D, size, E, K).train(train)
    x, mask = batch("padding")
    with NaNWatcher() as watcher, torch.set_grad_enabled(train):
        y = layer(x, mask)
        if train:
            y.square().sum().backward()
    assert watcher.found == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [8, 5])
def test_grouped_products_are_zero_past_the_end_whatever_lies_there(size: int, dtype: torch.dtype) -> None:
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    rows = torch.randn(10, 8, generator=generator(1)).to(dtype)
    rows[7:] = torch.nan
    rows.requires_grad_()
    weight = torch.randn(3, size, 8, generator=generator(2)).to(dtype).requires_grad_()
    y = grouped_linear(rows, weight, offsets)
    dy = torch.randn(10, size, generator=generator(4)).to(dtype)
    dy[7:] = torch.nan
    d_rows, d_weight = torch.autograd.grad(y, (rows, weight), dy)
    expert = torch.tensor([0] * 3 + [2] * 4)
    right = torch.einsum("md,mnd->mn", rows[:7].double(), weight[expert].double())
    right_d_rows, right_d_weight = torch.autograd.grad(right, (rows, weight), dy[:7].double())
    tolerance = {"atol": 0.1, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(y[:7].double(), right, **tolerance)
    torch.testing.assert_close(d_rows[:7], right_d_rows[:7], **tolerance)
    torch.testing.assert_close(d_weight, right_d_weight, **tolerance)
    for past in (y, d_rows):
        assert not past[7:].any()


@pytest.mark.parametrize("how", ["whole", "checkpointed"])
def test_watched_training_is_plain_training(how: str) -> None:
    """Padding adds nothing: outputs and gradients of the valid tokens alone."""
    x, mask = batch("padding")
    assert mask is not None
    layer = MoE(D, 16, E, K)

    def run(call: Callable[..., Tensor], *args: Any) -> tuple[Tensor, ...]:
        y = call(*args)
        return y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))

    def call(*args: Any) -> Tensor:
        checkpointed = how == "checkpointed"
        y: Tensor = (
            torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False) if checkpointed else layer(*args)
        )
        return y

    with torch.autograd.detect_anomaly(check_nan=True):
        y, dx, *d_weights = run(call, x, mask)
    y_alone, dx_alone, *d_alone = run(call, x[mask])
    torch.testing.assert_close(y[mask], y_alone)
    torch.testing.assert_close(dx, dx_alone)
    for one, other in zip(d_weights, d_alone, strict=True):
        torch.testing.assert_close(one, other)
    assert not y[~mask].any()
