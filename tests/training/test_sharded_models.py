"""Models that are sharded over ranks: FSDP2, its mixed precision, HSDP meshes, sequences cut into parts, replicas."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from kmeans_route import KMeansRouter, LearnedRouter, MoE, attach
from tests.helpers.compare import generator
from tests.helpers.ranks import run_on_ranks

D, E, K, B, S, STEPS = 16, 6, 2, 8, 12, 4
RANKS = 4
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CASES: dict[str, dict[str, Any]] = {
    # name: mesh; what is cut ("batch" or "sequence"); how the model is built; how it is attached
    "fsdp": {"mesh": (4,)},
    "fsdp-recompute": {"mesh": (4,), "recompute": True, "micro": 2},
    "fsdp-learned": {"mesh": (4,), "router": "sigmoid"},
    "fsdp-mixed": {"mesh": (4,), "policy": HALF},
    "fsdp-offset": {"mesh": (4,), "offset": True},
    "fsdp-offset-mixed": {"mesh": (4,), "offset": True, "recompute": True, "policy": HALF},
    "fsdp-overlap": {"mesh": (4,), "micro": 2, "attach": {"overlap_after": 2}},
    "hsdp": {"mesh": (2, 2)},
    "sequence": {"mesh": (4,), "cut": "sequence"},
    "replicas": {"mesh": (2, 2), "cut": "data"},  # the second dimension holds the same tokens twice
}


class Block(nn.Module):
    """A mixture beside its input, which it may recompute."""

    def __init__(self, recompute: bool, router: str, offset: bool) -> None:
        super().__init__()
        options: dict[str, Any] = {"learned_offset": offset} if router == "kmeans" else {}
        self.recompute, self.moe = recompute, MoE(D, 8, E, K, router, **options)

    def forward(self, h: Tensor) -> Tensor:
        self.seen_dtype = h.dtype
        return h + (checkpoint(self.moe, h, use_reentrant=False) if self.recompute else self.moe(h))


def make(case: dict[str, Any]) -> nn.Module:
    torch.manual_seed(3)
    options = case.get("recompute", False), case.get("router", "kmeans"), case.get("offset", False)
    blocks = [Block(*options) for _ in range(2)]
    return nn.Sequential(nn.Linear(D, D), *blocks, nn.Linear(D, 1))


def batch(step: int) -> Tensor:
    return torch.randn(B, S, D, generator=generator(step)) + torch.linspace(-0.5, 0.5, D)


def full(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def train(rank: int, name: str, num_ranks: int) -> dict[str, Tensor]:
    """Some steps of AdamW; the whole state afterwards, and each step's loss."""
    case = CASES[name]
    model, cut = make(case), case.get("cut", "batch")
    process_group: Any = None
    share, shares = rank, num_ranks
    if num_ranks > 1:
        mesh = init_device_mesh("cpu", case["mesh"], mesh_dim_names=("data", "other")[: len(case["mesh"])])
        if cut == "data":
            share, shares, process_group = mesh["data"].get_local_rank(), 2, mesh["data"]
        policy = case.get("policy", MixedPrecisionPolicy())
        for layer in model:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, foreach=False)
    attachment = attach(model, optimizer, process_group, **case.get("attach", {}))
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        x = batch(step).chunk(shares, dim=1 if cut == "sequence" else 0)[share]
        parts = x.chunk(case.get("micro", 1))
        for part in parts:
            loss = model(part).float().square().mean() / len(parts)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimizer.step()
    metrics = attachment.metrics()
    attachment.remove()
    for layer in model:
        if isinstance(layer, Block) and "policy" in case:
            assert layer.seen_dtype == (torch.bfloat16 if num_ranks > 1 else torch.float32)
            assert layer.moe.router.weight.dtype == torch.float32
    state = {key: full(tensor) for key, tensor in model.state_dict().items()}
    own = ("direction_cosine", "effective_experts")  # the second is of this rank's tokens
    state |= {key: torch.tensor(value) for key, value in metrics.items() if not any(name in key for name in own)}
    return state | {
        "tokens": torch.stack([layer.moe.router.tokens_per_expert for layer in model if isinstance(layer, Block)])
    }


def train_all(rank: int, num_ranks: int) -> dict[str, dict[str, Tensor]]:
    return {name: train(rank, name, num_ranks) for name in CASES}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    return run_on_ranks(train_all, RANKS, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(on_ranks: list[dict[str, dict[str, Tensor]]], name: str) -> None:
    """Parameters, router state, loads and metrics of one process with the whole batch; equal bits on all ranks."""
    want = train(0, name, 1)
    for key, tensor in want.items():
        got = on_ranks[0][name][key]
        assert all(torch.equal(rank[name][key], got) for rank in on_ranks), (name, key)
        if "policy" in CASES[name]:
            assert got.dtype == tensor.dtype, key
            # Hidden states in bf16, some tokens elsewhere.
            if key.endswith("router.weight"):
                assert float(nn.functional.cosine_similarity(got, tensor).min()) > 0.99, f"{name} {key}"
            if key.endswith("expert_bias"):
                torch.testing.assert_close(got, tensor, rtol=0, atol=0.05, msg=f"{name} {key}")
        elif tensor.is_floating_point():
            torch.testing.assert_close(got, tensor, rtol=1e-4, atol=1e-4, msg=f"{name} {key}")
        else:
            assert torch.equal(got, tensor), (name, key)


def meshes(rank: int) -> list[str]:
    told = []
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "other"))
    for given in (mesh, mesh["data"], mesh["data"].get_group()):
        try:
            attach(nn.Sequential(KMeansRouter(D, E, K)), torch.optim.SGD([nn.Parameter(torch.zeros(1))]), given)
            told.append("")
        except TypeError as error:
            told.append(str(error))
    return told


def test_which_meshes_attach_takes(tmp_path: Path) -> None:
    for told in run_on_ranks(meshes, 4, tmp_path):
        assert "got DeviceMesh of 2 dimensions: call" in told[0]
        assert told[1:] == ["", ""]


def test_the_learned_case_has_a_learned_router() -> None:
    assert isinstance(make(CASES["fsdp-learned"])[1].moe.router, LearnedRouter)
