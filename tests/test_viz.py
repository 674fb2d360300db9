"""Pictures say what they show: titles, axes, units, legends, one scale; and values land where they belong."""

import sys

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from kmeans_route import metrics, viz

LOADS = {"K-Means": [[1.2, 0.8, 1.0], [0.9, 1.0, 1.1]], "softmax": torch.tensor([[1.5, 0.5, 1.0], [1.0, 1.0, 1.0]])}


def drawn(figure: Figure) -> Figure:
    """Run the layout and every artist, as saving would."""
    figure.canvas.draw()
    return figure


def panels(figure: Figure) -> list:
    return [axis for axis in figure.axes if axis.images]


def test_load_heatmap_shows_the_values_on_one_scale() -> None:
    figure = drawn(viz.load_heatmap(LOADS))
    first, second = panels(figure)
    assert first.images[0].get_array().tolist() == LOADS["K-Means"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0.5, 1.5)
    assert first.get_title(loc="left") == "K-Means: mean MaxVio 0.15"
    assert first.get_ylabel() == "layer"
    assert second.get_xlabel() == "expert"
    assert figure.axes[-1].get_ylabel() == "load / fair share\n(1 = fair)"
    assert "validation" in figure.get_suptitle()


def test_labels_of_colour_bars_stay_off_the_edges() -> None:
    """In the lowest figures that there are: one router of one layer."""
    cosine = torch.eye(4)[None]
    for figure in (viz.load_heatmap({"one": [[1.0, 1.2, 0.8]]}), viz.direction_similarity({"one": cosine})):
        height = drawn(figure).bbox.height
        label = figure.axes[-1].yaxis.label.get_window_extent()
        assert 0.02 * height < label.y0 < label.y1 < 0.98 * height


def test_load_heatmap_scale_ends_at_twice_the_fair_share() -> None:
    figure = viz.load_heatmap({"dead": [[0.0, 0.0, 3.0]]})
    assert panels(figure)[0].images[0].get_clim() == (0.0, 2.0)
    nearly_even = viz.load_heatmap({"even": [[1.001, 0.999]]})
    assert panels(nearly_even)[0].images[0].get_clim() == (0.9, 1.1)


def test_max_vio_curves_have_units_legend_and_running_means() -> None:
    figure = drawn(viz.max_vio_curves({"one": [1.0, 3.0, 2.0], "two": [0.5, 0.0, 0.1]}, window=2))
    (axis,) = figure.axes
    assert axis.get_xlabel() == "optimizer step"
    assert "max load / mean load - 1" in axis.get_ylabel()
    assert axis.get_yscale() == "log"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["one", "two"]
    lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    assert lines["one"].get_xdata().tolist() == [1, 2, 3]
    assert lines["one"].get_ydata().tolist() == [2.0, 2.5, 2.0]
    assert lines["one"].get_linestyle() != lines["two"].get_linestyle()
    assert "running mean of 2 steps; pale: each step" in axis.get_title(loc="left")


def test_several_seeds_give_a_mean_and_a_range() -> None:
    figure = drawn(viz.max_vio_curves({"one": [[1.0, 1.0], [3.0, 5.0]]}, window=1))
    (axis,) = figure.axes
    assert axis.lines[0].get_ydata().tolist() == [2.0, 3.0]
    heights = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (1.0, 5.0)
    assert "range over 2 seeds" in axis.get_title(loc="left")


def test_loss_curves_mark_the_validation_passes() -> None:
    train = {"one": torch.linspace(8, 4, 50), "two": torch.linspace(8, 5, 50)}
    figure = drawn(viz.loss_curves(train, {"one": [(25, 6.1), (50, 4.2)], "two": [(10, 7.5), (50, 5.2)]}))
    axis, below = figure.axes
    assert axis.get_ylabel() == "cross-entropy (bits per byte)"
    assert "markers: validation" in axis.get_title(loc="left")
    marked = [line for line in axis.lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in marked] == [[6.1, 4.2]]
    assert marked[0].get_markeredgecolor() == axis.lines[1].get_color()
    assert below.get_xlabel() == "optimizer step"
    assert below.get_title(loc="left") == "Loss above that of one on the same text\n(below 0: better)"
    gap = {line.get_label(): line.get_ydata() for line in below.lines}
    assert gap["one"].tolist() == [0.0] * 50
    assert gap["two"][-6] == pytest.approx(44.5 / 49)
    (gap_marked,) = [line for line in below.lines if line.get_marker() == "s"]
    assert list(gap_marked.get_xdata()) == [50]
    assert list(gap_marked.get_ydata()) == pytest.approx([1.0])
    alone = viz.loss_curves({"one": train["one"]})
    assert len(alone.axes) == 1
    assert "validation" not in alone.axes[0].get_title(loc="left")


