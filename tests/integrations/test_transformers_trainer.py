"""The Trainer of transformers with K-Means routers: text, gradient accumulation, checkpoints, resume."""

import copy
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.16")
pytest.importorskip("accelerate")

from kmeans_route import Attachment, KMeansRouter, attach  # noqa: E402
from kmeans_route.integrations.transformers import (  # noqa: E402
    KMeansRouterCallback,
    apply_kmeans_routing,
    load_kmeans_pretrained,
)
from tests.helpers.compare import assert_same_bits, routers_of  # noqa: E402
from tests.integrations.transformers_models import tiny_model  # noqa: E402

LENGTH = 32


def text_of_the_standard_library(rows: int) -> list[dict[str, torch.Tensor]]:
    """Bytes of its .py files, cut into rows; every third one is padded."""
    wanted, read = rows * LENGTH, b""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        read += file.read_bytes()
        if len(read) >= wanted:
            break
    ids = torch.tensor(list(read[:wanted])).view(rows, LENGTH)
    mask = torch.ones_like(ids)
    mask[::3, LENGTH - 8 :] = 0
    return [
        {"input_ids": row, "attention_mask": kept, "labels": row.masked_fill(kept == 0, -100)}
        for row, kept in zip(ids, mask, strict=True)
    ]


def trained(folder: Path, steps: int, resume: str | None = None, **options: Any) -> tuple[Any, Any]:
    model = tiny_model(options.pop("model_type", "mixtral"), vocab_size=256)
    apply_kmeans_routing(model)
    args = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=1,
        save_steps=4, report_to=[], use_cpu=True, learning_rate=3e-3, lr_scheduler_type="constant", seed=1,
        disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=text_of_the_standard_library(96))
    KMeansRouterCallback().add_to(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def checkpointing(kind: str) -> dict[str, Any]:
    if kind == "none":
        return {}
    new = "activation_checkpointing" in transformers.TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": kind == "reentrant"}}


@pytest.mark.parametrize("kind", ["none", "checkpoint", "reentrant"])
def test_commits_are_optimizer_steps(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits, tokens, commit = [], [], Attachment.commit

    def counted(self: Attachment, *args: Any) -> None:
        commits.append(1)
        tokens.append(int(next(iter(self.routers.values())).pending.num_tokens))
        commit(self, *args)

    monkeypatch.setattr(Attachment, "commit", counted)
    model, trainer = trained(tmp_path, 8, **checkpointing(kind))
    assert len(commits) == trainer.state.global_step == 8
    routers = [module for module in model.modules() if isinstance(module, KMeansRouter)]
    assert all(int(router.steps) == 7 for router in routers)  # the first commit sets the centroids only
    assert all(8 * (LENGTH - 8) <= n <= 8 * LENGTH for n in tokens)  # two micro-batches of 4, whatever is recomputed
    assert sum(tokens) < 8 * 8 * LENGTH  # and no padding
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert all("model.layers.0.mlp.gate/maxvio" in entry for entry in logs)
    assert all(router._scope is None for router in routers)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_resumed_training_has_the_bits_of_one_that_never_stopped(model_type: str, tmp_path: Path) -> None:
    options = {"model_type": model_type, **checkpointing("checkpoint")}
    whole, _ = trained(tmp_path / "whole", 8, **options)
    trained(tmp_path / "parts", 4, **options)
    resumed, trainer = trained(tmp_path / "parts", 8, str(tmp_path / "parts" / "checkpoint-4"), **options)
    for name, value in whole.state_dict().items():
        assert_same_bits(resumed.state_dict()[name], value)
    loaded = load_kmeans_pretrained(type(resumed), tmp_path / "parts" / "checkpoint-8")
    trainer.save_model(tmp_path / "last")  # after training, in the form that the hub knows
    last = load_kmeans_pretrained(type(resumed), tmp_path / "last")
    for name, value in whole.state_dict().items():
        assert_same_bits(loaded.state_dict()[name], value)
        assert_same_bits(last.state_dict()[name], value)


def test_every_logger_gets_the_metrics(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Logger(transformers.TrainerCallback):
        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            seen.append(dict(logs))

    model = tiny_model("mixtral", vocab_size=256)
    apply_kmeans_routing(model)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    trainer = transformers.Trainer(model, args, train_dataset=text_of_the_standard_library(32), callbacks=[Logger()])
    callback = KMeansRouterCallback(metrics=None, every_n_steps=2).add_to(trainer)
    trainer.train()
    assert "model.layers.1.mlp.gate/load_entropy" in seen[0]
    assert callback.attachment is None
    assert int(model.model.layers[0].mlp.gate.initialized)


class Interrupt(transformers.TrainerCallback):
    """Does something after the first step, by default what Ctrl-C does."""

    def __init__(self, error: BaseException | None = None, action: Any = None) -> None:
        self.error, self.action = error, action

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.action is not None:
            self.action()
        if self.error is not None:
            raise self.error


def short_trainer(model: Any, folder: Path, callbacks: Any = ()) -> Any:
    args = transformers.TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    return transformers.Trainer(model, args, train_dataset=text_of_the_standard_library(16), callbacks=[*callbacks])


def swapped_model(folder: Path, loaded: bool) -> tuple[Any, set[str], Any]:
    """A model, the names that save_pretrained gives its experts, and how it is to save them."""
    model = tiny_model("mixtral", vocab_size=256)
    apply_kmeans_routing(model)
    if loaded:  # which knows what its checkpoint was converted by
        model.save_pretrained(folder / "source")
        model = load_kmeans_pretrained(type(model), folder / "source")
        assert model._weight_conversions
    return model, saved_experts(model, folder / "before"), getattr(model, "_weight_conversions", None)


def saved_experts(model: Any, folder: Path) -> set[str]:
    safetensors = pytest.importorskip("safetensors")
    model.save_pretrained(folder)
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        return {name for name in file.keys() if ".experts." in name}  # noqa: SIM118 - no mapping


@pytest.mark.parametrize("loaded", [False, True])
def test_the_next_training_ends_what_an_interrupted_one_has_left(loaded: bool, tmp_path: Path) -> None:
    """No callback hears of the interrupt."""
    model, names, form = swapped_model(tmp_path, loaded)
    with pytest.raises(KeyboardInterrupt):
        short_trainer(model, tmp_path, [KMeansRouterCallback(), Interrupt(KeyboardInterrupt())]).train()
    left = routers_of(model)[0].attachment
    assert left is not None
    other = copy.deepcopy(model)
    assert saved_experts(other, tmp_path / "copy") == names
    seen = []
    watch = Interrupt(action=lambda: seen.append(routers_of(model)[0].attachment))
    short_trainer(model, tmp_path, [KMeansRouterCallback(), watch]).train()
    assert seen[0] is not None
    assert seen[0] is not left
    assert getattr(model, "_weight_conversions", None) is form
    assert not any(router.attached for router in routers_of(model))
    assert [int(router.steps) for router in routers_of(model)] == [2, 2]
    assert saved_experts(model, tmp_path / "after") == names


def test_attachments_that_live_are_not_replaced(tmp_path: Path) -> None:
    model, _, form = swapped_model(tmp_path, loaded=False)
    with pytest.raises(RuntimeError, match="must not be attached twice"):  # two callbacks of one training
        short_trainer(model, tmp_path, [KMeansRouterCallback(), KMeansRouterCallback()]).train()
    mine = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), replace=True)
    with pytest.raises(RuntimeError, match="must not be attached twice"):  # the caller's own, after an interrupt
        short_trainer(model, tmp_path, [KMeansRouterCallback()]).train()
    assert all(router.attachment is mine for router in routers_of(model))
    assert getattr(model, "_weight_conversions", None) is form
    mine.remove()


def test_a_training_inside_of_another_of_the_same_model_is_refused(tmp_path: Path) -> None:
    model, names, _ = swapped_model(tmp_path, loaded=False)
    inner = short_trainer(model, tmp_path)
    KMeansRouterCallback().add_to(inner)
    outer = short_trainer(model, tmp_path, [Interrupt(action=inner.train)])
    KMeansRouterCallback().add_to(outer)
    with pytest.raises(RuntimeError, match="model must be in one training at a time, got another Trainer's"):
        outer.train()
    assert (outer.state.global_step, inner.state.global_step) == (1, 2)
    assert not any(router.attached for router in routers_of(model))
    assert saved_experts(model, tmp_path / "after") == names


def test_the_callback_says_what_it_takes() -> None:
    model = torch.nn.Linear(2, 2)
    for metrics in (model, "maxvio"):
        with pytest.raises(TypeError, match="metrics must be a list of names or None, got"):
            KMeansRouterCallback(metrics)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="trainer must be a Trainer, got Linear: make the Trainer first"):
        KMeansRouterCallback().add_to(model)
