"""The quality study: floors, the sweep that stops and goes on, and what its tables say."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from benchmarks.quality import analysis, final, one, studies, sweep, texts, trials
from kmeans_route import KMeansRouter, MoE
from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.data import load_corpus, standard_library_files
from kmeans_route.lm.model import DecoderLM
from kmeans_route.lm.results import summarize
from kmeans_route.lm.trainer import Trainer, learning_rate

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL: dict[str, Any] = {
    "layers": 1, "hidden": 16, "heads": 2, "experts": 4, "expert_hidden": 16, "seq_len": 16, "batch": 4,
    "eval_bytes": 512, "steps": 6,
}  # fmt: skip

CORPUS = load_corpus([ROOT / "kmeans_route"])


@pytest.mark.parametrize("router", ["random", "hash"])
def test_the_floors_choose_by_nothing_that_they_learn(router: str) -> None:
    trainer = Trainer(TrainConfig(router=router, **SMALL), CORPUS)
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
    assert 1 < float(evaluation.effective_experts.min()) <= float(evaluation.effective_experts.max()) <= 4
    assert bool(trainer.evaluate(sample=False).effective_experts.isnan().all())


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
    made = studies.jobs("main", ["D64-E16-K2", "D64-E64-K8"], [0, 1, 2], TrainConfig(steps=24))
    assert len(made) == 2 * 3 * len(studies.MAIN)
    assert len({job.name for job in made}) == len(made)
    assert {job.config.expert_hidden * job.config.top_k for job in made} == {128}
    assert {job.config.seed for job in made[: len(studies.MAIN)]} == {0}
    assert all(job.config.eval_every == 2 for job in made)
    for arguments, name in ((("other", ["D64-E16-K2"]), "--study"), (("main", ["E1"]), "--size")):
        with pytest.raises(ValueError, match=name):
            studies.jobs(*arguments, [0], TrainConfig())
    with pytest.raises(ValueError, match="--only must be among"):
        studies.jobs("main", ["D64-E16-K2"], [0], TrainConfig(), ["K-Means"])
    tried = studies.jobs("tries", ["D64-E16-K2"], [0], TrainConfig(), ["K-Means, proportional 0.015, tau 0.2"])[0]
    changes = studies.jobs("main", ["D64-E16-K2"], [0], TrainConfig(), [studies.CENTROIDS])[0]
    assert tried.config == replace(changes.config, bias_rate=0.015)


@pytest.mark.parametrize(("name", "top_k"), [(studies.WHITENED, 2), (studies.CENTROIDS, 1)])
def test_the_contestants_called_the_default_are_the_router_s(name: str, top_k: int) -> None:
    chosen = studies.jobs("main", ["D64-E16-K2"], [0], TrainConfig(), [name])[0].config
    default = KMeansRouter(64, 16, top_k)
    assert chosen.router_options == {"directions": default.commit_options.directions}
    assert (chosen.tau, chosen.decay) == (default.options.tau, default.commit_options.decay)
    assert (chosen.balance, chosen.bias_rate) == (default.commit_options.balance, None)
    assert TrainConfig().tau is None, "the router's own"


def command(folder: Path, steps: int) -> list[str]:
    return [
        sys.executable, "-m", "benchmarks.quality.sweep", "--size", studies.TINY, "--seeds", "0", "--steps", str(steps),
        "--only", "K-Means, quantile", "--out", str(folder / "work"), "--results", str(folder / "results.jsonl"),
        "--json",
    ]  # fmt: skip


def run_sweep(folder: Path, steps: int) -> dict[str, Any]:
    done = subprocess.run(command(folder, steps), cwd=ROOT, env=ENVIRONMENT, capture_output=True, check=False)
    assert done.returncode in (0, 3), done.stderr
    said = json.loads(done.stdout)
    assert done.returncode == (3 if said["left"] else 0)
    return said


def test_a_sweep_that_is_stopped_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Stopped within a run by a signal, it leaves a checkpoint; the whole and the interrupted sweep agree."""
    steps, where = 240, tmp_path / "a"
    where.mkdir()
    process = subprocess.Popen(command(where, steps), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(where.glob("work/*/checkpoint/*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    first = json.loads(stdout)
    assert process.returncode == 3
    assert first["left"], "it was stopped after its first checkpoint"
    assert not first["failed"]
    assert run_sweep(where, steps)["left"] == []
    run_sweep(tmp_path / "b", steps)
    interrupted, whole = (
        {run["name"]: run for run in sweep.read_results(tmp_path / name / "results.jsonl")} for name in "ab"
    )
    assert len(interrupted) == 1
    for name, run in interrupted.items():
        for key in ("measures", "curve", "validation", "geometry", "config"):
            assert run[key] == whole[name][key], (name, key)
    assert run_sweep(tmp_path / "b", steps) == {"finished": 0, "failed": [], "left": []}


def test_churn_is_the_share_of_a_tokens_experts_that_changed(tmp_path: Path) -> None:
    now = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]]])
    then = torch.tensor([[[1, 0], [2, 0]], [[2, 3], [2, 3]]])
    assert one.churn(then, 10, 10, tmp_path) is None
    assert one.churn(now, 20, 10, tmp_path) == 3 / 8
    assert one.churn(now, 30, 10, tmp_path) == 0


