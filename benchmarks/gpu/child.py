"""A process that may hang: what it says goes to a file, and all that it has started ends with it."""

import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from types import TracebackType
from typing import Self


class Child:
    """`command` as a process group of its own, within a `with` block at whose end nothing of it is left."""

    def __init__(self, command: list[str], *, cwd: str, env: dict[str, str]) -> None:
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 closed in __exit__
        self._process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=self._said, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self, seconds: float) -> tuple[int, str] | None:
        """Exit code and output, or None where it has not ended in that time."""
        try:
            code = self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        self._said.seek(0)
        return code, self._said.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._said.close()
