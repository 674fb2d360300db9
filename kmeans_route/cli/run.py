"""One training run seen from a command: progress, checkpoints, Ctrl-C, final figures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from kmeans_route.cli.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from kmeans_route.cli.config import TrainConfig
from kmeans_route.cli.data import Corpus, load_corpus
from kmeans_route.cli.info import environment
from kmeans_route.cli.output import Output
from kmeans_route.cli.report import write_report
from kmeans_route.cli.results import Run, summarize, table_rows
from kmeans_route.cli.training import Trainer, run_steps, stop_on_signal


class Stopped(NamedTuple):
    """A run that a signal ended after a whole step, with its checkpoint saved.

    step of steps are done; folder holds the checkpoint; signum is the signal's number.
    """

    step: int
    steps: int
    folder: Path
    signum: int

    @property
    def exit_code(self) -> int:
        """128 + signal number: 130 for Ctrl-C."""
        return 128 + self.signum

    @property
    def resume_command(self) -> str:
        """The command that finishes the run."""
        return f"kmeans-route train --resume --out {shlex.quote(str(self.folder))}"

    def tell(self, output: Output) -> int:
        """Say where the checkpoint is and how to go on. Returns: the exit code."""
        output.note(f"stopped after step {self.step} of {self.steps}; checkpoint saved in {self.folder}")
        output.note(f"continue with: {self.resume_command}")
        output.document(
            {
                "interrupted": True,
                "step": self.step,
                "steps": self.steps,
                "checkpoint": str(self.folder),
                "resume": self.resume_command,
            }
        )
        return self.exit_code


def train_run(
    config: TrainConfig,
    corpus: Corpus,
    output: Output,
    folder: Path,
    *,
    checkpoint: Checkpoint | None = None,
    save_every: int = 0,
    save_final: bool = True,
) -> Run | Stopped:
    """Train to the last step, or to a signal.

    Args:
        config, corpus: what to train on.
        output: shows the progress.
        folder: of the checkpoints; a signal always saves one.
        checkpoint: to continue from.
        save_every: steps between checkpoints, 0 for none on the way.
        save_final: keep a checkpoint of the last step.

    Returns:
        The figures of the finished run, or where it stopped.

    Raises:
        CheckpointError: `checkpoint` does not fit. NotFiniteError: the loss broke. ValueError: options or text.
    """
    trainer = Trainer(config, corpus)
    if checkpoint is not None:
        trainer.restore(checkpoint)

    def save() -> None:
        save_checkpoint(folder, trainer.checkpoint())

    # Short, so that a progress line fits 80 columns.
    description = f"{config.label.split(',')[0]}, seed {config.seed}"
    with output.progress(description, config.steps, trainer.step) as update, stop_on_signal() as request:

        def on_step(record: dict[str, Any]) -> None:
            max_vio = sum(record["max_vio"]) / len(record["max_vio"])
            update(record["step"], f"loss {record['loss_bits']:.3f} bits/byte, MaxVio {max_vio:.2f}")

        done = run_steps(trainer, request, on_step=on_step, save=save, save_every=save_every)
        if save_final or not done:
            save()
    if not done:
        return Stopped(trainer.step, config.steps, folder, request.signum)
    trainer.attachment.remove()
    evaluation = trainer.evaluate()
    trainer.history[-1]["validation_bits"] = evaluation.bits_per_byte
    return summarize(trainer, evaluation)


def resumed(folder: Path, given: dict[str, Any], text: Sequence[Path]) -> tuple[TrainConfig, Corpus, Checkpoint]:
    """Options, text and state of a run to continue.

    Args:
        folder: of its checkpoint.
        given: options named on the command line; they may only repeat the checkpoint's.
        text: --text as named; none means the checkpoint's.

    Returns:
        (options, corpus, checkpoint), all from the checkpoint.

    Raises:
        CheckpointError: no usable checkpoint, or one of other options.
    """
    checkpoint = load_checkpoint(folder)
    try:
        config = TrainConfig.from_dict(checkpoint.config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint in {folder} is of another version: {error}") from None
    stored = config.to_dict()
    changed = [
        f"{name} (checkpoint {stored[name]}, asked {value})" for name, value in given.items() if stored[name] != value
    ]
    if changed:
        raise CheckpointError(
            f"a resumed run keeps its options, these differ: {', '.join(changed)}. "
            "Leave them out, or start a new run with another --out"
        )
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
) -> int:
    """The command `train`: one run, its table, its report.

    Args:
        config, corpus, checkpoint, save_every: see `train_run`.
        out: folder of the checkpoint and the report.
        output: where to speak.

    Returns:
        The exit code: 0, or 128 + the signal that stopped the run.
    """
    output.note(
        f"{config.label}: {config.steps} steps of {config.batch * config.seq_len} bytes on {corpus.name} "
        f"({len(corpus.train_files)} files, {corpus.train.numel() / 1e6:.1f} MB; held out: "
        f"{len(corpus.validation_files)} files)" + (f", from step {checkpoint.step}" if checkpoint else "")
    )
    result = train_run(config, corpus, output, out, checkpoint=checkpoint, save_every=save_every)
    if isinstance(result, Stopped):
        return result.tell(output)
    files = []
    if find_spec("matplotlib") is not None:
        title = f"Training with {config.label}"
        files = write_report([result], out, title=title, environment=environment())
    output.table(f"{config.label}, seed {config.seed}", *table_rows([result]))
    max_vio = ", ".join(f"{value:.3f}" for value in result["layers"]["max_vio"])
    output.note(f"validation MaxVio by layer: {max_vio}")
    output.note(f"checkpoint: {out}" + (f"; report: {files[-1]}" if files else ""))
    output.document(
        {
            "command": "train",
            "completed": True,
            "checkpoint": str(out),
            **{key: value for key, value in result.items() if key != "history"},
            "files": [str(path) for path in files],
            "environment": environment(),
        }
    )
    return 0
