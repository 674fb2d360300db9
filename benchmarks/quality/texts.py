"""Two texts of one origin and different kind: the standard library's code, and the prose that explains it."""

import ast
import functools
import hashlib
from pathlib import Path

import torch

from kmeans_route.lm.data import Corpus, split_documents, standard_library_files

PROSE_SUFFIXES = (".txt", ".rst")


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


def _beside(root: Path) -> list[Path]:
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    found = [path for suffix in PROSE_SUFFIXES for path in root.rglob(f"*{suffix}")]
    return [path for path in found if not skipped.intersection(path.relative_to(root).parts)]


def _corpus(name: str, documents: list[tuple[str, bytes]]) -> Corpus:
    sides = split_documents([(file, text) for file, text in documents if text])
    train, validation = (b"".join(text + b"\0" for _, text in side) for side in sides)
    names = (tuple(file for file, _ in side) for side in sides)
    digest = hashlib.sha256(train + b"|" + validation).hexdigest()
    tensors = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, validation))
    return Corpus(*tensors, *names, name, digest)