@pytest.mark.parametrize("router", ["hash", "kmeans"])
def test_a_fixed_table_has_no_churn(tmp_path: Path, router: str) -> None:
    trainer = Trainer(TrainConfig(router=router, eval_every=1, **SMALL), CORPUS)
    found = []
    for _ in range(3):
        trainer.train_step()
        seen = one.geometry(trainer, tmp_path)
        found.append(seen["churn"])
        assert 1 < seen["effective_experts"] <= 4
    assert found[0] is None
    assert all((churn > 0) == (router == "kmeans") for churn in found[1:])


@pytest.mark.parametrize("change", studies.CHANGES)
def test_a_change_in_mid_run_happens_after_half_of_the_steps(change: str) -> None:
    base = replace(TrainConfig(steps=20), batch=8)
    job = studies.jobs(change, [studies.TINY], [0], base, [f"K-Means, quantile; {change}"])[0]
    run = one.changed_run(job.config, change)
    assert isinstance(run, dict)
    assert run["curve"]["step"] == [10, 20]
    assert set(run["measures"]) == {"bits_code", "bits_prose"}


def what_is_learnt(trainer: Trainer) -> list[object]:
    """Losses, and the router's state: a few steps of another bias need not change a loss."""
    router = trainer.model.moe_layers[0].router
    return [*(record["loss_bits"] for record in trainer.history), router.weight.tolist(), router.expert_bias.tolist()]


@pytest.mark.parametrize("trial", trials.TRIALS)
def test_a_trial_changes_what_is_learnt_and_survives_a_stop(trial: str) -> None:
    config = TrainConfig(router="kmeans", balance="quantile", **SMALL)
    runs = []
    for stop in (None, 3):
        trainer = Trainer(config, CORPUS)
        after_step = trials.TRIALS[trial](trainer) or (lambda: None)
        for _ in range(config.steps):
            trainer.train_step()
            after_step()
            if trainer.step == stop:
                checkpoint = trainer.checkpoint()
                trainer = Trainer(config, CORPUS)
                after_step = trials.TRIALS[trial](trainer) or (lambda: None)
                trainer.restore(checkpoint)
                after_step()
        runs.append(what_is_learnt(trainer))
    assert runs[0] == runs[1]
    if trial == "decay follows the rate":  # the plain mean of the first steps hides it
        decays = [layer.router.commit_options.decay for layer in trainer.model.moe_layers]
        assert decays == [pytest.approx(1 - 0.01 * learning_rate(config, config.steps) / config.lr)]
        return
    plain = Trainer(config, CORPUS)
    for _ in range(config.steps):
        plain.train_step()
    assert runs[0] != what_is_learnt(plain)


def test_the_option_learned_offset_does_what_was_tried() -> None:
    made = []
    for options, trial in (({"learned_offset": True}, None), ({}, trials.TRIALS["learned offset"])):
        trainer = Trainer(TrainConfig(router="kmeans", tau=0.2, router_options=options, **SMALL), CORPUS)
        if trial is not None:
            trial(trainer)
        for _ in range(trainer.config.steps):
            trainer.train_step()
        made.append(trainer)
    option, tried = ([(r["loss_bits"], r["max_vio"]) for r in trainer.history] for trainer in made)
    torch.testing.assert_close(torch.tensor([loss for loss, _ in option]), torch.tensor([loss for loss, _ in tried]))
    assert [load for _, load in option] == [load for _, load in tried]
    for layer, twin in zip(made[0].model.moe_layers, made[1].model.moe_layers, strict=True):
        torch.testing.assert_close(layer.router.offset, twin.trial_offset, rtol=1e-3, atol=1e-4)
        assert twin.trial_offset.abs().max() > 1e-3


