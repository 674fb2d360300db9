"""The demonstration: three routers from the same weights on the same text, compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kmeans_route.cli import places
from kmeans_route.cli.info import environment
from kmeans_route.cli.output import Output, duration
from kmeans_route.cli.train import train_run
from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.data import load_corpus
from kmeans_route.lm.report import write_report
from kmeans_route.lm.results import Run, means, table_rows, verdicts

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
        raise ModuleNotFoundError('the demo draws pictures: pip install "kmeans_route[cli,viz]"', name="matplotlib")
    asked, out = out, places.unused(out)
    places.check_folder(out)
    if out != asked:
        output.note(f"{asked} holds {places.held_by(asked)}: this one goes to {out}")
    start, corpus = time.monotonic(), load_corpus(text)
    output.note(
        f"{len(CONTESTANTS)} routers, seeds {', '.join(map(str, seeds))}, {base.steps} steps of "
        f"{base.batch * base.seq_len} bytes on {corpus.label}"
    )
    runs: list[Run] = []
    for seed in seeds:
        for contestant in CONTESTANTS:
            config = replace(base, seed=seed, **contestant)
            folder = out / places.INTERRUPTED / f"{config.router}-seed{seed}"
            runs.append(train_run(config, corpus, output, folder, save_final=False))
    facts = environment()
    paths = write_report(runs, out, title="K-Means routing and two learned routers", environment=facts)
    time_s, checks = time.monotonic() - start, verdicts(runs)
    spread = ", mean ± standard deviation over seeds" if len(seeds) > 1 else ""
    output.table(f"Same weights, same text, three routers{spread}", *table_rows(runs))
    if len(seeds) == 1:
        output.note("one seed decides neither of these; `make demo-seeds` asks them of three, at 800 steps:")
    for check in checks:
        output.note(f"check {'passed' if check['passed'] else 'FAILED'}: {check['text']}")
    output.note(f"report: {paths[-1]} ({duration(time_s)})")
    output.document(
        {
            "command": "demo",
            "time_s": time_s,
            "means": means(runs),
            "checks": checks,
            "runs": [
                {"label": run["label"], "seed": run["config"]["seed"], "measures": run["measures"]} for run in runs
            ],
            "files": [str(path) for path in paths],
            "environment": facts,
        }
    )
