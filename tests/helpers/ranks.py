"""Run a function on several gloo ranks, each a process of its own.

The processes stay for the next call, since importing torch is most of what a short run takes; the process group is new
for each.
"""

import atexit
import contextlib
import datetime
import queue
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 600
"""For ranks to find each other and to answer: on a busy machine one may start minutes after another. A test of what
happens when a rank does not answer sets a shorter one after that, with `short_timeout`."""
MAX_RANKS = 4


class RankError(Exception):
    """A function raised, or its process ended, on some rank."""


def _worker(orders: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    while True:
        order = orders.get()
        if order is None:
            return
        answers.put(_one_run(*order))


def _one_run(
    rank: int, function: Callable[..., Any], num_ranks: int, folder: str, arguments: tuple[Any, ...]
) -> tuple[int, str]:
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=num_ranks,
            timeout=datetime.timedelta(seconds=TIMEOUT_S),
        )
        torch.manual_seed(0)
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        return rank, traceback.format_exc()
    return rank, ""


class _Pool:
    """Processes that wait for orders; none before the first use, and none after a failure."""

    def __init__(self) -> None:
        self.processes: list[Any] = []

    def start(self) -> None:
        context = mp.get_context("spawn")
        self.answers = context.Queue()
        self.orders = [context.Queue() for _ in range(MAX_RANKS)]
        self.processes = [
            context.Process(target=_worker, args=(orders, self.answers), daemon=True) for orders in self.orders
        ]
        for process in self.processes:
            process.start()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes = []

    def run(self, function: Callable[..., Any], num_ranks: int, folder: Path, arguments: tuple[Any, ...]) -> None:
        if not self.processes:
            self.start()
        for rank in range(num_ranks):
            self.orders[rank].put((rank, function, num_ranks, str(folder), arguments))
        try:
            for _ in range(num_ranks):
                self._next_answer(num_ranks)
        except BaseException:
            self.stop()  # the others may still wait for the one that failed
            raise

    def _next_answer(self, num_ranks: int) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                rank, error = self.answers.get(timeout=1)
                if error:
                    raise RankError(f"rank {rank}: {error}")
                return
            ended = [rank for rank, process in enumerate(self.processes[:num_ranks]) if not process.is_alive()]
            if ended:
                raise RankError(f"ranks {ended} ended")


_POOL = _Pool()
atexit.register(_POOL.stop)


def short_timeout(seconds: float) -> None:
    """From here on the default group, which all ranks have joined, waits no longer than that."""
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds))


def run_on_ranks(function: Callable[..., Any], num_ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)`, of a module's top level, returns on each rank.

    Args:
        folder: empty; each call needs its own.

    Raises:
        RankError: a rank failed.
    """
    folder.mkdir(exist_ok=True)
    _POOL.run(function, num_ranks, folder, arguments)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]
