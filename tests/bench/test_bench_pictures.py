"""Pictures of measurements show what the result files hold, and say what was measured and what was not."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from benchmarks import pictures as command
from benchmarks.harness import pictures
from benchmarks.harness.pictures import Bars, Point
from benchmarks.harness.results import write_results

ROOT = Path(__file__).parents[2]
POINTS = [
    Point("route_fwd", "OLMoE", 64e6, 4e9, 40.0),
    Point("route_fwd", "Mixtral", 128e6, 2e9, 50.0),
    Point("commit", "OLMoE", 2e6, 0.0, 1.0),
    Point("commit", "Mixtral", 1e6, 0.0, 2.0),
]
PEAKS = {"kind": "peaks", "copy_bytes_per_s": 2e12, "bf16_flop_per_s": 5e14}


def drawn(figure: Figure) -> Figure:
    figure.canvas.draw()
    return figure


def dots(figure: Figure) -> dict[str, tuple[float, float]]:
    """ "kernel shape" -> where its dot is."""
    return {
        line.get_label(): (line.get_xdata()[0], line.get_ydata()[0])
        for axis in figure.axes
        for line in axis.lines
        if line.get_marker() not in ("None", "", None)
    }


def test_roofline_puts_every_kernel_where_it_belongs() -> None:
    figure = drawn(pictures.roofline(POINTS, 2e12, 8e14, title="Measured", dot="a", roof="b"))
    product, strip = figure.axes
    assert product.get_title(loc="left") == "route_fwd"
    assert strip.get_title(loc="left") == "kernels without a matrix product"
    assert [text.get_text() for text in strip.get_xticklabels()] == ["commit"]
    where = dots(figure)
    assert where["route_fwd OLMoE"] == pytest.approx((62.5, 1.6))
    assert where["route_fwd Mixtral"] == pytest.approx((15.625, 2.56))
    assert where["commit OLMoE"][1] == pytest.approx(2.0)
    assert where["commit Mixtral"][1] == pytest.approx(0.5)
    roof = product.lines[0]
    assert list(roof.get_ydata())[:2] == [2.0, 2.0]
    assert roof.get_xdata()[1] == pytest.approx(400)
    assert roof.get_ydata()[2] == pytest.approx(800 / roof.get_xdata()[2])
    assert {axis.get_yscale() for axis in figure.axes} == {"log"}
    low, high = product.get_ylim()
    assert all(low < y < high for _, y in where.values())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["OLMoE", "Mixtral"]
    assert figure.get_suptitle().startswith("Measured\n")
    markers = {line.get_label(): line.get_marker() for axis in figure.axes for line in axis.lines}
    assert markers["route_fwd OLMoE"] == markers["commit OLMoE"] != markers["commit Mixtral"]


def test_bars_have_medians_whiskers_and_ratios() -> None:
    times = {"kmeans_route": (2.0, 1.5, 3.0), "softmax": (5.0, 4.0, 5.5), "kmeans_route commit alone": (0.5, 0.4, 0.6)}
    figure = drawn(pictures.contest_bars([Bars("T=8", times)], title="Training step", note="a CPU"))
    (axis,) = figure.axes
    assert [patch.get_width() for patch in axis.patches] == [2.0, 5.0, 0.5]
    assert [list(line.get_xdata()) for line in axis.lines] == [[1.5, 3.0], [4.0, 5.5], [0.4, 0.6]]
    assert [text.get_text() for text in axis.texts] == ["2.00 ms", "5.00 ms  (2.50 x)", "0.500 ms"]
    assert [label.get_text() for label in axis.get_yticklabels()] == list(times)
    assert axis.patches[0].get_facecolor() != axis.patches[1].get_facecolor()
    assert (axis.patches[0].get_hatch() or "", axis.patches[1].get_hatch()) == ("", "//")
    assert axis.get_xlim()[1] > 5.5
    assert axis.get_xlabel() == "milliseconds"
    assert figure.get_suptitle().splitlines()[:2] == ["Training step", "a CPU"]
    edge = figure.bbox.x1
    assert all(text.get_window_extent().x1 < edge for text in axis.texts), "a label leaves the picture"


SCALING = {
    "axis": "T",
    "values": [1024, 2048, 4096],
    "median_ms": {"kmeans_route": [1.0, 2.1, 4.0], "textbook": [3.0, None, 13.0]},
    "exponent": {"kmeans_route": 1.02},
    "fixed": {"D": 1024, "E": 64, "K": 8},
}


def test_scaling_draws_times_and_a_line_of_slope_one() -> None:
    figure = drawn(pictures.scaling([SCALING], title="Scaling"))
    (axis,) = figure.axes
    ours, textbook, reference = axis.lines
    assert list(ours.get_xdata()) == [1024, 2048, 4096]
    assert list(ours.get_ydata()) == [1.0, 2.1, 4.0]
    assert str(textbook.get_ydata()[1]) == "nan"
    assert list(reference.get_ydata()) == [1.0, 2.0, 4.0]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert axis.get_title(loc="left") == "T: slope 1.02\n(D1024 E64 K8)"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["kmeans_route", "textbook", "slope 1"]
    four = drawn(pictures.scaling([SCALING | {"axis": axis} for axis in "TDEK"], title="Scaling"))
    assert [axis.get_xlabel() for axis in four.axes] == list("TDEK")


def cell(num_tokens: int, **times: float) -> dict[str, Any]:
    parts = {part: {"kmeans_route": {"median_us": time}} for part, time in times.items()}
    parts["combine"] = {"kmeans_route": {"skipped": "no time was left"}}
    floors = {part: {"hbm_us": 10.0, "flop_us": 5.0, "l2_us": 1.0} for part in parts}
    return {"kind": "cell", "shape": "OLMoE", "num_tokens": num_tokens, "parts": parts, "floors": floors}


def write_run(folder: Path, name: str, device: str, date: str, *cells: dict[str, Any]) -> None:
    lines = [{"kind": "header", "device": device, "date": date}, PEAKS, *cells, {"kind": "end"}]
    (folder / name).write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")


def test_a_gpu_run_is_drawn_from_its_newest_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "a.jsonl", "H100", "2026-01-02", cell(64, eval=20.0), cell(4096, eval=9.0),
              cell(65536, eval=40.0, commit=50.0))  # fmt: skip
    write_run(tmp_path, "b.jsonl", "H100", "2026-01-01", cell(4096, eval=1.0))
    write_run(tmp_path, "c.jsonl", "dry run on a CPU", "2026-01-03", cell(4096, eval=1.0))
    wrong = {"kind": "cell", "shape": "OLMoE", "num_tokens": 1, "correct": False}
    write_run(tmp_path, "d.jsonl", "H100", "2026-01-04", wrong)
    figures = dict(command.rooflines(tmp_path))
    assert set(figures) == {"roofline", "roofline-decode"}
    large = dots(figures["roofline"])
    assert large == {
        "eval routing OLMoE, T=65536": pytest.approx((125.0, 0.5)),  # 20 MB in 40 us, 2.5 GFLOP
        "commit OLMoE, T=65536": pytest.approx((125.0, 0.4)),
    }
    assert dots(figures["roofline-decode"]) == {"eval routing OLMoE, T=64": pytest.approx((125.0, 1.0))}
    assert figures["roofline"].get_suptitle().startswith("Measured on H100, 2026-01-02")
    assert command.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "roofline: roofline.png",
        "roofline: roofline-decode.png",
        "predictions: no result file has the data, left out",
        "bars: no result file has the data, left out",
        "scaling: no result file has the data, left out",
    ]
    assert (tmp_path / "out" / "roofline.png").stat().st_size > 10_000


def test_committed_results_give_the_predictions_and_the_bars() -> None:
    """Six panels, of each the sums of three steps and their floors, at every T."""
    table = json.loads(sorted(command.RESULTS.glob("predict-h200-*.json"))[-1].read_text(encoding="utf-8"))
    ((name, figure),) = command.predictions(command.RESULTS)
    drawn(figure)
    assert name == "predicted"
    assert figure.get_suptitle().startswith("Predicted from compiled code, not measured: H200")
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_title(loc="left")}
    assert set(panels) == {row["shape"] for row in table["rows"]}
    for shape, axis in panels.items():
        lines = {line.get_label(): line for line in axis.get_lines()}
        assert len(lines) == 2 * len(command.STEPS)
        for step, parts in command.STEPS.items():
            rows = [row for row in table["rows"] if row["shape"] == shape and row["part"] in parts]
            for label, key in ((step, "time_us"), (f"floor of {step}", "floor_us")):
                expected = [
                    sum(row[key] for row in rows if row["num_tokens"] == tokens) for tokens in lines[label].get_xdata()
                ]
                assert list(lines[label].get_ydata()) == pytest.approx(expected)
    found = command.contests(command.results_of(command.RESULTS, "cpu-*.json"))
    assert len(found["training step"][1]) == 9
    assert found["training step"][1][0].label == "T=8192  D=1024  E=64  K=8"


def test_each_picture_is_shown_by_a_page() -> None:
    """And what the command draws from the committed results are such pictures, none else."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    links = [re.findall(r"!\[[^]]+\]\(\S*benchmarks/results/(\S+\.png)\)", page.read_text("utf-8")) for page in pages]
    shown = {name for of_page in links for name in of_page}
    assert {path.name for path in command.RESULTS.glob("*.png")} <= shown
    names = [
        name
        for draw in (command.rooflines, command.predictions, command.bars, command.scalings)
        for name, _ in draw(command.RESULTS)
    ]
    assert len(set(names)) == len(names) >= 4
    assert {f"{name}.png" for name in names} <= shown