@pytest.mark.parametrize(("top_k", "share", "residual"), [(2, 1.0, False), (1, 0.0, True), (1, 0.5, False)])
def test_ranks_weigh_as_they_say(top_k: int, share: float, residual: bool) -> None:
    """Equal weights are the plain rule; so is everything with one choice, of which nothing is left over."""
    config = TrainConfig(router="kmeans", **SMALL | {"top_k": top_k, "steps": 4})
    plain, ranked = Trainer(config, CORPUS), Trainer(config, CORPUS)
    trials.by_rank(ranked, share=share, residual=residual)
    for trainer in (plain, ranked):
        for _ in range(config.steps):
            trainer.train_step()
    weights = [trainer.model.moe_layers[0].router.weight for trainer in (plain, ranked)]
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=1e-4)


def test_prose_and_code_part_ways() -> None:
    source = '"""Top."""\nx = 1  # why\ndef f():\n    """Inner."""\nclass C:\n    """Third."""\n    y = 2\n'
    prose, code = texts.prose_and_code(source)
    assert set(prose.split("\n\n")) == {"Top.", "Inner.", "Third."}
    assert code == "x = 1\n\ndef f():\n    pass\n\nclass C:\n    y = 2"


def test_subwords_stand_for_all_bytes_and_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, files = standard_library_files()
    monkeypatch.setattr(texts, "standard_library_files", lambda: (root, files[:40]))
    monkeypatch.setattr(texts, "PACKAGES", ("benchmarks.quality.texts",))
    monkeypatch.setattr(texts, "VOCAB_SIZE", 300)
    made = texts.subwords(tmp_path)
    both = (made.corpus.train, made.corpus.validation)
    own = list(Path(texts.__file__).parent.glob("*.py"))
    num_bytes = sum(path.stat().st_size + 1 for path in (*files[:40], *own))
    assert sum(int(made.lengths[ids.long()].sum()) for ids in both) == num_bytes
    assert 256 < int(made.corpus.train.max()) < made.corpus.vocab_size == 300
    assert 0.5 < made.per_byte(both[1]) < 1.0
    monkeypatch.setattr(texts, "_byte_pairs", lambda *_: pytest.fail("they are kept"))
    assert torch.equal(texts.subwords(tmp_path).corpus.train, both[0])
    config = TrainConfig(router="kmeans", **SMALL | {"steps": 1})
    trainer = Trainer(config, made.corpus)
    trainer.train_step()
    assert trainer.model.head.out_features == 300
    whole = trainer.evaluate(sample=False)
    per_byte = made.per_byte(trainer.windows[:, 1:])
    kept = one.reduced(trainer, {"bits_per_byte": whole.bits_per_byte, "perplexity": whole.perplexity}, per_byte)
    assert kept["measures"]["bits_per_byte"] == pytest.approx(whole.bits_per_byte * per_byte, abs=1e-5)
    assert kept["measures"]["perplexity"] == pytest.approx(2 ** kept["measures"]["bits_per_byte"], rel=1e-4)


def test_weights_of_the_other_start_have_a_unit_of_what_they_read() -> None:
    trainer = Trainer(TrainConfig(router="softmax", balance="aux", **SMALL), CORPUS)
    routers = [layer.router.weight.clone() for layer in trainer.model.moe_layers]
    trials.TRIALS[trials.FAN_IN](trainer)
    branch = (2 * trainer.config.layers) ** -0.5
    block = trainer.model.blocks[0]
    for weight, std in (
        (trainer.model.embedding.weight, 1.0), (trainer.model.head.weight, 16**-0.5),
        (block.attention.qkv.weight, 16**-0.5), (block.attention.out.weight, 16**-0.5 * branch),
        (block.moe.experts.gate_up, 16**-0.5), (block.moe.experts.down, 16**-0.5 * branch),
    ):  # fmt: skip
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.15)
    for layer, before in zip(trainer.model.moe_layers, routers, strict=True):
        assert torch.equal(layer.router.weight, before)
    assert torch.equal(block.moe_norm.weight, torch.ones(16))


