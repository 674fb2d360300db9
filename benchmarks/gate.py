"""Every compilation that a user can reach, compiled without a GPU and looked through for faults.

    python -m benchmarks.gate [--arch sm_90 ...] [--part] [--only REGEX] [--json] [--out FILE]

The launchers themselves say what they would compile: they run on meta tensors with the kernels recorded, for one T of
each stretch of 1..65536 over which neither configuration nor split changes, at the named shapes and at odd ones, in
three dtypes, with each option, for training and evaluation. A compilation has a problem when it spills, needs more
shared memory than there is, reads x in pieces under 128 bits, leaves the tensor cores out for 16-bit inputs, may
overwrite a tile that a product still reads, or has its products serialised. Exit code 1 when one has.

What was compiled is kept under build/gate, by the kernel's code and the compiler's inputs: a run that was stopped goes
on, and one after a change compiles what changed.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

import argparse
import datetime
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.compiled import Compiled, compile_source
from benchmarks.offline import TARGETS, Launch, problems_of, recorded
from kmeans_route.backends import TRITON_MAX_EXPERTS
from kmeans_route.bench.results import command_line
from kmeans_route.checks import check_route_options
from kmeans_route.kernels import accumulate, combine, commit, configs, directions, dispatch, route, route_bwd
from kmeans_route.testing import MODEL_SHAPES

MAX_TOKENS = 65536
KEPT = Path(__file__).resolve().parent.parent / "build" / "gate"
PART = ("OLMoE", "Mixtral", "DeepSeek-V3")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Shape = tuple[int, int, int]
"""D, E, K."""
ODD_SHAPES: tuple[Shape, ...] = (
    (64, 1, 1), (1000, 13, 2), (2880, 13, 7), (2880, 60, 4), (64, 60, 10), (7168, 61, 6), (1000, 61, 1), (1000, 144, 4),
    (2880, 144, 32), (7168, 160, 6), (7168, 384, 6), (1000, 384, 10), (64, 1000, 2), (7168, 1000, 32),
)  # fmt: skip
GATES = [(gate, normalize) for gate in ("softmax", "sigmoid", "cosine", "uniform") for normalize in (True, False)]
ROUTE_VARIANTS: dict[str, dict[str, Any]] = {
    "eval": {},
    "training": {"want_std": True, "want_rank": True},
    "everything": {
        "want_std": True, "want_rank": True, "want_hist": True, "want_scores": True, "replay": True,
        "mask": True, "count_mask": True,
        "options": {"gate": "softmax", "normalize": False}, "groups": "top2",
    },
}  # fmt: skip
"""What every shape is compiled with, in every dtype."""
MORE_ROUTE_VARIANTS: dict[str, dict[str, Any]] = {
    "no bias": {"bias": False},
    "mask": {"mask": True},
    "scores": {"want_scores": True},
    "replay": {"replay": True},
    "training, replay, mask": {"want_std": True, "want_rank": True, "replay": True, "mask": True},
    "training, count mask": {"want_std": True, "want_rank": True, "count_mask": True},
    "training, histogram": {"want_std": True, "want_rank": True, "want_hist": True},
    "groups": {"groups": "top2"},
    "training, groups": {"want_std": True, "want_rank": True, "groups": "max"},
    **{
        f"{gate}, {'' if normalize else 'not '}normalised": {"options": {"gate": gate, "normalize": normalize}}
        for gate, normalize in GATES[1:]
    },
}
"""What the named shapes are compiled with too, in bf16."""
DISPATCH_VARIANTS: dict[str, dict[str, bool]] = {
    "copies and sums": {},
    "index mode": {"copies": False},
    "copies alone": {"sums": False},
    "raw sums": {"unit": False},
    "sums alone": {"ranked": False},
    "raw sums alone": {"ranked": False, "unit": False},
}


def geometry(shape: Shape, dtype: torch.dtype, arch: str, num_tokens: int) -> tuple[object, ...]:
    """All that a compiled routing knows of T: the configuration, the splits of D that are asked for at once, how splits
    are aligned, the rows that are selected for and ranked together."""
    hidden_size, num_experts, _ = shape
    config = route.route_config(num_tokens, num_experts, dtype, arch, hidden_size % 16 == 0)
    parts = configs.padded_experts(num_experts) // configs.product_experts(config, num_experts, dtype, arch)
    splits, size = route.column_splits(
        hidden_size, -(-num_tokens // config.BT) * parts, config.BD, route.most_splits(config)
    )
    tiles = [configs.selected_rows(num_tokens, num_experts, long=long) for long in (False, True)]
    batches = [
        route.split_batch(config, splits, rows, num_experts, long=long)
        for long, (_, rows) in zip((False, True), tiles, strict=True)
    ]
    return config, *batches, size % 16 == 0, *tiles, configs.ranked_tokens(num_tokens)


@lru_cache
def token_counts(shape: Shape, dtype: torch.dtype, arch: str) -> list[int]:
    """One T for each geometry that 1..65536 can reach."""
    # Blocks have at least 16 tokens, and thresholds are multiples of 16: nothing changes but at T = 16 n and 16 n + 1;
    # a test holds that for every T.
    first: dict[tuple[object, ...], int] = {}
    for num_tokens in sorted([*range(1, MAX_TOKENS, 16), *range(16, MAX_TOKENS + 1, 16)]):
        first.setdefault(geometry(shape, dtype, arch, num_tokens), num_tokens)
    return list(first.values())


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of which only shape and dtype are there."""
    return torch.empty(shape, dtype=dtype, device="meta")


