"""The language model of `kmeans-route train`: text, model, steps, checkpoints."""

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("safetensors")

import kmeans_route
from kmeans_route.lm import checkpoint as checkpoints
from kmeans_route.lm import data
from kmeans_route.lm.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.model import DecoderLM, next_byte_loss
from kmeans_route.lm.trainer import NotFiniteError, StopRequest, Trainer, learning_rate, run_steps, stop_on_signal

ROUTERS = ("kmeans", "softmax", "sigmoid")
TINY = TrainConfig(
    steps=6, layers=2, hidden=16, heads=2, experts=4, expert_hidden=16, seq_len=16, batch=4, eval_bytes=512, threads=1
)
SENTENCES = ("the quick brown fox ", "def route(x, weight): ", "return x @ weight.T\n", "jumps over the lazy dog\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty small text files, all different."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        words = [SENTENCES[(number + step * (1 + number % 3)) % 4] for step in range(20)]
        (text / f"{number:02d}.txt").write_text(f"file {number}\n" + "".join(words))
    return text


@pytest.fixture
def corpus(folder: Path) -> data.Corpus:
    return data.load_corpus([folder])


def all_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.checkpoint().tensors.items()}


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def without_time(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "time_ms"} for record in history]


# Text


def test_split_is_by_file_disjoint_and_deterministic(folder: Path) -> None:
    first, again = data.load_corpus([folder]), data.load_corpus([folder])
    assert first.train_files == again.train_files
    assert torch.equal(first.validation, again.validation)
    assert not set(first.train_files) & set(first.validation_files)
    assert len(first.train_files) + len(first.validation_files) == 30
    held_out = [(folder / name).read_bytes() for name in first.validation_files]
    assert bytes(first.validation.numpy()) == b"".join(text + b"\0" for text in held_out)
    assert all(text not in bytes(first.train.numpy()) for text in held_out)


def test_split_keeps_copies_together_and_files_in_place(folder: Path) -> None:
    before = data.load_corpus([folder])
    name = before.validation_files[0]
    (folder / "zz_copy.txt").write_bytes((folder / name).read_bytes())
    (folder / "zz_new.txt").write_text("another file\n" * 9)
    after = data.load_corpus([folder])
    assert "zz_copy.txt" in after.validation_files
    assert set(before.train_files) <= set(after.train_files)
    assert set(before.validation_files) <= set(after.validation_files)
    assert before.sha256 != after.sha256


def test_single_file_is_cut_at_nine_tenths(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(1, 251)) * 4)
    corpus = data.load_corpus([path])
    joined = bytes(corpus.train.numpy()[:-1]) + bytes(corpus.validation.numpy()[:-1])
    assert joined == path.read_bytes()
    assert corpus.validation.numel() == 101


def test_split_never_leaves_a_side_empty() -> None:
    for number in range(1000):
        text = b"%d" % number
        train, validation = data.split_documents([("a", text), ("b", text + b"!")])
        assert len(train) == len(validation) == 1


def test_binary_and_hidden_files_are_left_out(folder: Path) -> None:
    (folder / "picture.bin").write_bytes(b"\x89PNG\0\0\0")
    (folder / ".hidden").write_text("secret")
    corpus = data.load_corpus([folder])
    assert not {"picture.bin", ".hidden"} & {*corpus.train_files, *corpus.validation_files}


def test_text_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        data.load_corpus([tmp_path / "absent"])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"no text files.*--text"):
        data.load_corpus([tmp_path])
    with pytest.raises(ValueError, match="training text has 3 bytes, a window needs 17"):
        data.BatchSampler(torch.zeros(3, dtype=torch.uint8), 16, 1, 0)
    with pytest.raises(ValueError, match="held-out text has 3 bytes, a window needs 17"):
        data.validation_windows(torch.zeros(3, dtype=torch.uint8), 16, 100)


def test_standard_library_holds_no_installed_packages_and_no_tests() -> None:
    root, files = data.standard_library_files()
    names = [path.relative_to(root).as_posix() for path in files]
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert names == sorted(names)
    assert not [name for name in names if "site-packages" in name or "/tests/" in name]


