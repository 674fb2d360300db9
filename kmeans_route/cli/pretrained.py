"""`inspect`, `convert` and `export` on a folder of transformers' save_pretrained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmeans_route import Comparison, calibrate
from kmeans_route.cli.checkpoint import CheckpointError, exists
from kmeans_route.cli.conversion import comparison_table
from kmeans_route.cli.data import load_corpus
from kmeans_route.cli.output import Output

WINDOW, ROWS = 512, 4  # tokens of a window, windows of a batch
Batch = dict[str, Tensor]


def is_pretrained(folder: Path) -> bool:
    """Whether a folder holds a model of transformers rather than a run of `kmeans-route train`."""
    return (folder / "config.json").is_file() and not exists(folder)


def convert_pretrained(
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
) -> int:
    """The command `convert`: see `kmeans_route.cli.conversion.convert`.

    Raises:
        CheckpointError: no readable model, or no tokenizer beside it. ValueError: it has K-Means routers already, or
        none that can be swapped.
    """
    from kmeans_route.integrations.transformers import apply_kmeans_routing

    old, tokenizer = _load(source), _tokenizer(source)
    if getattr(old.config, "kmeans_route", None):
        raise ValueError(f"{source} must hold learned routers, got K-Means: convert a model that has none yet")
    new = copy.deepcopy(old)
    options: dict[str, Any] = ({"balance": balance} if balance else {}) | ({} if tau is None else {"tau": tau})
    swaps = apply_kmeans_routing(new, from_gate=True, **options)
    batches, held_out = token_batches(old, tokenizer, text, calibration_bytes)
    passes = (start == "means") + (tau is None or balance_steps > 0)
    with output.batches("calibrating", passes * len(batches) + 2 * len(held_out)) as tick:
        comparison = calibrate(
            old, new, batches, held_out=held_out, start=start, balance_steps=balance_steps, fit_tau=tau is None,
            progress=tick,
        )  # fmt: skip
    fitted = swaps[0].router.options.tau
    _save(new, tokenizer, out)
    facts = {"tau": fitted, "calibration_tokens": _count(batches)}
    _tell("convert", source, out, new.config.model_type, swaps[0].router.top_k, comparison, facts, output)
    return 0


def export_pretrained(
    source: Path, out: Path, output: Output, *, text: Sequence[Path], bias: str, calibration_bytes: int
) -> int:
    """The command `export`: see `kmeans_route.integrations.transformers.export_vanilla`.

    Raises:
        CheckpointError: no readable model, or no tokenizer beside it. ValueError: it has no K-Means routers.
    """
    from kmeans_route.integrations.transformers import export_vanilla

    model, tokenizer = _load(source), _tokenizer(source)
    if not getattr(model.config, "kmeans_route", None):
        raise ValueError(f"{source} must hold K-Means routers, got a model without: nothing to export")
    batches, held_out = token_batches(model, tokenizer, text, calibration_bytes)
    with output.batches("exporting", len(batches) + 2 * len(held_out)) as tick:
        export = export_vanilla(model, batches, held_out=held_out, bias=bias or None, progress=tick)
    _save(export.model, tokenizer, out)
    facts = {"bias": bias or "the architecture's", "calibration_tokens": _count(batches)}
    top_k = next(iter(export.gates.values())).options.top_k
    _tell("export", source, out, model.config.model_type, top_k, export.comparison, facts, output)
    return 0


def token_batches(model: Any, tokenizer: Any, text: Sequence[Path], num_bytes: int) -> tuple[list[Batch], list[Batch]]:
    """(training, held-out) windows of text as the model's batches, about `num_bytes` bytes each.

    Raises:
        ValueError: the text is too short for one window.
    """
    corpus = load_corpus(text)
    length = min(WINDOW, int(getattr(model.config.get_text_config(), "max_position_embeddings", WINDOW)))
    sides = []
    for name, side in (("training", corpus.train), ("held-out", corpus.validation)):
        words = bytes(side[:num_bytes].tolist()).decode("utf-8", errors="replace").replace("\0", "\n")
        ids = torch.tensor(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) < length:
            raise ValueError(
                f"--text and --calibration-bytes must give at least {length} {name} tokens, got {len(ids)}: raise them"
            )
        windows = ids[: len(ids) // length * length].view(-1, length).to(model.device)
        sides.append([{"input_ids": rows, "labels": rows} for rows in torch.split(windows, ROWS)])
    return sides[0], sides[1]


def load_for_inspection(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer or None) of a folder, for its state and, where there is a tokenizer, its loads."""
    model = _load(folder)
    try:
        return model, _tokenizer(folder)
    except CheckpointError:
        return model, None


def _load(folder: Path) -> Any:
    """The model, on the CPU, in the dtype that it was saved in.

    Raises:
        ModuleNotFoundError: no transformers. CheckpointError: it cannot be read.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{folder} holds a model of transformers: pip install "kmeans_route[hf]"', name=error.name
        ) from error
    from kmeans_route.integrations.transformers import load_kmeans_pretrained

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(config, "kmeans_route", None):
            return load_kmeans_pretrained(AutoModelForCausalLM, folder, dtype="auto", local_files_only=True).eval()
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
    except OSError as error:
        raise CheckpointError(f"{folder} holds no model that transformers can read: {_first_line(error)}") from None


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            f"{folder} must hold a tokenizer beside the model, got none ({_first_line(error)}): save one, or call "
            "calibrate and export_vanilla from Python with batches of your own"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _count(batches: list[Batch]) -> int:
    return sum(batch["input_ids"].numel() for batch in batches)


def _tell(
    command: str,
    source: Path,
    out: Path,
    model_type: str,
    top_k: int,
    comparison: Comparison,
    facts: Mapping[str, Any],
    output: Output,
) -> None:
    figures = comparison_table(f"{command}: {model_type}, held-out text", top_k, comparison, output)
    assert comparison.loss_before is not None
    assert comparison.loss_after is not None
    change = comparison.loss_after - comparison.loss_before
    output.note(f"loss a token: {comparison.loss_before:.4f} before, {comparison.loss_after:.4f} after ({change:+.4f})")
    output.note(", ".join(f"{name} {value}" for name, value in facts.items()))
    output.note(f"model: {out}")
    output.document({"command": command, "source": str(source), "checkpoint": str(out), **facts, **figures})
