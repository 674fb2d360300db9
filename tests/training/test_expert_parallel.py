"""Experts divided between ranks against one process with all tokens, in gloo runs with 2 and 4 processes."""

import contextlib
import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from kmeans_route import KMeansRouter, MoE, attach, expert_parallel, expert_parameters
from kmeans_route.reference import WHITENING_EPS
from tests.helpers.ranks import run_on_ranks

D, I, K, TOKENS = 16, 8, 2, 48  # noqa: E741 (I is the intermediate size)
SCENARIOS: dict[str, dict[str, Any]] = {
    # name: router, options of the layer; share of each rank's tokens; what is special about the forward. E is 6.
    # Compiling takes seconds, so only 2 ranks do it.
    "even": {},
    "uneven": {"router": "softmax", "shares": "uneven"},
    "shared": {"router": "sigmoid", "shares": "uneven", "options": {"num_shared_experts": 1}},
    "empty rank": {"shares": "empty", "options": {"num_shared_experts": 1}},
    "empty rank, learned": {"router": "softmax", "shares": "empty"},
    "only the last rank has tokens": {"shares": "last"},
    "all tokens to the first experts": {"favour": [0, 1], "shares": "uneven"},
    "all tokens to the last experts": {"favour": [2, 5]},
    "masked": {"masked": True, "shares": "uneven", "options": {"num_shared_experts": 1}},
    "masked, learned": {"router": "sigmoid", "masked": True},
    "bad rows": {"spoiled": True, "shares": "uneven", "options": {"num_shared_experts": 1}},
    "5 experts": {"num_experts": 5, "shares": "uneven"},
    "3 experts": {"num_experts": 3},
    "odd sizes": {"intermediate_size": 5, "shares": "empty"},
    "average": {"average_gradients": True},
    "bfloat16": {"dtype": torch.bfloat16, "shares": "uneven"},
    "float64": {"dtype": torch.float64},
    "autocast": {"autocast": True, "shares": "empty"},
    "checkpoint": {"checkpoint": False, "shares": "uneven"},
    "checkpoint, reentrant": {"checkpoint": True, "shares": "empty"},
    "no gradient of x": {"leaf": "none", "shares": "empty"},
    "gradient of x on the first rank": {"leaf": "first", "shares": "uneven"},
    "gradient of x on the first rank, checkpoint": {"leaf": "first", "checkpoint": False},
    "frozen experts": {"freeze": ("gate_up", "down"), "shares": "empty"},
    "frozen gate_up": {"freeze": ("gate_up",), "leaf": "first"},
    "evaluation": {"train": False},
    "details": {"details": True, "masked": True, "shares": "uneven"},
    "compiled": {"compiled": 2, "shares": "uneven"},
}
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}


def tokens(num_tokens: int = TOKENS, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, D, generator=gen) + 0.3 * torch.randn(D, generator=gen)


def share(x: Tensor, rank: int, num_ranks: int, shares: str) -> Tensor:
    """This rank's part of the tokens; the parts of all ranks in order are x."""
    if num_ranks == 1:
        return x
    if shares == "even":
        return x.chunk(num_ranks)[rank]
    if shares == "empty":  # the first rank sees nothing
        return x[:0] if rank == 0 else x.chunk(num_ranks - 1)[rank - 1]
    if shares == "last":
        return x if rank == num_ranks - 1 else x[:0]
    cuts = [0, *[3 * (r + 1) for r in range(num_ranks - 1)], len(x)]
    return x[cuts[rank] : cuts[rank + 1]]


def make(scenario: dict[str, Any]) -> MoE:
    """A layer in the middle of training."""
    torch.manual_seed(5)
    num_experts = scenario.get("num_experts", 6)
    layer = MoE(
        D, scenario.get("intermediate_size", I), num_experts, K, scenario.get("router", "kmeans"),
        **scenario.get("options", {}),
    )  # fmt: skip
    if isinstance(layer.router, KMeansRouter):
        layer.router.initialize(tokens(300, 100))
    layer.router.expert_bias.copy_(torch.linspace(-0.1, 0.1, num_experts))
    if "favour" in scenario:
        layer.router.expert_bias[scenario["favour"]] += 2
    for name in scenario.get("freeze", ()):
        layer.experts.get_parameter(name).requires_grad_(False)
    return layer.to(scenario.get("dtype", torch.float32)).train(scenario.get("train", True))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def call(layer: MoE, x: Tensor, mask: Tensor | None, scenario: dict[str, Any], num_ranks: int) -> Tensor:
    forward: Any = layer
    if "checkpoint" in scenario:
        forward = functools.partial(checkpoint, layer, use_reentrant=scenario["checkpoint"])
    if scenario.get("compiled") == num_ranks:
        forward = torch.compile(layer, backend="aot_eager")
        layer.router.expert_bias.neg_()  # other loads: the lengths of the exchange change between calls
        forward(x)
        layer.router.expert_bias.neg_()
        layer.router.pending.clear_()
    with torch.autocast("cpu", torch.bfloat16, enabled=scenario.get("autocast", False)):
        return forward(x, mask)


