"""One run of a sweep, in a process of its own: `python -m benchmarks.quality.one FOLDER`.

FOLDER/config.json holds the options. Every line on stdout is {"step": n}; a run that is stopped leaves its checkpoint
there and goes on from it next time; a finished one leaves run.json.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kmeans_route.cli import checkpoint as checkpoints
from kmeans_route.cli.config import TrainConfig
from kmeans_route.cli.data import load_corpus
from kmeans_route.cli.output import Output
from kmeans_route.cli.run import Stopped, resumed, train_run

SAVE_EVERY, WINDOW = 100, 50


class Steps(Output):
    """Tells the sweep how far the run is."""

    @contextmanager
    def progress(self, description: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        def update(step: int, _note: str) -> None:
            if step % 10 == 0:
                print(json.dumps({"step": step}), flush=True)

        yield update


def reduced(run: dict[str, Any]) -> dict[str, Any]:
    """What the result file keeps: measures, each layer's, and the curves as means over windows of 50 steps."""
    history = run["history"]
    windows = [history[i : i + WINDOW] for i in range(0, len(history), WINDOW)]
    cosines = run["layers"]["direction_cosine"]
    return {
        "measures": {key: value if math.isfinite(value) else None for key, value in run["measures"].items()},
        "layers": {
            "max_vio": run["layers"]["max_vio"],
            "coupling": [value if math.isfinite(value) else None for value in run["layers"]["coupling"]],
            "direction_cosine": [_off_diagonal_mean(matrix) for matrix in cosines],
        },
        "curve": {
            "step": [window[-1]["step"] for window in windows],
            "loss_bits": [_round(statistics.fmean(r["loss_bits"] for r in window)) for window in windows],
            "max_vio": [_round(statistics.fmean(statistics.fmean(r["max_vio"]) for r in window)) for window in windows],
        },
        "validation": [[r["step"], _round(r["validation_bits"])] for r in history if "validation_bits" in r],
        "num_parameters": run["num_parameters"],
        "corpus": {key: run["corpus"][key] for key in ("name", "sha256") if key in run["corpus"]},
    }


def _off_diagonal_mean(matrix: list[list[float]]) -> float:
    size = len(matrix)
    return _round((sum(map(sum, matrix)) - sum(matrix[i][i] for i in range(size))) / max(1, size * (size - 1)))


def _round(value: float) -> float:
    return round(value, 5)


def main(folder: Path) -> int:
    """Run or go on. Returns: 0, or 128 + the signal that stopped it."""
    config = TrainConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    where = folder / "checkpoint"
    checkpoint = None
    if checkpoints.exists(where):
        stored, corpus, checkpoint = resumed(where, {}, [])
        if stored != config:
            raise ValueError(f"{folder} holds a run of other options: name another --out")
    else:
        corpus = load_corpus([])
    run = train_run(
        config, corpus, Steps(json_mode=True), where, checkpoint=checkpoint, save_every=SAVE_EVERY, save_final=False
    )
    if isinstance(run, Stopped):
        return run.exit_code
    checkpoints.write_atomically(folder / "run.json", json.dumps(reduced(run)).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
