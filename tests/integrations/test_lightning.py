"""Lightning: Trainer.fit with accumulation, checkpoints and resume; what counts is what training_step runs."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

pytest.importorskip("lightning", exc_type=ImportError)
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from kmeans_route import MoE, attach
from kmeans_route.integrations.lightning import KMeansRouting
from tests.helpers.compare import assert_same_bits, routers_of
from tests.helpers.examples import run_example
from tests.helpers.ranks import run_on_ranks

D, E = 12, 4
NOISE = (
    "ignore:.*does not have many workers",
    "ignore:.*but have no `val_dataloader`",
    "ignore:.*number of training batches",
    "ignore:.*treespec",
    "ignore:.*deterministic",
)


@pytest.fixture(autouse=True)
def no_warning_of_ours() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*router.*")
        yield


class Net(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.layers = nn.ModuleList(MoE(D, 8, E, 2, name=f"layers.{i}") for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=True) if self.recompute else layer(x))
        return x


class Module(pl.LightningModule):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inward, self.net = nn.Linear(D, D), Net(recompute)
        self.batches: list[int] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.batches.append(index)
        with torch.no_grad():
            self.net(batch)  # a look at the outputs, for a picture, is no training
        return (self.net(self.inward(batch)) - batch).square().mean()

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def tensors(num_batches: int = 12) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.randn(num_batches, 20, D))


def data(num_batches: int = 12, start: int = 0, stride: int = 1) -> DataLoader[Tensor]:
    return DataLoader(tensors(num_batches)[start::stride], batch_size=None)  # type: ignore[arg-type]


def trainer(folder: Path, *callbacks: Any, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 1, "accumulate_grad_batches": 3}
    return pl.Trainer(
        default_root_dir=folder, callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, **defaults, **options},
    )  # fmt: skip


def assert_same_state(got: nn.Module, want: nn.Module) -> None:
    for name, value in want.state_dict().items():
        assert_same_bits(got.state_dict()[name], value, name)


def by_hand(num_steps: int) -> Module:
    """What Trainer.fit is to compute: three batches a step."""
    module = Module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    tie = attach(module.net, optimizer)
    for step in range(num_steps):
        for batch in tensors()[3 * step : 3 * step + 3]:
            ((module.net(module.inward(batch)) - batch).square().mean() / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    tie.remove()
    return module


@pytest.mark.filterwarnings(*NOISE)
def test_fit_commits_once_per_optimizer_step_like_a_loop_by_hand(tmp_path: Path) -> None:
    module = Module()
    fit = trainer(tmp_path, KMeansRouting())
    fit.fit(module, data(), data(2))
    assert len(module.batches) == 12
    assert fit.global_step == 4
    # The first commit sets the centroids, the others are steps.
    assert [int(router.steps) for router in routers_of(module)] == [3, 3]
    assert_same_state(module, by_hand(4))
    assert all(router._scope is None for router in routers_of(module))


@pytest.mark.filterwarnings(*NOISE, "ignore:.*requires_grad=True")
def test_reentrant_checkpointing_counts_each_token_once(tmp_path: Path) -> None:
    plain, recomputed = Module(), Module(recompute=True)
    for module in (plain, recomputed):
        trainer(tmp_path, KMeansRouting()).fit(module, data())
    for got, want in zip(routers_of(recomputed), routers_of(plain), strict=True):
        assert got.tokens_per_expert.sum() == 3 * 20 * 2
        assert torch.equal(got.tokens_per_expert, want.tokens_per_expert)
        torch.testing.assert_close(got.weight, want.weight)


def stop_and_resume(every_n_steps: int, max_epochs: int, folder: Path) -> tuple[Module, pl.Trainer]:
    """Stop after the four steps of the first epoch, and go on in a new module from the checkpoint."""
    saved = ModelCheckpoint(dirpath=folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    first = trainer(folder, KMeansRouting(every_n_steps=every_n_steps), saved, enable_checkpointing=True)
    first.fit(Module(), data())
    module = Module()
    second = trainer(folder, KMeansRouting(every_n_steps=every_n_steps), max_epochs=max_epochs)
    second.fit(module, data(), ckpt_path=str(folder / "step=4.ckpt"), weights_only=True)
    return module, second


@pytest.mark.parametrize("every_n_steps", [1, 2])
@pytest.mark.filterwarnings(*NOISE)
def test_resume_has_the_bits_of_a_run_that_never_stopped(every_n_steps: int, tmp_path: Path) -> None:
    whole = Module()
    trainer(tmp_path, KMeansRouting(every_n_steps=every_n_steps), max_epochs=2).fit(whole, data())
    resumed, fit = stop_and_resume(every_n_steps, 2, tmp_path)
    assert fit.global_step == 8
    assert len(resumed.batches) == 12
    assert_same_state(resumed, whole)
    assert int(routers_of(resumed)[0].steps) == 8 // every_n_steps - 1


@pytest.mark.filterwarnings(*NOISE)
def test_resume_goes_on_counting_steps(tmp_path: Path) -> None:
    """Of twelve steps the third, sixth, ninth and twelfth commit, though the fourth is followed by a resume."""
    with pytest.warns(UserWarning, match="60 tokens pending"):  # of the fourth, which the checkpoint does not hold
        module, _ = stop_and_resume(3, 3, tmp_path)
    assert int(routers_of(module)[0].steps) == 3


@pytest.mark.filterwarnings(*NOISE)
def test_metrics_go_to_the_logger_at_its_pace(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version=0, flush_logs_every_n_steps=1)
    fit = trainer(tmp_path, KMeansRouting(), logger=logger, log_every_n_steps=2)
    module = Module()
    fit.fit(module, data())
    rows = [line.split(",") for line in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()]
    by_name = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    logged = {int(row["step"]): float(row["net.layers.1.router/steps"]) for row in by_name}
    assert logged == {2: 1.0, 4: 3.0}
    want = routers_of(module)[0].metrics()["maxvio"]
    assert float(fit.callback_metrics["net.layers.0.router/maxvio"]) == pytest.approx(want)

    quiet = trainer(tmp_path, KMeansRouting(log_metrics=False), logger=False)
    quiet.fit(Module(), data())
    assert not [name for name in quiet.callback_metrics if "maxvio" in name]


class TwoOptimizers(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.net(self.inward(batch)).square().mean())
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = (self.inward, self.net)
        return [torch.optim.SGD(part.parameters(), lr=1e-2) for part in parts]


@pytest.mark.filterwarnings(*NOISE)
def test_one_of_several_optimizers_commits(tmp_path: Path) -> None:
    module = TwoOptimizers()
    trainer(tmp_path, KMeansRouting(optimizer=1), accumulate_grad_batches=1).fit(module, data())
    assert [int(router.steps) for router in routers_of(module)] == [11, 11]
    with pytest.raises(ValueError, match="must name one of the 2 optimizers"):
        trainer(tmp_path, KMeansRouting(), accumulate_grad_batches=1).fit(TwoOptimizers(), data())
    with pytest.raises(ValueError, match=r"optimizer must be in \[0, 1\], got 2"):
        trainer(tmp_path, KMeansRouting(optimizer=2), accumulate_grad_batches=1).fit(TwoOptimizers(), data())


class Breaks(Module):
    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if index == 5:
            raise KeyError("data")
        return super().training_step(batch, index)


@pytest.mark.filterwarnings(*NOISE)
def test_a_fit_that_raises_leaves_the_module_free_for_the_next(tmp_path: Path) -> None:
    module = Breaks()
    with pytest.raises(KeyError):
        trainer(tmp_path, KMeansRouting()).fit(module, data())
    attach(module, torch.optim.SGD(module.parameters(), lr=0.1)).remove()


def test_a_module_without_routers_is_refused(tmp_path: Path) -> None:
    class Dense(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(D, D)  # type: ignore[assignment]

    with pytest.raises(ValueError, match="at least one router"):
        trainer(tmp_path, KMeansRouting()).fit(Dense(), data())


def fit_on_a_rank(rank: int, folder: str) -> dict[str, Tensor]:
    """DDP under a process group that is there already; each rank has every other batch."""
    warnings.simplefilter("ignore")
    module = Module()
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
    strategy.setup_distributed = lambda: None  # type: ignore[attr-defined]
    fit = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=2, accumulate_grad_batches=3, logger=False, barebones=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        use_distributed_sampler=False, callbacks=[KMeansRouting()], strategy=strategy,
    )  # fmt: skip
    fit.fit(module, data(12, rank, 2))
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.slow  # each process imports Lightning
@pytest.mark.filterwarnings(*NOISE)
def test_two_ranks_agree_and_see_the_tokens_of_both(tmp_path: Path) -> None:
    states = run_on_ranks(fit_on_a_rank, 2, tmp_path / "ranks", str(tmp_path))
    alone = Module()
    trainer(tmp_path, KMeansRouting(), accumulate_grad_batches=6).fit(alone, data())
    for name, value in alone.state_dict().items():
        assert_same_bits(states[0][name], states[1][name], name)
        torch.testing.assert_close(states[0][name], value, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_the_example_of_the_page_does_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the Trainer writes its logs there
    names = run_example("lightning")
    assert names["trainer"].global_step == 4
    assert int(routers_of(names["trainer"].model)[0].steps) == 3