def test_sampler_order_depends_on_the_seed_alone() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    first, again, other = (data.BatchSampler(text, 8, 4, seed) for seed in (1, 1, 2))
    batches = [first.next() for _ in range(3)]
    torch.manual_seed(99)
    assert all(torch.equal(batch, again.next()) for batch in batches)
    assert not torch.equal(batches[0], other.next())
    assert (batches[0].diff(dim=1) == 1).all()


def test_sampler_reaches_the_first_and_the_last_byte() -> None:
    text = torch.arange(10, dtype=torch.uint8)
    sampler = data.BatchSampler(text, 8, 64, 0)
    assert set(sampler.next().flatten().tolist()) == set(range(10))


def test_validation_windows_cover_the_text_evenly() -> None:
    text = torch.arange(101, dtype=torch.uint8)
    every = data.validation_windows(text, 10, 100)
    assert every[:, 1:].flatten().tolist() == list(range(1, 101))
    some = data.validation_windows(text, 10, 50)
    assert some[:, 0].tolist() == [0, 20, 40, 60, 80]


# Options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": "table"}, "router must be one of kmeans, softmax, sigmoid, random, hash, got 'table'"),
        ({"balance": "aux"}, "balance must be one of proportional, .* for router='kmeans', got 'aux'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"top_k": 5}, r"top_k must be in \[1, 4\], got 5"),
        ({"hidden": 18}, "hidden must be a multiple of 2 \\* heads = 4, got 18"),
        ({"accumulate": 3}, "accumulate must divide batch = 4, got 3"),
        ({"lr": 0.0}, r"lr must be in \(0, 1\), got 0.0"),
        ({"warmup": 1.0}, r"warmup must be a fraction in \[0, 1\), got 1.0"),
    ],
)
def test_config_refusals(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize("device", ["meta", "nothing"])
def test_unusable_devices_are_refused(device: str, corpus: data.Corpus) -> None:
    with pytest.raises(ValueError, match=f"device must be one that works here, got '{device}'"):
        Trainer(replace(TINY, device=device), corpus)


def test_config_survives_json() -> None:
    config = replace(TINY, router="sigmoid", balance="", bias_rate=0.002)
    assert config.balance == "sign"
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="differ from this version's: extra"):
        TrainConfig.from_dict({**config.to_dict(), "extra": 1})


def test_a_run_keeps_the_directions_that_it_began_with() -> None:
    """Whatever the default is when it goes on; one that says nothing is of a time when it was the centroids'."""
    said = TINY.to_dict()
    assert said["router_options"] == {"directions": "whitened"}
    again = TrainConfig.from_dict(said)
    assert (again.to_dict(), again.label) == (said, TINY.label)
    before = TrainConfig.from_dict(said | {"router_options": {}})
    assert before.router_options == {"directions": "centroids"}
    assert before.label == f"{TINY.label}, directions centroids"


def test_labels_tell_runs_of_different_routers_apart() -> None:
    changes: list[dict] = [{"router_options": {"directions": rule}} for rule in ("centroids", "whitened")]
    changes += [{"tau": tau} for tau in (0.1, 0.2)]
    assert len({TrainConfig(**change).label for change in [{}, *changes]}) == 4, "whitened is what {} has"


def test_the_router_of_a_model_has_the_default_of_its_class() -> None:
    for top_k, want in ((1, ("centroids", 0.2)), (2, ("whitened", 0.1))):
        for layer in DecoderLM(replace(TINY, top_k=top_k)).moe_layers:
            assert (layer.router.commit_options.directions, layer.router.options.tau) == want


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    config = replace(TINY, steps=100, warmup=0.1, lr=0.01)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.001)
    assert rates[9] == pytest.approx(0.01) == max(rates)
    assert all(late < early for early, late in pairwise(rates[10:]))
    assert rates[99] == pytest.approx(0.001, rel=0.01)


