"""What ranks send each other in a commit: bytes, and time over gloo between processes of one machine.

    python -m benchmarks.exchange            measures, prints a table
    python -m benchmarks.exchange --bytes    the table of docs/distributed.md: bytes alone, nothing runs

Each rank holds a few layers of a published shape with statistics pending; the collectives are recorded as they are
called, and their bytes counted as a ring sends them. Times are medians of the optimizer's step, which commits, over
all ranks' slowest. The overlapped exchange runs beside a sleep in place of a backward pass on an accelerator.
"""

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks.harness.results import write_results
from kmeans_route import KMeansRouter, attach
from kmeans_route.testing import MODEL_SHAPES
from kmeans_route.training.exchange import WIRE_DTYPES

LAYERS = {"OLMoE": 16, "Qwen3-30B-A3B": 48, "DeepSeek-V3": 58}
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "shard": {"shard": True},
    'wire="bf16"': {"wire": "bf16"},
    'shard, wire="bf16"': {"shard": True, "wire": "bf16"},
    "every_n_steps=8": {"every_n_steps": 8},
    "overlap_after=1": {"overlap_after": 1},
}
MEASURED_LAYERS = 4
COLLECTIVES = ("all_reduce", "all_to_all_single", "all_gather", "all_gather_into_tensor", "all_gather_single")


def wire_bytes(num_experts: int, hidden_size: int, num_ranks: int, *, wire: str = "fp32", shard: bool = False) -> float:
    """Bytes that each rank sends for one router and commit, and receives as many, by a ring.

    An all-reduce sends 2 (R - 1) / R times its buffer, an all-to-all or all-gather half of that. The counts, E + 2
    int64, are in it; the histograms of balance="quantile" and the first commit's moments are not.
    """
    elements, counted = num_experts * hidden_size, 4 + 8 * (num_experts + 2)
    if shard:
        halves = elements * (WIRE_DTYPES[wire].itemsize + 2)
    else:
        halves = 2 * elements * WIRE_DTYPES[wire].itemsize
    return (halves + 2 * counted) * (num_ranks - 1) / num_ranks


def bytes_of(shape: str, options: dict[str, Any], num_ranks: int) -> float:
    """Bytes that a rank sends for one layer and optimizer step."""
    s, every = MODEL_SHAPES[shape], options.get("every_n_steps", 1)
    wire = {key: value for key, value in options.items() if key in ("wire", "shard")}
    return wire_bytes(s.num_experts, s.hidden_size, num_ranks, **wire) / every


