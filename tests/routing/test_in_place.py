"""After the first data every tensor of the state stays where it is, so that a captured CUDA graph may hold it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kmeans_route import KMeansRouter, MoE, attach, reference
from kmeans_route.backends import torch as torch_backend
from tests.helpers.compare import assert_same_bits, generator

D, E, K = 16, 6, 2
LAYERS: dict[str, dict[str, Any]] = {
    "proportional": {},
    "quantile": {"balance": "quantile", "average": "cumulative"},
    "normal": {"init": "normal", "balance": "sign", "accumulate": "raw"},
    "sigmoid": {"router": "sigmoid"},
    "triton": {"backend": "triton"},
}


def hidden_states(num_tokens: int, seed: int) -> Tensor:
    return torch.randn(num_tokens, D, generator=generator(seed)) + 0.5


def held_by(layer: MoE) -> dict[str, Tensor]:
    """Every tensor that outlives a step, the parameters aside."""
    router = layer.router
    pending = {f"pending.{field}": getattr(router.pending, field) for field in router.pending.FIELDS}
    plain = {name: getattr(router, name) for name in router.PLAIN_TENSORS if name != "aux_loss"}
    return dict(router.named_buffers()) | pending | plain | {"loads": layer.tokens_per_expert}


def places(layer: MoE) -> dict[str, tuple[int, int, torch.Size]]:
    return {name: (id(tensor), tensor.data_ptr(), tensor.shape) for name, tensor in held_by(layer).items()}


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_moves_after_the_first_data(name: str, coarse_rows: None) -> None:
    layer = MoE(D, 8, E, K, **LAYERS[name])
    optimizer = torch.optim.SGD(layer.parameters(), 1e-2)
    attachment = attach(layer, optimizer)
    layer(hidden_states(20, 0)).square().mean().backward()
    optimizer.step()
    before, values = places(layer), {name: tensor.clone() for name, tensor in held_by(layer).items()}

    def stays(call: Callable[[], Any]) -> None:
        call()
        assert places(layer) == before

    x = hidden_states(20, 1)
    stays(lambda: layer(x).square().mean().backward())
    stays(lambda: attachment.commit(torch.tensor(True)))
    assert int(layer.router.pending.num_tokens) == 20
    stays(optimizer.step)
    assert int(layer.router.pending.num_tokens) == 0
    stays(optimizer.step)  # with nothing pending
    saved = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    stays(lambda: layer.load_state_dict(saved))
    stays(lambda: layer.eval()(hidden_states(7, 2)))
    with torch.inference_mode():
        stays(lambda: layer(hidden_states(7, 3)))
    layer.train()
    stays(lambda: layer.router.freeze() and layer(x))
    moved = {name for name, tensor in held_by(layer).items() if not torch.equal(tensor, values[name])}
    assert {"loads", "tokens_per_expert", *layer.router.FP32_STATE} <= moved


def test_a_capture_keeps_no_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be those of the centroids at its time, in memory that is freed at the next commit."""
    router = KMeansRouter(D, E, K).eval()
    x = hidden_states(20, 0)
    want = router(x)
    made: list[Tensor] = []

    def directions(weight: Tensor, dtype: torch.dtype) -> Tensor:
        made.append(reference.directions_reference(weight, dtype))
        return made[-1]

    monkeypatch.setattr(torch_backend, "directions", directions)
    router.freeze()
    for _ in range(2):
        assert_same_bits(router(x).indices, want.indices)
        assert len(made) == 1, "pinned"
    monkeypatch.setattr("kmeans_route.routing.kmeans._is_capturing", lambda device: True)
    for calls in (2, 3):
        assert_same_bits(router(x).indices, want.indices)
        assert len(made) == calls


def test_the_auxiliary_loss_is_a_new_tensor_each_time() -> None:
    """The one exception: it carries a graph."""
    layer: nn.Module = MoE(D, 8, E, K, "softmax")
    losses = []
    for seed in range(2):
        layer(hidden_states(20, seed))
        losses.append(layer.aux_loss)
    assert losses[0] is not losses[1]
    assert all(loss.requires_grad for loss in losses)
