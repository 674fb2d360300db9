"""Texts of the studies beside the standard library: its code, the prose that explains it, all installed code, and
subwords of more code."""

import ast
import functools
import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kmeans_route.lm.data import Corpus, split_documents, standard_library_files

PROSE_SUFFIXES = (".txt", ".rst")
PACKAGES = ("torch", "transformers", "sympy", "matplotlib", "networkx", "numpy")
"""Whose .py files join the standard library's; `constraints.txt` pins them, and the digest of the text tells."""
VOCAB_SIZE = 4096
LEARNT_FROM = 4
"""One training file in so many teaches the alphabet."""
TESTS, INSTALLED = frozenset({"test", "tests"}), frozenset({"site-packages", "dist-packages"})
"""Names of folders."""


def prose_and_code(source: str) -> tuple[str, str]:
    """(docstrings, the code without them and without comments) of one Python file.

    Raises:
        SyntaxError: it is none.
    """
    tree = ast.parse(source)
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                docstrings.append(text)
                node.body = node.body[1:] or [ast.Pass()]
    return "\n\n".join(docstrings), ast.unparse(tree)


@functools.cache
def code_and_prose() -> tuple[Corpus, Corpus]:
    """The running Python's code, and its docstrings with the .txt and .rst files beside them.

    Raises:
        ValueError: no standard library on disk.
    """
    root, files = standard_library_files()
    code, prose = list[tuple[str, bytes]](), list[tuple[str, bytes]]()
    for path in files:
        name = path.relative_to(root).as_posix()
        try:
            text, program = prose_and_code(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # the library keeps examples of both
            continue
        prose.append((name, text.encode()))
        code.append((name, program.encode()))
    for path in sorted(_beside(root)):
        prose.append((path.relative_to(root).as_posix(), path.read_bytes()))
    return _corpus("standard library, code", code), _corpus("standard library, prose", prose)


def installed_code() -> Corpus:
    """The .py files of the running Python's standard library and of the packages installed in it, but their tests.

    Which packages there are differs from machine to machine, and so does the text; its digest says so.

    Raises:
        ValueError: no standard library on disk.
    """
    root, files = standard_library_files()
    found = {path: path.relative_to(root).as_posix() for path in files}
    for folder in [Path(name) for name in dict.fromkeys(sys.path) if Path(name).name in INSTALLED]:
        for path in sorted(folder.rglob("*.py")):
            if not TESTS.intersection(path.relative_to(folder).parts):
                found[path] = path.relative_to(folder).as_posix()
    documents = [(name, path.read_bytes()) for path, name in found.items() if path.is_file()]
    return _corpus("standard library and installed packages", documents)


def _beside(root: Path) -> list[Path]:
    found = [path for suffix in PROSE_SUFFIXES for path in root.rglob(f"*{suffix}")]
    return [path for path in found if not (TESTS | INSTALLED).intersection(path.relative_to(root).parts)]


def _corpus(name: str, documents: list[tuple[str, bytes]]) -> Corpus:
    sides = split_documents([(file, text) for file, text in documents if text])
    train, validation = (b"".join(text + b"\0" for _, text in side) for side in sides)
    names = (tuple(file for file, _ in side) for side in sides)
    digest = hashlib.sha256(train + b"|" + validation).hexdigest()
    tensors = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, validation))
    return Corpus(*tensors, *names, name, digest)


class Subwords(NamedTuple):
    """corpus: ids below `VOCAB_SIZE`. lengths: (VOCAB_SIZE,) int64, the bytes that an id stands for."""

    corpus: Corpus
    lengths: Tensor

    def per_byte(self, ids: Tensor) -> float:
        """Ids a byte in `ids`: what turns bits an id into bits a byte."""
        return ids.numel() / float(self.lengths[ids.long()].sum())


def subwords(folder: Path) -> Subwords:
    """The .py files of the standard library and of `PACKAGES` in byte pairs learnt on the training side (Sennrich et
    al., arXiv 1508.07909), kept in `folder` once made.

    Raises:
        ImportError: no `tokenizers`, which comes with transformers.
    """
    root, files = standard_library_files()
    named = [(path.relative_to(root).as_posix(), path) for path in files]
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        assert found is not None, package
        assert found.origin is not None, package
        where = Path(found.origin).parent
        named += [(path.relative_to(where.parent).as_posix(), path) for path in sorted(where.rglob("*.py"))]
    documents = [(name, path.read_bytes() + b"\0") for name, path in named]
    sides = split_documents(documents)
    digest = hashlib.sha256(b"|".join(b"".join(text for _, text in side) for side in sides)).hexdigest()
    kept = folder / f"subwords-{VOCAB_SIZE}-{digest[:16]}.pt"
    if not kept.exists():
        made = _byte_pairs(*([text.decode("utf-8", "replace") for _, text in side] for side in sides))
        partial = kept.with_suffix(f".{os.getpid()}")  # runs side by side may make it at once
        torch.save(made, partial)
        partial.replace(kept)
    train, validation, lengths = torch.load(kept)
    names = (tuple(name for name, _ in side) for side in sides)
    where_from = ", ".join(("standard library", *PACKAGES))
    return Subwords(Corpus(train, validation, *names, where_from, digest, (), VOCAB_SIZE), lengths)


def _byte_pairs(train: list[str], validation: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids of the one text, of the other, bytes of each id)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(train[::LEARNT_FROM], trainer)
    texts = (
        torch.tensor([number for one in tokenizer.encode_batch_fast(side) for number in one.ids], dtype=torch.int16)
        for side in (train, validation)
    )
    # The alphabet has one letter a byte.
    return *texts, torch.tensor([len(tokenizer.id_to_token(number)) for number in range(tokenizer.get_vocab_size())])
