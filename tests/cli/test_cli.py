"""The `kmeans-route` command: output modes, exit codes, demo report, resume, selftest."""

import base64
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

import kmeans_route
from kmeans_route import cli
from kmeans_route.cli import app as commands
from kmeans_route.cli import demo as demonstration
from kmeans_route.cli import output as speaking
from kmeans_route.cli import selftest
from kmeans_route.cli.output import Output, duration, to_json
from kmeans_route.install import install_line
from kmeans_route.lm import results
from kmeans_route.lm.checkpoint import load_checkpoint
from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.data import load_corpus
from kmeans_route.lm.trainer import Trainer
from tests.conftest import INTERPRETED
from tests.helpers.commands import Terminal, invoke, write_text

SIZES = {"layers": 2, "hidden": 16, "heads": 2, "experts": 4, "expert_hidden": 16, "seq_len": 16, "batch": 4}
SIZES |= {"eval_bytes": 512}
TINY = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(value))]
ESCAPE = "\x1b"
QUALITY = Path(kmeans_route.__file__).resolve().parents[1] / "docs" / "quality.md"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text")


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with a model that trains in a second."""

    def small(**options: object) -> TrainConfig:
        return TrainConfig(**{**options, **SIZES})  # type: ignore[arg-type]

    monkeypatch.setattr(commands, "TrainConfig", small)


# Demo


@pytest.mark.usefixtures("small_demo")
def test_demo_writes_a_report_that_needs_nothing_else(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    arguments = ("demo", "--text", text, "--steps", 12, "--seeds", "0 3", "--out", out, "--threads", 1, "--json")
    code, document = invoke(*arguments)
    assert code == 0
    assert [run["seed"] for run in document["runs"]] == [0, 0, 0, 3, 3, 3]
    assert len(document["checks"]) == 2
    labels = ["K-Means, proportional", "softmax, aux loss 0.01", "sigmoid, loss-free sign"]
    assert list(document["means"]) == labels
    bits = [run["measures"]["bits_per_byte"] for run in document["runs"] if run["label"] == labels[0]]
    assert document["means"][labels[0]]["bits_per_byte"] == pytest.approx(sum(bits) / 2)

    page = (out / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    (link,) = re.findall(r"<a href='([^']+)'>docs/quality.md</a>", page)
    assert (out / link).resolve() == QUALITY
    captions = re.findall(r"</h2><figure><img[^>]+><figcaption>(.*?)</figcaption>", page)
    assert len(captions) == 4
    assert all(caption.endswith(".") for caption in captions)
    assert (
        "A block on it that is as dark as the diagonal is a group of experts that ask for the same tokens"
        in captions[3]
    )
    embedded = [base64.b64decode(data) for data in re.findall(r"src='data:image/png;base64,([^']+)'", page)]
    assert len(embedded) == page.count("<img") == 4
    assert {path.read_bytes() for path in out.glob("*.png")} == set(embedded)
    assert all(picture.startswith(b"\x89PNG") for picture in embedded)
    assert all(label in page for label in labels)
    assert "prefers-color-scheme: dark" in page
    assert "name='viewport'" in page

    stored = json.loads((out / "results.json").read_text())["runs"]
    assert [len(run["history"]) for run in stored] == [12] * 6
    assert stored[0]["measures"] == document["runs"][0]["measures"]
    first_losses = {run["history"][0]["loss_bits"] for run in stored if run["config"]["seed"] == 0}
    assert max(first_losses) - min(first_losses) < 0.1


@pytest.mark.usefixtures("small_demo")
def test_demo_tells_what_one_seed_can_tell_and_no_more(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    arguments = ["demo", "--text", str(text), "--steps", "6", "--out", str(out), "--threads", "1", "--plain"]
    result = CliRunner().invoke(commands.app, arguments)
    code, said = result.exit_code, result.stdout
    assert code == 0
    assert said.startswith("3 routers, seed 0, 6 steps of 64 bytes on ")
    for line in result.stderr.splitlines():
        assert re.fullmatch(r"seed 0: \d/6, K-Means \d.\d\d, softmax \d.\d\d, sigmoid \d.\d\d, .* left", line)
    assert result.stderr.count("\n") == 6
    assert ESCAPE not in said
    assert not set(said) & set("│┃━─╭╰")
    can, cannot = said.split("What one seed cannot tell: quality.")
    for measure in results.MEASURES:
        assert (measure.label in can) == (measure.key in results.ROUTING)
    assert re.search(r"^step time / that of K-Means +1\.00 ", can, flags=re.MULTILINE)
    assert "validation bits per byte" in cannot
    assert re.search(r"^study: 800 steps, 3 seeds +2\.\d{3} ± ", cannot, flags=re.MULTILINE)
    assert not re.search(r"FAILED|passed|^(yes|no): ", said, flags=re.MULTILINE)
    tables = said.partition("What this run")[2].partition("report:")[0]
    assert max(map(len, tables.splitlines())) <= 80
    *_, place, last = said.splitlines()
    assert str(out / "report.html") in place
    assert last.startswith("In training K-Means' fullest expert took ")
    assert last.endswith("stands in docs/quality.md.")
    assert ". " not in last, "one sentence"
    page = (out / "report.html").read_text()
    assert "So small a run says little of balance: 32 tokens an expert" in said
    assert "So small a run says little of balance: 32 tokens an expert" in page
    assert "What one seed cannot tell" in page
    assert "class='no'" not in page


def test_the_figures_of_the_study_are_those_of_its_page() -> None:
    section = QUALITY.read_text().partition("## A shorter study: `make demo-seeds`")[2]
    (row,) = re.findall(r"^\| validation bits per byte \| (.*) \|$", section, flags=re.MULTILINE)
    assert [cell.strip("* ") for cell in row.split("|")] == list(results.STUDY.values())
    assert list(results.STUDY) == [contestant["router"] for contestant in demonstration.CONTESTANTS]
    assert re.search(r"800 steps.* seeds\s+0, 1, 2", section)


def test_contestants_take_turns_and_their_times_are_paired(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trains as it would alone; a machine that slows down as it goes on slows all of them."""
    turns: list[str] = []
    train_step = Trainer.train_step

    def step(trainer: Trainer) -> dict[str, object]:
        record = train_step(trainer)
        turns.append(trainer.config.router)
        record["time_ms"] = {"kmeans": 4.0, "softmax": 2.0, "sigmoid": 3.0}[trainer.config.router] * trainer.step**2
        return record

    configs = [TrainConfig(router=router, steps=5, **SIZES) for router in ("kmeans", "softmax", "sigmoid")]
    corpus = load_corpus([text])
    monkeypatch.setattr(Trainer, "train_step", step)
    runs = demonstration.race(configs, corpus, tmp_path, Output(json_mode=True))
    rounds = [turns[start : start + 3] for start in range(0, 15, 3)]
    assert all(set(one) == {"kmeans", "softmax", "sigmoid"} for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1, "the order is drawn anew"
    assert [run["measures"]["time_ratio"] for run in runs] == [1.0, 0.5, 0.75]
    for config, run in zip(configs, runs, strict=True):
        alone = Trainer(config, corpus)
        for _ in range(5):
            alone.train_step()
        assert [record["loss_bits"] for record in run["history"]] == [record["loss_bits"] for record in alone.history]


def test_a_stopped_demo_leaves_a_checkpoint_of_each(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = Trainer.train_step

    def step(trainer: Trainer) -> dict[str, object]:
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT) if trainer.config.router == "softmax" else None
        return train_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", step)
    monkeypatch.setattr(commands, "TrainConfig", lambda **options: TrainConfig(**{**options, **SIZES}))
    out = tmp_path / "report"
    code, document = invoke("demo", "--text", text, "--steps", 6, "--out", out, "--threads", 1, "--json")
    assert code == 130
    assert document["step"] == 3
    folders = [Path(one["checkpoint"]) for one in document["checkpoints"]]
    assert [folder.name for folder in folders] == ["kmeans-seed0", "softmax-seed0", "sigmoid-seed0"]
    assert [load_checkpoint(folder).step for folder in folders] == [3, 3, 3]
    assert document["resume"] == f"kmeans-route train --resume --out {folders[0]}"


def test_demo_refusals(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seeds, message in (("a b", "must be whole numbers"), ("1 1", "must differ"), ("", "must be whole numbers")):
        code, said = invoke("demo", "--text", text, "--seeds", seeds, "--out", tmp_path, "--json")
        assert code == 1
        assert message in said["error"]
    monkeypatch.setattr(demonstration, "find_spec", lambda name: None)
    code, said = invoke("demo", "--text", text, "--out", tmp_path, "--json")
    assert code == 1
    assert said["error"] == f"the demo draws pictures: {install_line('cli', 'viz')}"


def run_of(label: str, bits: float, max_vio: float) -> results.Run:
    measures = {measure.key: 0.0 for measure in results.MEASURES}
    measures |= {"bits_per_byte": bits, "max_vio_validation": max_vio}
    return {
        "label": label,
        "measures": measures,
        "config": {"layers": 2, "experts": 4, "steps": 40, "seed": int(100 * bits)},
    }


def test_verdicts_can_pass_and_fail() -> None:
    learned = [run_of("softmax", 2.0, 0.3), run_of("softmax", 2.2, 0.1), run_of("sigmoid", 2.3, 0.5)]
    good = results.verdicts([run_of("K-Means", 2.1, 0.1), run_of("K-Means", 2.18, 0.2), *learned])
    assert [check["passed"] for check in good] == [True, True]
    assert "0.150 against 0.200 (softmax)" in good[0]["text"]
    assert "+0.040 (softmax)" in good[1]["text"]
    bad = results.verdicts([run_of("K-Means", 2.2, 0.3), *learned])
    assert [check["passed"] for check in bad] == [False, False]
    one_seed = [{**run, "config": {**run["config"], "seed": 0}} for run in [run_of("K-Means", 2.2, 0.3), *learned]]
    assert results.verdicts(one_seed) == []


def test_small_runs_say_that_they_tell_little_of_balance() -> None:
    smoke = TrainConfig(steps=60, hidden=32, batch=8, seq_len=64).to_dict()
    assert results.not_yet_balanced(smoke) == (
        "So small a run says little of balance: 64 tokens an expert and commit (about 100 are needed), 60 steps (some "
        "hundred are needed); see docs/api.md."
    )
    assert "steps" not in results.not_yet_balanced({**smoke, "steps": 400})
    assert "tokens" not in results.not_yet_balanced({**smoke, "commit_every": 2})
    demo = TrainConfig(steps=demonstration.DEMO_STEPS).to_dict()
    assert results.not_yet_balanced(demo) == ""


def test_table_shows_mean_and_spread_over_seeds() -> None:
    runs = [run_of("K-Means", 2.0, 0.1), run_of("K-Means", 3.0, 0.3), run_of("softmax", 2.5, 0.5)]
    columns, rows = results.table_rows(runs)
    assert columns == ["measure", "K-Means", "softmax"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["validation bits per byte"] == ["2.500 ± 0.707", "2.500"]
    assert cells["dead experts (of 8)"][0] == "0.0 ± 0.0"
    assert "MaxVio, training, last 40 steps" in cells
    runs[0]["measures"]["coupling"] = float("nan")
    assert results.table_rows(runs)[1][7] == ["router-expert coupling", "n/a", "0.00"]


# Train


def test_train_saves_resumes_and_refuses(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", "--text", text, "--router", "softmax", "--steps", 6, *TINY, "--threads", 1, "--out", out]
    code, document = invoke(*arguments, "--json")
    assert code == 0
    assert document["completed"] is True
    assert document["measures"]["bits_per_byte"] < 8.2
    assert len(document["layers"]["load"]) == 2
    assert load_checkpoint(out).step == 6
    assert (out / "report.html").exists()

    code, said = invoke(*arguments, "--json")
    assert code == 1
    assert "already holds a run: add --resume" in said["error"]
    code, said = invoke("train", "--resume", "--out", out, "--lr", "0.5", "--router", "softmax", "--json")
    assert code == 1
    assert "these differ: lr (checkpoint 0.003, asked 0.5)" in said["error"]
    code, said = invoke("train", "--resume", "--out", out, "--json")
    assert code == 0
    assert said["measures"] == document["measures"]
    code, said = invoke("train", "--resume", "--out", out, "--plain")
    assert code == 0
    assert "already at step 6 of 6: add --more-steps N to go on\n" in said
    assert "So small a run says little of balance: 32 tokens an expert and commit" in said
    code, said = invoke("train", "--resume", "--more-steps", 1, "--out", out, "--plain")
    assert code == 0
    assert "already at" not in said
    code, said = invoke("train", "--resume", "--overwrite", "--out", out, "--json")
    assert (code, "got both: leave one out" in said["error"]) == (1, True)
    code, _ = invoke(*arguments, "--overwrite", "--plain")
    assert code == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--router", "softmax", "--tau", 0.3), "--tau must be left out with --router softmax"),
        (("--router", "sigmoid", "--decay", 0.5), "--decay must be left out with --router sigmoid"),
        (("--router", "softmax", "--bias-rate", 0.5), "--bias-rate must be left out with --router softmax and"),
        (("--aux-loss-coef", 0.5), "--aux-loss-coef must be left out with --router kmeans"),
        (("--router-option", "tau=0.3"), "name it as --tau"),
        (("--router-option", "balanse=sign"), "did you mean 'balance'?"),
    ],
)  # fmt: skip
def test_train_refuses_options_that_would_do_nothing(
    given: tuple[object, ...], message: str, text: Path, tmp_path: Path
) -> None:
    code, said = invoke("train", "--text", text, "--steps", 1, *TINY, "--out", tmp_path / "run", *given, "--json")
    assert code == 1
    assert message in said["error"]


def test_train_takes_any_option_of_the_router(text: Path, tmp_path: Path) -> None:
    few = ["train", "--text", text, "--steps", 2, *TINY, "--threads", 1, "--json"]
    options = ["--router-option", "gate=uniform", "--router-option", "detach_gates=true"]
    code, _ = invoke(*few, *options, "--out", tmp_path / "a")
    assert code == 0
    want = {"directions": "whitened", "gate": "uniform", "detach_gates": True}
    assert load_checkpoint(tmp_path / "a").config["router_options"] == want
    code, _ = invoke("train", "--resume", "--out", tmp_path / "a", *options, "--json")
    assert code == 0
    for given, message in (
        ("gats=uniform", "router_options must be among average, .*, got gats"),
        ("tau=0.2", "router_options must be among .*, got tau"),
        ("gate=hard", "gate must be one of"),
        ("gate", "--router-option must be NAME=VALUE, got 'gate'"),
    ):
        code, said = invoke(*few, "--router-option", given, "--out", tmp_path / "b")
        assert code == 1
        assert re.search(message, said["error"]), said


def test_train_says_what_is_wrong_in_one_line(text: Path, tmp_path: Path) -> None:
    arguments = ["train", "--text", str(text), "--out", str(tmp_path / "run"), "--top-k", "99"]
    result = CliRunner().invoke(commands.app, arguments)
    assert result.exit_code == 1
    assert result.stderr == "error: top_k must be in [1, 16], got 99: lower --top-k or raise --experts\n"
    assert CliRunner().invoke(commands.app, ["train", "--steps", "many"]).exit_code == 2


# Info and selftest


def test_info_names_versions_and_backends() -> None:
    code, facts = invoke("info", "--json")
    assert code == 0
    assert facts["torch"] == torch.__version__
    assert facts["kmeans_route"] == kmeans_route.__version__
    assert facts["backends"]["reference"] == facts["backends"]["torch"] == "available"
    assert facts["devices"][0] == "cpu"
    code, said = invoke("info", "--plain")
    assert ESCAPE not in said
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", said, flags=re.MULTILINE)


def test_selftest_passes() -> None:
    code, document = invoke("selftest", "--threads", 1, "--json")
    assert document["passed"], [check for check in document["checks"] if not check["passed"]]
    assert code == 0
    assert len(document["checks"]) > 10


def broken_route(
    field: str, change: Callable[[torch.Tensor], torch.Tensor], backend: str = "torch"
) -> Callable[..., kmeans_route.Routing]:
    right = kmeans_route.route

    def route(*arguments: object, **options: object) -> kmeans_route.Routing:
        routing = right(*arguments, **options)  # type: ignore[arg-type]
        if options.get("backend") == backend:
            routing = routing._replace(**{field: change(getattr(routing, field))})
        return routing

    return route


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("weights", lambda tensor: tensor * 1.001, "gates are off by"),
        ("weights", lambda tensor: tensor.detach() + 0.001 * (tensor - tensor.detach()), "gradients are off by"),
        ("indices", lambda tensor: tensor.roll(1, 0), "rows chose other experts"),
        ("tokens_per_expert", lambda tensor: tensor + 1, "the counts sum to"),
        ("valid", lambda tensor: ~tensor, "the valid tokens differ"),
    ],
)
def test_selftest_notices_a_wrong_backend(
    field: str, change: Callable[[torch.Tensor], torch.Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans_route, "route", broken_route(field, change))
    problems = []
    for case in selftest.CASES:
        try:
            selftest.check_route(case)
        except AssertionError as error:
            problems.append(str(error))
    assert any(message in problem for problem in problems), problems


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_selftest_checks_the_kernels_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(name.startswith("kernels: ") for name, _ in selftest.all_checks()) == 6
    wrong = broken_route("weights", lambda tensor: tensor * 1.001, "triton")
    monkeypatch.setattr(kmeans_route, "route", wrong)
    with pytest.raises(AssertionError, match="gates are off by"):
        selftest.check_route(selftest.KERNEL_CASES[1], "triton")
    monkeypatch.setattr(selftest, "INTERPRETED", False)
    assert not any(name.startswith("kernels: ") for name, _ in selftest.all_checks())


def test_selftest_notices_a_wrong_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans_route.KMeansRouter, "_check_unattached", lambda router: None)
    monkeypatch.setattr(kmeans_route.KMeansRouter, "commit", lambda router: router.centroids.add_(0.1))
    with pytest.raises(AssertionError, match="centroids are off by"):
        selftest.check_commit()
    monkeypatch.setattr(kmeans_route.KMeansRouter, "commit", lambda router: router.weight.fill_(torch.nan))
    with pytest.raises(AssertionError, match="NaN reached the centroids"):
        selftest.check_not_a_number()


