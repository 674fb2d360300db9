"""Checkpoints by other people's tools: safetensors, torch.distributed.checkpoint, a loop of one's own."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kmeans_route import KMeansRouter, LearnedRouter, MoE, attach
from tests.helpers.compare import assert_same_bits, generator
from tests.helpers.ranks import run_on_ranks

D, E, K = 16, 6, 2
STOP, END = 2, 4
State = dict[str, Tensor]
KINDS: dict[str, dict[str, Any]] = {
    "kmeans": {},
    "cumulative": {"average": "cumulative", "balance": "quantile"},
    "softmax": {"router": "softmax"},
    "sigmoid": {"router": "sigmoid"},
}
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")


class Model(nn.Module):
    """Two blocks with a mixture each."""

    def __init__(self, seed: int = 0, experts: int = E, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(MoE(D, 8, experts, K, seed=seed, name=f"blocks.{i}", **options) for i in range(2))
        self.outward = nn.Linear(D, 1)

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = h + block(h)
        return self.outward(h).square().mean()

    @property
    def aux_loss(self) -> Tensor:
        return torch.stack([block.aux_loss for block in self.blocks]).sum()  # type: ignore[operator]


class Run:
    """A model, its optimizer and their tie; as an application's `Stateful` for torch.distributed.checkpoint."""

    def __init__(self, seed: int = 0, shard: bool = False, **options: Any) -> None:
        self.model = Model(seed, **options)
        if shard:
            mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.attachment = attach(self.model, self.optimizer)

    def train(self, start: int, stop: int, rank: int = 0, num_ranks: int = 1) -> "Run":
        for step in range(start, stop):
            x = torch.randn(96, D, generator=generator(step)) + 0.3
            x[5 * step] = torch.nan if isinstance(self.attachment.routers["blocks.0.router"], KMeansRouter) else 0.0
            loss = self.model(x.chunk(num_ranks)[rank])
            (loss + self.model.aux_loss).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def state_of(run: Run) -> State:
    """All that the next step depends on, unsharded."""
    state = {name: whole(tensor) for name, tensor in run.model.state_dict().items()}
    for name, parameter in run.model.named_parameters():
        state |= {f"{key} of {name}": whole(value) for key, value in run.optimizer.state[parameter].items()}
    return state


def assert_same(got: State, want: State) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_same_bits(got[name], value, name)


def straight(**options: Any) -> tuple[Run, State]:
    """A run stopped half way, and what it would have come to."""
    return Run(**options).train(0, STOP), state_of(Run(**options).train(0, END))


def carry_optimizer(source: Run, target: Run) -> None:
    target.optimizer.load_state_dict(source.optimizer.state_dict())


# safetensors