def test_direction_similarity_names_layers_and_means() -> None:
    cosine = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    negative = torch.tensor([[1.0, -0.001], [-0.001, 1.0]])
    figure = drawn(viz.direction_similarity({"K-Means, sign": [cosine.tolist(), negative.tolist()], "b": cosine[None]}))
    first, second, third = panels(figure)
    assert [axis.get_title() for axis in (first, second, third)] == [
        "layer 0: +0.50",
        "layer 1: +0.00",
        "layer 0: +0.50",
    ]
    assert first.images[0].get_clim() == (-1, 1)
    assert first.get_ylabel() == "K-Means\nsign\n2 experts"
    assert "A block as dark as the diagonal: they ask for the same tokens" in figure.get_supxlabel()
    assert "cosine" in figure.axes[-1].get_ylabel()


def whitened_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Directions (8, 32) of which all hold a large common part: all apart, and pairs of copies."""
    torch.manual_seed(0)
    common = 5 * torch.nn.functional.normalize(torch.randn(1, 32))
    apart = torch.linalg.qr(torch.randn(32, 8))[0].T
    return common + apart, common + apart.roll(4, 0).repeat_interleave(2, 0)[:8]


def test_what_all_directions_share_does_not_hide_what_tells_them_apart() -> None:
    apart, copies = map(metrics.differences_cosine, whitened_pair())
    assert metrics.mean_pairwise_cosine(whitened_pair()[0]) > 0.9, "a panel of these would be red"
    off_diagonal = ~torch.eye(8, dtype=torch.bool)
    assert apart[off_diagonal].max() < 0.2
    assert float(metrics.nearest_cosine(apart)) < 0.2
    assert float(metrics.nearest_cosine(copies)) == pytest.approx(1)
    assert metrics.nearest_cosine(torch.ones(1, 1)) == 0
    panel = torch.stack([apart, copies])
    figure = drawn(viz.direction_similarity({"whitened": panel, "plain": panel}, less_mean=["whitened"]))
    first, second, third, _ = panels(figure)
    assert first.get_title().startswith("layer 0\nnearest -0.")
    assert second.get_title() == "layer 1\nnearest +1.00"
    assert third.get_title() == "layer 0: -0.14"
    assert first.get_ylabel() == "whitened\n8 experts\nless their mean"
    assert third.get_ylabel() == "plain\n8 experts"
    assert "nearest: mean cosine with the expert most alike" in figure.get_suptitle()
    assert "nearest" not in viz.direction_similarity({"plain": panel}).get_suptitle()


def test_experts_of_like_directions_stand_side_by_side() -> None:
    """Two groups whose ids alternate come out as two blocks, whatever the diagonal."""
    group = torch.arange(6) % 2
    cosine = torch.where(group[:, None] == group, 0.9, -0.2).fill_diagonal_(1.0)
    (first, *_) = panels(drawn(viz.direction_similarity({"a": cosine[None]})))
    shown = torch.as_tensor(first.images[0].get_array().data)
    assert (shown[:3, :3] > 0.5).all()
    assert (shown[3:, 3:] > 0.5).all()
    assert (shown[:3, 3:] < 0).all()
    cosine[2] = cosine[:, 2] = torch.nan
    viz.direction_similarity({"a": cosine[None]})


def test_pictures_leave_the_global_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    from matplotlib import pyplot

    before = dict(pyplot.rcParams)
    drawn(viz.load_heatmap(LOADS))
    assert dict(pyplot.rcParams) == before
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(
    ("draw", "argument"),
    [
        (viz.load_heatmap, "loads"),
        (viz.max_vio_curves, "curves"),
        (viz.loss_curves, "train"),
        (viz.direction_similarity, "similarities"),
    ],
)
def test_refusals(draw: object, argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(draw)
    with pytest.raises(ValueError, match=f"{argument} must hold at least one router"):
        draw({})
    with pytest.raises(ValueError, match=r"must have [23] dimensions and values, got shape \(\d?,?( \d, \d, \d)?"):
        draw({"one": torch.zeros(1, 2, 2, 2)})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install .*\[viz\]"$'):
        draw({"one": [[1.0]]})