def test_selftest_fails_with_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise AssertionError("two is not one")

    monkeypatch.setattr(selftest, "all_checks", lambda: iter([("good", lambda: "fine"), ("bad", fail)]))
    code, said = invoke("selftest", "--plain")
    assert code == 1
    assert re.search(r"^bad +FAIL$", said, flags=re.MULTILINE)
    assert "bad: AssertionError: two is not one" in said
    assert "1 of 2 checks passed" in said


# Smoke


def makefile() -> str:
    return (Path(kmeans_route.__file__).parents[1] / "Makefile").read_text()


def test_the_commands_of_make_smoke_work(tmp_path: Path) -> None:
    sizes = re.search(r"^SMOKE_SIZES := (.*)", makefile(), re.M)
    recipe = re.search(r"^smoke: \$\(VENV\)/\.commands\n((?:\t.*\n)+)", makefile(), re.M)
    assert sizes
    assert recipe
    lines = re.findall(r"\$\(BIN\)/kmeans-route (.*)", recipe[1].replace("$(SMOKE_SIZES)", sizes[1]))
    assert [line.split()[0] for line in lines] == ["info", "selftest", "train", "train", "inspect"]
    for line in lines[2:]:
        code, _ = invoke(*line.replace("build/smoke", str(tmp_path / "smoke")).split(), "--json")
        assert code == 0, line
    assert load_checkpoint(tmp_path / "smoke").step == 60


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_commands_install_what_they_use_and_the_tests_the_rest(tmp_path: Path) -> None:
    for target, rest in (("smoke", False), ("demo", False), ("demo-seeds", False), ("test", True), ("style", True)):
        command = ["make", "--dry-run", f"VENV={tmp_path / 'absent'}", target]
        root = Path(kmeans_route.__file__).parents[1]
        said = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
        installs = [line for line in said.splitlines() if "/pip install " in line]
        assert installs[0].endswith("-c constraints.txt torch"), "first, so that nothing else chooses its build"
        assert installs[1].endswith('-e ".[cli,viz,triton]"')
        assert any(".[dev]" in line for line in installs) == rest
        assert any("frameworks.txt" in line for line in installs) == rest


