"""`kmeans-route bench`: what it prints, what it refuses, and that nothing wrong is ever timed."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("safetensors")

from typer.testing import CliRunner, Result

from kmeans_route import KMeansRouter
from kmeans_route.bench import baselines, routing_contest
from kmeans_route.bench.clock import Clock
from kmeans_route.bench.contest import Contestant, NotVerifiedError
from kmeans_route.bench.problem import Problem
from kmeans_route.cli import app as commands
from kmeans_route.cli import bench as command
from kmeans_route.cli.output import Output
from kmeans_route.testing import MODEL_SHAPES, BenchShape
from tests.helpers.commands import Terminal

TINY = ("--shape", "24,32,8,2", "--repeats", "2", "--threads", "1", "--device", "cpu")
CPU = torch.device("cpu")


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(commands.app, ["bench", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else runs here, nothing is said of it."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


def test_a_busy_machine_is_said_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1.2, 0.0, 0.0))
    assert invoke(*TINY, "--against", "learned", "--plain").stderr == "", "one thread has a core of its own"
    monkeypatch.setattr(os, "getloadavg", lambda: (3.5, 0.0, 0.0))
    for form in (["--plain"], ["--csv", "-"], ["--json"]):
        done = invoke(*TINY, "--against", "learned", *form)
        assert done.stderr.startswith("warning: 2 cores have a load of 3.5 and this run wants 1: its CPU time alone is")
    (warning,) = json.loads(done.stdout)["warnings"]
    assert done.stderr == f"warning: {warning}\n"


def test_the_warning_names_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (3.5, 0.0, 0.0))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (warning,) = command._warnings(CPU)
        assert "take --threads 1, or set OMP_WAIT_POLICY=passive, or wait for a quiet machine" in warning
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        (warning,) = command._warnings(CPU)
        assert "take --threads 1, or wait for a quiet machine" in warning
    finally:
        torch.set_num_threads(before)


def test_the_command_runs_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    rivals = ("--against", "learned", "--against", "eager")
    first = json.loads(invoke(*TINY, *rivals, "--tokens", "7", "--json").stdout)["environment"]
    words = first["command"].split()
    assert words[:2] == ["kmeans-route", "bench"]
    assert "--tokens" not in words, "no named shape takes them"
    again = json.loads(invoke(*words[2:], "--json").stdout)["environment"]
    assert again["command"] == first["command"]
    assert again["num_threads"] == 1
    assert again["omp_wait_policy"] == "passive"
    given = command.parse_options(
        ["olmoe", "8, 16,4,1"],
        7,
        ["learned compiled"],
        mode="eval",
        dtype="",
        device="cpu",
        repeats=2,
        threads=3,
        csv="f",
    )
    assert given.command == (
        "kmeans-route bench --shape olmoe --shape '8, 16,4,1' --tokens 7 --against 'learned compiled' --mode eval "
        "--dtype float32 --device cpu --repeats 2 --threads 3"
    )


def test_one_thread_is_timed_by_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it sleeps, or another process has the core, nothing is counted."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (asleep_us,) = Clock(CPU).samples_us(lambda: time.sleep(0.05))
        torch.set_num_threads(2)
        (waited_us,) = Clock(CPU).samples_us(lambda: time.sleep(0.05))
    finally:
        torch.set_num_threads(before)
    assert asleep_us < 5e4 <= waited_us


def facts_with(ours: tuple[float, float, float], theirs: tuple[float, float, float]) -> dict[str, Any]:
    contest = routing_contest.ClockedContest(
        Clock(CPU), "t", [Contestant(name, lambda: None) for name in ("kmeans_route", "learned")], ["kmeans_route"]
    )
    contest.verify(lambda: None)
    contest.warm_up()
    contest.times_ms = {"kmeans_route": list(ours), "learned": list(theirs)}
    return command._rows(contest, Problem(BenchShape(8, 16, 4, 1)))["learned"]


def test_rows_whose_quartiles_overlap_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    apart, not_apart = facts_with((1.0, 2.0, 3.0), (4.0, 5.0, 9.0)), facts_with((1.0, 2.0, 3.0), (1.0, 2.5, 90.0))
    assert apart["told_apart"]
    assert apart["ours_over_theirs"] == 0.4
    assert not not_apart["told_apart"]
    ours = {**apart, "told_apart": None, "ours_over_theirs": 1.0}
    for row, cell in ((apart, "0.40"), (not_apart, "0.80~")):
        facts = {"title": "t", "contestants": {"kmeans_route": ours, "learned": row}, "skipped": {}}
        output = Output(plain=True)
        command._show(facts, output)
        command._explain([facts], output)
        shown = capsys.readouterr().out
        assert re.search(rf"^learned .* {cell} ", shown, re.M)
        assert ("~: its quartiles and ours overlap" in shown) == cell.endswith("~")
        assert "learned: a learned softmax router in plain PyTorch" in shown


def test_compiling_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_options: function)
    done = invoke(*TINY, "--against", "learned compiled,learned", "--json")
    assert done.stderr == "compiling learned compiled for 24,32,8,2: minutes where the machine is busy\n"
    assert json.loads(done.stdout)["results"]


def test_help_says_who_they_are() -> None:
    said = " ".join(invoke("--help").stdout.split())
    for name in routing_contest.RIVALS:
        assert f"{name}: {routing_contest.CONTESTANTS[name]}." in said


def test_against_takes_a_list() -> None:
    done = invoke(*TINY, "--against", "eager, learned", "--against", "textbook", "--json")
    (facts,) = json.loads(done.stdout)["results"]
    assert list(facts["contestants"]) == ["kmeans_route", "eager", "learned", "textbook"]
    done = invoke(*TINY, "--against", "eager,everyone")
    assert done.exit_code == 1
    assert "--against must be one of 'eager', " in done.stderr
    assert "got 'everyone'" in done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_json_has_every_contestant_and_consistent_rates(mode: str, dtype: str) -> None:
    done = invoke(*TINY, "--mode", mode, "--dtype", dtype, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    (facts,) = document["results"]
    orders = {"learned, topk first"} if mode == "train" else set()
    assert set(facts["contestants"]) == {"kmeans_route", "eager", "learned", "textbook"} | orders
    assert facts["correct"] is True
    assert facts["skipped"] == {}
    ours = facts["contestants"]["kmeans_route"]
    size = 4 if dtype == "float32" else 2
    for row in facts["contestants"].values():
        assert row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
        assert row["repeats"] == 2
        assert row["ratio"] == pytest.approx(row["median_ms"] / ours["median_ms"])
        assert row["ours_over_theirs"] == pytest.approx(1 / row["ratio"])
        assert row["method"] == "thread time"
        assert row["tokens_per_s"] == pytest.approx(24 / (row["median_ms"] / 1e3))
        assert row["gb_per_s"] == pytest.approx(24 * 32 * size / (row["median_ms"] / 1e3) / 1e9)
    assert set(document["fields"]) <= set(ours), "each field that is explained is there"
    assert document["warnings"] == []
    assert document["environment"]["command"].startswith("kmeans-route bench --shape 24,32,8,2")
    assert "torch" in document["environment"]


def test_plain_is_a_table_without_decoration() -> None:
    done = invoke(*TINY, "--plain", "--against", "eager", "--against", "learned")
    assert done.exit_code == 0
    assert "\x1b" not in done.output
    assert not set(done.output) & set("│┃━─╭╰")
    assert re.search(r"^contestant +median ms +quartiles ms +ours / theirs +tokens/s +GB/s of x$", done.stdout, re.M)
    assert re.search(r"^kmeans_route .* 1\.00 ", done.stdout, re.M)
    assert "24,32,8,2: T=24 D=32 E=8 K=2, float32 on cpu, eval (2 rounds, all results right)" in done.stdout
    assert "textbook" not in done.stdout
    assert done.stderr == "", "progress is for terminals"


def test_csv_to_stdout_and_to_a_file(tmp_path: Path) -> None:
    done = invoke(*TINY, "--shape", "8,16,4,1", "--against", "learned", "--csv", "-")
    assert done.exit_code == 0
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["shape"], row["contestant"]) for row in rows] == [
        (shape, name) for shape in ("24,32,8,2", "8,16,4,1") for name in ("kmeans_route", "learned")
    ]
    assert all(float(row["median_ms"]) > 0 for row in rows)
    path = tmp_path / "rows.csv"
    done = invoke(*TINY, "--against", "learned", "--csv", str(path), "--json")
    (facts,) = json.loads(done.stdout)["results"]
    first = next(csv.DictReader(path.open(encoding="utf-8")))
    assert float(first["median_ms"]) == facts["contestants"]["kmeans_route"]["median_ms"]
    assert str(tmp_path) not in done.stdout


def broken(module: Any, name: str, field: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    right = getattr(module, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        return result._replace(**{field: change(getattr(result, field))})

    return wrong


@pytest.mark.parametrize("output", [["--json"], ["--plain"], ["--csv", "-"]], ids=" ".join)
def test_a_wrong_rival_is_refused(output: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "softmax_plain", broken(baselines, "softmax_plain", "weights", lambda t: t * 1.01))
    done = invoke(*TINY, "--shape", "8,16,4,1", *output)
    assert done.exit_code == 1
    assert "refused, a result is wrong, so no time is shown: learned: gates: error" in done.stderr
    assert "learned: gates: error" in done.stdout or output == ["--plain"]
    for word in ('median_ms":', "quartiles ms", '"ratio": 1', '"thread time"'):
        assert word not in done.stdout
    if output == ["--json"]:
        assert [facts["correct"] for facts in json.loads(done.stdout)["results"]] == [False, False]


def test_a_wrong_shape_does_not_hide_the_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    right = routing_contest._check

    def check(s: Problem, *args: Any) -> None:
        right(s, *args)
        assert s.shape.num_experts != 8, "eight"

    monkeypatch.setattr(routing_contest, "_check", check)
    done = invoke(*TINY, "--shape", "8,16,4,1", "--against", "learned", "--json")
    wrong, good = json.loads(done.stdout)["results"]
    assert done.exit_code == 1
    assert (wrong["correct"], good["correct"]) == (False, True)
    assert "contestants" not in wrong
    assert "kmeans_route: eight" in wrong["error"]


@pytest.mark.parametrize(
    ("target", "field", "change", "mode", "message"),
    [
        ("route", "weights", lambda t: t * 1.001, "eval", "kmeans_route: gates"),
        ("route", "indices", lambda t: t.roll(1, 0), "eval", "kmeans_route: .* rows differ outside near-ties"),
        ("route", "tokens_per_expert", lambda t: t + 1, "eval", "kmeans_route: tokens_per_expert"),
        ("softmax_aux", "weights", lambda t: t.detach() + 1.3 * (t - t.detach()), "train", "learned: d"),
        ("softmax_aux", "aux_loss", lambda t: 20 * t, "train", "learned: d"),
    ],
)
def test_checks_notice(
    target: str, field: str, change: Any, mode: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = routing_contest if target == "route" else baselines
    monkeypatch.setattr(module, target, broken(module, target, field, change))
    setting = Problem(BenchShape(64, 32, 8, 2), torch.float32, CPU, mode)
    with pytest.raises(AssertionError, match=message):
        routing_contest.routing_contest("t", setting, ["learned"], Clock(CPU))


@pytest.mark.parametrize("kind", ["centroid sums", "dx"])
def test_checks_notice_wrong_training(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Problem(BenchShape(64, 32, 8, 2), torch.float32, CPU, "train")
    right = KMeansRouter.forward

    def forward(router: Any, x: torch.Tensor, **options: Any) -> Any:
        result = right(router, x, **options)
        if kind == "centroid sums":
            router.pending.sums[0] *= 1.01
            return result
        w = result.weights
        return result._replace(weights=w.detach() + 1.01 * (w - w.detach()))

    monkeypatch.setattr(KMeansRouter, "forward", forward)
    with pytest.raises(AssertionError, match=f"kmeans_route: {kind}"):
        routing_contest.routing_contest("t", setting, [], Clock(CPU))


def test_the_textbook_is_checked_before_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.TextbookKMeansRouter, "__call__", lambda self, x, update: (
        torch.full((len(x), self.top_k), 1 / self.top_k), torch.arange(self.top_k).expand(len(x), -1)))  # fmt: skip
    setting = Problem(BenchShape(64, 32, 8, 2), torch.float32, CPU, "eval")
    with pytest.raises(AssertionError, match=r"textbook: .* rows differ outside near-ties"):
        routing_contest.routing_contest("t", setting, ["textbook"], Clock(CPU))


def test_who_cannot_run_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler in /usr/bin/somewhere")

    monkeypatch.setattr(torch, "compile", no_compiler)
    rivals = ("--against", "learned compiled", "--against", "compiled reference", "--against", "learned")
    done = invoke(*TINY, *rivals, "--plain")
    assert done.exit_code == 0
    assert "learned compiled: did not run: RuntimeError: no C++ compiler in somewhere" in done.stdout
    assert "compiled reference: did not run" in done.stdout
    rows = list(csv.DictReader(io.StringIO(invoke(*TINY, *rivals, "--csv", "-").stdout)))
    assert [row["contestant"] for row in rows if row["reason"]] == ["learned compiled", "compiled reference"]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiled_rivals(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through dynamo, without the minutes that generated code takes."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="eager", **options))
    done = invoke(*TINY, "--mode", mode, "--against", "learned compiled", "--against", "compiled reference", "--json")
    assert done.exit_code == 0, done.output
    (facts,) = json.loads(done.stdout)["results"]
    assert set(facts["contestants"]) == {"kmeans_route", "learned compiled", "compiled reference"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "olmo"], "--shape must be T,D,E,K or one of olmoe, qwen3, .*, got 'olmo'"),
        (["--shape", "8,16,4"], "--shape must be T,D,E,K"),
        (["--shape", "8,16,-4,1"], "--shape must be T,D,E,K"),
        (["--shape", "8,0,4,1"], "--shape must have T, D, E and K of at least 1, got '8,0,4,1'"),
        (["--shape", "8,16,4,5"], r"top_k must be in \[1, 4\], got 5"),
        (["--against", "everyone"], "--against must be .*eager.*, got 'everyone'"),
        (["--mode", "half"], "--mode must be"),
        (["--dtype", "int8"], "--dtype must be"),
        (["--device", "abacus"], "--device must be cpu or cuda, got 'abacus'"),
        (["--device", "meta"], "--device must be cpu or cuda, got 'meta': nothing else can be timed"),
        (["--csv", "-", "--json"], "--csv - and --json both want stdout"),
        (
            ["--shape", "deepseek-v3", "--tokens", "100000000"],
            "--shape deepseek-v3 needs about [0-9.]+ GB",
        ),
    ],
)
def test_refusals(arguments: list[str], message: str) -> None:
    done = invoke(*(["--device", "cpu"] if "--device" not in arguments else []), *arguments)
    assert done.exit_code == 1
    assert done.stdout == "" or "error" in json.loads(done.stdout)
    assert re.match(f"error: {message}", done.stderr), done.stderr


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    done = invoke("--device", "cuda")
    assert done.exit_code == 1
    assert "--device must be one that torch can use, got 'cuda' with 0 GPUs: try cpu" in done.stderr


def test_named_shapes_take_the_tokens() -> None:
    assert set(command.SHAPE_NAMES.values()) == set(MODEL_SHAPES)
    assert command.parse_shape("DeepSeek-V3", 64) == BenchShape(64, 7168, 256, 8)
    assert command.parse_shape("4, 8,2,1", 64) == BenchShape(4, 8, 2, 1)


def test_nothing_unverified_is_timed() -> None:
    contest = routing_contest.ClockedContest(Clock(CPU), "t", [Contestant("a", lambda: None)], ["a"])
    with pytest.raises(NotVerifiedError):
        contest.warm_up()
    contest.verify(lambda: None)
    with pytest.raises(NotVerifiedError, match="warm_up"):
        contest.round()


def test_nothing_is_timed_where_python_leaves_assertions_out() -> None:
    program = "import sys; from kmeans_route.cli import main; sys.argv = ['kmeans-route', *sys.argv[1:]]; main()"
    words = [sys.executable, "-O", "-c", program, "bench", *TINY, "--against", "learned", "--plain"]
    root = Path(command.__file__).parents[2]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "python -O leaves assertions out, so nothing is checked" in done.stderr
    assert "median" not in done.stdout


def test_progress_on_a_terminal_is_drawn_between_rounds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stdout, stderr = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    before = set(threading.enumerate())
    threads = []
    round_ = routing_contest.ClockedContest.round

    def watched_round(contest: routing_contest.ClockedContest) -> None:
        threads.append(set(threading.enumerate()) - before)
        round_(contest)

    monkeypatch.setattr(routing_contest.ClockedContest, "round", watched_round)
    options = command.parse_options(
        ["8,16,4,1"], 1, ["learned"], mode="eval", dtype="", device="cpu", repeats=2, threads=1, csv=""
    )
    assert command.bench(options, Output()) == 0
    monkeypatch.undo()
    assert "2/2" in stderr.getvalue()
    assert "ours / theirs" in stdout.getvalue()
    assert threads == [set(), set()]
