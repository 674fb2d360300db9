"""In which order the programs of an interpreted launch run: one by one, usual or shuffled, or taking turns.

Programs that take turns are threads of which one at a time holds the baton; before each load, store and atomic a seeded
choice says whether it goes on. That shows the logic of tickets and last arrivers: who waits for whom. It does not show
the order in which a GPU makes stores visible, nor what its caches hold: here every store is seen at once, and the
accesses of one instruction are one step.
"""

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from triton.runtime import interpreter

Index = tuple[int, int, int]
Kernel = Callable[..., None]
Schedule = Callable[[Kernel, dict[str, Any], list[Index]], None]

SHARES = (1.0, 0.3, 0.1)
"""Of the accesses at which a program hands over, in schedules where every handover goes to a program at random."""
POINTS = ((6, True), (6, True), (50, False))
"""In other schedules about every second program hands over, just once, at one of its first 6 atomics or 50 accesses,
and goes on when the others have stopped. Faults about arrivals need few handovers."""


def in_random_order(rng: random.Random) -> Schedule:
    """Programs one after another, in an order that is not the usual one."""

    def run(fn: Kernel, arguments: dict[str, Any], indices: list[Index]) -> None:
        order = list(indices)
        while order == indices and len(indices) > 1:
            rng.shuffle(order)
        for index in order:
            interpreter.interpreter_builder.grid_idx = index
            fn(**arguments)

    return run


class _Stop(BaseException):
    """Ends the threads of a launch after one of them failed."""


class Baton:
    """A schedule in which programs take turns. `trace` names those that went on, over all launches."""

    active: "Baton | None" = None

    def __init__(self, seed: int) -> None:
        self.rng, self.trace = random.Random(seed), list[int]()

    def __call__(self, fn: Kernel, arguments: dict[str, Any], indices: list[Index]) -> None:
        self.live = self.rng.sample(range(len(indices)), len(indices))
        self.habit = self.rng.choice((*SHARES, *POINTS))
        if isinstance(self.habit, tuple):
            self.left = [self.rng.choice((-1, self.rng.randint(1, self.habit[0]))) for _ in indices]
        self.gates = [threading.Semaphore(0) for _ in indices]
        self.done = threading.Semaphore(0)
        self.error: BaseException | None = None
        threads = [
            threading.Thread(target=self._program, args=(i, index, fn, arguments), daemon=True)
            for i, index in enumerate(indices)
        ]
        for thread in threads:
            thread.start()
        Baton.active = self
        try:
            self._resume_next()
            self.done.acquire()
        finally:
            Baton.active = None
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _program(self, i: int, index: Index, fn: Kernel, arguments: dict[str, Any]) -> None:
        self.gates[i].acquire()
        try:
            if self.error is None:
                interpreter.interpreter_builder.grid_idx = index
                with np.errstate(all="ignore"):
                    fn(**arguments)
        except _Stop:
            pass
        except BaseException as error:  # raised again in the thread of the launch
            self.error = self.error or error
        self.live.remove(i)
        if self.live:
            self._resume_next()
        else:
            self.done.release()

    def _resume_next(self) -> None:
        self.holder = self.live[0] if isinstance(self.habit, tuple) else self.rng.choice(self.live)
        self.trace.append(self.holder)
        self.gates[self.holder].release()

    def _stops_here(self, at_atomic: bool) -> bool:
        if not isinstance(self.habit, tuple):
            return self.rng.random() < self.habit
        self.left[self.holder] -= at_atomic or not self.habit[1]
        return self.left[self.holder] == 0

    def turn(self, at_atomic: bool) -> None:
        """The program that holds the baton goes on, or hands it over and waits for it."""
        if not self._stops_here(at_atomic):
            return
        own, index = self.holder, interpreter.interpreter_builder.grid_idx
        self.live.append(self.live.pop(self.live.index(own)))
        self._resume_next()
        self.gates[own].acquire()
        interpreter.interpreter_builder.grid_idx = index
        if self.error is not None:
            raise _Stop


def take_turns(at_atomic: bool = False) -> None:
    """Called before every access of a program."""
    if Baton.active is not None:
        Baton.active.turn(at_atomic)