def test_winners_average_alone_and_the_selection_does_not_see_their_bias() -> None:
    """With one choice and no bias yet the winner is the choice."""
    config = TrainConfig(router="kmeans", balance="none", bias_rate=0.05, **SMALL | {"top_k": 1, "steps": 3})
    plain, won = Trainer(config, CORPUS), Trainer(config, CORPUS)
    trials.winner(won)
    for trainer in (plain, won):
        for _ in range(3):
            trainer.train_step()
    first, second = (trainer.model.moe_layers[0] for trainer in (plain, won))
    torch.testing.assert_close(second.router.centroids, first.router.centroids, atol=1e-5, rtol=1e-4)
    assert second.trial_winner_bias.abs().max() > 0
    assert not second.router.expert_bias.any()


def test_direction_of_the_study_at_a_small_size() -> None:
    """Balance alone: at this length no difference in bits per byte is larger than that between seeds."""
    corpus, found = load_corpus(), {}
    for router, balance in (("kmeans", "proportional"), ("softmax", "aux"), ("kmeans", "none")):
        config = TrainConfig(
            router=router, balance=balance, layers=2, hidden=32, heads=2, expert_hidden=32, seq_len=64, steps=250,
            eval_bytes=16384,
        )  # fmt: skip
        trainer = Trainer(config, corpus)
        while trainer.step < config.steps:
            trainer.train_step()
        found[router, balance] = summarize(trainer, trainer.evaluate())["measures"]
    violation = {name: measures["max_vio_validation"] for name, measures in found.items()}
    bits = {name: measures["bits_per_byte"] for name, measures in found.items()}
    assert 1.5 * violation["kmeans", "proportional"] < violation["softmax", "aux"]
    assert 1.5 * violation["softmax", "aux"] < violation["kmeans", "none"]
    assert max(bits.values()) < 3.6, "a byte alone has 4.7 bits here"
    assert max(bits.values()) - min(bits.values()) < 0.2


def record(contestant: str, seed: int, bits: float | None, max_vio: float, size: str = "D64-E16-K2") -> dict[str, Any]:
    measures = {
        "bits_per_byte": bits, "max_vio_validation": max_vio, "max_vio_train": 2 * max_vio,
        "max_vio_training_text": max_vio / 2, "dead_experts": 0,
        "load_std": max_vio / 10,
    }  # fmt: skip
    names = ("cosine", "coupling", "coupling_neurons", "matched", "unmatched", "churn", "effective_experts")
    geometry = dict.fromkeys(names, 0.25)
    if "hash" in contestant:
        geometry = dict.fromkeys(geometry) | {"churn": 0.0, "effective_experts": 12.0}
    return {
        "size": size, "contestant": contestant, "config": {"steps": 100, "seed": seed}, "measures": measures,
        "geometry": [{"step": 100, **geometry}], "validation": [[50, (bits or 0) + 1], [100, bits]],
    }  # fmt: skip


