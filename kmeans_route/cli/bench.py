"""`kmeans-route bench`: this package against other ways to route, on the user's machine and shapes.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

from __future__ import annotations

import csv
import io
import os
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kmeans_route.bench.clock import Clock, reason
from kmeans_route.bench.contest import ClockedContest
from kmeans_route.bench.memory import free_bytes
from kmeans_route.bench.problem import Problem
from kmeans_route.bench.results import environment
from kmeans_route.bench.routing_contest import CONTESTANTS, MODES, OURS, QUICK_RIVALS, RIVALS, routing_contest
from kmeans_route.bench.truth import CHUNK
from kmeans_route.checks import check_choice, check_route_options
from kmeans_route.cli import places
from kmeans_route.cli.output import Output
from kmeans_route.testing import MODEL_SHAPES, BenchShape

SHAPE_NAMES = {
    "olmoe": "OLMoE",
    "qwen3": "Qwen3-30B-A3B",
    "mixtral": "Mixtral",
    "deepseek-v3": "DeepSeek-V3",
    "gpt-oss": "GPT-OSS-120B",
    "qwen3-next": "Qwen3-Next",
}
DTYPES = ("float32", "bfloat16", "float16")
Facts = dict[str, Any]
FIELDS = {
    "ratio": "its median_ms over that of kmeans_route; the table shows the inverse, ours / theirs",
    "paired_ratio": "median over the rounds of its time over that of kmeans_route in the same round",
    "ours_over_theirs": "median_ms of kmeans_route over its own: below 1, kmeans_route is faster",
    "told_apart": "whether its quartiles and those of kmeans_route lie apart; null for kmeans_route",
    "method": "thread time: CPU time of the one thread; wall clock: of several; graph, events: of a GPU",
}
"""What the figures of a contestant are, where the name does not say it."""
APART = "~: its quartiles and ours overlap, so this run does not tell which is quicker"


class BenchOptions(NamedTuple):
    """What is asked for. shapes: (name as given, shape). csv: a file, "-" for stdout, or "". command: runs the same."""

    shapes: list[tuple[str, BenchShape]]
    rivals: list[str]
    mode: str
    dtype: torch.dtype
    device: torch.device
    repeats: int
    csv: str
    command: str


def parse_options(
    shapes: list[str],
    tokens: int,
    against: list[str],
    *,
    mode: str,
    dtype: str,
    device: str,
    repeats: int,
    threads: int,
    csv: str,
) -> BenchOptions:
    """From the words of the command line; one that is not known is a ValueError."""
    check_choice("--mode", mode, MODES)
    against = [name.strip() for names in against for name in names.split(",")]
    for name in against:
        check_choice("--against", name, RIVALS)
    place = _device(device)
    dtype = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    check_choice("--dtype", dtype, DTYPES)
    named = [(text, parse_shape(text, tokens)) for text in dict.fromkeys(shapes)]
    words = [word for text, _ in named for word in ("--shape", text)]
    words += ["--tokens", str(tokens)] * any(text.lower() in SHAPE_NAMES for text, _ in named)
    words += ["--against", ",".join(against)] * bool(against)
    words += ["--mode", mode, "--dtype", dtype, "--device", str(place), "--repeats", str(repeats)]
    words += ["--threads", str(threads)] * (place.type == "cpu")
    rivals = list(dict.fromkeys(against or QUICK_RIVALS))
    command = f"kmeans-route bench {shlex.join(words)}"
    return BenchOptions(named, rivals, mode, getattr(torch, dtype), place, repeats, csv, command)


def parse_shape(text: str, tokens: int) -> BenchShape:
    """A named shape at T = tokens, or T,D,E,K; what no router can have is a ValueError."""
    name = SHAPE_NAMES.get(text.lower())
    if name is not None:
        return BenchShape(tokens, *MODEL_SHAPES[name])
    words = [word.strip() for word in text.split(",")]
    if len(words) != 4 or not all(word.isdecimal() for word in words):
        raise ValueError(f"--shape must be T,D,E,K or one of {', '.join(SHAPE_NAMES)}, got {text!r}")
    shape = BenchShape(*(int(word) for word in words))
    if not all(shape):
        raise ValueError(f"--shape must have T, D, E and K of at least 1, got {text!r}")
    check_route_options(shape.num_experts, shape.top_k)
    return shape


def _device(text: str) -> torch.device:
    text = text or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"--device must be cpu or cuda, got {text!r}") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"--device must be cpu or cuda, got {text!r}: nothing else can be timed")
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"--device must be one that torch can use, got {text!r} with {count} GPUs: try cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def bytes_needed(shape: BenchShape, dtype: torch.dtype, mode: str) -> int:
    """About what a contest holds at once: inputs and the fp32 they are drawn in, temporaries, fp64 of the checks."""
    num_tokens, width, num_experts, top_k = shape
    train = mode == "train"
    a_token = 24 + 3 * dtype.itemsize + (24 + 6 * dtype.itemsize if train else 0)
    rows = num_tokens * (width * a_token + num_experts * (48 if train else 24) + 64 * top_k)
    return rows + min(num_tokens, CHUNK) * 32 * (width + num_experts) + 64 * num_experts * width


def bench(options: BenchOptions, output: Output) -> int:
    """The command `bench`. Returns: the exit code, 1 where a contestant of some shape was wrong; it gets no times."""
    for name, shape in options.shapes:  # before anything is made
        needed, free = bytes_needed(shape, options.dtype, options.mode), free_bytes(options.device)
        if free is not None and needed > free:
            raise ValueError(
                f"--shape {name} needs about {needed / 1e9:.1f} GB in mode {options.mode}, and {free / 1e9:.1f} GB are "
                f"free on {options.device}: take fewer tokens"
            )
    if options.csv not in ("", "-"):
        places.check_file(Path(options.csv), "--csv")
    warnings = _warnings(options.device)
    for warning in warnings:
        output.warn(warning)
    clock, results = Clock(options.device), []
    for name, shape in options.shapes:
        facts = _one_shape(name, shape, options, clock, output)
        results.append(facts)
        if "error" in facts:
            output.complain(facts["error"])
        elif options.csv != "-":
            _show(facts, output)
    if options.csv != "-":
        _explain(results, output)
    if options.csv:
        _write_csv(options.csv, results, output)
    facts = environment(options.command)
    if clock.on_gpu:
        facts |= {"device": torch.cuda.get_device_name(options.device), "cuda": torch.version.cuda}
    output.document(
        {"command": "bench", "environment": facts, "warnings": warnings, "fields": FIELDS, "results": results}
    )
    return int(any("error" in facts for facts in results))


def _warnings(device: torch.device) -> list[str]:
    """How far to trust the times where other work leaves this run fewer cores than its threads."""
    if device.type != "cpu" or not hasattr(os, "getloadavg"):
        return []
    load, threads, cores = os.getloadavg()[0], torch.get_num_threads(), os.cpu_count() or 1
    if load + threads <= cores + 0.5:
        return []
    busy = f"{cores} cores have a load of {load:.1f} and this run wants {threads}: "
    if threads == 1:
        return [busy + "its CPU time alone is counted, which shared caches make longer; take ratios, not times"]
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    remedy = "take --threads 1" if passive else "take --threads 1, or set OMP_WAIT_POLICY=passive"
    return [
        f"{busy}threads that wait for one without a core make times many times too long, and ratios of small shapes "
        f"wrong: {remedy}, or wait for a quiet machine"
    ]


def _one_shape(name: str, shape: BenchShape, options: BenchOptions, clock: Clock, output: Output) -> Facts:
    dtype, device, mode = str(options.dtype).removeprefix("torch."), str(options.device), options.mode
    facts: Facts = {"shape": name, **shape._asdict(), "mode": mode, "dtype": dtype, "device": device}
    sizes = " ".join(f"{letter}={size}" for letter, size in zip("TDEK", shape, strict=True))
    title = f"{name}: {sizes}, {dtype} on {device}, {mode}"
    bar = output.progress(f"timing {name}", options.repeats, thread=False)

    def told(contestant: str) -> None:
        if "compiled" in contestant:
            output.say(f"compiling {contestant} for {name}: minutes where the machine is busy")

    try:
        with bar if sys.stderr.isatty() else nullcontext(lambda done, note: None) as update:
            update(0, "making the input, checking everyone")
            with clock.scope():
                problem = Problem(shape, options.dtype, options.device, options.mode)
            contest, skipped = routing_contest(title, problem, options.rivals, clock, told)
            contest.warm_up()
            for done in range(1, options.repeats + 1):
                contest.round()
                update(done, "")
    except AssertionError as error:
        message = f"{title}: refused, a result is wrong, so no time is shown: {error}"
        return {**facts, "correct": False, "error": " ".join(message.split())}
    except (RuntimeError, MemoryError) as error:
        return {**facts, "correct": None, "error": f"{title}: {reason(error)}"}
    return {**facts, "title": title, "correct": True, "contestants": _rows(contest, problem), "skipped": skipped}


def _rows(contest: ClockedContest, problem: Problem) -> dict[str, Facts]:
    x_bytes = problem.x.numel() * problem.x.element_size()
    timings = contest.timings()
    ours = timings[OURS]
    return {
        name: {
            **timing._asdict(),
            "ours_over_theirs": ours.median_ms / timing.median_ms,
            "told_apart": None if name == OURS else timing.q1_ms > ours.q3_ms or timing.q3_ms < ours.q1_ms,
            "tokens_per_s": 1e3 * problem.shape.num_tokens / timing.median_ms,
            "gb_per_s": x_bytes / timing.median_ms / 1e6,
            "method": contest.method[name],
            "peak_bytes": contest.peak_bytes[name],
        }
        for name, timing in timings.items()
    }


def _show(facts: Facts, output: Output) -> None:
    columns = ["contestant", "median ms", "quartiles ms", "ours / theirs", "tokens/s", "GB/s of x"]
    rows = [
        [
            name,
            _number(t["median_ms"]),
            f"{_number(t['q1_ms'])} .. {_number(t['q3_ms'])}",
            f"{t['ours_over_theirs']:.2f}" + "~" * (t["told_apart"] is False),
            f"{t['tokens_per_s']:,.0f}",
            _number(t["gb_per_s"]),
        ]
        for name, t in facts["contestants"].items()
    ]
    repeats = facts["contestants"][OURS]["repeats"]
    output.table(f"{facts['title']} ({repeats} rounds, all results right)", columns, rows)
    for name, why in facts["skipped"].items():
        output.note(f"{name}: did not run: {why}")
    for name, t in facts["contestants"].items():
        if t["method"].startswith("events"):
            output.note(f"{name}: gaps between launches count: {t['method']}")


def _explain(results: list[Facts], output: Output) -> None:
    """What stands under the tables: how to read a ratio, and who the contestants are."""
    rows = {name: row for facts in results for name, row in facts.get("contestants", {}).items()}
    if len(rows) < 2:
        return
    output.note("ours / theirs: below 1 kmeans_route is faster; of the medians")
    if any(row["told_apart"] is False for facts in results for row in facts.get("contestants", {}).values()):
        output.note(APART)
    for name in rows:
        output.note(f"{name}: {CONTESTANTS[name]}")


def _number(value: float) -> str:
    """Three digits at least."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _write_csv(place: str, results: list[Facts], output: Output) -> None:
    """One row a contestant; those without a time have a reason instead."""
    shared = ["shape", "num_tokens", "hidden_size", "num_experts", "top_k", "dtype", "device", "mode"]
    timed = ["median_ms", "q1_ms", "q3_ms", "min_ms", "ratio", "ours_over_theirs", "told_apart", "repeats"]
    timed += ["tokens_per_s", "gb_per_s", "method"]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*shared, "contestant", *timed, "reason"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for facts in results:
        rows = [{"contestant": name, **row} for name, row in facts.get("contestants", {}).items()]
        rows += [{"contestant": name, "reason": why} for name, why in facts.get("skipped", {}).items()]
        if "error" in facts:
            rows.append({"contestant": "", "reason": facts["error"]})
        writer.writerows({**{key: facts[key] for key in shared}, **row} for row in rows)
    if place == "-":
        sys.stdout.write(text.getvalue())
        return
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).write_text(text.getvalue(), encoding="utf-8")
    output.note(f"rows: {place}")