@contextmanager
def recorded(calls: list[tuple[str, int]]) -> Iterator[None]:
    """Note each collective of torch.distributed and the bytes of what this rank puts in."""
    own: dict[str, Callable[..., Any]] = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def wrapper(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent: Tensor = args[0] if name == "all_reduce" else args[1]
            calls.append(
                (name.removesuffix("_single").removesuffix("_into_tensor"), sent.numel() * sent.element_size())
            )
            return own[name](*args, **kwargs)

        return call

    try:
        for name in own:
            setattr(dist, name, wrapper(name))
        yield
    finally:
        for name, function in own.items():
            setattr(dist, name, function)


def sent_by_a_ring(calls: list[tuple[str, int]], num_ranks: int) -> float:
    """Bytes that each rank sends to its neighbour for these calls."""
    share = (num_ranks - 1) / num_ranks
    factor = {"all_reduce": 2 * share, "all_to_all": share, "all_gather": num_ranks - 1}
    return sum(factor[call] * num_bytes for call, num_bytes in calls)


class _Layers(nn.Module):
    """Routers whose statistics somebody else fills in."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        s = MODEL_SHAPES[shape]
        self.routers = nn.ModuleList(
            KMeansRouter(s.hidden_size, s.num_experts, s.top_k, name=str(i), init="normal")
            for i in range(MEASURED_LAYERS)
        )
        self.given = [torch.randn(s.num_experts, s.hidden_size) for _ in self.routers]

    def forward(self, _: Tensor) -> Tensor:
        for router, sums in zip(self.routers, self.given, strict=True):
            assert isinstance(router, KMeansRouter)
            router.pending.sums.copy_(sums)
            router.pending.counts.fill_(router.top_k)
            router.pending.num_tokens.fill_(router.num_experts)
        return self.given[0].new_zeros(())


def _measure(rank: int, num_ranks: int, folder: str, shapes: list[str], rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=num_ranks)
    records = []
    for shape in shapes:
        torch.manual_seed(rank)
        waits: dict[str, list[float]] = {name: [] for name in OPTIONS}
        calls: dict[str, list[tuple[str, int]]] = {}
        model = _Layers(shape)
        for _ in range(rounds):
            for name, options in OPTIONS.items():
                calls[name] = []
                backward_s = 1.5 * min(waits["fp32"], default=0.0)
                waits[name].append(_one_step(model, options, calls[name], backward_s))
        for name, options in OPTIONS.items():
            every = options.get("every_n_steps", 1)
            records.append(
                {
                    "shape": shape,
                    "option": name,
                    "num_ranks": num_ranks,
                    "layers": MEASURED_LAYERS,
                    "bytes_per_layer_and_step": sent_by_a_ring(calls[name], num_ranks) / MEASURED_LAYERS / every,
                    "step_ms": statistics.median(waits[name][1:]) * 1e3 / every,
                }
            )
    if rank == 0:
        Path(folder, "records.json").write_text(json.dumps(records))
    dist.destroy_process_group()


def _one_step(model: _Layers, options: dict[str, Any], calls: list[tuple[str, int]], backward_s: float) -> float:
    """Seconds of the step that commits, the slowest rank's."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    attachment = attach(model, optimizer, **options)
    for _ in range(options.get("every_n_steps", 1) - 1):
        optimizer.step()
    dist.barrier()
    with recorded(calls):
        model(torch.zeros(()))
        if "overlap_after" in options:
            time.sleep(backward_s)
        start = time.perf_counter()
        optimizer.step()
        seconds = torch.tensor(time.perf_counter() - start)
    attachment.remove()
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def measure(num_ranks: int, shapes: list[str], rounds: int) -> list[dict[str, object]]:
    """One record a shape and option."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_ranks, folder, shapes, rounds)
        mp.start_processes(_measure, args=arguments, nprocs=num_ranks, start_method="spawn")  # type: ignore[no-untyped-call]
        records: list[dict[str, object]] = json.loads(Path(folder, "records.json").read_text())
    return records


def bytes_table() -> str:
    """Markdown: bytes for each option, a layer and a step, in the limit of many ranks, and the whole model's."""
    lines = ["| option | " + " | ".join(f"{shape}, {n} layers" for shape, n in LAYERS.items()) + " |"]
    lines.append("| --- |" + " ---: |" * len(LAYERS))
    for name, options in OPTIONS.items():
        cells = []
        for shape, num_layers in LAYERS.items():
            sent = bytes_of(shape, options, 1 << 30)
            cells.append(f"{sent / 1e6:.2f} MB a layer, {sent * num_layers / 1e6:.0f} MB")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def times_table(records: list[dict[str, Any]]) -> str:
    """Markdown: the step's time for each option, over that of fp32 in the same run."""
    plain = {(r["shape"], r["num_ranks"]): r["step_ms"] for r in records if r["option"] == "fp32"}
    lines = ["| option | " + " | ".join(f"{shape}, {ranks} ranks" for shape, ranks in plain) + " |"]
    lines.append("| --- |" + " ---: |" * len(plain))
    for name in OPTIONS:
        cells = []
        for place, fp32_ms in plain.items():
            (ms,) = (r["step_ms"] for r in records if r["option"] == name and (r["shape"], r["num_ranks"]) == place)
            cells.append(f"{ms:.1f} ms ({ms / fp32_ms:.2f})")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Print one of the tables, and write the results where asked."""
    parser = argparse.ArgumentParser(description="Bytes and time of the exchange between ranks.")
    parser.add_argument("--bytes", action="store_true", help="the table of bytes alone")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--shape", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=8, help="repetitions, the first of which is left out")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--out", type=Path, help="write the results into this file")
    arguments = parser.parse_args()
    if arguments.bytes:
        print(bytes_table())
        return 0
    records: list[dict[str, object]] = []
    for num_ranks in arguments.ranks:
        if sys.stderr.isatty():
            print(f"{datetime.datetime.now():%H:%M:%S} {num_ranks} ranks", file=sys.stderr)
        records += measure(num_ranks, arguments.shape, arguments.rounds)
    if arguments.out:
        write_results(arguments.out, "python -m benchmarks.exchange", records)
    print(json.dumps(records) if arguments.json else times_table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
