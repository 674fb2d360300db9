"""Bytes to train on: files, cut by file into training and held-out text, the same way on every run."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

NUM_BYTE_VALUES = 256
VALIDATION_SHARE = 10
"""One file in this many is held out."""
STANDARD_LIBRARY = "standard library"
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_SNIFFED_BYTES = 8192


class Corpus(NamedTuple):
    """Text of one run.

    train, validation: (N,) uint8, the files one after the other, each followed by one zero byte; or ids below
    vocab_size, of any integer dtype, of another alphabet than the 256 bytes.
    train_files, validation_files: names in that order; no file, and no two equal files, stand on both sides.
    name: what the text is, for people. sha256: hex digest over both sides. paths: absolute, as asked for; none for the
    standard library.
    """

    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    name: str
    sha256: str
    paths: tuple[str, ...] = ()
    vocab_size: int = NUM_BYTE_VALUES

    @property
    def label(self) -> str:
        """E.g. "standard library (500 files, 9.1 MB; held out: 60 files)"."""
        return (
            f"{self.name} ({len(self.train_files)} files, {self.train.numel() / 1e6:.1f} MB; held out: "
            f"{len(self.validation_files)} files)"
        )

    def summary(self) -> dict[str, object]:
        """Counts and digest as plain JSON values."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "train_files": len(self.train_files),
            "train_bytes": self.train.numel(),
            "validation_files": len(self.validation_files),
            "validation_bytes": self.validation.numel(),
        }


def standard_library_files() -> tuple[Path, list[Path]]:
    """The running Python's own .py files, without installed packages and tests: (root folder, files sorted by path)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)]
    if not files:
        raise ValueError("this Python keeps no standard library .py files on disk: name your own text with --text PATH")
    return root, sorted(files, key=lambda path: path.relative_to(root).as_posix())


def text_files(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """The files named, and those under the folders named, but hidden ones: (name within its folder, path) by name.

    Each file comes once. A path that does not exist is a ValueError.
    """
    found: dict[Path, str] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"--text: {path} does not exist")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        base = path if path.is_dir() else path.parent
        for file in inside:
            name = file.relative_to(base)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                found.setdefault(file.resolve(), name.as_posix())
    return sorted(((name, file) for file, name in found.items()), key=lambda item: (item[0], item[1].as_posix()))


def load_corpus(paths: Sequence[Path] = ()) -> Corpus:
    """Read and split the text of files or folders; none means the standard library of the running Python.

    A file is held out when the hash of its bytes says so, so copies of one file fall on one side and adding files moves
    no other. A single file is cut instead: its last tenth is held out. No text there is a ValueError.
    """
    if paths:
        named, name = text_files(paths), ", ".join(path.name or str(path) for path in paths)
    else:
        root, files = standard_library_files()
        named, name = [(path.relative_to(root).as_posix(), path) for path in files], STANDARD_LIBRARY
    contents = [(file_name, path.read_bytes()) for file_name, path in named]
    # A zero byte near the start means that a file is no text.
    documents = [(file_name, text) for file_name, text in contents if text and b"\0" not in text[:_SNIFFED_BYTES]]
    if not documents:
        raise ValueError(f"no text files in {name}: name a folder or file of text with --text PATH")
    train, validation = split_documents(documents)
    digest = hashlib.sha256()
    for side in (train, validation):
        for _, text in side:
            digest.update(len(text).to_bytes(8, "little") + text)
        digest.update(b"|")
    train_files, validation_files = (tuple(file_name for file_name, _ in side) for side in (train, validation))
    texts = (_concatenate(train), _concatenate(validation))
    resolved = tuple(str(path.resolve()) for path in paths)
    return Corpus(*texts, train_files, validation_files, name, digest.hexdigest(), resolved)


Documents = list[tuple[str, bytes]]


def split_documents(documents: Documents) -> tuple[Documents, Documents]:
    """(training, held-out) documents of (name, bytes), decided by the hash of each one's bytes; order is kept.

    Neither side is empty: a lone document (or many copies of one) is cut after nine tenths of its bytes.
    """
    hashes = [hashlib.sha256(text).digest() for _, text in documents]
    distinct = sorted(set(hashes))
    if len(distinct) == 1:
        name, text = documents[0]
        cut = len(text) - len(text) // VALIDATION_SHARE
        return [(f"{name} (start)", text[:cut])], [(f"{name} (end)", text[cut:])]
    held_out = {digest for digest in distinct if int.from_bytes(digest[:8], "big") % VALIDATION_SHARE == 0}
    if not held_out or len(held_out) == len(distinct):
        held_out = {distinct[0]}
    train = [document for document, digest in zip(documents, hashes, strict=True) if digest not in held_out]
    validation = [document for document, digest in zip(documents, hashes, strict=True) if digest in held_out]
    return train, validation


def _concatenate(documents: Documents) -> Tensor:
    joined = bytearray().join(text + b"\0" for _, text in documents)
    return torch.frombuffer(joined, dtype=torch.uint8)


class BatchSampler:
    """Training windows of a text (N,) uint8 at random offsets; the order depends on the seed and on nothing else.

    `seq_len` S is the predicted bytes of a window, `batch` B the windows of a step. A text shorter than one window is a
    ValueError.
    """

    def __init__(self, text: Tensor, seq_len: int, batch: int, seed: int) -> None:
        _check_length("training", text, seq_len)
        self.text, self.seq_len, self.batch = text, seq_len, batch
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> Tensor:
        """The next step's windows, (B, S + 1) int64."""
        high = self.text.numel() - self.seq_len
        starts = torch.randint(high, (self.batch, 1), generator=self.generator)
        return self.text[starts + torch.arange(self.seq_len + 1)].long()


def validation_windows(text: Tensor, seq_len: int, num_bytes: int) -> Tensor:
    """Non-overlapping windows spread evenly over the held-out text (N,) uint8: (W, S + 1) uint8, W >= 1.

    They hold `num_bytes` predicted bytes in all, fewer when the text is shorter; less than one window is a ValueError.
    """
    _check_length("held-out", text, seq_len)
    available = (text.numel() - 1) // seq_len
    count = min(available, max(1, num_bytes // seq_len))
    starts = (torch.arange(count) * available // count * seq_len)[:, None]
    return text[starts + torch.arange(seq_len + 1)]


def _check_length(side: str, text: Tensor, seq_len: int) -> None:
    if text.numel() <= seq_len:
        raise ValueError(
            f"the {side} text has {text.numel()} bytes, a window needs {seq_len + 1}: give more text or lower --seq-len"
        )