# Model


def test_initial_weights_do_not_depend_on_the_router_nor_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    models = [DecoderLM(replace(TINY, router=router, balance="")) for router in ROUTERS]
    assert torch.equal(before, torch.get_rng_state())
    weights = [{n: p for n, p in model.named_parameters() if ".router." not in n} for model in models]
    assert_same_bits(weights[0], weights[1])
    assert_same_bits(weights[0], weights[2])
    assert not torch.equal(weights[0]["head.weight"], DecoderLM(replace(TINY, seed=1)).head.weight)


@pytest.mark.parametrize("router", ROUTERS)
def test_model_is_causal(router: str) -> None:
    model = DecoderLM(replace(TINY, router=router, balance="")).eval()
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    with torch.no_grad():
        first, second = model(tokens), model(changed)
    torch.testing.assert_close(first[:, :9], second[:, :9])
    assert (first[:, 9:] - second[:, 9:]).abs().amax(dim=(0, 2)).gt(1e-6).all()


def test_untrained_model_predicts_about_uniformly() -> None:
    windows = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))
    loss = next_byte_loss(DecoderLM(TINY).eval(), windows)
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


# Steps


@pytest.mark.parametrize("router", ROUTERS)
def test_training_loss_falls(router: str, corpus: data.Corpus) -> None:
    trainer = Trainer(replace(TINY, router=router, balance="", steps=60, lr=0.01, batch=16), corpus)
    before = trainer.evaluate()
    for _ in range(60):
        trainer.train_step()
    after = trainer.evaluate()
    assert before.bits_per_byte == pytest.approx(8.0, abs=0.1)
    assert after.bits_per_byte < 3.5
    assert after.perplexity == pytest.approx(2**after.bits_per_byte)
    assert trainer.history[-1]["loss_bits"] < trainer.history[0]["loss_bits"] - 4
    num_tokens = trainer.windows[:, 1:].numel()
    assert after.tokens_per_expert.sum(1).tolist() == [2 * num_tokens] * 2


def test_all_routers_read_the_same_text(corpus: data.Corpus) -> None:
    trainers = [Trainer(replace(TINY, router=router, balance=""), corpus) for router in ROUTERS]
    losses = [trainer.train_step()["loss_bits"] for trainer in trainers]
    assert max(losses) - min(losses) < 0.1
    batches = [trainer.sampler.next() for trainer in trainers]
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])


@pytest.mark.parametrize("router", ROUTERS)
def test_micro_batches_see_the_same_tokens(router: str, corpus: data.Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: None)
    config = replace(TINY, router=router, balance="none")
    whole, cut = Trainer(config, corpus), Trainer(replace(config, accumulate=4), corpus)
    first, second = whole.train_step(), cut.train_step()
    assert first["loss_bits"] == pytest.approx(second["loss_bits"], abs=1e-5)
    assert first["max_vio"] == pytest.approx(second["max_vio"], abs=0.05)
    for (name, one), other in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("router", ["kmeans", "sigmoid"])
def test_each_step_commits_once_however_many_micro_batches(router: str, corpus: data.Corpus) -> None:
    trainer = Trainer(replace(TINY, router=router, balance="", accumulate=4), corpus)
    routers = [layer.router for layer in trainer.model.moe_layers]
    num_tokens = TINY.batch * TINY.seq_len
    for step in range(3):
        trainer.train_step()
        for layer in routers:
            assert int(layer.tokens_per_expert.sum()) == TINY.top_k * num_tokens
            assert int(layer.pending.num_tokens) == 0
            assert router != "kmeans" or int(layer.steps) == step  # the first commit only sets the centroids
    trainer.evaluate()
    assert all(int(layer.pending.num_tokens) == 0 for layer in routers)


def test_auxiliary_loss_reaches_the_router(corpus: data.Corpus) -> None:
    config = replace(TINY, router="softmax", balance="aux", aux_loss_coef=0.0)
    without, with_loss = Trainer(config, corpus), Trainer(replace(config, aux_loss_coef=1.0), corpus)
    assert without.train_step()["loss_bits"] == with_loss.train_step()["loss_bits"]
    gradients = [trainer.model.moe_layers[0].router.weight.grad for trainer in (without, with_loss)]
    assert not torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("router", ROUTERS)
