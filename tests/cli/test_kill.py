"""kill -9 of `kmeans-route train`: whatever the moment, a resume gives the bits of the run that was never killed."""

import datetime
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("safetensors")

import kmeans_route
from kmeans_route.lm import checkpoint as checkpoints
from kmeans_route.lm.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.data import Corpus, load_corpus
from kmeans_route.lm.trainer import Trainer
from tests.helpers.commands import write_text

pytestmark = [
    pytest.mark.usefixtures("plain_empty"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL"),
]
TINY = TrainConfig(
    steps=4, layers=1, hidden=16, heads=2, experts=4, expert_hidden=16, seq_len=16, batch=2, eval_bytes=512
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text")


def digest(checkpoint: Checkpoint) -> str:
    """Of everything that a resume depends on: all tensors' bits, and the history without its times."""
    history = [{key: value for key, value in record.items() if key != "time_ms"} for record in checkpoint.history]
    sha = hashlib.sha256(json.dumps([checkpoint.step, checkpoint.config, history]).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def uninterrupted(config: TrainConfig, corpus: Corpus) -> list[str]:
    """The digest of each step of a run that nobody kills, the start included."""
    trainer = Trainer(config, corpus)
    digests = [digest(trainer.checkpoint())]
    while trainer.step < config.steps:
        trainer.train_step()
        digests.append(digest(trainer.checkpoint()))
    assert len(set(digests)) == config.steps + 1
    return digests


# Between any two lines of a save


def in_a_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process. Returns: the signal that killed it, 0 where it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_until_line(folder: Path, checkpoint: Checkpoint, lines: int) -> None:
    """Save, and die before the line of that number of lm/checkpoint.py is run."""
    left = lines

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != checkpoints.__file__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                die()
        return trace

    sys.settrace(trace)
    save_checkpoint(folder, checkpoint)


def save_until_byte(folder: Path, checkpoint: Checkpoint, suffix: str) -> None:
    """Save, and die when half of the file of that suffix is written."""

    def half_written(path: Path, mode: str) -> Any:
        if suffix not in path.name:
            return open(path, mode)
        file = mock.MagicMock()
        file.__enter__().write = lambda payload: (path.write_bytes(payload[: len(payload) // 2]), die())
        return file

    with mock.patch.object(checkpoints, "open", half_written, create=True):
        save_checkpoint(folder, checkpoint)


def resumed_digest(folder: Path, config: TrainConfig, corpus: Corpus) -> str:
    """Resume as the command does, and go to the end."""
    trainer = Trainer(config, corpus)
    trainer.restore(load_checkpoint(folder))
    while trainer.step < config.steps:
        trainer.train_step()
    save_checkpoint(folder, trainer.checkpoint())
    assert len(list(folder.iterdir())) == 2, "an index and its tensor file: nothing that a killed save left"
    return digest(load_checkpoint(folder))


def test_killed_before_every_line_of_a_save(text: Path, tmp_path: Path) -> None:
    corpus = load_corpus([text])
    want = uninterrupted(TINY, corpus)
    trainer = Trainer(TINY, corpus)
    trainer.train_step()
    trainer.train_step()
    old = trainer.checkpoint()
    old = old._replace(tensors={name: tensor.clone() for name, tensor in old.tensors.items()})
    trainer.train_step()
    new = trainer.checkpoint()
    assert [digest(old), digest(new)] == want[2:4]

    resumed: set[tuple[int, str]] = set()

    def attempt(name: str, save: Callable[[Path], None]) -> tuple[int, int]:
        """(signal, step of the checkpoint that survives), after a resume to the end where files of new kinds lie."""
        folder = tmp_path / name
        save_checkpoint(folder, old)
        killed = in_a_child(lambda: save(folder))
        survivor = load_checkpoint(folder)
        assert digest(survivor) == want[survivor.step]
        left = survivor.step, " ".join(sorted(f"{path.name[:12]} {path.stat().st_size}" for path in folder.iterdir()))
        if left not in resumed:
            resumed.add(left)
            assert resumed_digest(folder, TINY, corpus) == want[-1], name
        return killed, survivor.step

    outcomes = []
    for lines in range(1000):
        outcomes.append(attempt(f"line-{lines}", lambda folder, n=lines: save_until_line(folder, new, n)))
        if outcomes[-1][0] == 0:
            break
    *killed, alive = outcomes
    assert alive == (0, 3)
    assert len(killed) > 40
    assert {code for code, _ in killed} == {signal.SIGKILL}
    steps = [step for _, step in killed]
    assert steps == sorted(steps), "one moment parts the old checkpoint from the new one"
    assert set(steps) == {2, 3}
    for suffix in (".safetensors", checkpoints.INDEX_NAME):
        assert attempt(f"half{suffix}", lambda folder, s=suffix: save_until_byte(folder, new, s)) == (9, 2)
    assert len(resumed) >= 8


def test_killed_in_the_first_save_leaves_no_checkpoint(text: Path, tmp_path: Path) -> None:
    trainer = Trainer(TINY, load_corpus([text]))
    trainer.train_step()
    for suffix in (".safetensors", checkpoints.INDEX_NAME):
        folder = tmp_path / f"run{suffix}"
        assert in_a_child(lambda folder=folder, s=suffix: save_until_byte(folder, trainer.checkpoint(), s)) == 9
        assert any(folder.iterdir())
        assert not checkpoints.exists(folder)
        with pytest.raises(checkpoints.CheckpointError, match="start a run without --resume"):
            load_checkpoint(folder)
        save_checkpoint(folder, trainer.checkpoint())
        assert len(list(folder.iterdir())) == 2


# At random moments of the command


def start(run: Path, text: Path, config: TrainConfig, log: Any) -> subprocess.Popen[bytes]:
    """`kmeans-route train` with a checkpoint after every step; it resumes where there is one."""
    options = ["--resume"] if checkpoints.exists(run) else []
    if not options:
        names = ("steps", "layers", "hidden", "heads", "experts", "expert_hidden", "seq_len", "batch", "eval_bytes")
        options = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]
        options += ["--text", str(text)]
    root = str(Path(kmeans_route.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    program = "import sys; sys.modules['matplotlib'] = None; from kmeans_route.cli import main; main()"  # no report
    command = [sys.executable, "-c", program, "train", "--save-every", "1"]
    return subprocess.Popen(
        [*command, *options, "--out", str(run)], env=environment, cwd=root, stdout=subprocess.DEVNULL, stderr=log
    )


def seen(run: Path) -> tuple[int, int]:
    try:
        status = (run / checkpoints.INDEX_NAME).stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_ino, status.st_mtime_ns


def landing(run: Path, before: set[str], saved: bool) -> str:
    """Where a kill landed, by what it left behind."""
    files = {path.name for path in run.iterdir()} if run.exists() else set()
    if any(name.startswith(".") for name in files - before):
        return "while writing a file"
    tensors = {name for name in files if name.startswith("step-")}
    if len(tensors) > 1:
        return "between the two files of a save" if tensors - before else "before the old file was removed"
    return "in a step" if saved else "before the first save"


class Chain:
    """One run after the other, each killed and resumed until it is done."""

    def __init__(self, config: TrainConfig, text: Path, folder: Path, seed: int) -> None:
        self.config, self.text, self.folder = config, text, folder
        self.random = random.Random(seed)
        self.want = uninterrupted(config, load_corpus([text]))
        self.runs = self.kills = self.resumes = self.equal = 0
        self.landed: Counter[str] = Counter()

    def check(self, run: Path) -> int:
        """The step of the checkpoint that the kill left; its bits are those of the uninterrupted run."""
        if not checkpoints.exists(run):
            return 0
        survivor = load_checkpoint(run)
        assert digest(survivor) == self.want[survivor.step], f"step {survivor.step} after {self.kills} kills"
        self.equal += 1
        return survivor.step

    def one_life(self, run: Path, *, kill: bool) -> bool:
        """Start or resume a run, and kill it at a random moment. Returns: whether it came to its end before."""
        self.resumes += checkpoints.exists(run)
        before, first = {path.name for path in run.iterdir()} if run.exists() else set(), seen(run)
        with (self.folder / "log.txt").open("wb") as log:
            process = start(run, self.text, self.config, log)
            if kill:
                if self.random.random() < 0.1:  # while it starts, or soon after
                    time.sleep(self.random.uniform(0, 4))
                else:  # in the steps and saves that follow the first one
                    while seen(run) == first and process.poll() is None:
                        time.sleep(0.002)
                    time.sleep(self.random.uniform(0, 0.5))
                process.kill()
            code = process.wait(timeout=300)
        if code == 0:
            return True
        assert kill, (self.folder / "log.txt").read_text()
        assert code == -signal.SIGKILL, (self.folder / "log.txt").read_text()
        self.kills += 1
        self.landed[landing(run, before, seen(run) != first)] += 1
        return False

    def go(self, kills: int) -> None:
        """Kill that often, then let the last run end."""
        while self.kills < kills:
            self.runs += 1
            run = self.folder / f"run-{self.runs}"
            while not self.one_life(run, kill=self.kills < kills):
                self.check(run)
            assert self.check(run) == self.config.steps
            assert len(list(run.glob("step-*"))) == 1
            assert not list(run.glob(".*"))


@pytest.mark.parametrize(
    ("kills", "steps"), [(3, 60), pytest.param(50, 400, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_killed_at_random_moments(kills: int, steps: int, text: Path, tmp_path: Path) -> None:
    start_s, seed = time.monotonic(), int.from_bytes(os.urandom(4), "little")
    chain = Chain(replace(TINY, steps=steps), text, tmp_path, seed)
    chain.go(kills)
    assert chain.kills == kills
    summary = {
        "what": "kill -9 of `kmeans-route train --save-every 1`, resumed until done; equal: checkpoints left by a kill "
        "or by the end whose tensors and history have the bits of the uninterrupted run",
        "command": "python -m pytest tests/cli/test_kill.py -m slow",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "kills": chain.kills,
        "landed": dict(sorted(chain.landed.items())),
        "runs": chain.runs,
        "steps_per_run": steps,
        "resumes": chain.resumes,
        "checkpoints_compared": chain.equal,
        "checkpoints_equal": chain.equal,
        "seed": seed,
        "seconds": round(time.monotonic() - start_s),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
    print(json.dumps(summary, indent=2))
    folder = os.environ.get("KMEANS_ROUTE_SUMMARY")
    if folder and kills >= 50:
        path = Path(folder) / "reliability-kills.json"
        path.write_text(json.dumps(summary, indent=2) + "\n")
