"""`kmeans-route watch`: the log that `train` writes, and what is drawn of it."""

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
from kmeans_route.cli.output import Output
from kmeans_route.cli.watch import NAME, PICTURE, drawn, read, watch
from tests.helpers.commands import invoke, write_text

SMALL = ["--layers", 2, "--hidden", 16, "--heads", 2, "--experts", 4, "--top-k", 2, "--seq-len", 16, "--batch", 2]


def trained(folder: Path, steps: int, *more: object) -> None:
    text = folder.parent / "text"
    if not text.exists():
        write_text(text)
    code, _ = invoke("train", "--steps", steps, *SMALL, "--text", text, "--out", folder, "--json", *more)
    assert code == 0


def test_a_run_writes_its_loads_and_watch_draws_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run, 25)
    lines = read(run)
    assert [line["step"] for line in lines] == [10, 20, 25]
    for line in lines:
        assert [len(loads) for loads in line["loads"]] == [4, 4]
        assert all(sum(loads) == pytest.approx(4.0, abs=0.01) for loads in line["loads"])
    code, document = invoke("watch", run, "--json")
    assert (code, document["step"], document["loads"]) == (0, 25, lines[-1]["loads"])
    code, text = invoke("watch", run, "--plain")
    assert code == 0
    assert "step 25 of 25" in text
    assert (run / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run, 25)
    want = (run / NAME).read_text()
    with open(run / NAME, "a") as log:  # as a run that was killed after its last checkpoint leaves it
        log.write(json.dumps({**read(run)[-1], "step": 30}) + "\n" + '{"step": 4')
    code, _ = invoke("train", "--resume", "--out", run, "--json")
    assert code == 0
    assert (run / NAME).read_text() == want


def test_watch_follows_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"step": step, "steps": 20, "loss_bits": 3.0, "loads": [[1.0, 0.0, 3.0, 0.5]]} for step in (10, 20)]
    (tmp_path / NAME).write_text(json.dumps(lines[0]) + "\n")
    waits = []

    def wait() -> None:
        waits.append(1)
        if len(waits) == 2:
            with open(tmp_path / NAME, "a") as log:
                log.write(json.dumps(lines[1]) + "\n")

    watch(tmp_path, Output(plain=True), once=False, wait=wait)
    text = capsys.readouterr().out
    assert len(waits) == 2
    assert text.count("step 10 of 20") == text.count("step 20 of 20") == 1


def test_bars_say_fair_dead_and_full() -> None:
    many = [1.0] * 127 + [9.0]
    text = drawn({"step": 1, "steps": 2, "loss_bits": 1.0, "loads": [[1.0, 0.0, 2.0, 0.01], many]}).splitlines()
    assert text[1] == "layer  0 |▄ █▁| MaxVio 1.00  1 dead"
    assert text[2] == f"layer  1 |{'▄' * 63}█| MaxVio 8.00"
    assert max(map(len, text)) <= 100


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    code, document = invoke("watch", tmp_path / "none", "--json")
    assert code == 1
    assert "must hold a run with loads.jsonl, got none" in document["error"]
