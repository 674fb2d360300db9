"""Routers in models of 20 million active parameters, on a GPU: two train in turn, five minutes leave a comparison.

    python -m benchmarks.quality.gpu [--minutes 5] [--steps N] [--only NAME ...] [--seed 0] [--lr 0.001]
        [--accumulate 1] [--text PATH ...] [--results FILE] [--json] [--toy]

It needs the repository, torch and Triton, and no network. Equal weights, equal text, one step of each in turn: all have
the same device, and equally many steps whenever the run ends. Forwards are autocast to bf16; routers compute in fp32.

The schedule is that of every run of the study, `kmeans_route.lm.trainer.learning_rate`, which must know the last step.
So each contestant first makes a few steps that are thrown away; the median of the warm ones says how many fit into the
time that is left, and all start afresh with that number.

Each evaluation is a line of --results, on the disk before the next step begins. Exit code: 0; 1 where a contestant
failed, which is named; 2 where it cannot start; 3 where it ended before its last step, by the clock, SIGINT or SIGTERM.
A second signal ends it at once. --toy: the same in a minute on a CPU, at a size that means nothing.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import statistics
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.plan import NO_START, NOT_FINISHED, RIGHT, WRONG, Timer
from benchmarks.gpu.report import ROOT, header
from benchmarks.quality.studies import MAIN, PINNED, WHITENED
from benchmarks.quality.texts import installed_code
from kmeans_route import backends
from kmeans_route.bench.clock import reason, without_paths
from kmeans_route.bench.results import environment
from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.data import Corpus, load_corpus
from kmeans_route.lm.results import summarize
from kmeans_route.lm.trainer import NotFiniteError, StopRequest, Trainer, stop_on_signal

Record = dict[str, Any]
CONTESTANTS = {name: options for name, options in MAIN.items() if "trial" not in options}
DEFAULT = (WHITENED, "sigmoid, sign 0.01")
SIZE: dict[str, Any] = {
    "layers": 8, "hidden": 512, "heads": 8, "experts": 64, "top_k": 8, "expert_hidden": 128, "seq_len": 512,
    "batch": 128, "eval_bytes": 1 << 20, "device": "cuda",
}  # fmt: skip
"""65,536 bytes a step. As in the study a token passes through experts of 2 D inner width in all."""
TOY: dict[str, Any] = {
    "layers": 1, "hidden": 16, "heads": 2, "experts": 4, "top_k": 2, "expert_hidden": 16, "seq_len": 32, "batch": 8,
    "eval_bytes": 2048, "device": "cpu",
}  # fmt: skip
POINTS = 10
"""Evaluations of a whole run, the last one after its last step."""
WARM_STEPS, TIMED_STEPS = 3, 10
RESERVE = 0.05
"""Of the time that is left: a step may take longer later, when loads have moved."""
GRACE_S = 30.0
"""So long after the limit a run that hangs is ended."""
MEASURES = {
    "bits_per_byte": ("bits per byte, held-out", 4),
    "max_vio_train": ("MaxVio, batches, last 100 steps", 3),
    "max_vio_validation": ("MaxVio, held-out, counts pooled", 3),
    "effective_experts": ("effective experts, mean over layers", 1),
    "dead_experts": ("dead experts, all layers", 0),
    "step_ms": ("step, median, ms", 2),
    "step_q1_ms": ("step, lower quartile, ms", 2),
    "step_q3_ms": ("step, upper quartile, ms", 2),
    "tokens_per_s": ("tokens/s, of the median step", 0),
}
"""Measure of an evaluation -> its row in the table, digits after the point."""


class ContestantError(Exception):
    """A contestant failed; the message names it, and says why."""


@contextmanager
def named(contestant: str) -> Iterator[None]:
    """Whatever goes wrong within the block has the contestant's name."""
    try:
        yield
    except Exception as error:
        raise ContestantError(f"{contestant}: {reason(error)}") from error


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.gpu", description=description)
    parser.add_argument("--minutes", type=float, help="limit of the whole run, compiling included (5; toy: 1)")
    parser.add_argument("--steps", type=int, help="instead of as many as fit; the limit holds all the same")
    parser.add_argument("--only", nargs="+", default=list(DEFAULT), metavar="NAME", help=f"({'; '.join(DEFAULT)})")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (0.001)")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step, for a small memory (1)")
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="PATH", help=(
        "files and folders (the running Python's .py files: standard library and installed packages)"
    ))  # fmt: skip
    parser.add_argument("--results", type=Path, help="file of JSON lines (benchmarks/results/quality-gpu.jsonl)")
    parser.add_argument("--json", action="store_true", help="one JSON document at the end instead of the table")
    parser.add_argument("--toy", action="store_true", help="tiny, on the CPU; lines go to build/quality-gpu-toy.jsonl")
    parser.add_argument("--since", type=float, help="when the minutes began, in seconds since 1970 (now)")
    args = parser.parse_args(argv)
    args.minutes = (1.0 if args.toy else 5.0) if args.minutes is None else args.minutes
    name = "build/quality-gpu-toy.jsonl" if args.toy else "benchmarks/results/quality-gpu.jsonl"
    args.results = args.results or ROOT / name
    return args


