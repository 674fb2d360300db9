"""`kmeans-route` run in this process, a small text for it, and a stream that passes for a terminal."""

import io
import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from kmeans_route.cli import app as commands


def invoke(*arguments: object) -> tuple[int, Any]:
    """(exit code, the JSON document where --json asks for one, else what was printed on stdout)."""
    result = CliRunner().invoke(commands.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout) if "--json" in arguments else result.stdout


def write_text(folder: Path, files: int = 12) -> Path:
    """A new folder with small text files, all different."""
    folder.mkdir(parents=True)
    for number in range(files):
        (folder / f"{number}.txt").write_text("".join(f"line {number * step % 7} of many\n" for step in range(60)))
    return folder


class Terminal(io.StringIO):
    """A stream of text that says it is a terminal."""

    def isatty(self) -> bool:
        return True