def test_contributing_says_how_long_each_target_takes() -> None:
    page = (Path(kmeans_route.__file__).parents[1] / "CONTRIBUTING.md").read_text()
    targets = re.findall(r"^## make ([\w-]+)", makefile(), re.M)
    assert len(targets) > 15
    for target in targets:
        lines = re.findall(rf"^make {target} +# (.*)$", page, re.M)
        assert len(lines) == 1, f"CONTRIBUTING.md has one line for make {target}"
        assert re.match(r"((\d+( to \d+)?|many|a few) (seconds|minutes?|hours)|not timed)\b", lines[0]), lines[0]


# Output


def speak(
    monkeypatch: pytest.MonkeyPatch, *, plain: bool = False, json_mode: bool = False, **environ: str
) -> tuple[str, str]:
    """What a terminal sees of a table, a note, an error and a progress bar: (stdout, stderr)."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", **environ}.items():
        monkeypatch.setenv(name, value)
    stdout, stderr = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    output = Output(json_mode=json_mode, plain=plain)
    output.table("title", ["name", "number"], [["[bold]a[/bold]", "1"]])
    output.note("a note: [2, 3]")
    output.fail("a failure")
    with output.progress("training", 2) as update:
        update(1, "loss [1]")
        update(2, "loss [2]")
    monkeypatch.undo()
    return stdout.getvalue(), stderr.getvalue()


def test_terminal_gets_colour_boxes_and_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, stderr = speak(monkeypatch)
    assert ESCAPE in stdout
    assert "─" in stdout
    assert "[bold]a[/bold]" in stdout
    assert "a note: [2, 3]\n" in stdout
    assert "━" in stderr
    assert "2/2" in stderr


def test_plain_has_no_escapes_boxes_or_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"plain": True}, {"plain": True, "FORCE_COLOR": "1"}, {"TERM": "dumb"}):
        stdout, stderr = speak(monkeypatch, **options)  # type: ignore[arg-type]
        assert ESCAPE not in stdout + stderr, options
        assert not set(stdout + stderr) & set("─━"), options
        assert "name            number\n[bold]a[/bold]       1\n" in stdout
        assert stderr == "error: a failure\ntraining: 1/2, loss [1], 0 s left\ntraining: 2/2, loss [2], 0 s left\n"


def test_lines_of_progress_come_at_tenths_however_far_a_leap_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with Output(plain=True).progress("work", 105, 7) as update:
        for now in (7, 9, 13, 19, 31, 31, 104, 105, 105):
            update(now, "busy")
    monkeypatch.undo()
    assert re.findall(r"work: (\d+)/105", stderr.getvalue()) == ["13", "31", "104", "105"]


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, stderr = speak(monkeypatch, NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*m", stdout + stderr)


def test_json_mode_prints_documents_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, stderr = speak(monkeypatch, json_mode=True)
    assert json.loads(stdout) == {"error": "a failure"}
    assert stderr == "error: a failure\n"


def test_json_is_strict() -> None:
    assert json.loads(to_json({"a": [float("nan"), (float("inf"), 1.5)], "b": None})) == {
        "a": [None, [None, 1.5]],
        "b": None,
    }


def test_durations_read_well() -> None:
    assert [duration(value) for value in (0.4, 59.4, 61, 7620)] == ["0 s", "59 s", "1 min 01 s", "2 h 07 min"]


@pytest.mark.parametrize("plain", [True, False])
def test_tables_fit_the_terminal(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headings fold, rows do not: one line a row."""
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    stdout = Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    columns = ["measure", "K-Means, proportional", "softmax, aux loss 0.01", "sigmoid, loss-free sign"]
    rows = [[f"{'a row ':-<32}", *["12.345 ± 0.678"[:13]] * 3] for _ in range(3)]
    Output(plain=plain).table("title", columns, rows)
    Output(plain=plain).table("few", ["name", "two words"], [["a", "1"]])
    monkeypatch.undo()
    lines = stdout.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("a row" in line and line.count("±") == 3 for line in lines) == 3
    assert any(re.fullmatch(r"name +two words", line.strip()) for line in lines), "headings fold only where they must"


