"""`watch`: the load of each expert in a run of `train` that is going on, redrawn as the run's log grows.

The log, loads.jsonl in the run's folder, has a line every few steps: step, steps, loss in bits a byte, and the load of
each expert in each layer over those steps, as a share of a fair one. A run that goes on from a checkpoint drops the
lines after it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kmeans_route import metrics
from kmeans_route.cli import places
from kmeans_route.cli.output import Output
from kmeans_route.lm.checkpoint import write_atomically
from kmeans_route.lm.trainer import Trainer

NAME, PICTURE = "loads.jsonl", "loads.png"
LOG_EVERY = 10
LEVELS = " ▁▂▃▄▅▆▇█"
"""Of a load in quarters of a fair share; the last one is two fair shares or more, a blank a dead expert."""
MOST_COLUMNS = 64


class LoadLog:
    """Writes the log of a run; `add` is called after each step."""

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._trainer = folder / NAME, trainer
        steps = trainer.config.steps  # more than the log says where the run was extended
        kept = [{**line, "steps": steps} for line in read(folder) if line["step"] <= trainer.step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._counts: Any = 0

    def add(self, record: dict[str, Any]) -> None:
        """Count a step's loads, and write a line where its turn has come."""
        self._counts = self._counts + self._trainer.tokens_per_expert
        steps = self._trainer.config.steps
        if record["step"] % LOG_EVERY and record["step"] < steps:
            return
        loads = metrics.load(self._counts).tolist()
        line = {
            "step": record["step"],
            "steps": steps,
            "loss_bits": round(record["loss_bits"], 4),
            "loads": [[round(load, 3) for load in layer] for layer in loads],
        }
        with open(self._path, "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        self._counts = 0


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; none where there is no log, and none that is being written."""
    path = folder / NAME
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def drawn(line: dict[str, Any]) -> str:
    """A line of the log as text: a row a layer, a column an expert (the fullest of several where there are many)."""
    rows = [f"step {line['step']} of {line['steps']}, loss {line['loss_bits']:.3f} bits/byte"]
    for number, loads in enumerate(line["loads"]):
        width = -(-len(loads) // MOST_COLUMNS)
        columns = [max(loads[start : start + width]) for start in range(0, len(loads), width)]
        bars = "".join(LEVELS[0 if load == 0 else min(8, max(1, round(4 * load)))] for load in columns)
        dead = sum(load == 0 for load in loads)
        told = f"  {dead} dead" if dead else ""
        rows.append(f"layer {number:>2} |{bars}| MaxVio {max(loads) - 1:.2f}{told}")
    told = f"loads of up to {LOG_EVERY} steps together; a bar at half is a fair share, full two or more, blank none"
    return "\n".join([*rows, told])


def watch(folder: Path, output: Output, *, once: bool, wait: Callable[[], None] = lambda: time.sleep(2.0)) -> None:
    """The command `watch`: draw the newest line of the log, as text and as a picture, until the run ends.

    once: draw what is there and end. wait: between two looks.

    Raises:
        ValueError: the folder has no log of a run.
    """
    last: dict[str, Any] = {}
    draws = find_spec("matplotlib") is not None
    if draws and folder.exists():
        try:
            places.check_folder(folder, "RUN")
        except ValueError as error:  # another's run: the text needs no file
            draws = False
            output.note(f"no {PICTURE}: {error}")
    with output.redrawn() as show:
        while True:
            lines = read(folder)
            if not lines and (once or not folder.exists()):
                raise ValueError(
                    f"{folder} must hold a run with {NAME}, got none: name the folder of `kmeans-route train --out`"
                )
            if lines and lines[-1] != last:
                last = lines[-1]
                show(drawn(last))
                if draws:
                    picture(folder, last)
            if once or (last and last["step"] >= last["steps"]):
                break
            wait()
    output.document({"command": "watch", **last})


def picture(folder: Path, line: dict[str, Any]) -> None:
    """Draw loads.png beside the log."""
    from kmeans_route.viz import load_heatmap

    path = folder / PICTURE
    temporary = path.with_name(f".{PICTURE}")
    load_heatmap({f"step {line['step']} of {line['steps']}": line["loads"]}).savefig(temporary, format="png")
    temporary.replace(path)
