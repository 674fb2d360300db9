"""Pictures of measurements: roofline, bars against other contestants, scaling; and of predicted times.
`python -m benchmarks.pictures` draws them from result files.

As in `kmeans_route.viz`: a Figure of its own each, Okabe and Ito's colours, nothing told apart by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kmeans_route.viz import FONT_SIZE, STYLES, large_print, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^DvP"
OURS = "kmeans_route"
_SMALL = FONT_SIZE - 2
_GREY = "#555555"
DOTTED = (0, (2, 3))


class Point(NamedTuple):
    """A kernel at a shape. num_bytes: of HBM that it must move; flop: on the matrix units; time_us: taken, or at least
    to be taken."""

    kernel: str
    shape: str
    num_bytes: float
    flop: float
    time_us: float

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.flop / self.num_bytes

    @property
    def tb_per_s(self) -> float:
        """Bytes that must move, over the time."""
        return self.num_bytes / self.time_us / 1e6


class Bars(NamedTuple):
    """One contest: contestant -> (median, first quartile, third quartile) in milliseconds."""

    label: str
    times_ms: Mapping[str, tuple[float, float, float]]


@large_print
def roofline(
    points: Sequence[Point], copy_bytes_per_s: float, flop_per_s: float, *, title: str, dot: str, roof: str
) -> Figure:
    """HBM bandwidth over arithmetic intensity, a panel a kernel; kernels without a matrix product share the last one.

    The roof is min(copy rate, matrix rate / intensity): in units of bandwidth, so that kernels that only move bytes
    have a place too.

    Args:
        points: kernels at shapes.
        copy_bytes_per_s, flop_per_s: the device's rates.
        title: what is shown; says whether it was measured.
        dot, roof: what a dot and the roof are, in words.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: matplotlib is absent; names the extra.
        ValueError: no points.
    """
    if not points:
        raise ValueError("points must hold at least one, got none")
    shapes = list(dict.fromkeys(point.shape for point in points))
    kernels = list(dict.fromkeys(point.kernel for point in points))
    with_product = [k for k in kernels if any(point.flop for point in points if point.kernel == k)]
    without = [k for k in kernels if k not in with_product]
    columns = 2
    rows = math.ceil(len(with_product) / columns)
    heights = [2.3] * rows + [2.6] * bool(without)
    figure = new_figure(sum(heights) + 1.9)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    styles = {shape: (MARKERS[i % 6], STYLES[i % len(STYLES)][0]) for i, shape in enumerate(shapes)}
    low = min(point.tb_per_s for point in points) / 2
    high = max(copy_bytes_per_s / 1e12, *(point.tb_per_s for point in points)) * 1.6
    panels: list[Axes] = []
    for number, kernel in enumerate(with_product):
        axis = figure.add_subplot(grid[number // columns, number % columns])
        panels.append(axis)
        axis.set_xscale("log")
        mine = [point for point in points if point.kernel == kernel]
        _draw_roof(axis, [point.intensity for point in points if point.flop], copy_bytes_per_s, flop_per_s)
        for point in mine:
            _dot(axis, point.intensity, point, styles)
        axis.set_title(kernel, fontsize=FONT_SIZE, loc="left")
        if number // columns == rows - 1 or number + columns >= len(with_product):
            axis.set_xlabel("FLOP a byte of HBM", fontsize=_SMALL)
    if without:
        panels.append(_strip(figure.add_subplot(grid[-1, :]), without, points, styles, copy_bytes_per_s))
    for axis in panels:
        axis.set_yscale("log")
        axis.set_ylim(low, high)
        _plain_numbers(axis.yaxis, low, high)
        axis.set_ylabel("TB/s", fontsize=_SMALL)
        axis.tick_params(labelsize=_SMALL)
        axis.grid(alpha=0.3, linewidth=0.6)
    handles = [_handle(shape, *styles[shape]) for shape in shapes]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=_SMALL)
    figure.suptitle(f"{title}\ndot: {dot}\nline: {roof}", fontsize=FONT_SIZE, x=0.01, ha="left")
    return figure


@large_print
def predictions(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float, float]]]], *, title: str) -> Figure:
    """Time over T, a panel a shape, both scales logarithmic; a dotted line of the same colour is the floor.

    Args:
        panels: shape -> what -> (T, microseconds, microseconds of the floor).
        title: says that nothing was measured.

    Raises:
        ModuleNotFoundError: matplotlib is absent; names the extra.
        ValueError: no panel.
    """
    if not panels:
        raise ValueError("panels must hold at least one, got none")
    columns = min(2, len(panels))
    count = math.ceil(len(panels) / columns)
    figure = new_figure(2.9 * count + 1.9)
    axes = figure.subplots(count, columns, squeeze=False, sharex=True, sharey=True).ravel()
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    for place, (axis, (shape, series)) in enumerate(zip(axes, panels.items(), strict=False)):
        for name, points in series.items():
            color, style = STYLES[names.index(name) % len(STYLES)]
            tokens, times, floors = zip(*points, strict=True)
            marker = MARKERS[names.index(name) % 6]
            axis.plot(tokens, times, color=color, linestyle=style, marker=marker, linewidth=2, label=name)
            axis.plot(tokens, floors, color=color, linestyle=DOTTED, linewidth=1.6, label=f"floor of {name}")
        axis.set_title(shape, fontsize=FONT_SIZE, loc="left")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(tokens, [f"{value:g}" for value in tokens], rotation=30)
        axis.minorticks_off()
        axis.tick_params(labelsize=_SMALL)
        axis.grid(alpha=0.3, linewidth=0.6)
        if place % columns == 0:
            axis.set_ylabel("microseconds", fontsize=_SMALL)
        if place >= len(panels) - columns:
            axis.set_xlabel("T", fontsize=_SMALL)
            axis.tick_params(axis="x", labelbottom=True)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    _plain_numbers(axes[0].yaxis, *axes[0].get_ylim(), decades=True)
    handles = [_handle(name, MARKERS[i % 6], *STYLES[i % len(STYLES)]) for i, name in enumerate(names)]
    figure.legend(handles=[*handles, _handle("floor", "", _GREY, DOTTED)], loc="outside lower center", ncols=4,
                  fontsize=_SMALL)  # fmt: skip
    figure.suptitle(title, fontsize=FONT_SIZE, x=0.01, ha="left")
    return figure


@large_print
def contest_bars(contests: Sequence[Bars], *, title: str, note: str = "") -> Figure:
    """Median time of every contestant, one panel a contest, whiskers from quartile to quartile.

    Behind each bar stands the median and how many times this package's it is.

    Raises:
        ModuleNotFoundError: matplotlib is absent; names the extra.
        ValueError: no contest.
    """
    if not contests:
        raise ValueError("contests must hold at least one, got none")
    figure = new_figure(sum(0.75 + 0.36 * len(contest.times_ms) for contest in contests) + 1.0)
    axes = figure.subplots(
        len(contests), 1, squeeze=False, height_ratios=[1.5 + len(contest.times_ms) for contest in contests]
    )[:, 0]
    for axis, contest in zip(axes, contests, strict=True):
        own = contest.times_ms.get(OURS)
        for place, (name, (median, q1, q3)) in enumerate(contest.times_ms.items()):
            ours = name.startswith(OURS)
            color = STYLES[0][0] if ours else "#BBBBBB"
            axis.barh(place, median, height=0.7, color=color, edgecolor="black", hatch="" if ours else "//")
            axis.plot([q1, q3], [place, place], color="black", linewidth=2.2, solid_capstyle="butt", marker="|")
            ratio = f"  ({median / own[0]:.2f} x)" if own and not ours else ""
            axis.annotate(
                f"{_three_digits(median)} ms{ratio}", (max(median, q3), place), xytext=(8, 0),
                textcoords="offset points", va="center", fontsize=_SMALL,
            )  # fmt: skip
        axis.set_xlim(0, 1.32 * max(max(median, q3) for median, _, q3 in contest.times_ms.values()))
        axis.set_yticks(range(len(contest.times_ms)), list(contest.times_ms), fontsize=_SMALL)
        axis.invert_yaxis()
        axis.tick_params(axis="x", labelsize=_SMALL)
        axis.set_title(contest.label, fontsize=FONT_SIZE - 1, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("milliseconds", fontsize=_SMALL)
    key = f"bar: median; whisker: quartiles; x: times the median of {OURS}"
    figure.suptitle("\n".join(filter(None, (title, note, key))), fontsize=FONT_SIZE, x=0.01, ha="left")
    return figure


@large_print
def scaling(records: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Time over T, D, E and K, a panel an axis, both scales logarithmic, with a line of slope 1 from the first point.

    Args:
        records: {"axis": "T", "values": [...], "median_ms": {name: [...]}, "exponent": {name: slope}, "fixed": {"D":
            ...}}; a None among the medians leaves a gap. The line of slope 1 starts at the first name's first point.
        title: of the picture.

    Raises:
        ModuleNotFoundError: matplotlib is absent; names the extra.
        ValueError: no records.
    """
    if not records:
        raise ValueError("records must hold at least one, got none")
    columns = min(2, len(records))
    rows = math.ceil(len(records) / columns)
    figure = new_figure(3.7 * rows + 1.6)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    names = list(dict.fromkeys(name for record in records for name in record["median_ms"]))
    for axis, record in zip(axes, records, strict=False):
        values = record["values"]
        for name, times in record["median_ms"].items():
            place = names.index(name)
            color, style = STYLES[place % len(STYLES)]
            drawn = [math.nan if time is None else time for time in times]
            axis.plot(values, drawn, color=color, linestyle=style, marker=MARKERS[place % 6], linewidth=2)
        first = next(iter(record["median_ms"].values()))
        own = next((time for time in first if time is not None), None)
        if own is not None:
            start = values[first.index(own)]
            axis.plot(
                values, [own * value / start for value in values], color=_GREY, linewidth=1, linestyle=(0, (2, 3))
            )
        exponents = record.get("exponent") or {}
        slopes = ", ".join(f"{exponents[name]:.2f}" for name in record["median_ms"] if name in exponents)
        slope = f": slope {slopes}" if slopes else ""
        fixed = " ".join(f"{key}{value}" for key, value in record.get("fixed", {}).items())
        axis.set_title(f"{record['axis']}{slope}\n({fixed})", fontsize=_SMALL, loc="left")
        axis.set_xscale("log")
        axis.set_yscale("log")
        _plain_numbers(axis.yaxis, *axis.get_ylim())
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
        axis.set_xlabel(record["axis"], fontsize=_SMALL)
        axis.set_ylabel("milliseconds", fontsize=_SMALL)
        axis.tick_params(labelsize=_SMALL)
        axis.tick_params(axis="x", rotation=30)
        axis.grid(alpha=0.3, linewidth=0.6)
    for axis in axes[len(records) :]:
        axis.set_axis_off()
    handles = [
        _handle(name, MARKERS[i % 6], STYLES[i % len(STYLES)][0], STYLES[i % len(STYLES)][1])
        for i, name in enumerate(names)
    ]
    handles.append(_handle("slope 1", "", _GREY, DOTTED))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=_SMALL)
    figure.suptitle(title, fontsize=FONT_SIZE, x=0.01, ha="left")
    return figure


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _draw_roof(axis: Axes, intensities: Sequence[float], copy_bytes_per_s: float, flop_per_s: float) -> None:
    ridge = flop_per_s / copy_bytes_per_s
    left, right = min(intensities) / 2, max(ridge * 4, *(value * 2 for value in intensities))
    top = copy_bytes_per_s / 1e12
    axis.plot([left, ridge, right], [top, top, flop_per_s / right / 1e12], color=_GREY, linewidth=1.6, zorder=1)
    axis.set_xlim(left, right)
    _plain_numbers(axis.xaxis, left, right, decades=True)


