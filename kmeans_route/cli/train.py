"""The command `train`, and one training run seen from a command: progress, checkpoints, Ctrl-C, final figures."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kmeans_route.cli.info import environment
from kmeans_route.cli.output import Output
from kmeans_route.cli.watch import LoadLog
from kmeans_route.lm.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.data import Corpus, load_corpus
from kmeans_route.lm.report import write_report
from kmeans_route.lm.results import Run, not_yet_balanced, summarize, table_rows
from kmeans_route.lm.trainer import Trainer, run_steps, stop_on_signal


class Stopped(Exception):
    """A signal has ended runs after a whole step, and their checkpoints lie in the folders."""

    def __init__(self, trainer: Trainer, folders: Sequence[Path], signum: int) -> None:
        super().__init__(f"stopped after step {trainer.step} of {trainer.config.steps}")
        self.step, self.steps, self.folders, self.signum = trainer.step, trainer.config.steps, folders, signum

    def tell(self, output: Output) -> int:
        """Say where the checkpoint is and how to go on. Returns: the exit code, 128 + signal number."""
        told = []
        for folder in self.folders:
            resume = f"kmeans-route train --resume --out {shlex.quote(str(folder))}"
            output.note(f"{self}; checkpoint saved in {folder}")
            output.note(f"continue with: {resume}")
            told.append({"checkpoint": str(folder), "resume": resume})
        facts = {"step": self.step, "steps": self.steps, **told[0], "checkpoints": told}
        output.document({"interrupted": True, **facts})
        return 128 + self.signum


def train_run(
    config: TrainConfig,
    corpus: Corpus,
    output: Output,
    folder: Path,
    *,
    checkpoint: Checkpoint | None = None,
    save_every: int = 0,
) -> Run:
    """Train to the last step, from a checkpoint if one is given. Returns: the figures of the run.

    What `watch` draws and checkpoints go to `folder`: every `save_every` steps (0: none on the way), at the end, and
    where a signal stops the run, which raises Stopped.
    """
    trainer = Trainer(config, corpus)
    if checkpoint is not None:
        trainer.restore(checkpoint)

    def save() -> None:
        save_checkpoint(folder, trainer.checkpoint())

    log = LoadLog(folder, trainer)
    # Short, so that a progress line fits 80 columns.
    description = f"{config.label.split(',')[0]}, seed {config.seed}"
    with output.progress(description, config.steps, trainer.step) as update, stop_on_signal() as request:

        def on_step(record: dict[str, Any]) -> None:
            log.add(record)
            max_vio = statistics.fmean(record["max_vio"])
            update(record["step"], f"loss {record['loss_bits']:.3f} bits/byte, MaxVio {max_vio:.2f}")

        done = run_steps(trainer, request, on_step=on_step, save=save, save_every=save_every)
        save()
    if not done:
        raise Stopped(trainer, [folder], request.signum)
    trainer.attachment.remove()
    evaluation = trainer.evaluate()
    trainer.history[-1]["validation_bits"] = evaluation.bits_per_byte
    return summarize(trainer, evaluation)


def resumed(
    folder: Path, given: dict[str, Any], text: Sequence[Path], more_steps: int = 0
) -> tuple[TrainConfig, Corpus, Checkpoint]:
    """Options, text (the checkpoint's where none is named) and state of the run in a folder.

    `given`, options named on the command line, may only repeat the checkpoint's; else, and where there is none that can
    be read, a CheckpointError. more_steps: to add to the run's; from here on its rate follows the schedule of a run of
    that many, so it rises again where a finished run had come down.
    """
    checkpoint = load_checkpoint(folder)
    try:
        config = TrainConfig.from_dict(checkpoint.config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint in {folder} is of another version: {error}") from None
    stored = config.to_dict()
    if "router_options" in given:
        given = given | {"router_options": config.own_options | given["router_options"]}
    changed = [
        f"{name} (checkpoint {stored[name]}, asked {value})" for name, value in given.items() if stored[name] != value
    ]
    if changed:
        longer = ". For a longer run name --more-steps" if "steps" in given and not more_steps else ""
        raise CheckpointError(
            f"a resumed run keeps its options, these differ: {', '.join(changed)}{longer}. "
            "Leave them out, or start a new run with another --out"
        )
    if more_steps:
        config = replace(config, steps=config.steps + more_steps)
        checkpoint = checkpoint._replace(config=config.to_dict())
    paths = list(text) or [Path(path) for path in checkpoint.corpus.get("paths", [])]
    return config, load_corpus(paths), checkpoint


def train(
    config: TrainConfig,
    corpus: Corpus,
    out: Path,
    output: Output,
    *,
    checkpoint: Checkpoint | None = None,
    save_every: int = 0,
) -> None:
    """The command `train`: one run in the folder `out`, its table, its report; the options are those of `train_run`."""
    where = f", from step {checkpoint.step}" if checkpoint else ""
    output.note(
        f"{config.label}: {config.steps} steps of {config.batch * config.seq_len} bytes on {corpus.label}{where}"
    )
    if checkpoint and checkpoint.step >= config.steps:
        output.note(f"already at step {checkpoint.step} of {config.steps}: add --more-steps N to go on")
    result = train_run(config, corpus, output, out, checkpoint=checkpoint, save_every=save_every)
    facts, files = environment(), list[Path]()
    if find_spec("matplotlib") is not None:
        files = write_report([result], out, title=f"Training with {config.label}", environment=facts)
    output.table(f"{config.label}, seed {config.seed}", *table_rows([result]))
    max_vio = ", ".join(f"{value:.3f}" for value in result["layers"]["max_vio"])
    output.note(f"validation MaxVio by layer: {max_vio}")
    if few := not_yet_balanced(result["config"]):
        output.note(few)
    output.note(f"checkpoint: {out}" + (f"; report: {files[-1]}" if files else ""))
    output.document(
        {
            "command": "train",
            "completed": True,
            "checkpoint": str(out),
            **{key: value for key, value in result.items() if key != "history"},
            "files": [str(path) for path in files],
            "environment": facts,
        }
    )
