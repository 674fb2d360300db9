"""The Trainer of transformers with K-Means routers: text, gradient accumulation, checkpoints, resume."""

import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.16")
pytest.importorskip("accelerate")

from kmeans_route import Attachment, KMeansRouter  # noqa: E402
from kmeans_route.integrations.transformers import (  # noqa: E402
    KMeansRouterCallback,
    apply_kmeans_routing,
    load_kmeans_pretrained,
)
from tests.helpers.compare import assert_same_bits  # noqa: E402
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


def test_the_callback_says_what_it_takes() -> None:
    model = torch.nn.Linear(2, 2)
    for metrics in (model, "maxvio"):
        with pytest.raises(TypeError, match="metrics must be a list of names or None, got"):
            KMeansRouterCallback(metrics)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="trainer must be a Trainer, got Linear: make the Trainer first"):
        KMeansRouterCallback().add_to(model)