def by_file(source: nn.Module, target: nn.Module, path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(source.state_dict(), path)
    target.load_state_dict(safetensors.load_file(path))


def by_file_in_place(source: nn.Module, target: nn.Module, path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(source.state_dict(), path)
    loaded = safetensors.load_file(path)
    for name, held in target.state_dict().items():
        held.copy_(loaded[name])


def by_model(source: nn.Module, target: nn.Module, path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(source, str(path))
    missing, unexpected = safetensors.load_model(target, path)
    assert not missing
    assert not unexpected


def by_dcp_in_place(source: nn.Module, target: nn.Module, path: Path) -> None:
    dcp.save(source.state_dict(), checkpoint_id=path)
    dcp.load(target.state_dict(), checkpoint_id=path)


def by_dcp(source: nn.Module, target: nn.Module, path: Path) -> None:
    dcp.save(source.state_dict(), checkpoint_id=path)
    state = target.state_dict()
    dcp.load(state, checkpoint_id=path)
    target.load_state_dict(state)


ROUTES: list[Callable[[nn.Module, nn.Module, Path], None]] = [
    by_file, by_file_in_place, by_model, by_dcp_in_place, by_dcp,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_resume_is_bit_for_bit(route: Callable[..., None], kind: str, tmp_path: Path) -> None:
    first, want = straight(**KINDS[kind])
    second = Run(seed=1, **KINDS[kind])
    route(first.model, second.model, tmp_path / "saved")
    carry_optimizer(first, second)
    assert_same(state_of(second), state_of(first))
    assert_same(state_of(second.train(STOP, END)), want)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("kind", KINDS)
def test_model_and_optimizer_as_stateful(kind: str, tmp_path: Path) -> None:
    first, want = straight(**KINDS[kind])
    dcp.save({"app": first}, checkpoint_id=tmp_path)
    second = Run(seed=1, **KINDS[kind])
    dcp.load({"app": second}, checkpoint_id=tmp_path)
    assert_same(state_of(second.train(STOP, END)), want)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_another_shape_is_refused(route: Callable[..., None], tmp_path: Path) -> None:
    """By us, and in place by the tool itself: the model stays what it was."""
    source, target = Run(experts=E + 1).train(0, STOP), Run().train(0, STOP)
    before = state_of(target)
    messages = {
        "by_file": r"blocks.0.router.weight must have shape \(6, 16\), got \(7, 16\)",
        "by_model": r"blocks.0.router.weight must have shape \(6, 16\), got \(7, 16\)",
        "by_file_in_place": r"must match the size of tensor",
    }
    with pytest.raises((RuntimeError, CheckpointException), match=messages.get(route.__name__, "Size mismatch")):
        route(source.model, target.model, tmp_path / "saved")
    assert_same(state_of(target), before)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_non_finite_state_is_refused_by_name(route: Callable[..., None], value: float, tmp_path: Path) -> None:
    """At once, or where the tool writes in place and calls nothing here, by the next training forward."""
    source, target = Run().train(0, STOP), Run(seed=1)
    source.attachment.routers["blocks.1.router"].expert_bias[2] = value
    refused = pytest.raises(
        RuntimeError, match=r"expert_bias of router 'blocks.1' must be|1.router.expert_bias must be"
    )
    if route.__name__.endswith("in_place"):
        route(source.model, target.model, tmp_path / "saved")
        with refused:
            target.train(STOP, END)
    else:
        with refused:
            route(source.model, target.model, tmp_path / "saved")


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_checkpoint_without_a_part_of_the_state_is_refused(tmp_path: Path) -> None:
    source, target = Run(), Run(average="cumulative")
    with pytest.raises(RuntimeError, match=r'Missing key.*"blocks.0.router.tokens_seen"'):
        by_file(source.model, target.model, tmp_path / "file")
    with pytest.raises(CheckpointException, match=r"Missing key .*: blocks.0.router.tokens_seen"):
        by_dcp_in_place(source.model, target.model, tmp_path / "dcp")


# Ranks


def on_ranks(rank: int, kind: str, in_place: bool, folder: str) -> tuple[State, State, State]:
    """FSDP2 on two ranks: (what a run came to, what a resumed run came to, what was saved), unsharded."""
    options = KINDS[kind]
    want = state_of(Run(shard=True, **options).train(0, END, rank, 2))
    first = Run(shard=True, **options).train(0, STOP, rank, 2)
    dcp.save({"app": first}, checkpoint_id=folder)
    second = Run(seed=1, shard=True, **options)
    if in_place:
        dcp.load({"app": second.state_dict()}, checkpoint_id=folder)
    else:
        dcp.load({"app": second}, checkpoint_id=folder)
    return want, state_of(second.train(STOP, END, rank, 2)), state_of(first)


def every_kind_on_ranks(rank: int, folder: str) -> dict[str, tuple[State, State, State]]:
    warnings.simplefilter("ignore")
    cases = [("kmeans", False), ("cumulative", True), ("sigmoid", False)]
    return {kind: on_ranks(rank, kind, in_place, f"{folder}/{kind}") for kind, in_place in cases}


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_sharded_runs_resume_bit_for_bit_and_load_into_one_process(tmp_path: Path) -> None:
    ranks = run_on_ranks(every_kind_on_ranks, 2, tmp_path, str(tmp_path))
    for kind in ranks[0]:
        for want, resumed, _ in (ranks[0][kind], ranks[1][kind]):
            assert_same(resumed, want)
        assert_same(ranks[0][kind][0], ranks[1][kind][0])
        alone = Run(seed=1, **KINDS[kind])
        dcp.load({"app": alone}, checkpoint_id=tmp_path / kind)
        assert_same(state_of(alone), ranks[0][kind][2])
        for router in alone.attachment.routers.values():
            assert isinstance(router, LearnedRouter) or bool(router.initialized)


# A loop of one's own


class Loop:
    """What the README shows: mixed precision with a scaler, and a checkpoint wherever nothing is pending."""

    def __init__(self, seed: int, fused: bool, every_n_steps: int) -> None:
        self.model = Model(seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2, fused=fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        self.attachment = attach(self.model, self.optimizer, every_n_steps=every_n_steps)
        self.step, self.skipped = 0, 0

    def train_step(self) -> None:
        x = torch.randn(96, D, generator=generator(self.step)) + 0.3
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(x)
        if self.step in (2, 6):
            loss = loss * torch.inf
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < scale
        self.optimizer.zero_grad()
        self.step += 1

    def nothing_pending(self) -> bool:
        return not any(int(router.pending.num_tokens) for router in self.attachment.routers.values())

    def everything(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def save(self, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(self.everything(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        self.step = saved["step"]
        for name in ("model", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(saved[name])


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, inner in items for key, leaf in flat(inner, f"{name}.{part}").items()}
    return {name: value}


@pytest.mark.filterwarnings("ignore:.*tokens pending")
@pytest.mark.parametrize("every_n_steps", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_a_loop_with_a_scaler_resumes_bit_for_bit(fused: bool, every_n_steps: int, tmp_path: Path) -> None:
    loop, saved = Loop(0, fused, every_n_steps), []
    while loop.step < 10:
        loop.train_step()
        if loop.nothing_pending():
            saved.append(tmp_path / f"{loop.step}.pt")
            loop.save(saved[-1])
    assert loop.skipped == 2
    assert len(saved) >= 4
    want = flat(loop.everything())
    for path in saved[:-1]:
        resumed = Loop(1, fused, every_n_steps)
        resumed.load(path)
        while resumed.step < 10:
            resumed.train_step()
        got = flat(resumed.everything())
        assert got.keys() == want.keys()
        for name, value in want.items():
            if isinstance(value, Tensor):
                assert_same_bits(got[name], value, f"{path.name} {name}")
            else:
                assert got[name] == value, f"{path.name} {name}"
