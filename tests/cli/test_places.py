"""Where commands write: a bad place is told before any work, and nothing is replaced in silence."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("safetensors")

from kmeans_route.cli import app as commands
from kmeans_route.cli import bench, demo, inspect, places, trained, watch
from kmeans_route.cli.train import resumed
from kmeans_route.lm.checkpoint import CheckpointError, load_checkpoint
from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.data import load_corpus
from kmeans_route.lm.trainer import Trainer, learning_rate
from tests.helpers.commands import invoke, write_text

SIZES = "--layers 1 --hidden 16 --heads 2 --experts 4 --expert-hidden 16 --seq-len 16 --batch 2 --eval-bytes 512"
FEW = ("--calibration-bytes", 128)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a softmax router, without a report."""
    folder = tmp_path_factory.mktemp("runs")
    text = write_text(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kmeans_route.cli.train.find_spec", lambda name: None)
        options = ["--router", "softmax", "--steps", 2, *SIZES.split()]
        assert invoke("train", "--text", text, *options, "--out", folder / "run", "--json")[0] == 0
    return folder / "run"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads a text, a model or times something fails the test."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("this is work, and the place was not tried yet")

    for module in (commands, demo, trained):
        monkeypatch.setattr(module, "load_corpus", work, raising=False)
    monkeypatch.setattr(trained, "Trainer", work)
    monkeypatch.setattr("kmeans_route.cli.train.load_checkpoint", work)
    for module, name in ((inspect, "describe"), (bench, "_one_shape")):
        monkeypatch.setattr(module, name, work)


def writers(run: Path, out: Path) -> list[tuple[object, ...]]:
    """Every command that writes to a place of the user's choice."""
    return [
        ("train", "--out", out),
        ("train", "--resume", "--out", out),
        ("demo", "--out", out),
        ("convert", run, "--out", out),
        ("export", run, "--out", out),
        ("inspect", run, "--out", out),
        ("bench", "--shape", "8,16,4,1", "--device", "cpu", "--csv", out),
    ]


def test_the_list_of_writers_is_whole() -> None:
    """A command with an option for a place is in it, or reads there only."""
    written = {"--out", "--csv"}
    names = [str(command.name) for command in commands.app.registered_commands]
    writing = {name for name in names if written & set(re.findall(r"--[a-z]+", invoke(name, "--help")[1]))}
    assert writing == {words[0] for words in writers(Path(), Path())}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("number", range(7))
def test_a_place_below_a_file_is_refused_before_any_work(number: int, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "below"
    arguments = writers(run, out)[number]
    code, document = invoke(*arguments, "--json")
    assert code == 1
    wanted = "--csv must be a file" if "--csv" in arguments else "--out must be a folder"
    reason = "(not a directory): name another place"
    assert document["error"] == f"{wanted} that can be written, got {out} {reason}"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("number", range(7))
def test_a_place_without_permission_is_refused_before_any_work(
    number: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The superuser may write anywhere: what the system would say is said for it."""

    def denied(*_: object, **__: object) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(places.tempfile, "TemporaryFile", denied)
    monkeypatch.setattr(places, "open", denied, raising=False)
    out = tmp_path / "new" / "place"
    if number == 6:
        out.parent.mkdir()
    code, document = invoke(*writers(run, out)[number], "--json")
    assert code == 1
    assert "that can be written" in document["error"]
    assert document["error"].endswith(f"got {out} (permission denied): name another place, or change its permissions")
    assert not out.exists()
    assert (tmp_path / "new").exists() == (number == 6)


def test_trying_a_place_leaves_nothing_and_keeps_what_is_there(tmp_path: Path) -> None:
    places.check_folder(tmp_path / "a" / "b")
    places.check_file(tmp_path / "a" / "rows.csv", "--csv")
    places.check_file(tmp_path / "rows.csv", "--csv")
    assert not list(tmp_path.iterdir())
    (tmp_path / "rows.csv").write_text("old")
    places.check_file(tmp_path / "rows.csv", "--csv")
    assert (tmp_path / "rows.csv").read_text() == "old"
    with pytest.raises(ValueError, match=r"--csv must be a file that can be written, got .* \(is a directory\): name"):
        places.check_file(tmp_path, "--csv")


def test_the_advice_fits_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"got .*/file \(a file lies there\): name another place$"):
        places.check_folder(tmp_path / "file")

    def failing(number: int) -> Any:
        def fail(*_: object, **__: object) -> Any:
            raise OSError(number, os.strerror(number))

        return fail

    for number, advice in (
        (errno.ENOENT, "name another place"),
        (errno.EROFS, "name another place"),
        (errno.EPERM, "name another place, or change its permissions"),
        (errno.ENOSPC, "name another place, or free some space"),
    ):
        monkeypatch.setattr(places.tempfile, "TemporaryFile", failing(number))
        with pytest.raises(ValueError, match=rf"\({os.strerror(number).lower()}\): {advice}$"):
            places.check_folder(tmp_path)


def test_csv_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    few = ("bench", "--shape", "8,16,4,1", "--device", "cpu", "--repeats", 2, "--against", "learned")
    assert invoke(*few, "--csv", path, "--plain")[0] == 0
    assert path.read_text().startswith("shape,")


# Nothing is replaced in silence


def test_a_report_is_kept_by_every_command(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    out.mkdir()
    (out / "report.html").write_text("mine")
    for arguments in writers(run, out)[:-1]:
        if arguments[0] == "demo" or "--resume" in arguments:
            continue
        more = FEW if arguments[0] in ("convert", "export") else ()
        code, document = invoke(*arguments, *more, "--json")
        assert code == 1
        assert f"{out} already holds a report" in document["error"], arguments
        assert "name another --out" in document["error"]
    assert [path.name for path in out.iterdir()] == ["report.html"]


def test_a_demo_takes_the_next_number(tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert places.unused(out) == out
    out.mkdir()
    (out / "notes.txt").write_text("no report")
    assert places.unused(out) == out
    (out / "results.json").write_text("{}")
    assert places.unused(out) == tmp_path / "report-2"
    (tmp_path / "report-2" / places.INTERRUPTED).mkdir(parents=True)
    assert places.unused(out) == tmp_path / "report-3"


def test_watch_draws_text_alone_where_it_cannot_write(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise ValueError("RUN must be a folder that can be written")

    monkeypatch.setattr(watch.places, "check_folder", denied)
    monkeypatch.setattr(watch, "picture", lambda *_: pytest.fail("drawn"))
    code, said = invoke("watch", run, "--once", "--plain")
    assert code == 0
    assert "no loads.png: RUN must be a folder that can be written" in said
    assert "step 2 of 2" in said


# More steps


@pytest.mark.usefixtures("plain_empty")
def test_a_finished_run_goes_on_for_more_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rate is that of a run of the new total, and a stop on the way changes no bit."""
    monkeypatch.setattr("kmeans_route.cli.train.find_spec", lambda name: None)
    text, out = write_text(tmp_path / "text"), tmp_path / "run"
    assert invoke("train", "--text", text, "--steps", 4, *SIZES.split(), "--out", out, "--json")[0] == 0
    config, corpus, checkpoint = resumed(out, {}, [], 3)
    assert (config.steps, checkpoint.step, checkpoint.config) == (7, 4, config.to_dict())
    trainer = Trainer(config, corpus)
    trainer.restore(checkpoint)
    while trainer.step < 7:
        trainer.train_step()

    code, document = invoke("train", "--resume", "--more-steps", 3, "--out", out, "--json")
    assert (code, document["config"]["steps"]) == (0, 7)
    extended = load_checkpoint(out)
    assert extended.step == 7
    rates = [record["lr"] for record in extended.history]
    old = TrainConfig(**{**config.to_dict(), "steps": 4})
    assert rates == [learning_rate(old if step < 4 else config, step) for step in range(7)]
    for name, tensor in trainer.checkpoint().tensors.items():
        assert torch.equal(tensor, extended.tensors[name]), name
    assert {line["steps"] for line in watch.read(out)} == {7}


def test_more_steps_are_refused_without_a_run(tmp_path: Path) -> None:
    code, document = invoke("train", "--more-steps", 3, "--out", tmp_path / "run", "--json")
    assert code == 1
    assert "--more-steps extends a run, got 3 without --resume: add that" in document["error"]
    code, document = invoke("train", "--resume", "--more-steps", 3, "--out", tmp_path / "run", "--json")
    assert code == 1
    assert "no checkpoint in" in document["error"]


def test_other_steps_of_a_resumed_run_name_more_steps(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"steps \(checkpoint 2, asked 9\)\. For a longer run name --more-steps"):
        resumed(run, {"steps": 9}, [])
    with pytest.raises(CheckpointError, match=r"asked 0\.5\)\. Leave them out"):
        resumed(run, {"lr": 0.5}, [])
    assert load_corpus([run.parent / "text"]).sha256 == load_checkpoint(run).corpus["sha256"]
