"""Checkpoints of a training run: tensors in safetensors, everything else in JSON, never half written.

A folder holds `checkpoint.json` and the one tensor file that it names. The tensor file is written first, under a name
of its own; replacing the JSON is the single moment at which the new checkpoint takes the place of the old.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# safetensors is imported where a file is written or read: a trainer that keeps no checkpoint runs without it.

FORMAT = "kmeans_route.lm"
VERSION = 1
INDEX_NAME = "checkpoint.json"


class CheckpointError(Exception):
    """A checkpoint that is absent, foreign, truncated or of another version."""


class Checkpoint(NamedTuple):
    """What a folder holds.

    step: optimizer steps done. config: options as JSON values. corpus: summary of the text, with its digest.
    history: one record a step. tensors: flat name -> tensor, on the CPU.
    """

    step: int
    config: dict[str, Any]
    corpus: dict[str, Any]
    history: list[dict[str, Any]]
    tensors: dict[str, Tensor]

    def model_state(self) -> dict[str, Tensor]:
        """The state dict of the model."""
        return {name.removeprefix("model."): t for name, t in self.tensors.items() if name.startswith("model.")}


def exists(folder: Path) -> bool:
    """Whether the folder holds a checkpoint, readable or not."""
    return (folder / INDEX_NAME).exists()


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that a crash at any moment leaves the old one or the new one.

    The folder is made when absent; the previous checkpoint, and what a killed save left, is removed afterwards.
    """
    from safetensors.torch import save as save_tensors

    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "step": str(checkpoint.step)}
    payload = save_tensors({name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}, metadata)
    digest = hashlib.sha256(payload).hexdigest()
    # The digest in the name keeps a rewrite of the same step from touching the file in use.
    tensor_path = folder / f"step-{checkpoint.step:06d}-{digest[:8]}.safetensors"
    write_atomically(tensor_path, payload)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "torch": torch.__version__,
        **checkpoint._asdict(),
        "tensors": {"file": tensor_path.name, "num_bytes": len(payload), "sha256": digest},
    }
    write_atomically(folder / INDEX_NAME, json.dumps(index, allow_nan=False).encode())
    # Also what a killed save has left behind: a tensor file that no index names, temporary files.
    for pattern in ("step-*.safetensors", ".step-*.safetensors.*", f".{INDEX_NAME}.*"):
        for old in folder.glob(pattern):
            if old != tensor_path:
                old.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and verify every byte of it; what cannot be used is a CheckpointError that says why."""
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint in {folder}: start a run without --resume, or name its --out") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no JSON, so it is truncated or foreign: start afresh ({error})") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this program: format must be {FORMAT!r}")
    if index.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {index.get('version')}, this program reads {VERSION}")
    try:
        tensors = _read_tensors(folder, index["tensors"])
        return Checkpoint(int(index["step"]), index["config"], index["corpus"], index["history"], tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} lacks a part or holds a wrong one: {error!r}") from None


def _read_tensors(folder: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors.torch import load as load_tensors

    path = folder / Path(str(entry["file"])).name
    try:
        payload = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, start afresh") from None
    if len(payload) != entry["num_bytes"]:
        raise CheckpointError(f"{path} is truncated: expected {entry['num_bytes']} bytes, got {len(payload)}")
    if hashlib.sha256(payload).hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{path} was changed after it was written: its SHA-256 differs from the recorded one")
    tensors: dict[str, Tensor] = load_tensors(payload)
    return tensors


def write_atomically(path: Path, payload: bytes) -> None:
    """Replace a file by new contents: readers see the old bytes or all of the new ones, also after a power cut."""
    # Beside the file, so on the same file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # The rename itself lives in the folder's entry.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