def test_evaluation_leaves_no_trace(router: str, corpus: data.Corpus) -> None:
    config = replace(TINY, router=router, balance="")
    plain, watched = Trainer(config, corpus), Trainer(replace(config, eval_every=1), corpus)
    modes: list[bool] = []
    watched.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    for _ in range(3):
        plain.train_step()
        watched.train_step()
        watched.evaluate()
    assert_same_bits(all_state(plain), all_state(watched))
    assert all(0 < record["validation_bits"] < 9 for record in watched.history)
    assert modes.count(True) == 3
    assert modes.count(False) > 3
    assert "validation_bits" not in plain.history[0]


def test_broken_loss_stops_before_the_weights(corpus: data.Corpus) -> None:
    trainer = Trainer(TINY, corpus)
    trainer.train_step()
    with torch.no_grad():
        trainer.model.head.weight[0, 0] = math.nan
    before = trainer.model.embedding.weight.clone()
    with pytest.raises(NotFiniteError, match=r"loss of step 2 is nan: lower --lr"):
        trainer.train_step()
    assert torch.equal(before, trainer.model.embedding.weight)


# Checkpoints


@pytest.mark.usefixtures("plain_empty")
@pytest.mark.parametrize("router", ROUTERS)
def test_resume_is_bit_for_bit(router: str, corpus: data.Corpus, tmp_path: Path) -> None:
    config = replace(TINY, router=router, balance="", accumulate=2)
    straight = Trainer(config, corpus)
    for _ in range(6):
        straight.train_step()

    first = Trainer(config, corpus)
    for _ in range(3):
        first.train_step()
    save_checkpoint(tmp_path / "run", first.checkpoint())
    second = Trainer(config, corpus)
    second.restore(load_checkpoint(tmp_path / "run"))
    assert_same_bits(all_state(first), all_state(second))
    for _ in range(3):
        second.train_step()

    assert_same_bits(all_state(straight), all_state(second))
    assert without_time(straight.history) == without_time(second.history)
    evaluations = [trainer.evaluate() for trainer in (straight, second)]
    assert evaluations[0].bits_per_byte == evaluations[1].bits_per_byte
    assert torch.equal(evaluations[0].tokens_per_expert, evaluations[1].tokens_per_expert)


@pytest.mark.usefixtures("plain_empty")
@pytest.mark.parametrize(("every", "stop"), [(2, 1), (2, 3), (3, 4), (3, 5)])
@pytest.mark.parametrize(("router", "balance"), [("kmeans", ""), ("kmeans", "quantile"), ("sigmoid", "sign")])
def test_resume_between_two_commits_is_bit_for_bit(
    router: str, balance: str, every: int, stop: int, corpus: data.Corpus, tmp_path: Path
) -> None:
    """What was pending, and how many steps ago the last commit was, go with the checkpoint, without a warning."""
    config = replace(TINY, router=router, balance=balance, commit_every=every)
    straight, first, second = (Trainer(config, corpus) for _ in range(3))
    for _ in range(6):
        straight.train_step()
    for _ in range(stop):
        first.train_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_checkpoint(tmp_path / "run", first.checkpoint())
        second.restore(load_checkpoint(tmp_path / "run"))
    tokens = TINY.batch * TINY.seq_len * (stop % every)
    assert [int(layer.router.pending.num_tokens) for layer in second.model.moe_layers] == [tokens] * 2
    assert_same_bits(all_state(first), all_state(second))
    for _ in range(6 - stop):
        second.train_step()
    assert_same_bits(all_state(straight), all_state(second))
    for layer in second.model.moe_layers:
        assert int(layer.router.pending.num_tokens) == 0
        assert router != "kmeans" or int(layer.router.steps) == 6 // every - 1  # the first commit only sets centroids