def test_tables_and_goals_are_those_of_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        *(record("softmax, aux 0.01", seed, 1.9 + 0.009 * seed, 0.3) for seed in range(3)),
        *(record("K-Means, quantile", seed, 1.9 + 0.011 * seed, 0.1) for seed in range(3)),
        *(record("K-Means, sign", seed, 1.95 + 0.01 * seed, 0.2) for seed in range(3)),
        *(record(studies.CENTROIDS, seed, 2.0 + 0.01 * seed, 0.5) for seed in range(3)),
        record(studies.OFFSET, 0, 1.75, 0.1),
        record("sigmoid, quantile", 0, 1.0, 0.01),
        *(record("hash of the byte", seed, 1.0, 0.9) for seed in range(3)),
        *(record("K-Means, tau 0.2", seed, 1.9 + 0.01 * seed, 0.1) for seed in range(3)),
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    assert analysis.main(["--results", str(path)]) == 0
    said = capsys.readouterr().out
    assert "| router (3 seeds) | D64-E16-K2, 100 steps |" in said
    assert "| K-Means, quantile | 1.911 ± 0.011; 0.10 / 0.05 |" in said
    assert "| sigmoid, quantile | 1.000; 0.01 / 0.01 (1 seed) |" in said
    row = "| K-Means, quantile | 1.911 ± 0.011 | 0.100 ± 0.000 | 0.050 ± 0.000 | 0.200 ± 0.000 | 0.0100 ± 0.0000 |"
    assert row in said
    assert "| hash of the byte | n/a | n/a | n/a | n/a | n/a | 0.000 ± 0.000 | 12.0 ± 0.0 | 3 |" in said
    assert "| sigmoid, sign 0.1 | not run |" in said
    assert (
        "| D64-E16-K2, 100 steps | softmax, aux 0.01 (1.909 ± 0.009) | **+0.101 ± 0.002** | -0.150 (1 seed) "
        "| softmax, aux 0.01: 0.300 / 0.500 = 0.6 | softmax, aux 0.01: 0.150 / 0.250 = 0.6 |" in said
    )
    assert (
        "| K-Means, tau 0.2 | 1.910 ± 0.010 | K-Means, quantile | -0.001 ± 0.002 (95%, 3 pairs), not resolved "
        "| 0.100 / 0.050 |" in said
    )
    assert "| K-Means, sign | -0.050 ± 0.000 (95%, 3 pairs), resolved | 0.40 | 0.40 |" in said
    for name in ("quality", "quality-D64-E16-K2-100"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10000
    assert analysis.main(["--results", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["D64-E16-K2, 100 steps"]
    assert document["K-Means, sign"]["MaxVio, held-out text"] == [0.2] * 3


def test_a_later_seed_of_one_contestant_leaves_the_goals_as_they_are() -> None:
    rivals = dict.fromkeys(studies.RIVALS, 1.8) | {studies.CENTROIDS: 1.9}
    records = [record(name, seed, value + 0.01 * seed, 0.1) for name, value in rivals.items() for seed in range(3)]
    before = analysis.goals(records)
    assert len(before.splitlines()) == 3
    later = [record(name, 3, 1.0, 0.1) for name in (studies.WHITENED, studies.CENTROIDS)]
    assert analysis.goals([*records, *later]) == before


def test_the_decision_is_of_the_rate_chosen_on_a_seed_that_it_leaves_out() -> None:
    def run(name: str, rate: float, seed: int, bits: float | None, size: str = final.WHERE[0]) -> dict[str, Any]:
        made = record(studies.at_rate(name, rate), seed, bits, 0.1, size)
        made["config"] |= {"steps": studies.STEPS, "experts": 16}
        return made | {"curve": {"max_vio": [4.0, 2.0, 1.0, 1.0, 0.5]}}

    sigmoid = studies.RIVALS[0]
    records = [
        *(run(studies.WHITENED, 0.003, seed, 1.8 + 0.01 * seed) for seed in range(3)),
        *(run(studies.WHITENED, 0.006, seed, 1.7 + 0.01 * seed) for seed in range(4)),
        run(studies.WHITENED, 0.012, 0, None),
        run(studies.RIVALS[1], 0.003, 0, 1.5), run(studies.RIVALS[1], 0.003, 1, 1.5),
        *(run(sigmoid, 0.003, seed, 1.75 + 0.012 * seed) for seed in range(4)),
        *(run(sigmoid, rate, 0, 1.76) for rate in studies.RATES),
        run("dense", 0.003, 0, 1.6, "D64-E1-K1"), run("dense", 0.003, 1, 1.5, "D64-E1-K1"),
        run("dense", 0.006, 0, 1.7, "D64-E1-K1"),
    ]  # fmt: skip
    table = final.decision(records)
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    whitened, other, dense = (final.TITLES[name] for name in (studies.WHITENED, sigmoid, "dense"))
    assert set(found) == {whitened, other, dense}, "the other has run at one rate alone"
    assert found[whitened]["E16-K2"] == "1.720 ± 0.010 (3)"
    assert found[other]["E16-K2"] == "1.774 ± 0.012 (3)"
    assert found[other]["whitened minus it (95%)"] == "**-0.054 ± 0.005 (3 pairs)**"
    front = final.front(records).splitlines()
    assert [len(row.split("|")) for row in front] == [len(front[0].split("|"))] * 4
    assert not any(dense in row for row in front), "one model, whatever the size"
    assert f"| {whitened} | 1.720 | n/a | n/a | n/a | n/a / n/a | 0.05 |" in front
    assert {found[dense][size.removeprefix("D64-")] for size in final.WHERE} == {"1.500 (1)"}
    assert "| K-Means, whitened | 1.800 / **1.700** / n/a | not run |" in final.rates(records)
    assert "| softmax, aux 0.01 | 1.500 / - / - | not run |" in final.rates(records)
    assert "| K-Means, whitened | 2.00 | not run |" in final.early(records)


def test_the_pages_hold_what_the_committed_runs_say() -> None:
    records = sweep.read_results(analysis.RESULTS)
    assert records
    for page, text in analysis.pages(records).items():
        held = page.read_text(encoding="utf-8")
        assert held == analysis.with_tables(held, text), f"{page.name}: make quality writes it"
    with pytest.raises(ValueError, match="must hold"):
        analysis.with_tables("no marks", "")


def test_a_picture_needs_a_second_seed(tmp_path: Path) -> None:
    twice = [record(studies.CENTROIDS, seed, 2.0, 0.1) for seed in range(2)]
    once = record(studies.CENTROIDS, 0, 2.0, 0.1, size="D64-E64-K2")
    drawn = analysis.pictures([*twice, once], tmp_path)
    assert [path.name for path in drawn] == ["quality.png", "quality-D64-E16-K2-100.png"]


def test_one_seed_and_strange_seeds_decide_nothing() -> None:
    one, other = record("K-Means, sign", 0, 1.0, 0.1), record("softmax, aux 0.1", 0, 2.0, 0.1)
    assert analysis.compared([one], [other]) == "-1.000, one seed decides nothing"
    assert analysis.compared([one], [other | {"config": {"steps": 100, "seed": 1}}]) == "no seed in common"


def test_each_size_by_itself_says_what_is_resolved() -> None:
    def runs(contestant: str, *bits: float) -> list[sweep.Record]:
        return [record(contestant, seed, value, 0.1) for seed, value in enumerate(bits)]

    default = runs(studies.CENTROIDS, 1.0, 2.0, 3.0)
    worse, noisy = runs("K-Means, sign", 1.5, 2.51, 3.5), runs("softmax, aux 0.1", 1.5, 1.5, 3.5)
    text = analysis.size_by_size([*default, *worse, *noisy, *runs("hash of the byte", 0.75)])
    assert "| K-Means, sign | **+0.503 ± 0.014** |" in text  # 4.30 * 0.00577 / sqrt(3)
    assert "| softmax, aux 0.1 | +0.167 ± 1.433 |" in text  # 4.30 * 0.57735 / sqrt(3)
    assert "| hash of the byte | -0.250 (1 seed) |" in text
    assert "| random, fixed | not run |" in text


def test_a_long_run_has_a_table_of_its_own_and_leaves_the_others_alone() -> None:
    usual = [record(name, seed, 2.0, 0.1) for name in (studies.CENTROIDS, "K-Means, sign") for seed in range(2)]
    longer = [
        each | {"config": {"steps": 400, "seed": 0}}
        for each in (record(studies.CENTROIDS, 0, 1.5, 0.1), record("K-Means, sign", 0, 1.0, 0.1))
    ]
    assert analysis.usual_length([*longer, *usual]) == usual
    for tables in (analysis.summary, analysis.pooled):
        assert tables([*longer, *usual]) == tables(usual)
    assert "| K-Means, sign | +0.000 ± 0.000 (2 seeds) | -0.500 (1 seed) |" in analysis.size_by_size([*longer, *usual])
    assert "### D64-E16-K2, 400 steps" in analysis.report([*longer, *usual])


def test_order_agrees_with_itself_and_not_with_its_reverse() -> None:
    assert analysis.kendall([1, 2, 3], [4, 5, 6]) == 1
    assert analysis.kendall([1, 2, 3], [6, 5, 4]) == -1


def test_curves_compare_equal_seeds_alone() -> None:
    def run(contestant: str, seed: int, bits: float) -> sweep.Record:
        return record(contestant, seed, bits, 0.1) | {"validation": [[1, bits + 1.0], [2, bits]]}

    default = [run(studies.CENTROIDS, seed, 2.0 + seed) for seed in range(3)]
    base, curves = analysis.curves_above(
        {"hash of the byte": [run("hash of the byte", 0, 1.5)], studies.CENTROIDS: default}
    )
    assert base == studies.CENTROIDS
    assert curves["hash of the byte"] == [(1, -0.5), (2, -0.5)]  # against seed 0; the mean over seeds is 3.0
    assert curves[base] == [(1, 0.0), (2, 0.0)]
    _, curves = analysis.curves_above({base: default, "K-Means, sign": [run("K-Means, sign", 7, 2.0)]})
    assert "K-Means, sign" not in curves


def test_a_torn_result_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"name": 1}\n{"name"')
    with pytest.raises(ValueError, match="in line 2: remove it"):
        sweep.read_results(path)