def route_launches(shape: Shape, dtype: torch.dtype, num_tokens: int, variant: dict[str, Any]) -> list[Launch]:
    """The launches of one routing."""
    hidden_size, num_experts, top_k = shape
    given = dict(variant)
    bias = empty(num_experts) if given.pop("bias", True) else None
    mask = empty(num_tokens, dtype=torch.bool) if given.pop("mask", False) else None
    given["count_mask"] = empty(num_tokens, dtype=torch.bool) if given.pop("count_mask", False) else None
    indices = empty(num_tokens, top_k, dtype=torch.int64) if given.pop("replay", False) else None
    options, group_score = given.pop("options", {}), given.pop("groups", None)
    if group_score and num_experts % 4 == 0 and num_experts // 2 >= top_k:
        options = options | {"n_group": 4, "topk_group": 2, "group_score": group_score}
    x, d = empty(num_tokens, hidden_size, dtype=dtype), empty(num_experts, hidden_size, dtype=dtype)
    with recorded() as launches:
        route.route_fwd(x, d, bias, mask, indices, check_route_options(num_experts, top_k, **options), **given)
    return launches


def dispatch_tokens(dtype: torch.dtype, block: int) -> list[int]:
    """One T for each configuration of dispatch, and both ways to add up the counts of blocks."""
    first: dict[object, int] = {}
    for power in range(17):  # configurations change behind powers of two
        for num_tokens in (1 << power, (1 << power) + 1):
            few = -(-num_tokens // block) <= dispatch.FEW_BLOCKS
            first.setdefault((few, configs.dispatch_config(num_tokens, dtype)), min(num_tokens, MAX_TOKENS))
    return list(first.values())


def dispatch_launches(
    shape: Shape, dtype: torch.dtype, num_tokens: int, block: int, variant: dict[str, bool]
) -> list[Launch]:
    """The launches of one dispatch behind a routing in blocks of `block` tokens, and those that add up its sums."""
    hidden_size, num_experts, top_k = shape
    ids, valid = empty(num_tokens, top_k, dtype=torch.int64), empty(num_tokens, dtype=torch.bool)
    x, count = empty(num_tokens, hidden_size, dtype=dtype), empty(num_experts, dtype=torch.int64)
    with recorded() as launches:
        ranks = dispatch.rank(ids, valid, num_experts)._replace(block=block)
        sent = dispatch.dispatch_fwd(
            x, ids, valid, num_experts, ranks if variant.get("ranked", True) else None,
            empty(num_tokens) if variant.get("unit", True) else None,
            copies=variant.get("copies", True), want_sums=variant.get("sums", True),
        )  # fmt: skip
        partials = empty(0, num_experts, hidden_size) if sent.partials is None else sent.partials
        scalar, number = empty(), empty(dtype=torch.int64)
        for bins in (0, num_experts):
            hist = empty(bins, route.NUM_MARGIN_BINS.value, dtype=torch.int32)
            accumulate.accumulate(
                partials, count, empty(num_tokens), number, hist, top_k,
                empty(num_experts, hidden_size), count, scalar, number, number, hist,
            )  # fmt: skip
    return launches


def row_launches(shape: Shape, dtype: torch.dtype, *, every_option: bool) -> list[Launch]:
    """combine, its backward, the backward of routing with and without copies, commit and directions."""
    hidden_size, num_experts, top_k = shape
    num_tokens, weight = 2 * configs.FEW_COPIES, empty(num_experts, hidden_size)
    ids, valid = empty(num_tokens, top_k, dtype=torch.int64), empty(num_tokens, dtype=torch.bool)
    x, d = empty(num_tokens, hidden_size, dtype=dtype), empty(num_experts, hidden_size, dtype=dtype)
    rows, weights, inv_norm = empty(num_tokens * top_k, hidden_size, dtype=dtype), empty(*ids.shape), empty(num_tokens)
    count, number, scalar = empty(num_experts, dtype=torch.int64), empty(dtype=torch.int64), empty()
    with recorded() as launches:
        for each in (weights, None):
            combine.combine_fwd(rows, ids, each, valid)
        for few in (1, num_tokens):
            combine.combine_bwd(x[:few], rows[: few * top_k], weights[:few], ids[:few], valid[:few])
        for gate, normalize in GATES if every_option else GATES[:1]:
            for copies, d_selected in ((rows, None), (None, weights)):
                route_bwd.route_bwd(
                    x, d, ids, weights, inv_norm, valid, weights, d_selected, copies,
                    None if copies is None else ids, gate, 0.2, normalize, 1.0,
                )  # fmt: skip
        route_bwd.route_bwd(x, d, ids, weights, inv_norm, valid, None, None, rows, ids, "softmax", 0.2, True, 1.0)
        balances = ("proportional", "sign", "quantile", "none") if every_option else ("proportional", "quantile")
        for balance, rule in itertools.product(balances, ("centroids", "whitened")):
            for seen, skip in ((None, None), (count, empty(dtype=torch.bool)))[: 1 + every_option]:
                commit.commit(
                    weight, weight, empty(num_experts), scalar, number, seen, number, count, empty(2, num_experts),
                    weight, count, scalar, number, number, empty(num_experts, 1024, dtype=torch.int32), skip, top_k,
                    0.999, balance, 0.05, rule,
                )  # fmt: skip
        directions.directions(weight, dtype)
    return launches


def reachable(arch: str, *, part: bool = False) -> Iterator[tuple[str, Launch]]:
    """(where from, launch) of everything; with `part`, of the routing loops of three shapes, in bf16, for training.

    Architectures other than sm_90 get the named shapes in bf16 and fp32. fp16, whose code is bf16's with another type,
    gets training alone at the odd shapes.
    """
    configs.assumed_architecture = arch
    named: dict[str, Shape] = {name: (s.hidden_size, s.num_experts, s.top_k) for name, s in MODEL_SHAPES.items()}
    named = {name: named[name] for name in PART} if part else named
    odd = {} if part or arch != "sm_90" else {f"D{d}-E{e}-K{k}": (d, e, k) for d, e, k in ODD_SHAPES}
    for name, shape in (named | odd).items():
        for kind, dtype in DTYPES.items():
            if (part and kind != "bf16") or (arch != "sm_90" and kind == "fp16"):
                continue
            if shape[1] > TRITON_MAX_EXPERTS[dtype]:  # refused by name
                continue
            blocks = {dispatch.RANK_BLOCK}  # tokens that are ranked together
            short = part or (name in odd and kind == "fp16")
            variants = {"training": ROUTE_VARIANTS["training"]} if short else ROUTE_VARIANTS
            every_option = name in named and kind == "bf16" and arch == "sm_90" and not part
            if every_option:
                variants = variants | MORE_ROUTE_VARIANTS
            for num_tokens in token_counts(shape, dtype, arch):
                for variant, given in variants.items():
                    for launch in route_launches(shape, dtype, num_tokens, given):
                        yield f"{name} {kind} T={num_tokens} {variant}", launch
                    if given.get("want_rank"):
                        blocks.add(configs.ranked_tokens(num_tokens))
            if short:
                continue
            for block in sorted(blocks):
                every_variant = every_option and block == min(blocks)
                for variant, flags in list(DISPATCH_VARIANTS.items())[: None if every_variant else 1]:
                    for num_tokens in dispatch_tokens(dtype, block):
                        for launch in dispatch_launches(shape, dtype, num_tokens, block, flags):
                            yield f"{name} {kind} T={num_tokens} {variant}", launch
            for launch in row_launches(shape, dtype, every_option=every_option):
                yield f"{name} {kind}", launch


@lru_cache
def distinct(arch: str, part: bool = False, only: str = "") -> list[tuple[str, Launch]]:
    """The first launch of each source, by the compiler's own inputs. only: those whose name holds this expression."""
    found: dict[str, tuple[str, Launch]] = {}
    for where, launch in reachable(arch, part=part):
        if re.search(only, f"{where} {launch.name}"):
            found.setdefault(launch.source()[1], (where, launch))
    return list(found.values())


def _compile(task: tuple[tuple[str, bool, str], int]) -> tuple[int, dict[str, Any]]:
    """Number and figures of a launch: those of `Compiled`, or "error", and "seconds"."""
    chosen, number = task
    arch, (_, launch) = chosen[0], distinct(*chosen)[number]
    began = time.monotonic()
    try:
        figures = asdict(compile_source(launch.source()[0], TARGETS[arch], launch.options))
    except Exception as error:
        figures = {"error": str(error).splitlines()[-1][:200]}
    return number, figures | {"seconds": round(time.monotonic() - began, 2)}


def key_of(launch: Launch) -> str:
    """What tells a compilation from every other: how it is read, the kernel's code, and what the compiler gets."""
    reader = Path(compile_source.__code__.co_filename).read_bytes()
    return hashlib.sha256(reader + f"{launch.kernel.cache_key} {launch.source()[1]}".encode()).hexdigest()


def problems_in(where: str, launch: Launch, figures: dict[str, Any], arch: str) -> list[str]:
    """What is wrong with a compilation, each with where it comes from and its configuration."""
    config = {name: launch.arguments[name] for name in ("BT", "BD", "BE", "EB", "RT") if name in launch.arguments}
    words = f"{where} {launch.name} {config | launch.options}"
    if "error" in figures:
        return [f"{words}: does not compile: {figures['error']}"]
    compiled = Compiled(**{name: value for name, value in figures.items() if name != "seconds"})
    return [f"{words}: {problem}" for problem in problems_of(launch, compiled, arch)]


def _start(folder: str) -> None:
    triton.knobs.cache.dir = folder
    torch.set_num_threads(1)


def check(
    arch: str, *, part: bool = False, only: str = "", processes: int | None = None, progress: bool = False
) -> dict[str, Any]:
    """Compile everything for one architecture. Per kernel: distinct compilations, the largest figures; problems."""
    chosen, began = (arch, part, only), time.monotonic()
    launches = distinct(*chosen)
    keys = [key_of(launch) for _, launch in launches]
    kept = KEPT / f"triton-{triton.__version__}-{arch}.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    text = kept.read_text(encoding="utf-8") if kept.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # without a line that a run was stopped in
    kept.write_text(whole, encoding="utf-8")
    known: dict[str, dict[str, Any]] = {line.pop("key"): line for line in map(json.loads, whole.splitlines())}
    # The slow ones first, so that no core waits at the end; `spawn`, since torch's threads do not survive a fork.
    order = sorted(range(len(launches)), key=lambda i: -launches[i][1].arguments.get("BE", 0))
    tasks = [(chosen, number) for number in order if keys[number] not in known]
    count = processes or os.cpu_count() or 1
    with (
        tempfile.TemporaryDirectory() as folder,
        kept.open("a", encoding="utf-8") as file,
        multiprocessing.get_context("spawn").Pool(count, _start, (folder,)) as pool,
    ):
        for done, (number, figures) in enumerate(pool.imap_unordered(_compile, tasks), 1):
            known[keys[number]] = figures
            file.write(json.dumps({"key": keys[number], **figures}) + "\n")
            file.flush()
            for problem in problems_in(*launches[number], figures, arch):  # at once: the whole takes long
                print(f"\n{problem}" if progress else problem, file=sys.stderr, flush=True)
            if progress:
                _show(arch, done, len(tasks), began)
    if progress:
        print(file=sys.stderr)
    return _summary(arch, launches, [known[key] for key in keys])


def _summary(arch: str, launches: list[tuple[str, Launch]], figures: list[dict[str, Any]]) -> dict[str, Any]:
    by_kernel: dict[str, list[dict[str, Any]]] = {}
    for (_, launch), each in zip(launches, figures, strict=True):
        by_kernel.setdefault(launch.name, []).append(each)
    problems = [
        problem
        for (where, launch), each in zip(launches, figures, strict=True)
        for problem in problems_in(where, launch, each, arch)
    ]
    return {
        "distinct": len(launches),
        "compile_seconds": round(sum(each["seconds"] for each in figures)),
        "kernels": {
            name: {
                "distinct": len(each),
                "most_registers": max(c.get("registers", 0) for c in each),
                "most_shared_bytes": max(c.get("shared", 0) for c in each),
                "spilling": sum(c.get("spills", 0) > 0 for c in each),
                "racing": sum(bool(c.get("races")) for c in each),
                "serialised": sum(c.get("serialised", False) for c in each),
            }
            for name, each in sorted(by_kernel.items())
        },
        "problems": sorted(problems),
    }


def _show(arch: str, done: int, total: int, began: float) -> None:
    seconds = time.monotonic() - began
    bar = "#" * (30 * done // total)
    left = seconds / done * (total - done)
    line = f"{arch} [{bar:<30}] {done}/{total}, {seconds:.0f} s, about {left:.0f} s left"
    print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)


def main() -> int:
    """Exit code 1 when a compilation has a problem."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--part", action="store_true", help="the routing loops at the named shapes in bf16 alone")
    parser.add_argument("--only", default="", metavar="REGEX", help="of 'OLMoE bf16 T=1 training route_select'")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--out", type=Path, help="write the JSON document there too")
    parser.add_argument("--processes", type=int, help="default: one for each core")
    arguments = parser.parse_args()
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.touch()
    document: dict[str, Any] = {
        "command": command_line("python -m benchmarks.gate", sys.argv[1:]),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "archs": {},
    }
    progress = sys.stderr.isatty() and not os.environ.get("CI")
    for arch in arguments.arch:
        result = check(arch, part=arguments.part, only=arguments.only, processes=arguments.processes, progress=progress)
        document["archs"][arch] = result
        if not arguments.json:
            _print(arch, result)
    text = json.dumps(document, indent=1)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        print(text)
    return int(any(result["problems"] for result in document["archs"].values()))


def _print(arch: str, result: dict[str, Any]) -> None:
    seconds = result["compile_seconds"]
    print(f"{arch}: {result['distinct']} distinct compilations, {seconds} s of one core, Triton {triton.__version__}")
    for name, row in result["kernels"].items():
        print(
            f"  {name:13} {row['distinct']:5} at most {row['most_registers']} registers, {row['most_shared_bytes']} "
            f"bytes of shared memory; {row['spilling']} spill, {row['racing']} race, {row['serialised']} serialised"
        )
    for problem in result["problems"]:
        print("  PROBLEM", problem)


if __name__ == "__main__":
    sys.exit(main())