def test_scaling_comes_from_the_newest_file_that_has_it(tmp_path: Path) -> None:
    base = {"num_tokens": 64, "hidden_size": 16, "num_experts": 8, "top_k": 2}
    grown = [
        {
            "title": f"{what} over {axis}, fixed",
            "contestants": {},
            "base": base,
            "growth": {"axis": axis, "sizes": [2, 4], "median_ms": [1.0, 2.0], "time": {"exponent": 1.0}},
        }
        for axis in ("num_tokens", "hidden_size")
        for what in ("training step", "routing alone")
    ]
    write_results(tmp_path / "one.json", "c", grown)
    assert [(r["axis"], list(r["median_ms"]), r["fixed"]) for r in command.growths(grown)] == [
        ("T", ["training step", "routing alone"], {"D": 16, "E": 8, "K": 2}),
        ("D", ["training step", "routing alone"], {"T": 64, "E": 8, "K": 2}),
    ]
    write_results(tmp_path / "two.json", "c", [{"title": "routing alone, x", "contestants": {}}])
    ((name, figure),) = command.scalings(tmp_path)
    assert name == "scaling"
    assert len([axis for axis in figure.axes if axis.get_xlabel()]) == 2
    assert list(command.bars(tmp_path)) == []


def test_nothing_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.main(["--results", str(tmp_path)]) == 1
    for draw, message in (
        (lambda: pictures.roofline([], 1.0, 1.0, title="", dot="", roof=""), "points must hold at least one"),
        (lambda: pictures.predictions({}, title=""), "panels must hold at least one"),
        (lambda: pictures.contest_bars([], title=""), "contests must hold at least one"),
        (lambda: pictures.scaling([], title=""), "records must hold at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            draw()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install .*\[viz\]"$'):
        pictures.scaling([SCALING], title="")