def one_step(rank: int, num_ranks: int, mesh: DeviceMesh | None, scenario: dict[str, Any]) -> dict[str, Tensor]:
    """This rank's y and dx; the weights' gradients, state and statistics of all ranks together."""
    layer = make(scenario)
    average = scenario.get("average_gradients", False)
    if mesh is not None:
        assert expert_parallel(layer, mesh, average_gradients=average) is layer
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    attachment = attach(layer, optimizer)
    part = functools.partial(share, rank=rank, num_ranks=num_ranks, shares=scenario.get("shares", "even"))
    x, mask = tokens().to(scenario.get("dtype", torch.float32)), None
    if scenario.get("masked"):
        mask = torch.rand(TOKENS, generator=torch.Generator().manual_seed(2)) < 0.7
        x[~mask] = torch.nan
        mask = part(mask)
    if scenario.get("spoiled"):
        x[::5] = torch.tensor([torch.nan, torch.inf, 0.0, 1e30, 1e-30])[:, None].repeat(2, 1)
    coefficients = part(torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(3)))
    wants_dx = scenario.get("leaf", "all")
    x = part(x).clone().requires_grad_(wants_dx == "all" or (wants_dx == "first" and rank == 0))
    if scenario.get("details"):
        details = layer.details(x, mask)
        return {"y": details.y, "rows": details.y_sorted.sum(0)}
    with contextlib.nullcontext() if layer.training else torch.no_grad():
        y = call(layer, x, mask, scenario, num_ranks)
    if not layer.training:
        return {"y": y}
    factor = num_ranks if average else 1  # so that the mean over the ranks is the loss of one process
    ((y * coefficients).sum() * factor).backward()
    result = {"y": y.detach(), **({} if x.grad is None else {"x": x.grad / factor})}
    for name, p in layer.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        if isinstance(p, DTensor) and p.grad is not None:
            result[name] = p.grad.full_tensor()
        elif p.grad is not None:
            result[name] = p.grad
            if num_ranks > 1:
                dist.all_reduce(p.grad)
                p.grad /= factor
    optimizer.step()
    attachment.remove()
    return {**result, **dict(layer.router.named_buffers()), "counts": layer.router.tokens_per_expert}


def all_steps(rank: int, num_ranks: int) -> dict[str, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (num_ranks,)) if num_ranks > 1 else None
    return {name: one_step(rank, num_ranks, mesh, scenario) for name, scenario in SCENARIOS.items()}


def assert_same_as_alone(ranks: list[dict[str, dict[str, Tensor]]], alone: dict[str, dict[str, Tensor]]) -> None:
    for name, want in alone.items():
        scenario = SCENARIOS[name]
        dtype = torch.bfloat16 if scenario.get("autocast") else scenario.get("dtype", torch.float32)
        for key, value in want.items():
            parts = [rank[name][key] for rank in ranks if key in rank[name]]
            if key == "rows":
                parts = [torch.stack(parts).sum(0)]
            if key in ("y", "x"):
                assert len(parts) == len(ranks) or scenario.get("leaf")
                parts = [torch.cat(parts)]
            assert parts, (name, key)
            for part in parts:
                rounding = ROUNDING[dtype if value.dtype == dtype or dtype == torch.bfloat16 else torch.float32]
                scale = float(value.abs().max()) if value.is_floating_point() else 0.0
                if key == "weight" and scenario.get("router", "kmeans") == "kmeans":
                    scale *= WHITENING_EPS**-0.5  # as much as whitening can make of a rounding
                torch.testing.assert_close(
                    part, value[: len(part)] if key == "x" else value, rtol=0, atol=rounding * scale,
                    msg=lambda m, at=(name, key): f"{at}: {m}",
                )  # fmt: skip


