"""Run a function on several gloo ranks, each a process of its own."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 60


def _worker(rank: int, function: Callable[..., Any], num_ranks: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_on_ranks(function: Callable[..., Any], num_ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)`, of a module's top level, returns on each rank.

    Raises:
        ProcessRaisedException, ProcessExitedException: a rank failed.
    """
    mp.start_processes(
        _worker, args=(function, num_ranks, str(folder), arguments), nprocs=num_ranks, start_method="spawn"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]