def test_a_checkpoint_of_before_commits_in_the_steps_that_it_would_have(corpus: data.Corpus) -> None:
    """Written when checkpoints held neither the attachment's steps nor what was pending."""
    config = replace(TINY, commit_every=2)
    first, second = Trainer(config, corpus), Trainer(config, corpus)
    for _ in range(3):
        first.train_step()
    whole = first.checkpoint()
    old = {name: t for name, t in whole.tensors.items() if not name.startswith(("attachment.", "pending."))}
    assert len(old) < len(whole.tensors)
    second.restore(whole._replace(tensors=old))
    second.train_step()
    for layer in second.model.moe_layers:
        assert (int(layer.router.pending.num_tokens), int(layer.router.steps)) == (0, 1)


def test_pending_tokens_of_another_shape_are_refused(corpus: data.Corpus) -> None:
    trainer = Trainer(replace(TINY, commit_every=2), corpus)
    trainer.train_step()
    checkpoint = trainer.checkpoint()
    name = "pending.counts.blocks.1.moe.router"
    assert checkpoint.tensors[name].shape == (4,)
    broken = checkpoint._replace(tensors=checkpoint.tensors | {name: torch.ones((), dtype=torch.int64)})
    with pytest.raises(CheckpointError, match=rf"do not fit its options: {name} must have shape \(4,\), got \(\)"):
        Trainer(trainer.config, corpus).restore(broken)


@pytest.mark.parametrize("stop", [0, 3])
def test_later_steps_leave_a_checkpoint_as_it_is(stop: int, corpus: data.Corpus) -> None:
    """Nothing of it is the trainer's own, so going back to it is to have never gone on."""
    trainer, straight = Trainer(TINY, corpus), Trainer(TINY, corpus)
    for _ in range(stop):
        trainer.train_step()
    checkpoint = trainer.checkpoint()
    assert {tensor.device.type for tensor in checkpoint.tensors.values()} == {"cpu"}
    before = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    for _ in range(2):
        trainer.train_step()
        trainer.history[stop - 1]["validation_bits"] = 1.0
        assert_same_bits(before, checkpoint.tensors)
        assert len(checkpoint.history) == stop
        assert not any("validation_bits" in record for record in checkpoint.history)
        trainer.restore(checkpoint)
        assert_same_bits(before, all_state(trainer))
        trainer.train_step()
    while straight.step < trainer.step:
        straight.train_step()
    assert_same_bits(all_state(straight), all_state(trainer))


@pytest.mark.parametrize("router", ROUTERS)
def test_a_run_draws_nothing_from_the_global_generator(router: str, corpus: data.Corpus) -> None:
    """So a checkpoint holds no state of it, which torch seeds anew in each process."""
    before = torch.get_rng_state()
    trainer = Trainer(replace(TINY, router=router, balance=""), corpus)
    trainer.train_step()
    trainer.restore(trainer.checkpoint())
    trainer.evaluate()
    assert torch.equal(before, torch.get_rng_state())
    assert [name for name in trainer.checkpoint().tensors if name.startswith("random.")] == ["random.sampler"]


@pytest.fixture
def saved(corpus: data.Corpus, tmp_path: Path) -> tuple[Trainer, Path]:
    trainer = Trainer(TINY, corpus)
    trainer.train_step()
    save_checkpoint(tmp_path / "run", trainer.checkpoint())
    return trainer, tmp_path / "run"


def tensor_file(run: Path) -> Path:
    (path,) = run.glob("step-*.safetensors")
    return path


def test_truncated_checkpoints_are_refused(saved: tuple[Trainer, Path]) -> None:
    _, run = saved
    path, payload = tensor_file(run), tensor_file(run).read_bytes()
    path.write_bytes(payload[:-1])
    with pytest.raises(CheckpointError, match=f"truncated: expected {len(payload)} bytes, got {len(payload) - 1}"):
        load_checkpoint(run)
    path.write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        load_checkpoint(run)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_checkpoint(run)
    index = run / checkpoints.INDEX_NAME
    index.write_text(index.read_text()[:100])
    with pytest.raises(CheckpointError, match="is no JSON"):
        load_checkpoint(run)


