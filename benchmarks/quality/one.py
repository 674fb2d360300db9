"""One run of a sweep, in a process of its own: `python -m benchmarks.quality.one FOLDER`.

FOLDER/job.json holds the options. Every line on stdout is {"step": n}; a run that is stopped leaves its checkpoint
there and goes on from it next time; a finished one leaves run.json. A run with a change starts over instead.
"""

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.texts import code_and_prose, subwords
from benchmarks.quality.trials import TRIALS
from kmeans_route import MoE, metrics
from kmeans_route.lm import checkpoint as checkpoints
from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.data import BatchSampler, Corpus, load_corpus, validation_windows
from kmeans_route.lm.results import summarize
from kmeans_route.lm.trainer import Trainer, run_steps, stop_on_signal
from kmeans_route.routing.experts import grouped_linear

SAVE_EVERY, WINDOW, CHANGE_WINDOW, TRAINING_BYTES = 100, 50, 10, 262144


@torch.no_grad()
def geometry(trainer: Trainer, folder: Path) -> dict[str, float | None]:
    """How routers and experts lie to each other now, means over the layers. Keeps the choices in `folder`.

    cosine: mean cosine between two different router directions. matched, unmatched: mean |cosine| of a router direction
    with the input-side (gate) neurons of its own expert, and of the others. coupling, coupling_neurons: correlation
    over validation tokens of the selected score with the norm of what that expert returned, and with the norm of its
    inner activations. effective_experts: see `metrics`. churn: mean share of a token's experts that were not its own at
    the last such call. None where there are no scores, and for the first churn.
    """
    trainer.model.eval()
    inputs, chosen = trainer.observe()
    layers = trainer.model.moe_layers
    rows = [_layer_geometry(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    trainer.model.train()
    scored = trainer.config.router != "hash"
    means = {key: _finite(statistics.fmean(row[key] for row in rows)) if scored else None for key in rows[0]}
    return means | {
        "effective_experts": _round(float(metrics.effective_experts(chosen, trainer.config.experts).mean())),
        "churn": churn(chosen.cpu(), trainer.step, trainer.config.eval_every, folder),
    }


def churn(choices: Tensor, step: int, every: int, folder: Path) -> float | None:
    """Mean share of a token's experts, choices (L, T, K) ids, that `every` steps ago were not among its own; None where
    that is not known. Files and not the checkpoint keep the choices: what is loaded again stays what it was.
    """
    torch.save(choices, folder / f"choices-{step}.pt")
    before = folder / f"choices-{step - every}.pt"
    if not before.exists():
        return None
    kept = (choices[..., None] == torch.load(before)[..., None, :]).any(-1)
    return _round(1.0 - float(kept.float().mean()))


def _layer_geometry(layer: MoE, x: Tensor) -> dict[str, float]:
    gates = layer.experts.gate_up.chunk(2, dim=1)[0]
    directions = F.normalize(layer.router.weight.float(), dim=1)
    cosines = torch.einsum("ed,fid->efi", directions, F.normalize(gates.float(), dim=2)).abs().mean(2)
    own = torch.eye(len(directions), dtype=torch.bool, device=directions.device)
    details = layer.details(x)
    sent, scores = details.dispatch, details.routing.selected_scores
    gate, up = grouped_linear(sent.x_sorted, layer.experts.gate_up, sent.offsets).chunk(2, dim=1)
    inner = (F.silu(gate) * up).norm(dim=1)
    return {
        "cosine": float(metrics.mean_pairwise_cosine(layer.router.weight.detach())),
        "matched": float(cosines[own].mean()),
        "unmatched": float(cosines[~own].mean()),
        "coupling": float(metrics.coupling(scores, details.y_sorted.norm(dim=1)[sent.positions])),
        "coupling_neurons": float(metrics.coupling(scores, inner[sent.positions])),
    }


def reduced(trainer: Trainer, measures: dict[str, Any], per_byte: float = 1.0) -> dict[str, Any]:
    """What the result file keeps: measures, and the curves as means over windows of 50 steps. per_byte: ids a byte."""
    history = trainer.history
    for record in history:
        for key in {"loss_bits", "validation_bits"} & set(record):
            record[key] *= per_byte
    bits, perplexity = measures["bits_per_byte"] * per_byte, measures["perplexity"] ** per_byte
    measures = measures | {"bits_per_byte": bits, "perplexity": perplexity}
    windows = [history[i : i + WINDOW] for i in range(0, len(history), WINDOW)]
    return {
        "measures": {key: _finite(value) for key, value in measures.items()},
        "curve": {
            "step": [window[-1]["step"] for window in windows],
            "loss_bits": [_mean(r["loss_bits"] for r in window) for window in windows],
            "max_vio": [_mean(statistics.fmean(r["max_vio"]) for r in window) for window in windows],
        },
        "validation": [[r["step"], _round(r["validation_bits"])] for r in history if "validation_bits" in r],
        "geometry": [{"step": r["step"], **r["geometry"]} for r in history if "geometry" in r],
        "num_parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "corpus": {"name": trainer.corpus.name, "sha256": trainer.corpus.sha256},
    }


def _mean(values: Any) -> float:
    return _round(statistics.fmean(values))


def _round(value: float) -> float:
    return round(value, 5)


def _finite(value: float) -> float | None:
    return _round(value) if math.isfinite(value) else None


def tell(record: dict[str, Any]) -> None:
    """The sweep's progress bar reads this."""
    if record["step"] % 10 == 0:
        print(json.dumps({"step": record["step"]}), flush=True)


def plain_run(config: TrainConfig, trial: str, text: str, folder: Path) -> dict[str, Any] | int:
    """Train, or go on. Returns: what to keep, or the signal that stopped it."""
    where = folder / "checkpoint"
    alphabet = subwords(folder.parent) if text else None
    trainer = Trainer(config, alphabet.corpus if alphabet else load_corpus([]))
    per_byte = alphabet.per_byte(trainer.windows[:, 1:]) if alphabet else 1.0
    after_step = TRIALS[trial](trainer) if trial else None
    if checkpoints.exists(where):
        trainer.restore(checkpoints.load_checkpoint(where))
        if after_step is not None:
            after_step()

    def on_step(record: dict[str, Any]) -> None:
        tell(record)
        if record["step"] % config.eval_every == 0:
            record["geometry"] = geometry(trainer, folder)
        if after_step is not None:
            after_step()

    def save() -> None:
        checkpoints.save_checkpoint(where, trainer.checkpoint())

    with stop_on_signal() as request:
        if not run_steps(trainer, request, on_step=on_step, save=save, save_every=SAVE_EVERY):
            save()
            return request.signum
    trainer.attachment.remove()
    evaluation = trainer.evaluate()
    trainer.history[-1]["validation_bits"] = evaluation.bits_per_byte
    measures = summarize(trainer, evaluation)["measures"]
    del measures["time_ms"]  # runs side by side share the machine
    measures["max_vio_training_text"] = training_text_max_vio(trainer)
    return reduced(trainer, measures, per_byte)


def training_text_max_vio(trainer: Trainer) -> float:
    """MaxVio, counts pooled over windows spread over the text that was trained on: without the noise of a batch and the
    difference between training and held-out files, both of which are larger than what a good router leaves."""
    trainer.windows = validation_windows(trainer.corpus.train, trainer.config.seq_len, TRAINING_BYTES)
    return float(metrics.max_vio(trainer.evaluate(sample=False).tokens_per_expert).mean())


def changed_run(config: TrainConfig, change: str) -> dict[str, Any] | int:
    """Train half of the steps on code, then let one thing be different: the text turns to prose, the learning rate
    doubles, or the batch grows by 16. Returns: what to keep, or the signal that stopped it."""
    code, prose = code_and_prose()
    trainer = Trainer(config, code)
    layers, half = trainer.model.moe_layers, config.steps // 2
    counts: list[Tensor] = []

    def on_step(record: dict[str, Any]) -> None:
        tell(record)
        counts.append(torch.stack([layer.tokens_per_expert for layer in layers]))
        if record["step"] == half:
            apply_change(trainer, change, prose)

    with stop_on_signal() as request:
        if not run_steps(trainer, request, on_step=on_step):
            return request.signum
    bits = {}
    for name, corpus in (("code", code), ("prose", prose)):
        trainer.windows = validation_windows(corpus.validation, config.seq_len, config.eval_bytes)
        bits[f"bits_{name}"] = _round(trainer.evaluate(sample=False).bits_per_byte)
    spans = [slice(i, i + CHANGE_WINDOW) for i in range(0, config.steps, CHANGE_WINDOW)]
    pooled = [torch.stack(counts[span]).sum(0) for span in spans]
    history = trainer.history
    return {
        "measures": bits,
        "change": change,
        "curve": {
            "step": [history[span][-1]["step"] for span in spans],
            "loss_bits": [_mean(r["loss_bits"] for r in history[span]) for span in spans],
            "max_vio": [_mean(statistics.fmean(r["max_vio"]) for r in history[span]) for span in spans],
            "max_vio_pooled": [_round(float(metrics.max_vio(window).mean())) for window in pooled],
            "dead_experts": [_round(float(metrics.dead_experts(window).float().mean())) for window in pooled],
        },
        "corpus": {"name": code.name, "sha256": code.sha256},
    }


def apply_change(trainer: Trainer, change: str, prose: Corpus) -> None:
    """From the next step on."""
    config = trainer.config
    if change == "prose":
        trainer.sampler = BatchSampler(prose.train, config.seq_len, config.batch, config.seed)
    elif change == "lr":
        trainer.config = replace(config, lr=2 * config.lr)
    else:
        trainer.sampler.batch = 16 * config.batch


def main(folder: Path) -> int:
    """Exit code: 0, or 128 + the signal that stopped it."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    config = TrainConfig.from_dict(job["config"])
    run = changed_run(config, job["change"]) if job["change"] else plain_run(config, job["trial"], job["text"], folder)
    if isinstance(run, int):
        return 128 + run
    checkpoints.write_atomically(folder / "run.json", json.dumps(run).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
