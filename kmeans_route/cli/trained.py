"""A run of `kmeans-route train`, as `inspect`, `convert` and `export` work on it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kmeans_route import Comparison, KMeansRouter, LearnedRouter, export_gates
from kmeans_route.cli.output import Output
from kmeans_route.cli.train import resumed
from kmeans_route.lm.checkpoint import save_checkpoint
from kmeans_route.lm.data import BatchSampler
from kmeans_route.lm.model import DecoderLM, next_byte_loss
from kmeans_route.lm.trainer import NATS_PER_BIT, Trainer


class Trained:
    """The run in a folder, on the text named, or on its own. What cannot be read is a CheckpointError."""

    def __init__(self, folder: Path, text: Sequence[Path]) -> None:
        config, corpus, self.checkpoint = resumed(folder, {}, text)
        self.folder, self.trainer = folder, Trainer(config, corpus)
        self.trainer.restore(self.checkpoint)
        self.trainer.attachment.remove()
        for router in self.trainer.attachment.routers.values():
            router.pending.clear_()  # of a run between two commits: this model does not go on
        self.model, self.state, self.forward = self.trainer.model, self.checkpoint.model_state(), next_byte_loss

    def windows(self, num_bytes: int) -> tuple[list[Any], list[Any], dict[str, int]]:
        """About `num_bytes` of the training text, and the run's validation windows, in batches; the first's size."""
        config, device = self.model.config, self.trainer.device
        sampler = BatchSampler(self.trainer.corpus.train, config.seq_len, config.batch, config.seed)
        count = max(1, math.ceil(num_bytes / (config.seq_len * config.batch)))
        calibration = [sampler.next().to(device) for _ in range(count)]
        held_out = [windows.to(device).long() for windows in torch.split(self.trainer.windows, config.batch)]
        return calibration, held_out, {"calibration_bytes": count * config.batch * config.seq_len}

    def with_kmeans(self, balance: str, tau: float | None, more_steps: int, directions: str | None) -> DecoderLM:
        """The model with K-Means routers in place of its own, which must be learned: their rows are the directions."""
        if self.model.config.router == "kmeans":
            raise ValueError(f"{self.folder} must hold a learned router, got K-Means: convert a softmax or sigmoid run")
        given = self.model.config.router_options | ({} if directions is None else {"directions": directions})
        changes = {"router_options": given} | ({} if tau is None else {"tau": tau})
        new = self._with_routers("kmeans", balance, more_steps, **changes)
        for ours, theirs in zip(new.moe_layers, self.model.moe_layers, strict=True):
            assert isinstance(ours.router, KMeansRouter)
            ours.router.set_centroids(theirs.router.weight)
        return new

    def with_gates(self, router: str, balance: str, more_steps: int) -> DecoderLM:
        """The model with learned routers, not yet fitted, in place of its own, which must be K-Means."""
        if self.model.config.router != "kmeans":
            raise ValueError(
                f"{self.folder} must hold K-Means routers, got {self.model.config.router}: nothing to export"
            )
        if router == "kmeans":
            raise ValueError("--router must be softmax or sigmoid, got kmeans: these are the ordinary ones")
        taken = signature(LearnedRouter).parameters
        kept = {name: value for name, value in self.model.config.router_options.items() if name in taken}
        return self._with_routers(router, balance, more_steps, router_options=kept)

    def _with_routers(self, router: str, balance: str, more_steps: int, **changes: Any) -> DecoderLM:
        steps = self.model.config.steps + more_steps
        config = replace(self.model.config, router=router, balance=balance, bias_rate=None, steps=steps, **changes)
        new = DecoderLM(config).to(self.trainer.device)
        routers = _router_prefixes(self.model)
        state = {name: value for name, value in self.model.state_dict().items() if not name.startswith(routers)}
        new.load_state_dict(state, strict=False)
        return new

    def fit_gates(
        self, new: DecoderLM, batches: list[Any], held: list[Any], bias: str, tick: Any
    ) -> tuple[DecoderLM, Comparison, dict[str, Any]]:
        """Give the routers of `new` the gates nearest to this model's: (new, comparison, what to tell)."""
        kind, place = new.config.router, bias or ("score" if new.config.balance in ("sign", "quantile") else "rows")
        gates, comparison = export_gates(
            self.model, batches, target=new, held_out=held, kind=kind, bias=place, forward=self.forward, progress=tick
        )
        scales = {name: gate.scale for name, gate in gates.items()}
        return new, comparison, {"bias": place, "scales": scales}

    def save(self, new: DecoderLM, out: Path) -> None:
        """The old checkpoint with the new model; a parameter that the old one had not starts without moments."""
        routers = _router_prefixes(new)
        first = new.moe_layers[0].router
        if isinstance(first, KMeansRouter):  # whose tau was fitted
            new.config = replace(new.config, tau=first.options.tau)
        tensors = {f"model.{name}": value for name, value in new.state_dict().items()}
        for name, parameter in new.named_parameters() if self.checkpoint.step else ():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                fresh = torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
                entry = f"optimizer.{key}.{name}"
                tensors[entry] = fresh if name.startswith(routers) else self.checkpoint.tensors[entry]
        kept = ("random.", "attachment.steps")
        tensors |= {name: value for name, value in self.checkpoint.tensors.items() if name.startswith(kept)}
        save_checkpoint(out, self.checkpoint._replace(config=new.config.to_dict(), tensors=tensors))

    def tell(
        self, command: str, new: DecoderLM, out: Path, comparison: Comparison, facts: dict[str, Any], output: Output
    ) -> None:
        """Say what a conversion has come to."""
        before, after = self.model.config, new.config
        title = f"{before.label} -> {after.label}, held-out text"
        figures = comparison_table(title, after.top_k, comparison, output)
        bits = [figures.pop(f"loss_{when}") / NATS_PER_BIT for when in ("before", "after")]
        output.note(f"validation bits per byte: {bits[0]:.4f} before, {bits[1]:.4f} after ({bits[1] - bits[0]:+.4f})")
        output.note(", ".join(f"{name} {value:g}" for name, value in facts.items() if isinstance(value, (int, float))))
        output.note(f"checkpoint: {out}")
        if after.steps > before.steps:
            output.note(f"train on with: kmeans-route train --resume --out {shlex.quote(str(out))}")
        figures["bits_per_byte_before"], figures["bits_per_byte_after"] = bits
        where = {"source": str(self.folder), "checkpoint": str(out), "from": before.label, "to": after.label}
        output.document({"command": command, **where, **facts, **figures})


def _router_prefixes(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, (KMeansRouter, LearnedRouter)))


def comparison_table(title: str, top_k: int, comparison: Comparison, output: Output) -> dict[str, Any]:
    """Show agreement and loads, router by router; returns the figures for JSON."""
    figures = comparison.to_dict()
    names = ("top1", "overlap", "gate_error", "max_vio_before", "max_vio_after")
    everything = {**figures["routers"], "mean": figures["mean"]}
    rows = [[name, *(f"{values[key]:.3f}" for key in names)] for name, values in everything.items()]
    output.table(title, ["router", "top-1", f"top-{top_k}", "gate error", "MaxVio before", "after"], rows)
    return figures
