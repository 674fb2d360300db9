"""The study on a GPU, tried on a CPU: turns, what a stop leaves, the number of steps by a clock, the table, imports."""

import json
import os
import signal
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.plan import NO_START, NOT_FINISHED, RIGHT, WRONG, Timer
from benchmarks.quality import gpu, texts
from kmeans_route.lm.data import load_corpus
from kmeans_route.lm.trainer import StopRequest, Trainer

ROOT = Path(__file__).parents[2]
KMEANS, SIGMOID = gpu.DEFAULT
PREPARING = gpu.WARM_STEPS + gpu.TIMED_STEPS
CORPUS = load_corpus([ROOT / "kmeans_route"])


def toy(folder: Path, *more: str) -> list[str]:
    return ["--toy", "--text", str(ROOT / "kmeans_route"), "--results", str(folder / "lines.jsonl"), *more]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "lines.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainer of each step made, in order."""
    made, plain = list[Trainer](), Trainer.train_step

    def train_step(self: Trainer) -> dict[str, Any]:
        made.append(self)
        return plain(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    return made


def test_they_take_turns_and_the_table_is_what_they_did(
    tmp_path: Path, stepped: list[Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.jsonl").write_text('{"kind": "of another run"}\n', encoding="utf-8")
    assert gpu.main(toy(tmp_path, "--steps", "12")) == RIGHT
    kinds = [trainer.config.router for trainer in stepped]
    assert kinds[: 2 * PREPARING] == ["kmeans"] * PREPARING + ["sigmoid"] * PREPARING
    assert kinds[2 * PREPARING :] == ["kmeans", "sigmoid"] * 12
    trainers = dict(zip((KMEANS, SIGMOID), stepped[-2:], strict=True))
    kept, header, plan, *evaluations, end = lines_of(tmp_path)
    assert kept == {"kind": "of another run"}, "lines are appended"
    assert {"device", "torch", "triton", "python", "date", "command", "commit", "corpus"} <= header.keys()
    assert str(ROOT) not in json.dumps(lines_of(tmp_path))
    assert [(r["contestant"], r["step"]) for r in evaluations] == [
        (name, step) for step in (2, 4, 6, 8, 10, 12) for name in (KMEANS, SIGMOID)
    ]
    assert all(line["run"] == header["date"] for line in (plan, *evaluations, end))
    assert (end["exit_code"], end["ended"]) == (RIGHT, "after its last step")
    said = capsys.readouterr()
    assert said.err == "", "nobody looks at a terminal here"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.out.splitlines() if line[:1] == "|"]
    table = {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows}
    for name, trainer in trainers.items():
        assert plan["contestants"][name]["config"] == trainer.config.to_dict() | {"steps": 12}
        times, again = sorted(record["time_ms"] for record in trainer.history), trainer.evaluate()
        assert len(times) == 12
        vio = statistics.fmean(statistics.fmean(record["max_vio"]) for record in trainer.history)
        assert table["steps"][name] == "12 of 12"
        assert table["bits per byte, held-out"][name] == f"{again.bits_per_byte:.4f}"
        assert table["MaxVio, batches, last 100 steps"][name] == f"{vio:.3f}"
        load = again.tokens_per_expert.double()
        held_out = float((load.amax(1) / load.mean(1) - 1).mean())
        assert table["MaxVio, held-out, counts pooled"][name] == f"{held_out:.3f}"
        assert table["effective experts, mean over layers"][name] == f"{float(again.effective_experts.mean()):.1f}"
        assert table["step, median, ms"][name] == f"{(times[5] + times[6]) / 2:.2f}"
        assert table["step, lower quartile, ms"][name] == f"{times[2] + 0.75 * (times[3] - times[2]):.2f}"
        assert table["tokens/s, of the median step"][name] == f"{8 * 32 * 2e3 / (times[5] + times[6]):.0f}"


def logits_and_dtypes(trainer: Trainer) -> tuple[torch.Tensor, set[torch.dtype]]:
    """What the router scores in a first step, and what the experts return in it and in an evaluation."""
    scores, dtypes = list[Any](), set[torch.dtype]()
    (layer,) = trainer.model.moe_layers
    layer.router.observe(lambda _, routing: scores.append(routing.scores))
    layer.experts.register_forward_hook(lambda _module, _args, y: dtypes.add(y.dtype))
    trainer.train_step()
    trainer.evaluate()
    return scores[0], dtypes


def test_both_start_alike_and_autocast_reaches_the_experts_alone() -> None:
    """It would round the logits of a learned router, as it does in a trainer that takes no care."""
    options = gpu.configs(gpu.arguments(["--toy"]))
    ours, theirs = (gpu.build(options[name], CORPUS) for name in (KMEANS, SIGMOID))
    for name, parameter in ours.model.named_parameters():
        assert torch.equal(parameter, theirs.model.get_parameter(name)), name
    assert torch.equal(ours.sampler.text, theirs.sampler.text)
    assert torch.equal(ours.sampler.generator.get_state(), theirs.sampler.generator.get_state())
    assert logits_and_dtypes(ours)[1] == {torch.bfloat16}
    exact, dtypes = logits_and_dtypes(theirs)
    assert dtypes == {torch.bfloat16}
    assert not torch.equal(exact, exact.bfloat16().float())
    careless, _ = logits_and_dtypes(Trainer(options[SIGMOID], CORPUS, autocast=torch.bfloat16))
    assert torch.equal(careless, careless.bfloat16().float())
    assert logits_and_dtypes(Trainer(options[SIGMOID], CORPUS))[1] == {torch.float32}
    assert {p.dtype for trainer in (ours, theirs) for p in trainer.model.parameters()} == {torch.float32}


def test_active_parameters_are_those_that_a_token_passes_through() -> None:
    args = gpu.arguments(["--toy"])
    for name, router in ((KMEANS, 0), (SIGMOID, 4 * 16)):
        facts = gpu.facts(gpu.build(gpu.configs(args)[name], CORPUS))
        attention, experts, norms, head = 4 * 16 * 16, 3 * 16 * 16, 3 * 16, 256 * 16
        assert facts["active_parameters"] == attention + 2 * experts + norms + head + router
        assert facts["parameters"] == facts["active_parameters"] + 2 * experts + 256 * 16


class Clock:
    """Seconds that pass as the contestants make them pass."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Slow:
    """A contestant whose first step compiles, and whose steps take `longer` as long from the thirtieth on."""

    def __init__(self, clock: Clock, config: Any, *, longer: float) -> None:
        self.clock, self.config, self.longer, self.step = clock, config, longer, 0
        self.step_s = {"kmeans": 0.25, "sigmoid": 0.5}[config.router]
        clock.now += 2.0

    def train_step(self) -> dict[str, Any]:
        self.step += 1
        self.clock.now += self.step_s * (self.longer if self.step > 30 else 1.0)
        if self.step == 1 and self.config.steps == 2400:  # the number that nobody has chosen yet
            self.clock.now += 16.0
        return {"loss_bits": 1.0}

    def evaluate(self) -> None:
        self.clock.now += 1.0


@pytest.mark.parametrize("longer", [1.0, 3.0])
def test_as_many_steps_as_the_clock_allows(longer: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of 300 s, of which 2 (2 + 16 + 13 steps + 2 evaluations) go by before; then a step of both takes 0.75 s.
    When steps turn out to take longer, the clock ends the run, with equal steps and an evaluation."""
    clock, config = Clock(), gpu.configs(gpu.arguments(["--toy"]))
    monkeypatch.setattr(gpu, "build", lambda config, _corpus: Slow(clock, config, longer=longer))
    monkeypatch.setattr(gpu, "facts", lambda trainer: {})

    def evaluated(name: str, trainer: Any) -> dict[str, Any]:
        trainer.evaluate()
        return {"kind": "evaluation", "contestant": name, "step": trainer.step}

    monkeypatch.setattr(gpu, "evaluated", evaluated)
    lines = gpu.Lines(tmp_path / "lines.jsonl", {"kind": "header", "date": "today"})
    session = gpu.Session(gpu.arguments(["--toy", "--minutes", "5"]), lines, StopRequest(), Timer(now=clock))
    code, ended = session.run(config, CORPUS)
    before = 2 * (2 + 16 + 2) + 13 * 0.75
    steps = int((0.95 * (300 - before) - 2 * 2 - 10 * 2) / 0.75)
    (plan,), evaluations = lines.of("plan"), lines.of("evaluation")
    assert plan["steps"] == steps == 284
    assert plan["contestants"][KMEANS]["pace"] == {"build_s": 2, "step_s": 0.25, "evaluation_s": 1, "compile_s": 16}
    done = evaluations[-1]["step"]
    assert [r["contestant"] for r in evaluations[-2:]] == [KMEANS, SIGMOID]
    assert evaluations[-2]["step"] == done
    took_s = clock.now - 1000.0
    assert took_s <= 300 + 0.75 * (longer - 1), "over the limit by no more than a round is longer than foreseen"
    if longer == 1.0:
        assert (code, done) == (RIGHT, steps)
        assert len(evaluations) == 2 * gpu.POINTS
        assert took_s > 0.9 * 300
    else:
        assert code == NOT_FINISHED
        assert ended == f"the clock, after step {done} of 284: the learning rate had not come down"
        assert took_s >= 300 - 0.75 - 2, "no earlier than by a round and an evaluation"
    assert gpu.steps_within(10.0, [gpu.Pace(2, 1, 1, 0)]) == 0, "10 evaluations take all of it"


def at_step(monkeypatch: pytest.MonkeyPatch, router: str, step: int, do: Callable[[Trainer], object]) -> None:
    """Before that step of that contestant, in the run that counts, `do`."""
    plain = Trainer.train_step

    def train_step(self: Trainer) -> dict[str, Any]:
        if (self.config.router, self.step + 1) == (router, step) and self.config.steps != 2400:
            do(self)
        return plain(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("router", ["kmeans", "sigmoid"])
def test_a_stop_leaves_a_comparison(
    router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever is at work when it comes, both are evaluated after equally many steps."""
    at_step(monkeypatch, router, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert gpu.main(toy(tmp_path, "--steps", "50", "--json")) == NOT_FINISHED
    *_, ours, theirs, end = lines_of(tmp_path)
    assert (ours["contestant"], ours["step"]) == (KMEANS, 3)
    assert (theirs["contestant"], theirs["step"]) == (SIGMOID, 3)
    assert end["ended"].startswith("signal 15, after step 3 of 50")
    document = json.loads(capsys.readouterr().out)
    assert document["evaluation"] == [ours, theirs]
    assert document["end"] == [end]


def test_a_second_signal_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(_: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, "sigmoid", 6, twice)
    assert gpu.main(toy(tmp_path, "--steps", "20")) == NOT_FINISHED
    *_, theirs, end = lines_of(tmp_path)
    assert (theirs["contestant"], theirs["step"], end["ended"]) == (SIGMOID, 4, "a second signal")


def test_a_loss_that_is_not_finite_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(monkeypatch, "sigmoid", 3, lambda trainer: trainer.model.head.weight.data.fill_(torch.nan))
    assert gpu.main(toy(tmp_path, "--steps", "10")) == WRONG
    *_, ours, theirs, end = lines_of(tmp_path)
    assert [(ours["contestant"], ours["step"]), (theirs["contestant"], theirs["step"])] == [(KMEANS, 2), (SIGMOID, 2)]
    assert end["ended"] == f"{SIGMOID}: NotFiniteError: the loss of step 3 is nan: lower --lr"
    said = capsys.readouterr()
    assert "| steps | 2 of 10 | 2 of 10 |" in said.out
    assert "Traceback" in said.err


def test_a_run_that_hangs_is_ended_with_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE_S", 0.0)
    lines = gpu.Lines(tmp_path / "lines.jsonl", {"kind": "header", "date": "today"})
    session = gpu.Session(gpu.arguments(["--toy", "--minutes", "0"]), lines, StopRequest(), Timer())
    codes: list[int] = []
    session.stop_when_it_hangs(codes.append).join(timeout=30)
    assert codes == [NOT_FINISHED]
    assert lines_of(tmp_path)[-1]["ended"] == "it hung, and was ended 0 s after the limit"


def test_it_refuses_in_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for argv, sentence in (
        ([], "There is no CUDA or ROCm device that torch can use; --toy runs without one."),
        (["--toy", "--only", "K-Means"], "--only must be among "),
        (["--toy", "--steps", "0"], "--steps must be at least 1, got 0: leave it out for as many as fit"),
        (["--toy", "--accumulate", "3"], "accumulate must divide batch = 8, got 3"),
        (["--toy", "--text", "nowhere"], "--text: nowhere does not exist"),
    ):
        assert gpu.main(argv) == NO_START
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(sentence)
        assert said.err.count("\n") == 1
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.main(["--toy"]) == NO_START
    assert "triton cannot be imported by" in capsys.readouterr().err


def test_the_text_is_all_installed_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "site-packages"
    for name in ("one/a.py", "one/b.txt", "one/tests/c.py", "two.py"):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(f"# {name}\n", encoding="utf-8")
    library = tmp_path / "os.py"
    library.write_text("# the library\n", encoding="utf-8")
    monkeypatch.setattr(texts, "standard_library_files", lambda: (tmp_path, [library]))
    monkeypatch.setattr(sys, "path", [str(packages), str(packages), str(tmp_path)])
    corpus = texts.installed_code()
    assert sorted(corpus.train_files + corpus.validation_files) == ["one/a.py", "os.py", "two.py"]


def test_torch_and_triton_are_enough(tmp_path: Path) -> None:
    """What `make quality-gpu` promises, with all else that an extra of the package brings hidden."""
    code = """
        import sys
        hidden = {"typer", "rich", "matplotlib", "transformers", "safetensors", "hypothesis", "lightning"}
        class Hide:
            def __init__(self, finder):
                self.finder = finder
            def find_spec(self, name, path=None, target=None):
                return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)
        sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
        from benchmarks.quality.gpu import main
        sys.exit(main())
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *toy(tmp_path, "--steps", "1", "--json")],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [r["contestant"] for r in json.loads(done.stdout)["evaluation"]] == [KMEANS, SIGMOID]