def configs(args: argparse.Namespace) -> dict[str, TrainConfig]:
    """Contestant -> its options, with a number of steps that is still to be chosen.

    Raises:
        ValueError: a contestant that is not known, or an option out of range.
    """
    unknown = [name for name in args.only if name not in CONTESTANTS]
    if unknown:
        raise ValueError(f"--only must be among {'; '.join(CONTESTANTS)}, got {'; '.join(unknown)}")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}: leave it out for as many as fit")
    size = (TOY if args.toy else SIZE) | {"seed": args.seed, "lr": args.lr, "accumulate": args.accumulate}
    options: dict[str, dict[str, Any]] = {name: PINNED | size | CONTESTANTS[name] for name in args.only}
    return {name: TrainConfig(**chosen) for name, chosen in options.items()}


def cannot_start(args: argparse.Namespace) -> str:
    """Why not, in one sentence; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return f"triton cannot be imported by {Path(sys.executable).name}: choose another with PYTHON=..."
    if args.toy or torch.cuda.is_available():
        return ""
    return "There is no CUDA or ROCm device that torch can use; --toy runs without one."


def build(config: TrainConfig, corpus: Corpus) -> Trainer:
    """A contestant before its first step, in bf16 but for its routers: K-Means takes no part in autocast, and a learned
    router, whose logits autocast would round to bf16, is kept out of it here."""
    trainer = Trainer(config, corpus, autocast=torch.bfloat16)
    for layer in trainer.model.moe_layers:
        plain: Any = torch.autocast(trainer.device.type, enabled=False)(layer.router.route)
        layer.router.route = plain  # type: ignore[method-assign]
    return trainer


def facts(trainer: Trainer) -> Record:
    """Options and size of a contestant. active_parameters: those that a token passes through, which are all but the
    embedding's, and of the experts' the share top_k / experts. A K-Means router has none; its directions are state."""
    model, config = trainer.model, trainer.config
    everything = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for layer in model.moe_layers for parameter in layer.experts.parameters())
    active = everything - model.embedding.weight.numel() - experts + experts * config.top_k // config.experts
    backend = backends.choose("auto", trainer.device, torch.float32, config.experts).NAME
    return {"parameters": everything, "active_parameters": active, "backend": backend, "config": config.to_dict()}


class Pace(NamedTuple):
    """Seconds of a contestant: to build it, of a warm step (median), of a warm evaluation, and what its first steps and
    its first evaluation took beyond warm ones: compiling, and memory that is asked for once."""

    build_s: float
    step_s: float
    evaluation_s: float
    compile_s: float


def pace(make: Callable[[], Trainer], seconds: Callable[[], float]) -> Pace:
    """Measure it on steps that are thrown away. seconds: a clock."""
    start = seconds()
    trainer = make()
    built = seconds()
    for _ in range(WARM_STEPS):
        trainer.train_step()
    trainer.evaluate()
    marks = [seconds()]
    for _ in range(TIMED_STEPS):
        trainer.train_step()  # waits for the device by itself, since it reads the loads
        marks.append(seconds())
    trainer.evaluate()
    evaluation_s = seconds() - marks[-1]
    step_s = statistics.median(after - before for before, after in pairwise(marks))
    compile_s = marks[0] - built - WARM_STEPS * step_s - evaluation_s
    return Pace(built - start, step_s, evaluation_s, max(0.0, compile_s))


def steps_within(left_s: float, paces: list[Pace]) -> int:
    """How many steps of each contestant fit, beside what it takes to build and to evaluate all; 0 where none does."""
    for_steps_s = (1 - RESERVE) * left_s - sum(p.build_s + POINTS * p.evaluation_s for p in paces)
    return max(0, int(for_steps_s / sum(p.step_s for p in paces)))


def evaluated(contestant: str, trainer: Trainer) -> Record:
    """An evaluation of a contestant as it is now.

    Raises:
        NotFiniteError: its bits per byte are not finite.
    """
    evaluation = trainer.evaluate()
    if not math.isfinite(evaluation.bits_per_byte):
        raise NotFiniteError(f"evaluated after step {trainer.step}, it has {evaluation.bits_per_byte} bits per byte")
    times = torch.tensor([record["time_ms"] for record in trainer.history], dtype=torch.float64)
    q1, median, q3 = times.quantile(times.new_tensor([0.25, 0.5, 0.75])).tolist()
    tokens = trainer.config.batch * trainer.config.seq_len
    known = summarize(trainer, evaluation)["measures"]
    known |= {"step_ms": median, "step_q1_ms": q1, "step_q3_ms": q3, "tokens_per_s": 1e3 * tokens / median}
    place = {"contestant": contestant, "step": trainer.step, "steps": trainer.config.steps}
    measures = {measure: known[measure] for measure in MEASURES}
    return {"kind": "evaluation", **place, "tokens": tokens * trainer.step, "measures": measures}


def race(
    trainers: Mapping[str, Trainer],
    steps: int,
    late: Callable[[], bool],
    tell: Callable[[Record], object],
    progress: Callable[[str], object] = lambda text: None,
) -> int:
    """One step of each contestant in turn, until the last one or until it is late, and POINTS evaluations on the way.

    Whenever it ends, all have made equally many steps, and are evaluated there.

    Returns: the steps of each.
    Raises:
        ContestantError: one failed.
    """
    every, done, stopping = math.ceil(steps / POINTS), 0, late()
    while done < steps and not stopping:
        losses = []
        for name, trainer in trainers.items():
            with named(name):
                losses.append(f"{trainer.train_step()['loss_bits']:.3f}")
        done += 1
        progress(f"step {done} of {steps}, bits per byte of the last batch: {' / '.join(losses)}")
        stopping = late()
        if done % every == 0 or done == steps or stopping:
            for name, trainer in trainers.items():
                with named(name):
                    record = evaluated(name, trainer)
                tell(record)
            stopping = late()
    return done


def table(evaluations: list[Record]) -> str:
    """The last evaluation of each contestant in Markdown, measures down."""
    last = {record["contestant"]: record for record in evaluations}
    rows = [["measure", *last], ["---"] * (1 + len(last))]
    rows.append(["steps", *(f"{record['step']} of {record['steps']}" for record in last.values())])
    for measure, (label, digits) in MEASURES.items():
        rows.append([label, *(f"{record['measures'][measure]:.{digits}f}" for record in last.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def show_progress(text: str) -> None:
    """A line that the next one takes the place of, where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


