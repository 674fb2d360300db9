"""The quality study: floors, the sweep that stops and goes on, and what its tables say."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from benchmarks.quality import analysis, studies, sweep
from kmeans_route import KMeansRouter, MoE
from kmeans_route.cli.config import TrainConfig
from kmeans_route.cli.data import load_corpus
from kmeans_route.cli.model import DecoderLM
from kmeans_route.cli.training import Trainer

ROOT = Path(__file__).parent.parent
SMALL: dict[str, Any] = {
    "layers": 1, "hidden": 16, "heads": 2, "experts": 4, "expert_hidden": 16, "seq_len": 16, "batch": 4,
    "eval_bytes": 512, "steps": 6,
}  # fmt: skip


@pytest.mark.parametrize("router", ["random", "hash"])
def test_the_floors_choose_by_nothing_that_they_learn(router: str) -> None:
    trainer = Trainer(TrainConfig(router=router, **SMALL), load_corpus([ROOT / "kmeans_route"]))
    layer = trainer.model.moe_layers[0]
    before = {name: value.clone() for name, value in layer.router.state_dict().items()}
    for _ in range(3):
        trainer.train_step()
    for name, value in layer.router.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert int(layer.tokens_per_expert.sum()) == 16 * 4 * 2
    evaluation = trainer.evaluate()
    assert math.isfinite(evaluation.bits_per_byte)
    assert bool(evaluation.coupling.isnan().all()) == (router == "hash")


def test_a_byte_has_one_set_of_experts_whatever_stands_around_it() -> None:
    config = TrainConfig(router="hash", **SMALL | {"layers": 2})
    model, seen = DecoderLM(config).eval(), list[torch.Tensor]()
    for block in model.blocks:
        block.moe.register_forward_pre_hook(lambda _m, _args, kwargs: seen.append(kwargs["indices"]), with_kwargs=True)
    model(torch.tensor([[7, 8, 7, 9]]))
    for ids in seen:
        assert torch.equal(ids[0], ids[2])
        assert all(len(set(row)) == 2 for row in ids.tolist())
    assert not torch.equal(seen[0], seen[1]), "each layer has a table of its own"
    tables = [DecoderLM(TrainConfig(router="hash", seed=seed, **SMALL)).blocks[0].table_VK for seed in (0, 0, 1)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert len(tables[0].flatten().bincount()) == 4


def test_a_layer_replays_ids_and_a_learned_one_refuses() -> None:
    x, ids = torch.randn(6, 16), torch.tensor([[3, 0]] * 6)
    layer = MoE(16, 8, 4, 2, gate="uniform").eval()
    assert isinstance(layer.router, KMeansRouter)
    layer(x, indices=ids)
    assert layer.tokens_per_expert.tolist() == [6, 0, 0, 6]
    with pytest.raises(ValueError, match="indices must be None with router='softmax'"):
        MoE(16, 8, 4, 2, "softmax")(x, indices=ids)


def test_jobs_are_the_study_and_bad_names_are_refused() -> None:
    made = studies.jobs("main", ["E16-K2", "E64-K8"], [0, 1, 2], TrainConfig(steps=24))
    assert len(made) == 2 * 3 * len(studies.MAIN)
    assert len({job.name for job in made}) == len(made)
    assert {job.config.expert_hidden * job.config.top_k for job in made} == {256}
    assert {job.config.seed for job in made[: len(studies.MAIN)]} == {0}
    assert all(job.config.eval_every == 2 for job in made)
    for arguments, name in ((("other", ["E16-K2"]), "--study"), (("main", ["E1"]), "--size")):
        with pytest.raises(ValueError, match=name):
            studies.jobs(*arguments, [0], TrainConfig())
    with pytest.raises(ValueError, match="--only must be among"):
        studies.jobs("main", ["E16-K2"], [0], TrainConfig(), ["K-Means"])


def command(folder: Path, steps: int, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "benchmarks.quality.sweep", "--size", "E16-K2", "--seeds", "0", "--steps", str(steps),
        "--only", "K-Means, quantile", "hash of the byte", "--workers", "1", "--out", str(folder / "work"),
        "--results", str(folder / "results.jsonl"), "--json", *more,
    ]  # fmt: skip


def test_a_sweep_that_is_stopped_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Stopped within a run by a signal, it leaves a checkpoint; the whole and the interrupted sweep agree."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    steps = 12
    process = subprocess.Popen(command(tmp_path / "a", steps), cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    (tmp_path / "a").mkdir(exist_ok=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "a").glob("work/*/config.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    first = json.loads(stdout)
    assert process.returncode == (3 if first["left"] else 0)
    again = subprocess.run(command(tmp_path / "a", steps), cwd=ROOT, env=environment, capture_output=True, check=False)
    assert again.returncode == 0, again.stderr
    whole = subprocess.run(command(tmp_path / "b", steps), cwd=ROOT, env=environment, capture_output=True, check=False)
    assert whole.returncode == 0, whole.stderr
    one, other = (sweep.read_results(tmp_path / name / "results.jsonl") for name in "ab")
    assert sorted(r["name"] for r in one) == sorted(r["name"] for r in other)
    assert len(one) == 2
    by_name = {record["name"]: record for record in other}
    for record in one:
        twin = by_name[record["name"]]
        assert record["curve"] == twin["curve"]
        assert record["validation"] == twin["validation"]
        assert record["measures"]["bits_per_byte"] == twin["measures"]["bits_per_byte"]
    done = subprocess.run(command(tmp_path / "b", steps), cwd=ROOT, env=environment, capture_output=True, check=True)
    assert json.loads(done.stdout) == {"finished": 0, "failed": [], "left": []}


def record(contestant: str, seed: int, bits: float, max_vio: float, size: str = "E16-K2") -> dict[str, Any]:
    measures = {
        "bits_per_byte": bits, "max_vio_validation": max_vio, "max_vio_train": 2 * max_vio, "dead_experts": 0,
        "coupling": None if "hash" in contestant else 0.25,
    }  # fmt: skip
    return {
        "size": size, "contestant": contestant, "config": {"steps": 100, "seed": seed}, "measures": measures,
        "layers": {"direction_cosine": [0.1, 0.3]}, "validation": [[50, bits + 1], [100, bits]],
    }  # fmt: skip


def test_tables_and_verdicts_are_those_of_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        *(record("softmax, aux 0.01", seed, 2.0 + 0.01 * seed, 0.3) for seed in range(3)),
        *(record("K-Means, quantile", seed, 1.9 + 0.01 * seed, 0.1) for seed in range(3)),
        *(record("K-Means, sign", seed, 1.95 + 0.01 * seed, 0.2) for seed in range(3)),
        *(record("hash of the byte", seed, 1.0, 0.9) for seed in range(3)),
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    assert analysis.main(["--results", str(path)]) == 0
    said = capsys.readouterr().out
    assert "| K-Means, quantile | 1.910 ± 0.010 | 0.100 ± 0.000 | 0.200 ± 0.000 | 0.0 ± 0.0 | 0.25 ± 0.00 |" in said
    assert "| hash of the byte | 1.000 ± 0.000 | 0.900 ± 0.000 | 1.800 ± 0.000 | 0.0 ± 0.0 | n/a |" in said
    assert "bits per byte: K-Means, quantile -0.100 against softmax, aux 0.01; resolved, standard error 0.008" in said
    assert "MaxVio: K-Means, quantile 0.100, 3.0 times less than softmax, aux 0.01 (0.300)" in said
    assert (tmp_path / "quality-E16-K2-100.png").stat().st_size > 10000
    assert analysis.main(["--results", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["E16-K2, 100 steps"]["K-Means, sign"]["max_vio_validation"] == [0.2] * 3


def test_close_means_are_not_resolved() -> None:
    assert analysis.resolved([1.0, 1.1, 1.2], [1.05, 1.15, 1.25]).startswith("not resolved")
    assert analysis.resolved([1.0], [2.0]) == "one seed decides nothing"


def test_a_torn_result_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"name": 1}\n{"name"')
    with pytest.raises(ValueError, match="in line 2: remove it"):
        sweep.read_results(path)
