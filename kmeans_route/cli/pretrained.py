"""A folder of transformers' save_pretrained, as `inspect`, `convert` and `export` work on it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmeans_route import Comparison, KMeansRouter
from kmeans_route.cli.output import Output
from kmeans_route.cli.trained import comparison_table
from kmeans_route.install import install_line
from kmeans_route.lm.checkpoint import CheckpointError, exists
from kmeans_route.lm.data import load_corpus

WINDOW, ROWS = 512, 4  # tokens of a window, windows of a batch
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def is_pretrained(folder: Path) -> bool:
    """Whether a folder holds a model of transformers rather than a run of `kmeans-route train`."""
    return (folder / "config.json").is_file() and not exists(folder)


class Pretrained:
    """A causal language model, on the text named or the standard library; does what `Trained` does."""

    forward = None

    def __init__(self, folder: Path, text: Sequence[Path]) -> None:
        self.folder, self.text = folder, text
        self.model = _load(folder)
        self.state: Mapping[str, Tensor] = self.model.state_dict()

    @cached_property
    def tokenizer(self) -> Any:
        """The one that lies beside the model."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # transformers raises many kinds
            # What it says of a folder without one is of no help.
            files = [path for name in TOKENIZER_FILES for path in self.folder.glob(name)]
            got = f"one that transformers cannot read ({first_line(error)})" if files else "none"
            raise CheckpointError(
                f"{self.folder} must hold a tokenizer beside the model, got {got}: write it there with "
                "tokenizer.save_pretrained, or work from Python with batches of your own"
            ) from None

    def windows(self, num_bytes: int) -> tuple[list[Any], list[Any], dict[str, int]]:
        """Training and held-out windows of text as the model's batches, about `num_bytes` each; the first's size."""
        tokenizer, corpus = self.tokenizer, load_corpus(self.text)
        length = min(WINDOW, int(getattr(self.model.config.get_text_config(), "max_position_embeddings", WINDOW)))
        sides = []
        for name, side in (("training", corpus.train), ("held-out", corpus.validation)):
            words = bytes(side[:num_bytes].tolist()).decode("utf-8", errors="replace").replace("\0", "\n")
            ids = torch.tensor(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"])
            if len(ids) < length:
                raise ValueError(
                    f"--text and --calibration-bytes must give at least {length} {name} tokens, got {len(ids)}: "
                    "raise them"
                )
            windows = ids[: len(ids) // length * length].view(-1, length).to(self.model.device)
            sides.append([{"input_ids": rows, "labels": rows} for rows in torch.split(windows, ROWS)])
        return sides[0], sides[1], {"calibration_tokens": sum(batch["input_ids"].numel() for batch in sides[0])}

    def with_kmeans(self, balance: str, tau: float | None, _more_steps: int, directions: str | None) -> Any:
        """A copy with K-Means routers in place of its own, which must be learned: their rows are the directions."""
        from kmeans_route.integrations.transformers import apply_kmeans_routing

        if getattr(self.model.config, "kmeans_route", None):
            raise ValueError(f"{self.folder} must hold learned routers, got K-Means: convert a model that has none yet")
        new = copy.deepcopy(self.model)
        options: dict[str, Any] = ({"balance": balance} if balance else {}) | ({} if tau is None else {"tau": tau})
        apply_kmeans_routing(new, from_gate=True, directions=directions, **options)
        return new

    def with_gates(self, _router: str, _balance: str, _more_steps: int) -> Any:
        """The model itself, whose routers must be K-Means; `fit_gates` makes another of it."""
        if not getattr(self.model.config, "kmeans_route", None):
            raise ValueError(f"{self.folder} must hold K-Means routers, got a model without: nothing to export")
        return self.model

    def fit_gates(
        self, new: Any, batches: list[Any], held_out: list[Any], bias: str, tick: Any
    ) -> tuple[Any, Comparison, dict[str, Any]]:
        """Give a copy of `new` the routers of its architecture: (copy, comparison, what to tell)."""
        from kmeans_route.integrations.transformers import export_vanilla

        export = export_vanilla(new, batches, held_out=held_out, bias=bias or None, progress=tick)
        return export.model, export.comparison, {"bias": bias or "the architecture's"}

    def save(self, new: Any, out: Path) -> None:
        """Write a model, and the tokenizer beside it."""
        new.save_pretrained(out)
        self.tokenizer.save_pretrained(out)

    def tell(
        self, command: str, new: Any, out: Path, comparison: Comparison, facts: dict[str, Any], output: Output
    ) -> None:
        """Say what a conversion has come to."""
        top_k = next(m.top_k for model in (new, self.model) for m in model.modules() if isinstance(m, KMeansRouter))
        title = f"{command}: {self.model.config.model_type}, held-out text"
        figures = comparison_table(title, top_k, comparison, output)
        before, after = figures["loss_before"], figures["loss_after"]
        output.note(f"loss a token: {before:.4f} before, {after:.4f} after ({after - before:+.4f})")
        output.note(", ".join(f"{name} {value}" for name, value in facts.items()))
        output.note(f"model: {out}")
        output.document({"command": command, "source": str(self.folder), "checkpoint": str(out), **facts, **figures})


def _load(folder: Path) -> Any:
    """The model, on the CPU, in the dtype that it was saved in."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{folder} holds a model of transformers: {install_line('hf')}", name=error.name
        ) from error
    from kmeans_route.integrations.transformers import load_kmeans_pretrained

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(config, "kmeans_route", None):  # of section version 1 too, which Auto classes do not know
            return load_kmeans_pretrained(AutoModelForCausalLM, folder, dtype="auto", local_files_only=True).eval()
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
    except OSError as error:
        raise CheckpointError(f"{folder} holds no model that transformers can read: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Of its message; its class where there is none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
