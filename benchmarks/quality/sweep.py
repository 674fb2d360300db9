"""Trains what `studies.py` lists, several runs side by side, and appends a JSON line for each that is finished.

    python -m benchmarks.quality.sweep [--study main|tries|rates|dense|prose|lr|batch] [--size D64-E16-K2 ...]
        [--seeds 0 1 2] [--steps 2400] [--workers 2] [--device cpu] [--minutes N] [--only NAME ...] [--out DIR]
        [--results FILE] [--json] [--list]

Stop it when you like, with Ctrl-C or --minutes: runs under way keep their checkpoints in --out, and the same command
goes on from there. Runs whose line is in --results already are not done again. Each run has one thread.
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.quality.studies import SIZES, STEPS, STUDIES, Job, jobs, usual_sizes
from kmeans_route.bench.results import environment
from kmeans_route.cli.output import Output
from kmeans_route.lm.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent.parent
Record = dict[str, Any]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.sweep", description=description)
    parser.add_argument("--study", default="main", help=f"one of {', '.join(STUDIES)} (main)")
    parser.add_argument("--size", nargs="+", metavar="NAME", help=f"of {', '.join(SIZES)} (the study's usual ones)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(0 1 2)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these contestants")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of a run ({STEPS})")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side (2)")
    parser.add_argument("--device", default="cpu", help="a torch device (cpu)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many, to go on later")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "quality", help="checkpoints (build/quality)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "quality.jsonl")
    parser.add_argument("--json", action="store_true", help="one JSON document at the end, no progress")
    parser.add_argument("--list", action="store_true", help="show what is left and stop")
    return parser.parse_args(argv)


def read_results(path: Path) -> list[Record]:
    """All lines of a result file; none where there is no file.

    Raises:
        ValueError: a line that is no JSON, by its number.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} must hold JSON lines, got {error} in line {number}: remove it") from None
    return records


def left(all_jobs: list[Job], records: list[Record]) -> list[Job]:
    """The jobs that no record has with the same options."""
    done = [(record["name"], record["config"]) for record in records]
    return [job for job in all_jobs if (job.name, job.config.to_dict()) not in done]


class Running:
    """A run under way: its process, and the last step that it told."""

    def __init__(self, job: Job, out: Path) -> None:
        self.job, self.step = job, 0
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", job.name)
        self.folder = out / f"{slug}-{job.config.steps}"
        self.folder.mkdir(parents=True, exist_ok=True)
        options = json.dumps(job._asdict() | {"config": job.config.to_dict()}, indent=2)
        (self.folder / "job.json").write_text(options + "\n", encoding="utf-8")
        self.log = (self.folder / "errors.txt").open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.quality.one", str(self.folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which stops each run once
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.step = json.loads(line)["step"]

    def record(self) -> Record:
        """Of the finished run."""
        run = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        names = ("device", "num_cpus", "python", "torch", "kmeans_route")
        facts = environment("python -m benchmarks.quality.sweep")
        return {
            "name": self.job.name,
            "size": self.job.size,
            "contestant": self.job.contestant,
            "config": self.job.config.to_dict(),
            **run,
            "date": datetime.date.today().isoformat(),
            "environment": {name: facts[name] for name in names},
        }


def sweep(todo: list[Job], args: argparse.Namespace, output: Output) -> tuple[int, list[str]]:
    """Run them. Returns: (how many were finished, the names of those that failed)."""
    waiting, running, failed, finished = list(todo), list[Running](), list[str](), 0
    stopping, told = threading.Event(), False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    deadline = time.monotonic() + 60 * args.minutes
    total, whole = sum(job.config.steps for job in todo), 0
    with output.progress(f"{len(todo)} runs", total) as update:
        while waiting or running:
            stop = stopping.is_set() or time.monotonic() > deadline
            while waiting and len(running) < args.workers and not stop:
                running.append(Running(waiting.pop(0), args.out))
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                one.log.close()
                if one.process.returncode == 0:
                    with args.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(one.record()) + "\n")
                    whole, finished = whole + one.job.config.steps, finished + 1
                elif not stop:
                    failed.append(one.job.name)
                    output.note(f"{one.job.name} failed, exit code {one.process.returncode}: see {one.folder}")
            update(whole + sum(one.step for one in running), f"{finished} done")
            if stop and not told:
                told, waiting = True, []
                for one in running:
                    one.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
    return finished, failed


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 when nothing is left, 1 where a run failed, 3 where it was stopped before the end, 2 for usage."""
    args = arguments(argv)
    output = Output(json_mode=args.json)
    try:
        everything = jobs(
            args.study,
            args.size or usual_sizes(args.study),
            args.seeds,
            TrainConfig(steps=args.steps, device=args.device),
            args.only,
        )
        todo = left(everything, read_results(args.results))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.list:
        for job in todo:
            output.note(job.name)
        output.document({"left": [job.name for job in todo]})
        return 0
    args.results.parent.mkdir(parents=True, exist_ok=True)
    finished, failed = sweep(todo, args, output)
    remaining = left(everything, read_results(args.results))
    output.note(f"{finished} runs finished, {len(remaining)} left, results in {args.results.name}")
    if remaining and not failed:
        output.note("the same command goes on from here (exit code 3: not all is done)")
    output.document({"finished": finished, "failed": failed, "left": [job.name for job in remaining]})
    return 1 if failed else 3 if remaining else 0


if __name__ == "__main__":
    sys.exit(main())