def _strip(
    axis: Axes,
    kernels: Sequence[str],
    points: Sequence[Point],
    styles: Mapping[str, tuple[str, str]],
    copy_bytes_per_s: float,
) -> Axes:
    """Kernels side by side, the shapes of each next to each other under the copy rate."""
    axis.axhline(copy_bytes_per_s / 1e12, color=_GREY, linewidth=1.6, zorder=1)
    order = list(styles)
    for place, kernel in enumerate(kernels):
        for point in points:
            if point.kernel == kernel:
                offset = (order.index(point.shape) - (len(order) - 1) / 2) * 0.8 / max(1, len(order))
                _dot(axis, place + offset, point, styles)
    axis.set_xticks(range(len(kernels)), [kernel.replace("_", "_\n", 1) for kernel in kernels])
    axis.set_xlim(-0.6, len(kernels) - 0.4)
    axis.set_title("kernels without a matrix product", fontsize=FONT_SIZE, loc="left")
    return axis


def _dot(axis: Axes, x: float, point: Point, styles: Mapping[str, tuple[str, str]]) -> None:
    marker, color = styles[point.shape]
    axis.plot(
        [x], [point.tb_per_s], linestyle="none", marker=marker, markersize=8, markerfacecolor="none",
        markeredgecolor=color, markeredgewidth=2, label=f"{point.kernel} {point.shape}",
    )  # fmt: skip


def _handle(label: str, marker: str, color: str, style: Any = "none") -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], label=label, linestyle=style, linewidth=2, color=color, marker=marker or None, markersize=8,
        markerfacecolor="none", markeredgewidth=2,
    )  # fmt: skip


def _plain_numbers(axis: Any, low: float, high: float, *, decades: bool = False) -> None:
    """Ticks such as 0.1, 0.2, 0.5, 1 on a log axis, without powers and without minor ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    wide = decades or high > 300 * low
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