class Lines:
    """The lines of one run: kept, and appended to a file that others may have begun. `run` says whose a line is."""

    def __init__(self, path: Path, head: Record) -> None:
        self.path, self.records = path, list[Record]()
        self._run = head["date"]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.add(head)

    def add(self, record: Record) -> None:
        """On the disk when it returns."""
        self.records.append({"run": self._run, **record})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.records[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def of(self, kind: str) -> list[Record]:
        """Those of a kind."""
        return [record for record in self.records if record["kind"] == kind]


class Session:
    """A run from its options to its table."""

    def __init__(self, args: argparse.Namespace, lines: Lines, request: StopRequest, timer: Timer) -> None:
        self.args, self.lines, self.request, self.timer = args, lines, request, timer
        self.limit_s = 60 * args.minutes

    def run(self, options: Mapping[str, TrainConfig], corpus: Corpus) -> tuple[int, str]:
        """Measure the pace, choose the number of steps, race. Returns: (exit code, how it ended)."""
        try:
            paces = {}
            for name, config in options.items():
                show_progress(f"compiling and timing: {name}")
                with named(name):
                    paces[name] = pace(partial(build, config, corpus), self.timer.seconds)
                gc.collect()  # hooks and routers hold each other, and their memory on the device
                if self.request.signum:
                    return NOT_FINISHED, f"signal {self.request.signum} before the first step that counts"
            left_s = self.timer.left(self.limit_s)
            steps = self.args.steps or steps_within(left_s, list(paces.values()))
            if not steps:
                return NOT_FINISHED, f"{left_s:.0f} s are left, too few for a step: raise --minutes"
            trainers = {}
            for name, config in options.items():
                with named(name):
                    trainers[name] = build(replace(config, steps=steps), corpus)
            done = self._race(trainers, steps, paces)
        except ContestantError as error:
            traceback.print_exception(error)
            return WRONG, str(error)
        except KeyboardInterrupt:
            return NOT_FINISHED, "a second signal"
        if done == steps:
            return RIGHT, "after its last step"
        why = f"signal {self.request.signum}" if self.request.signum else "the clock"
        return NOT_FINISHED, f"{why}, after step {done} of {steps}: the learning rate had not come down"

    def _race(self, trainers: Mapping[str, Trainer], steps: int, paces: Mapping[str, Pace]) -> int:
        seconds = {name: {key: round(value, 4) for key, value in p._asdict().items()} for name, p in paces.items()}
        contestants = {name: facts(trainer) | {"pace": seconds[name]} for name, trainer in trainers.items()}
        at_s = {"prepared_s": round(self.timer.seconds(), 1)}
        self.lines.add({"kind": "plan", "steps": steps, **at_s, "contestants": contestants})
        # What may still come when it is not late yet: a round, and the evaluation after it.
        end_s = self.limit_s - sum(p.step_s + p.evaluation_s for p in paces.values())

        def tell(record: Record) -> None:
            self.lines.add(record | {"at_s": round(self.timer.seconds(), 1)})

        def late() -> bool:
            return bool(self.request.signum) or self.timer.left(end_s) <= 0

        return race(trainers, steps, late, tell, show_progress)

    def finish(self, code: int, ended: str) -> int:
        """The last line, and table or document on stdout; the exit code."""
        peak = None if self.args.toy else torch.cuda.max_memory_allocated()
        seconds = round(self.timer.seconds(), 1)
        end = {"kind": "end", "exit_code": code, "ended": ended, "seconds": seconds, "peak_bytes": peak}
        self.lines.add(end)
        evaluations = self.lines.of("evaluation")
        show_progress("")
        if self.args.json:
            print(json.dumps({kind: self.lines.of(kind) for kind in ("header", "plan", "evaluation", "end")}, indent=1))
            return code
        if evaluations:
            print(table(evaluations))
        for plan in self.lines.of("plan"):
            compiled = " + ".join(f"{each['pace']['compile_s']:.1f}" for each in plan["contestants"].values())
            print(f"\n{plan['prepared_s']} s passed before the first step that counts, {compiled} s of them compiling.")
        print(f"Ended: {ended}. Exit code {code} after {seconds} s; lines in {self.lines.path.name}.", flush=True)
        return code

    def stop_when_it_hangs(self, exit_now: Callable[[int], object] = os._exit) -> threading.Timer:
        """After the limit and GRACE_S end the process, with all that was measured."""
        ended = f"it hung, and was ended {GRACE_S:.0f} s after the limit"
        wait_s = self.timer.left(self.limit_s + GRACE_S)
        watchdog = threading.Timer(wait_s, lambda: exit_now(self.finish(NOT_FINISHED, ended)))
        watchdog.daemon = True
        watchdog.start()
        return watchdog


def main(argv: list[str] | None = None) -> int:
    """The whole run; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    timer = Timer(args.since)
    why = cannot_start(args)
    try:
        options = configs(args)
        corpus = None if why else load_corpus(args.text) if args.text else installed_code()
    except ValueError as error:
        why, corpus = str(error), None
    if corpus is None:
        print(why, file=sys.stderr)
        return NO_START
    command = without_paths(" ".join(["python -m benchmarks.quality.gpu", *argv]))
    here = environment(command)
    head = here | {"processor": here["device"]} | header(command, torch.device("cpu" if args.toy else "cuda"))
    with stop_on_signal() as request:
        session = Session(args, Lines(args.results, head | {"corpus": corpus.summary()}), request, timer)
        watchdog = session.stop_when_it_hangs()
        try:
            return session.finish(*session.run(options, corpus))
        finally:
            watchdog.cancel()


if __name__ == "__main__":
    sys.exit(main())
