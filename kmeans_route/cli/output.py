"""What a command says: tables and notes on stdout, progress and errors on stderr, or one JSON document."""

from __future__ import annotations

import itertools
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kmeans_route.lm.results import to_json

Update = Callable[[int, str], None]
"""(done, note) -> None: how a loop reports where it is."""


class Output:
    """The one place that writes to the terminal.

    Args:
        json_mode: stdout carries one JSON document and nothing else; notes, tables and progress are dropped.
        plain: no colour, no boxes, no bars. A stdout that is no terminal, and TERM=dumb, mean the same.
    """

    def __init__(self, *, json_mode: bool = False, plain: bool = False) -> None:
        self.json_mode = json_mode
        self.plain = plain or json_mode or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb"
        self._stdout = _console(plain=self.plain, stderr=False)
        self._bars = not self.plain and sys.stderr.isatty()
        self._stderr = _console(plain=self.plain or not sys.stderr.isatty(), stderr=True)

    def note(self, text: str) -> None:
        """A line for people, on stdout; dropped in JSON mode."""
        if not self.json_mode:
            self._stdout.print(escape(text), soft_wrap=True, highlight=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> None:
        """A table, its first column left, the others right where they hold numbers; dropped in JSON mode.

        Headings take several lines where the table would be wider than the terminal.
        """
        if self.json_mode:
            return
        gap = 2 if self.plain else 3
        columns = _headings(columns, rows, self._stdout.width - gap * (len(columns) - 1))
        if self.plain:
            self.note("\n".join(_plain_table(title, columns, rows, numbers=numbers)))
            return
        table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
        table.show_edge = table.pad_edge = False
        for position, column in enumerate(columns):
            table.add_column(escape(column), justify="right" if position and numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self._stdout.print(table)

    def document(self, document: dict[str, Any]) -> None:
        """The JSON document of the command; dropped outside JSON mode. NaN and infinity become null."""
        if self.json_mode:
            print(to_json(document))

    def fail(self, message: str) -> None:
        """An error: a line on stderr, and in JSON mode a document with the key "error" on stdout."""
        self.complain(message)
        self.document({"error": message})

    def warn(self, message: str) -> None:
        """A line on stderr about how far to trust what follows, in JSON mode too."""
        self._stderr.print(escape(f"warning: {message}"), style="" if self.plain else "yellow", soft_wrap=True)

    def say(self, text: str) -> None:
        """A line on stderr about what goes on, in JSON mode too."""
        self._stderr.print(escape(text), soft_wrap=True, highlight=False)

    def complain(self, message: str) -> None:
        """An error that the command's own document tells too: a line on stderr."""
        self._stderr.print(escape(f"error: {message}"), style="" if self.plain else "red", soft_wrap=True)

    @contextmanager
    def redrawn(self) -> Iterator[Callable[[str], None]]:
        """Show texts, each in the place of the one before on a terminal, else one after another; in JSON mode none."""
        if self.json_mode or self.plain:
            yield self.note
            return
        with Live(console=self._stdout, auto_refresh=False) as live:
            yield lambda text: live.update(Text(text), refresh=True)

    @contextmanager
    def progress(self, description: str, total: int, done: int = 0, *, thread: bool = True) -> Iterator[Update]:
        """Report progress on stderr: a bar with the time left on a terminal, else ten lines, in JSON mode nothing.

        What was `done` before this call counts for no speed. Without `thread` a bar is redrawn only as it is updated,
        so that it disturbs no timing.
        """
        if self.json_mode:
            yield lambda _done, _note: None
        elif self._bars:
            place, left = (BarColumn(bar_width=10), MofNCompleteColumn()), ("left", TimeRemainingColumn())
            columns = ("{task.description}", *place, *left, "{task.fields[note]}")
            with Progress(*columns, console=self._stderr, transient=True, auto_refresh=thread) as bar:
                task = bar.add_task(escape(description), total=total, completed=done, note="")
                yield lambda now, note: bar.update(task, completed=now, note=escape(note), refresh=not thread)
        else:
            yield self._lines(description, total, done)

    @contextmanager
    def batches(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """The same for what is called without arguments after each batch."""
        done = itertools.count(1)
        with self.progress(description, total) as update:
            yield lambda: update(next(done), "batches")

    def _lines(self, description: str, total: int, done: int) -> Update:
        start, last = time.monotonic(), done
        every = max(1, total // 10)

        def update(now: int, note: str) -> None:
            nonlocal last
            if now // every == last // every and (now != total or last == total):
                return
            last = now
            left_s = (time.monotonic() - start) / max(1, now - done) * (total - now)
            line = f"{description}: {now}/{total}, {note}, {duration(left_s)} left"
            self._stderr.print(escape(line), soft_wrap=True, highlight=False)

        return update


def _console(*, plain: bool, stderr: bool) -> Console:
    # Rich keeps bold and dim under NO_COLOR; without a colour system it writes no escape codes for text at all.
    if not plain and not os.environ.get("NO_COLOR"):
        return Console(stderr=stderr, highlight=False)
    terminal = False if plain else None
    return Console(stderr=stderr, color_system=None, no_color=True, force_terminal=terminal, highlight=False)


def _headings(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The headings in as few lines as make the columns fit `width` together, four at most."""
    bodies = [max((len(row[position]) for row in rows), default=0) for position in range(len(columns))]
    folded = list(columns)
    for most_lines in range(1, 5):
        folded = [_folded(column, most_lines) for column in columns]
        if sum(max(body, _width(text)) for body, text in zip(bodies, folded, strict=True)) <= width:
            break
    return folded


def _folded(text: str, most_lines: int) -> str:
    """The text in that many lines at most, as narrow as words allow."""
    width = max(map(len, text.split()), default=1)
    while len(lines := textwrap.wrap(text, width, break_on_hyphens=False)) > most_lines:
        width += 1
    return "\n".join(lines)


def _width(text: str) -> int:
    return max(map(len, text.split("\n")))


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool) -> list[str]:
    heads = [column.split("\n") for column in columns]
    height = max(map(len, heads))
    lowered = [[""] * (height - len(head)) + head for head in heads]
    cells = [*map(list, zip(*lowered, strict=True)), *(list(row) for row in rows)]
    widths = [max(len(row[position]) for row in cells) for position in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if position and numbers else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return ["", title, *lines, ""]


def duration(seconds: float) -> str:
    """ "42 s", "3 min 05 s" or "2 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