def lost_and_found(rank: int, num_ranks: int) -> None:
    """Rows that carry who they are, sent and returned; every rank knows what every rank has."""
    from kmeans_route.parallel.experts import make_plan, return_rows, send_rows

    num_experts, most = 6, -(-6 // num_ranks)
    own = range(min(rank * most, 6), min(rank * most + most, 6))
    for seed in range(4):
        gen = torch.Generator().manual_seed(seed)
        counts = torch.randint(0, 5, (num_ranks, num_experts), generator=gen)
        counts *= torch.rand(num_ranks, num_experts, generator=gen) < 0.7
        counts[seed % num_ranks] = 0  # one rank sends nothing
        pieces = [
            [torch.tensor([r, e, i, 1.0])[None] for e in range(num_experts) for i in range(int(counts[r, e]))]
            for r in range(num_ranks)
        ]
        sent = torch.cat([torch.zeros(0, 4), *pieces[rank], torch.full((3, 4), torch.nan)])  # 3 rows are not valid
        offsets = torch.cat([torch.zeros(1), counts[rank].cumsum(0)]).int()
        plan = make_plan(sent, offsets, len(own), dist.group.WORLD, trains=False)
        rows = send_rows(sent, plan, sent, sent)
        want = [[r, e, i, 1.0] for e in own for r in range(num_ranks) for i in range(int(counts[r, e]))]
        assert rows.tolist() == want
        assert plan.offsets.tolist() == [0, *counts.sum(0)[own.start : own.stop].cumsum(0).tolist()]
        assert sum(plan.pieces.from_ranks) == len(want)
        back = return_rows(rows * 2, plan)
        assert back.shape == sent.shape
        assert torch.equal(back[: int(offsets[-1])], 2 * sent[: int(offsets[-1])])


def messages_of(*calls: Any) -> list[str]:
    messages = []
    for function in calls:
        try:
            function()
            messages.append("nothing was raised")
        except (TypeError, ValueError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def refusals(rank: int, num_ranks: int) -> list[str]:
    mesh, table = init_device_mesh("cpu", (num_ranks,)), init_device_mesh("cpu", (num_ranks // 2, 2))
    layer, other, frozen = (make({"router": "softmax"}) for _ in range(3))
    expert_parallel(layer, mesh)
    fully_shard(other, mesh=mesh)
    expert_parallel(frozen, mesh)
    for p in expert_parameters(frozen):
        p.requires_grad_(False)

    def with_gradients_on_the_first_rank() -> None:
        with torch.set_grad_enabled(rank == 0):
            layer(tokens())

    return messages_of(
        lambda: expert_parallel(make({}), "cpu"),
        lambda: expert_parallel(make({}), table),
        lambda: expert_parallel(nn.Linear(2, 2), mesh),
        lambda: expert_parallel(nn.Sequential(layer), mesh),
        lambda: expert_parallel(other, mesh),
        lambda: one_dtype_each(layer, rank),
        with_gradients_on_the_first_rank,
        lambda: frozen(tokens().requires_grad_(rank == 1)),
        lambda: expert_parallel(make({}), DeviceMesh("cpu", [0])),
    )


def one_dtype_each(layer: MoE, rank: int) -> None:
    layer.experts(torch.zeros(0, D, dtype=torch.float32 if rank else torch.float64), torch.zeros(7, dtype=torch.int32))


def train(rank: int, num_ranks: int, how: str) -> dict[str, Tensor]:
    """Five steps, and the whole state after them. how: "ddp", "fsdp", "dp x ep", or "alone" with all tokens."""
    torch.manual_seed(7)
    layers = [MoE(D, I, 6, K, router, num_shared_experts=1, name=router) for router in ("kmeans", "sigmoid")]
    model = root = nn.Sequential(nn.Linear(D, D), *layers)
    table = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep")) if how == "dp x ep" else None
    if how != "alone":
        mesh = init_device_mesh("cpu", (num_ranks,))
        expert_parallel(model, mesh if table is None else table["ep"])
    experts = expert_parameters(model)
    if table is not None:
        for layer in layers:
            fully_shard(layer.experts, mesh=table["dp"])
        fully_shard(model, mesh=mesh)
        experts = expert_parameters(model)
    elif how == "fsdp":
        fully_shard(model, mesh=mesh, ignored_params=experts)
    elif how == "ddp":
        root = DistributedDataParallel(model)
    dense = [p for p in model.parameters() if p not in experts]
    groups = [list(model.parameters())] if how == "fsdp" else [dense, list(experts)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=0.01, eps=1e-3, foreach=True)
    attachment = attach(root, optimizer)
    for step in range(5):
        x = tokens(64, seed=step).chunk(num_ranks)[rank]
        (root(x) - x.roll(1, dims=1)).square().mean().backward()
        if how == "fsdp":
            norm = whole(clip_grad_norm_(model.parameters(), 0.05))
        else:
            norms = [whole(get_total_norm([p.grad for p in group])) for group in groups]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            for group in groups:
                clip_grads_with_norm_(group, 0.05, norm)
        assert norm > 0.05, "clipping changes the gradients"
        optimizer.step()
        optimizer.zero_grad()
    attachment.remove()
    return {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}


def keep(rank: int, num_ranks: int, folder: str) -> dict[str, Tensor]:
    """Save, load, copy, start on the meta device; the whole state of what was saved."""
    mesh = init_device_mesh("cpu", (num_ranks,))
    layer, other = (expert_parallel(make({"num_experts": 5}), mesh) for _ in range(2))
    for p in other.parameters():
        nn.init.zeros_(p)
    dcp.save({"model": other.state_dict()}, checkpoint_id=f"{folder}/zeros")
    state = {name: whole(tensor).clone() for name, tensor in layer.state_dict().items()}
    other.load_state_dict(state)
    for one, two in zip(layer.parameters(), other.parameters(), strict=True):
        assert isinstance(two, DTensor)
        assert torch.equal(one.to_local(), two.to_local())
    twin = copy.deepcopy(other.eval())
    assert torch.equal(twin(tokens()), layer.eval()(tokens()))
    with torch.device("meta"):
        fresh = MoE(D, I, 5, K)
    expert_parallel(fresh, mesh)
    assert fresh.experts.down.is_meta
    fresh.to_empty(device="cpu")
    torch.manual_seed(5)
    fresh.experts.reset_parameters()
    after = torch.rand(1)
    torch.manual_seed(5)
    want = MoE(D, I, 5, K).experts
    assert torch.equal(after, torch.rand(1)), "all ranks go on from one state of the generator"
    for name in ("gate_up", "down"):
        assert torch.equal(fresh.experts.get_parameter(name).full_tensor(), want.get_parameter(name)), name
    dcp.load({"model": (loaded := other.state_dict())}, checkpoint_id=f"{folder}/zeros")
    assert not loaded["experts.down"].to_local().any()
    dcp.save({"model": layer.state_dict()}, checkpoint_id=f"{folder}/layer")
    return state


def everything(rank: int, num_ranks: int, folder: str) -> dict[str, Any]:
    lost_and_found(rank, num_ranks)
    ways = ["ddp", "fsdp"] if num_ranks == 2 else ["ddp", "fsdp", "dp x ep"]
    return {
        "steps": all_steps(rank, num_ranks),
        "refusals": refusals(rank, num_ranks),
        "training": {how: train(rank, num_ranks, how) for how in ways},
        "kept": keep(rank, num_ranks, folder),
    }


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_equal_one_process(tmp_path: Path, num_ranks: int) -> None:
    """All in one launch a number of ranks, since starting them takes longer than what they do."""
    ranks = run_on_ranks(everything, num_ranks, tmp_path, num_ranks, str(tmp_path))
    assert_same_as_alone([rank["steps"] for rank in ranks], all_steps(0, 1))
    assert_refused([rank["refusals"] for rank in ranks])
    alone = train(0, 1, "alone")
    for rank in ranks:
        for how, state in rank["training"].items():
            assert state.keys() == alone.keys()
            for name, tensor in state.items():
                torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-5, msg=f"{how} {name}")
    layer = make({"num_experts": 5, "router": "kmeans"})
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    dcp.load({"model": (state := layer.state_dict())}, checkpoint_id=str(tmp_path / "layer"), no_dist=True)
    for name, tensor in ranks[0]["kept"].items():
        assert torch.equal(state[name], tensor), name


def assert_refused(ranks: list[list[str]]) -> None:
    for rank, messages in enumerate(ranks):
        not_mesh, two, none, twice, sharded, dtypes, modes, frozen, outside = messages
        assert not_mesh.startswith("TypeError: mesh must be a DeviceMesh, got str")
        assert two.startswith("ValueError: mesh must have 1 dimension, got 2")
        assert none.startswith("ValueError: model must contain at least one MoE, got none in Linear")
        assert twice.startswith("RuntimeError: the experts of '0' must be whole on every rank, got ParallelExperts")
        assert sharded.startswith("RuntimeError: the experts of 'model' must be whole on every rank")
        assert "one dtype on all ranks of the mesh, got torch.float64, torch.float32" in dtypes
        assert f"got none on ranks {list(range(1, len(ranks)))}" in modes
        assert f"got none on ranks {[r for r in range(len(ranks)) if r != 1]}" in frozen
        assert outside.startswith("ValueError: mesh must hold this rank") == bool(rank)
