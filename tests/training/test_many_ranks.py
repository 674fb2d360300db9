"""Several ranks train a language model as one process does: every step of it, and its loss."""

import argparse
import datetime
import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("safetensors")

from kmeans_route.lm.config import TrainConfig
from kmeans_route.reference import WHITENING_EPS
from tests.helpers.ranks import run_on_ranks
from tests.training.many_ranks import Run, train

SMALL = TrainConfig(tau=0.2, steps=200)
TINY = replace(SMALL, steps=8, layers=2, hidden=32, heads=2, experts=8, expert_hidden=32, seq_len=32, batch=8)


def run(rank: int, num_ranks: int, config: TrainConfig, check: bool) -> Run:
    text = [Path(argparse.__file__)] if config == TINY else []  # the whole standard library takes seconds to read
    return train(rank, num_ranks, config, text, check=check)


def assert_equal_to_one_process(runs: list[Run]) -> None:
    first = runs[0]
    assert [r.unequal for r in runs] == [0] * len(runs)
    # Whitening may enlarge what averages differ by, as far as the smallest eigenvalue that it lets be.
    limits = dict.fromkeys(first.worst, 1e-6) | {"weight": 1e-6 / WHITENING_EPS**0.5}
    assert all(worst < limits[name] for name, worst in first.worst.items()), first.worst
    assert first.near_ties <= 1e-4 * first.choices
    assert all(first.worst[name] == 0 for name in ("steps", "initialized", "dropped_total", "tokens_per_expert"))
    assert first.losses[-1] < first.losses[0]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_step_is_that_of_one_process(tmp_path: Path, num_ranks: int) -> None:
    assert_equal_to_one_process(run_on_ranks(run, num_ranks, tmp_path, num_ranks, TINY, True))


def end(losses: list[float]) -> float:
    """Bits a byte over the last 20 steps."""
    return sum(losses[-20:]) / 20 / 0.6931471805599453


@pytest.mark.slow
def test_two_hundred_steps_on_four_ranks(tmp_path: Path) -> None:
    """Every step against one process; and runs left to themselves end within the spread of the seeds."""
    checked = run_on_ranks(run, 4, tmp_path / "checked", 4, SMALL, True)
    assert_equal_to_one_process(checked)
    curves = {f"1 rank, seed {seed}": run(0, 1, replace(SMALL, seed=seed), False).losses for seed in range(3)}
    curves["2 ranks, seed 0"] = run_on_ranks(run, 2, tmp_path / "two", 2, SMALL, False)[0].losses
    curves["4 ranks, seed 0"] = checked[0].losses
    ends = {name: end(losses) for name, losses in curves.items()}
    alone = [ends[f"1 rank, seed {seed}"] for seed in range(3)]
    spread = max(alone) - min(alone)
    summary = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, gloo",
        "command": "python -m pytest tests/training/test_many_ranks.py -m slow",
        "model": "4 layers, D 128, 16 experts, top 2, 2048 bytes a step, 200 steps",
        "steps_with_unequal_ranks": checked[0].unequal,
        "worst_relative_distance_to_one_process": checked[0].worst,
        "choices": checked[0].choices,
        "near_ties": checked[0].near_ties,
        "bits_per_byte_last_20_steps": ends,
        "spread_of_seeds": spread,
    }
    folder = os.environ.get("KMEANS_ROUTE_SUMMARY")
    if folder:
        Path(folder, "reliability-ranks.json").write_text(json.dumps(summary, indent=2) + "\n")
        picture(curves, Path(folder, "reliability-ranks.png"))
    for ranks in (2, 4):
        assert abs(ends[f"{ranks} ranks, seed 0"] - alone[0]) <= spread, ends


def picture(curves: dict[str, list[float]], path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, losses in curves.items():
        smooth = torch.tensor(losses).unfold(0, 10, 1).mean(1) / 0.6931471805599453
        alone = name.startswith("1 rank")
        axes.plot(
            range(10, len(losses) + 1), smooth, label=name, linewidth=1 if alone else 2, alpha=0.6 if alone else 1
        )
    axes.set(xlabel="optimizer step", ylabel="training loss, bits a byte, mean of 10 steps")
    axes.set_title("One, two and four ranks with the same batches")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
