"""From a learned checkpoint of `kmeans-route train` to a K-Means one, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kmeans_route import Comparison, KMeansRouter, LearnedRouter, calibrate, export_gates
from kmeans_route.cli.checkpoint import Checkpoint, save_checkpoint
from kmeans_route.cli.config import TrainConfig
from kmeans_route.cli.data import BatchSampler
from kmeans_route.cli.model import DecoderLM, next_byte_loss
from kmeans_route.cli.output import Output
from kmeans_route.cli.run import resumed
from kmeans_route.cli.training import NATS_PER_BIT, Trainer


def convert(
    source: Path,
    out: Path,
    output: Output,
    *,
    text: Sequence[Path],
    balance: str,
    start: str,
    tau: float | None,
    balance_steps: int,
    calibration_bytes: int,
    more_steps: int,
) -> int:
    """The command `convert`: a learned checkpoint with K-Means routers in place of the learned ones.

    Args:
        source, out: folders of the two checkpoints.
        output: where to speak.
        text: as named; none means the checkpoint's.
        balance: rule of the K-Means routers; "" for the default.
        start, balance_steps: see `kmeans_route.calibrate`.
        tau: of the gates; None fits it.
        calibration_bytes: of training text.
        more_steps: added to the steps of the run, so that it can be trained on.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: the checkpoint's routers are K-Means already. CheckpointError: it cannot be read.
    """
    old, checkpoint = _restored(source, text)
    if old.config.router == "kmeans":
        raise ValueError(f"{source} must hold a learned router, got K-Means: convert a softmax or sigmoid run")
    config = replace(old.config, router="kmeans", balance=balance, bias_rate=None, steps=old.config.steps + more_steps)
    if tau is not None:
        config = replace(config, tau=tau)
    model = _with_routers(old.model, config)
    for ours, theirs in zip(model.moe_layers, old.model.moe_layers, strict=True):
        assert isinstance(ours.router, KMeansRouter)
        ours.router.set_centroids(theirs.router.weight)
    batches, held_out = _windows(old, calibration_bytes)
    passes = (start == "means") + (tau is None or balance_steps > 0)
    with output.batches("calibrating", passes * len(batches) + 2 * len(held_out)) as tick:
        comparison = calibrate(
            old.model, model, batches, held_out=held_out, start=start, balance_steps=balance_steps,
            fit_tau=tau is None, forward=_loss, progress=tick,
        )  # fmt: skip
    first = model.moe_layers[0].router
    assert isinstance(first, KMeansRouter)
    config = replace(config, tau=first.options.tau)
    _save(out, checkpoint, config, model)
    facts = {"tau": config.tau, "calibration_bytes": sum(batch[:, 1:].numel() for batch in batches)}
    _tell("convert", source, out, old.config, config, comparison, facts, output)
    return 0


def export(
    source: Path,
    out: Path,
    output: Output,
    *,
    text: Sequence[Path],
    router: str,
    balance: str,
    bias: str,
    calibration_bytes: int,
    more_steps: int,
) -> int:
    """The command `export`: a K-Means checkpoint with ordinary gates.

    Args:
        source, out, output, text, calibration_bytes, more_steps: as in `convert`.
        router: "softmax" or "sigmoid".
        balance: its rule; "" for the default. "sign" and "quantile" have a place for the selection bias.
        bias: see `kmeans_route.export_gates`; "" for "score" where there is a place, else "rows".

    Returns:
        The exit code, 0.

    Raises:
        ValueError: the checkpoint's routers are learned ones. CheckpointError: it cannot be read.
    """
    old, checkpoint = _restored(source, text)
    if old.config.router != "kmeans":
        raise ValueError(f"{source} must hold K-Means routers, got {old.config.router}: nothing to export")
    if router == "kmeans":
        raise ValueError("--router must be softmax or sigmoid, got kmeans: these are the ordinary ones")
    config = replace(old.config, router=router, balance=balance, bias_rate=None, steps=old.config.steps + more_steps)
    place = bias or ("score" if config.balance in ("sign", "quantile") else "rows")
    model = _with_routers(old.model, config)
    batches, held_out = _windows(old, calibration_bytes)
    with output.batches("exporting", len(batches) + 2 * len(held_out)) as tick:
        gates, comparison = export_gates(
            old.model, batches, target=model, held_out=held_out, kind=router, bias=place, forward=_loss, progress=tick
        )
    _save(out, checkpoint, config, model)
    facts = {
        "bias": place,
        "calibration_bytes": sum(batch[:, 1:].numel() for batch in batches),
        "scales": {name: gate.scale for name, gate in gates.items()},
    }
    _tell("export", source, out, old.config, config, comparison, facts, output)
    return 0


def _restored(source: Path, text: Sequence[Path]) -> tuple[Trainer, Checkpoint]:
    config, corpus, checkpoint = resumed(source, {}, text)
    trainer = Trainer(config, corpus)
    trainer.restore(checkpoint)
    trainer.attachment.remove()
    return trainer, checkpoint


def _with_routers(model: DecoderLM, config: TrainConfig) -> DecoderLM:
    """A copy of the model with the routers that `config` names, as they are made."""
    new = DecoderLM(config).to(next(model.parameters()).device)
    routers = _router_prefixes(model)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(routers)}
    new.load_state_dict(state, strict=False)
    return new


def _router_prefixes(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, (KMeansRouter, LearnedRouter)))


def _windows(trainer: Trainer, num_bytes: int) -> tuple[list[Tensor], list[Tensor]]:
    """(calibration windows of the training text, the run's validation windows), cut into batches."""
    config = trainer.config
    sampler = BatchSampler(trainer.corpus.train, config.seq_len, config.batch, config.seed)
    count = max(1, math.ceil(num_bytes / (config.seq_len * config.batch)))
    calibration = [sampler.next().to(trainer.device) for _ in range(count)]
    return calibration, [w.to(trainer.device).long() for w in torch.split(trainer.windows, config.batch)]


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    assert isinstance(model, DecoderLM)
    return next_byte_loss(model, windows)


def _save(out: Path, checkpoint: Checkpoint, config: TrainConfig, model: DecoderLM) -> None:
    """The old checkpoint with the new model; a parameter that the old one had not starts without moments."""
    routers = _router_prefixes(model)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            fresh = torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
            entry = f"optimizer.{key}.{name}"
            tensors[entry] = fresh if name.startswith(routers) else checkpoint.tensors[entry]
    tensors |= {name: value for name, value in checkpoint.tensors.items() if name.startswith("random.")}
    save_checkpoint(out, checkpoint._replace(config=config.to_dict(), tensors=tensors))


def comparison_table(title: str, top_k: int, comparison: Comparison, output: Output) -> dict[str, Any]:
    """Show agreement and loads, router by router; returns the figures for JSON."""
    figures = comparison.to_dict()
    names = ("top1", "overlap", "gate_error", "max_vio_before", "max_vio_after")
    everything = {**figures["routers"], "mean": figures["mean"]}
    rows = [[name, *(f"{values[key]:.3f}" for key in names)] for name, values in everything.items()]
    output.table(title, ["router", "top-1", f"top-{top_k}", "gate error", "MaxVio before", "after"], rows)
    return figures


def _tell(
    command: str,
    source: Path,
    out: Path,
    before: TrainConfig,
    after: TrainConfig,
    comparison: Comparison,
    facts: dict[str, Any],
    output: Output,
) -> None:
    title = f"{before.label} -> {after.label}, held-out text"
    figures = comparison_table(title, after.top_k, comparison, output)
    assert comparison.loss_before is not None
    assert comparison.loss_after is not None
    bits = [comparison.loss_before / NATS_PER_BIT, comparison.loss_after / NATS_PER_BIT]
    output.note(f"validation bits per byte: {bits[0]:.4f} before, {bits[1]:.4f} after ({bits[1] - bits[0]:+.4f})")
    output.note(", ".join(f"{name} {value:g}" for name, value in facts.items() if isinstance(value, (int, float))))
    output.note(f"checkpoint: {out}")
    if after.steps > before.steps:
        output.note(f"train on with: kmeans-route train --resume --out {out}")
    figures["bits_per_byte_before"], figures["bits_per_byte_after"] = bits
    del figures["loss_before"], figures["loss_after"]
    output.document(
        {"command": command, "source": str(source), "checkpoint": str(out), "from": before.label, "to": after.label}
        | facts | figures
    )  # fmt: skip
