"""The command `export`: ordinary gates in place of K-Means routers."""

from __future__ import annotations

from pathlib import Path

from kmeans_route.cli.output import Output
from kmeans_route.cli.pretrained import Pretrained
from kmeans_route.cli.trained import Trained


def export(
    old: Trained | Pretrained,
    out: Path,
    output: Output,
    router: str,
    balance: str,
    bias: str,
    calibration_bytes: int,
    more_steps: int,
) -> None:
    """The command `export`; app.py says what the options are. What the routers refuse is a ValueError."""
    new = old.with_gates(router, balance, more_steps)
    batches, held_out = old.windows(calibration_bytes)
    with output.batches("exporting", len(batches) + 2 * len(held_out)) as tick:
        new, comparison, facts = old.fit_gates(new, batches, held_out, bias, tick)
    old.save(new, out)
    old.tell("export", new, out, comparison, facts, output)