def test_tables_of_the_commands_fit_80_columns(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tables, lines_of = tmp_path / "run", [], speaking._plain_table

    def recorded(*arguments: Any, **options: Any) -> list[str]:
        tables.append(lines_of(*arguments, **options))
        return tables[-1]

    monkeypatch.setattr(speaking, "_plain_table", recorded)
    for command in (
        ["info"],
        ["selftest"],
        ["bench", "--shape", "300,64,16,2", "--mode", "train", "--repeats", 2, "--device", "cpu"],
        ["train", "--text", text, "--steps", 2, *TINY, "--threads", 1, "--out", run],
        ["inspect", run, "--text", text],
    ):
        code, said = invoke(*command, "--plain")
        assert code == 0, said
        _, _, *lines = tables.pop()
        widest = max(lines, key=len)
        assert len(widest) <= 80, widest


def test_the_help_tells_each_command_in_a_whole_line() -> None:
    code, said = invoke("--help")
    assert code == 0
    commands_told = said.partition("Commands:\n")[2].splitlines()
    assert len(commands_told) == len(commands.app.registered_commands)
    for line in commands_told:
        assert line.endswith("."), line
        assert not line.endswith("..."), line
    result = CliRunner().invoke(commands.app, ["inspct"])
    assert (result.exit_code, "Did you mean 'inspect'?" in result.stderr) == (2, True)


def test_version() -> None:
    code, said = invoke("--version")
    assert (code, said) == (0, f"kmeans-route {kmeans_route.__version__}\n")


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("typer", "rich") else object())
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"error: kmeans-route needs typer, rich: {install_line('cli')}\n"


def test_entry_point_runs_as_a_process() -> None:
    root = Path(kmeans_route.__file__).parents[1]
    program = "import sys; from kmeans_route.cli import main; sys.argv[0] = 'kmeans-route'; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "info", "--json"], cwd=root, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["command"] == "info"
    assert done.stderr == ""