def test_foreign_checkpoints_are_refused(saved: tuple[Trainer, Path], folder: Path) -> None:
    trainer, run = saved
    index = run / checkpoints.INDEX_NAME
    original = json.loads(index.read_text())
    for change, message in (
        ({"format": "other"}, "is no checkpoint of this program"),
        ({"version": 99}, "has version 99, this program reads 1"),
        ({"tensors": {}}, "lacks a part"),
    ):
        index.write_text(json.dumps({**original, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(run)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_checkpoint(run / "absent")

    checkpoint = trainer.checkpoint()
    other = Trainer(replace(TINY, seed=1), trainer.corpus)
    before = all_state(other)
    with pytest.raises(CheckpointError, match="other options"):
        other.restore(checkpoint)
    with pytest.raises(CheckpointError, match="do not fit"):
        other.restore(checkpoint._replace(config=other.config.to_dict(), tensors={}))
    assert_same_bits(before, all_state(other))
    (folder / "more.txt").write_text("more text")
    changed = Trainer(TINY, data.load_corpus([folder]))
    with pytest.raises(CheckpointError, match="the text differs"):
        changed.restore(checkpoint)


def test_a_crash_while_saving_leaves_the_old_checkpoint(
    saved: tuple[Trainer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, run = saved
    before = load_checkpoint(run)
    trainer.train_step()
    replaced = os.replace

    def fail_at_the_index(source: str, target: Path) -> None:
        if Path(target).name == checkpoints.INDEX_NAME:
            raise OSError("power cut")
        replaced(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_index)
    with pytest.raises(OSError, match="power cut"):
        save_checkpoint(run, trainer.checkpoint())
    monkeypatch.undo()
    after = load_checkpoint(run)
    assert after.step == before.step == 1
    assert_same_bits(before.tensors, after.tensors)
    assert not list(run.glob(".*"))
    save_checkpoint(run, trainer.checkpoint())
    assert load_checkpoint(run).step == 2
    assert tensor_file(run).name.startswith("step-000002-")


# Stopping


def test_run_steps_saves_on_the_way_and_stops_on_request(corpus: data.Corpus) -> None:
    trainer, request, saved_at = Trainer(TINY, corpus), StopRequest(), []

    def on_step(record: dict) -> None:
        request.signum = signal.SIGINT if record["step"] == 5 else 0

    done = run_steps(trainer, request, on_step=on_step, save=lambda: saved_at.append(trainer.step), save_every=2)
    assert not done
    assert trainer.step == 5
    assert saved_at == [2, 4]
    assert run_steps(trainer, StopRequest())
    assert trainer.step == 6


def test_signals_are_caught_inside_the_block_only() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signal() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("plain_empty")
def test_ctrl_c_leaves_a_usable_checkpoint(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--steps", "1000", "--layers", "1", "--hidden", "16", "--heads", "2", "--experts", "4"]
    options += ["--expert-hidden", "16", "--seq-len", "16", "--batch", "2", "--threads", "1", "--save-every", "20"]
    command = [sys.executable, "-c", "from kmeans_route.cli import main; main()", "train", "--text", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(kmeans_route.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *options, "--out", str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, line + stderr
    checkpoint = load_checkpoint(out)
    assert 100 <= checkpoint.step < 1000
    assert f"stopped after step {checkpoint.step} of 1000" in stdout
    assert f"kmeans-route train --resume --out {out}" in stdout
    config = TrainConfig.from_dict(checkpoint.config)
    text = data.load_corpus([Path(path) for path in checkpoint.corpus["paths"]])
    resumed, straight = Trainer(config, text), Trainer(config, text)
    resumed.restore(checkpoint)
    resumed.train_step()
    while straight.step < resumed.step:
        straight.train_step()
    assert_same_bits(all_state(straight), all_state(resumed))
