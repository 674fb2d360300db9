"""The command `convert`: K-Means routers in place of learned ones."""

from __future__ import annotations

from pathlib import Path

from kmeans_route import KMeansRouter, calibrate
from kmeans_route.cli.output import Output
from kmeans_route.cli.pretrained import Pretrained
from kmeans_route.cli.trained import Trained


def convert(
    old: Trained | Pretrained,
    out: Path,
    output: Output,
    start: str,
    balance: str,
    balance_steps: int,
    tau: float | None,
    calibration_bytes: int,
    more_steps: int,
) -> None:
    """The command `convert`; app.py says what the options are. What the routers refuse is a ValueError."""
    new = old.with_kmeans(balance, tau, more_steps)
    batches, held_out = old.windows(calibration_bytes)
    passes = (start == "means") + (tau is None or balance_steps > 0)
    with output.batches("calibrating", passes * len(batches) + 2 * len(held_out)) as tick:
        comparison = calibrate(
            old.model,
            new,
            batches,
            held_out=held_out,
            start=start,
            balance_steps=balance_steps,
            fit_tau=tau is None,
            forward=old.forward,
            progress=tick,
        )
    old.save(new, out)
    fitted = next(module.options.tau for module in new.modules() if isinstance(module, KMeansRouter))
    old.tell("convert", new, out, comparison, {"tau": fitted, **old.counted(batches)}, output)
