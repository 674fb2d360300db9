"""Where a command writes: tried before it works, and nothing there is replaced in silence."""

from __future__ import annotations

import errno
import itertools
import tempfile
from pathlib import Path

from kmeans_route.lm import checkpoint as checkpoints
from kmeans_route.lm.report import PAGE, RESULTS

INTERRUPTED = "interrupted"
"""Folder in that of a demo, with the checkpoints of runs that a signal has stopped."""


def check_folder(path: Path, option: str = "--out") -> None:
    """Make the folder, write to it, and take away what that made; what fails is a ValueError that names `option`."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0")
    except OSError as error:
        raise ValueError(_refusal(option, "folder", path, error)) from None
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def check_file(path: Path, option: str) -> None:
    """The same for a file; what it holds stays until the command has something to write."""
    if not path.parent.exists():
        check_folder(path.parent, option)
        return
    existed = path.exists()
    try:
        with open(path, "ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(_refusal(option, "file", path, error)) from None


def _refusal(option: str, kind: str, path: Path, error: OSError) -> str:
    why = (error.strerror or type(error).__name__).lower()
    if isinstance(error, FileExistsError):
        why = "a file lies there"
    remedy = "name another place"
    if isinstance(error, PermissionError):
        remedy += ", or change its permissions"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy += ", or free some space"
    return f"{option} must be a {kind} that can be written, got {path} ({why}): {remedy}"


def held_by(folder: Path) -> str:
    """What lies there that a run or a report would replace: "a run", "a report", or "" where nothing does."""
    if checkpoints.exists(folder):
        return "a run"
    return "a report" if any((folder / name).exists() for name in (PAGE, RESULTS, INTERRUPTED)) else ""


def unused(folder: Path) -> Path:
    """The folder itself where it holds no run and no report, else the first of FOLDER-2, FOLDER-3, ... without."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    numbered = (named.with_name(f"{named.name}-{number}") for number in itertools.count(2))
    return next(place for place in itertools.chain([folder], numbered) if not held_by(place))
