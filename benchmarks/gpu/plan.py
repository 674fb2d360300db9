"""The plan of ten minutes: steps with an end each, on one clock, and what is left when it has run out.

A step is a list of units of work. Before each unit the plan looks at the clock: after the end of a step nothing more of
it starts, and the next step begins. Time that a step does not need is left to those after it. A unit that may hang is
told the seconds that are left; for whatever hangs all the same there is a limit, at which the run says what is left.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.gpu.report import Record, Report

ENDS = {"compile": 40, "race": 100, "shapes": 160, "timing": 380, "ncu": 480, "configs": 560, "sanitizer": 592}
"""Step -> the plan's second at which it ends. What each does: `steps.py`."""
LIMIT_S = 597
"""When the run ends, whatever hangs."""
RIGHT, WRONG, NO_START, NOT_FINISHED = 0, 1, 2, 3
"""Exit codes."""


class Timer:
    """Seconds of the plan.

    start: when they began, as `now` gives it. speed: so many of them pass in a second, for tests.
    """

    def __init__(self, start: float | None = None, *, speed: float = 1.0, now: Callable[[], float] = time.time) -> None:
        self.speed, self._now = speed, now
        self.start = now() if start is None else start

    def seconds(self) -> float:
        """Since the start."""
        return (self._now() - self.start) * self.speed

    def left(self, end_s: float) -> float:
        """Seconds of the wall until the plan's second end_s; not below 0."""
        return max(0.0, (end_s - self.seconds()) / self.speed)


class Unit(NamedTuple):
    """A piece of work. do: gets a function that says how many seconds are left; returns a record and what to show.

    A record's "ok" is false where something is wrong; its "left" lists what it did not come to.
    """

    name: str
    do: Callable[[Callable[[], float]], tuple[Record, str]]


class Step(NamedTuple):
    """Units of work that start before the plan's second end_s."""

    name: str
    end_s: float
    units: list[Unit]


class Plan:
    """Runs the steps in order and knows at any time what is left.

    alive: raises where the device is beyond use.
    """

    def __init__(self, steps: list[Step], timer: Timer, report: Report, alive: Callable[[], object]) -> None:
        self.steps, self.timer, self.report, self.alive = steps, timer, report, alive
        self.open = {f"{s.name}: {unit.name}": "" for s in steps for unit in s.units}
        self.open = {name: "" for name in self.open if name not in report.finished}
        """Name of a unit that is not finished -> what of it; empty for all of it."""
        self.wrong: list[str] = []

    def run(self, started: Callable[[str], object] = lambda step: None) -> None:
        """All steps. started: called with the name of each."""
        usable = True
        for step in self.steps:
            started(step.name)
            for unit in step.units:
                name = f"{step.name}: {unit.name}"
                if usable and name in self.open and self.timer.left(step.end_s) > 0:
                    self.attempt(step, unit, name)
                    usable = self._usable()
            self.report.publish()

    def attempt(self, step: Step, unit: Unit, name: str) -> None:
        """One unit; its record says how long it took, whatever happened."""
        from kmeans_route.bench.clock import reason

        began = self.timer.seconds()
        try:
            record, text = unit.do(lambda: self.timer.left(step.end_s))
        except Exception as error:
            record = {"kind": "error", "ok": False, "error": reason(error)}
            text = f"WRONG: {record['error']}"
        left = ", ".join(record.get("left", []))
        self.open[name] = left
        if not left:
            del self.open[name]
        if not record.get("ok", True):
            self.wrong.append(name)
        now = self.timer.seconds()
        record |= {"step": step.name, "unit": unit.name, "at_s": round(began, 1), "seconds": round(now - began, 1)}
        self.report.add(record, f"[{now:5.0f} s] {name}: {text}{f' LEFT: {left}' if left else ''}")

    def _usable(self) -> bool:
        try:
            self.alive()
        except Exception as error:
            self.report.add({"kind": "error", "ok": False, "error": str(error)}, "the device is beyond use")
            self.wrong.append("device")
            return False
        return True

    def left(self) -> list[str]:
        """Units that are not finished."""
        return [f"{name} ({what})" if what else name for name, what in list(self.open.items())]

    def finish(self, **facts: Any) -> int:
        """The last record, table and document; the exit code."""
        left = self.left()
        code = WRONG if self.wrong else NOT_FINISHED if left else RIGHT
        seconds = round(self.timer.seconds())
        end = {"kind": "end", "seconds": seconds, "left": left, "wrong": self.wrong, "exit_code": code, **facts}
        lines = [f"wrong: {name}" for name in self.wrong] + [f"left: {name}" for name in left]
        self.report.add(end, "\n".join(["", *lines, f"exit code {code} after {seconds} s"]))
        where = os.path.relpath(self.report.path)
        print(f"\n{self.report.publish()}\nwritten to {where}, and .json and .md beside it", flush=True)
        return code

    def stop_at(self, limit_s: float, exit_now: Callable[[int], Any] = os._exit) -> threading.Timer:
        """At the plan's second limit_s end the process, with all that is left in the report."""
        watchdog = threading.Timer(self.timer.left(limit_s), lambda: exit_now(self.finish(stopped_at_s=limit_s)))
        watchdog.daemon = True
        watchdog.start()
        return watchdog
