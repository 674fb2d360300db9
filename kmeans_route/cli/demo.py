"""The demonstration: three routers from the same weights on the same text, a step of each in turn, compared."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kmeans_route.cli import places
from kmeans_route.cli.info import environment
from kmeans_route.cli.output import Output, duration
from kmeans_route.cli.train import Stopped
from kmeans_route.install import install_line
from kmeans_route.lm.checkpoint import save_checkpoint
from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.data import Corpus, load_corpus
from kmeans_route.lm.report import write_report
from kmeans_route.lm.results import (
    QUALITY_PAGE,
    Run,
    conclusion,
    means,
    not_yet_balanced,
    pair_times,
    quality_rows,
    quality_title,
    routing_rows,
    summarize,
    verdicts,
)
from kmeans_route.lm.trainer import Trainer, stop_on_signal

DEMO_STEPS = 250
CONTESTANTS: tuple[dict[str, Any], ...] = (
    {"router": "kmeans", "balance": "proportional"},
    {"router": "softmax", "balance": "aux", "aux_loss_coef": 0.01},
    {"router": "sigmoid", "balance": "sign"},
)
"""What is compared, each with its default settings."""


def demo(base: TrainConfig, text: Sequence[Path], seeds: list[int], out: Path, output: Output) -> None:
    """The command `demo`: train every contestant with every seed and the options `base`, write the report to `out`.

    Where a report lies there, a number is added to the folder's name.
    """
    if find_spec("matplotlib") is None:  # said before anything is trained
        raise ModuleNotFoundError(f"the demo draws pictures: {install_line('cli', 'viz')}", name="matplotlib")
    asked, out = out, places.unused(out)
    places.check_folder(out)
    if out != asked:
        output.note(f"{asked} holds {places.held_by(asked)}: this one goes to {out}")
    start, corpus = time.monotonic(), load_corpus(text)
    output.note(
        f"{len(CONTESTANTS)} routers, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, {base.steps} steps of "
        f"{base.batch * base.seq_len} bytes on {corpus.label}; on the way, the bits per byte of each"
    )
    runs: list[Run] = []
    for seed in seeds:
        runs += race([replace(base, seed=seed, **contestant) for contestant in CONTESTANTS], corpus, out, output)
    facts = environment()
    paths = write_report(runs, out, title="K-Means routing and two learned routers", environment=facts)
    time_s = time.monotonic() - start
    if few := not_yet_balanced(runs[0]["config"]):
        output.note(few)
    output.table("What this run can tell", *routing_rows(runs))
    output.table(quality_title(runs), *quality_rows(runs))
    for check in verdicts(runs):
        output.note(f"{'yes' if check['passed'] else 'no'}: {check['text']}")
    output.note(f"report: {paths[-1]} ({duration(time_s)})")
    output.note(f"{conclusion(runs)} {QUALITY_PAGE}.")
    output.document(
        {
            "command": "demo",
            "time_s": time_s,
            "means": means(runs),
            "checks": verdicts(runs),
            "conclusion": conclusion(runs),
            "runs": [
                {"label": run["label"], "seed": run["config"]["seed"], "measures": run["measures"]} for run in runs
            ],
            "files": [str(path) for path in paths],
            "environment": facts,
        }
    )


def race(configs: Sequence[TrainConfig], corpus: Corpus, out: Path, output: Output) -> list[Run]:
    """Train all of them, a step of each in turn, so that whatever else the machine does falls on all alike.

    The order is drawn anew for each round, the same in every run. A signal ends a whole round: it leaves a checkpoint
    of each in `out`, and raises Stopped.

    Returns: the figures of the runs, in order, with the step times paired by round.
    """
    trainers = [Trainer(config, corpus) for config in configs]
    steps, seed = configs[0].steps, configs[0].seed
    with output.progress(f"seed {seed}", steps) as update, stop_on_signal() as request:
        for number in range(steps):
            shuffled = list(trainers)
            random.Random(number).shuffle(shuffled)
            for trainer in shuffled:
                trainer.train_step()
            # Names and figures alone, so that a progress line fits 80 columns.
            losses = [f"{one.config.label.partition(',')[0]} {one.history[-1]['loss_bits']:.2f}" for one in trainers]
            update(number + 1, ", ".join(losses))
            if request.signum:
                break
    if request.signum and trainers[0].step < steps:
        folders = [out / places.INTERRUPTED / f"{config.router}-seed{seed}" for config in configs]
        for trainer, folder in zip(trainers, folders, strict=True):
            save_checkpoint(folder, trainer.checkpoint())
        raise Stopped(trainers[0], folders, request.signum)
    runs = []
    for trainer in trainers:
        trainer.attachment.remove()
        evaluation = trainer.evaluate()
        trainer.history[-1]["validation_bits"] = evaluation.bits_per_byte
        runs.append(summarize(trainer, evaluation))
    pair_times(runs)
    return runs
