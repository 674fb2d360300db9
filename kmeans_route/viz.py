"""Pictures of routing: load heatmap, MaxVio and loss curves, similarity of directions.

Every function takes tensors or arrays and returns a matplotlib Figure of its own; no global pyplot state is touched.
Colours come from Okabe and Ito's palette, told apart by line style too, so that no picture depends on seeing colour.

Each raises ModuleNotFoundError where matplotlib is absent, which names the extra, and ValueError where there is nothing
to draw or a value has the wrong number of dimensions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
from torch import Tensor

from kmeans_route import metrics
from kmeans_route.install import install_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Values = Tensor | Sequence[Any]

_P = ParamSpec("_P")
STYLES = (
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#56B4E9", (0, (5, 1))),
    ("#000000", (0, (1, 1))),
)
FONT_SIZE = 13
WIDTH_IN = 8.5


def large_print(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Draw with a font that stays readable when the picture is shown at half its size."""

    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        try:
            import matplotlib
        except ModuleNotFoundError as error:
            message = f"pictures need matplotlib: {install_line('viz')}"
            raise ModuleNotFoundError(message, name=error.name) from error
        with matplotlib.rc_context({"font.size": FONT_SIZE}):
            return draw(*args, **kwargs)

    return drawn


@large_print
def load_heatmap(loads: Mapping[str, Values], *, title: str = "Load of each expert on the validation text") -> Figure:
    """Load of every expert in every layer, one panel a router, one colour scale for all.

    Args:
        loads: router name -> (L, E) load / fair share; 1 is a fair share, 0 a dead expert.
        title: of the figure.

    Returns:
        The figure. The scale is symmetric about 1 and reaches the largest deviation of all panels, at most 1;
        larger loads take the last colour, which the colour bar then says with an arrow.

    Example:
        >>> figure = load_heatmap({"K-Means": [[1.1, 0.9], [1.0, 1.0]]})
        >>> figure.axes[0].get_xlabel()
        'expert'
    """
    panels = _arrays(loads, 2, "loads")
    deviation = max(float((panel - 1).abs().max()) for panel in panels.values())
    reach = min(1.0, max(0.1, math.ceil(deviation * 10) / 10))
    figure = new_figure(0.9 + sum(0.85 + 0.32 * panel.shape[0] for panel in panels.values()))
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (name, panel) in zip(axes, panels.items(), strict=True):
        axis.imshow(panel.numpy(), cmap="PuOr_r", vmin=1 - reach, vmax=1 + reach, aspect="auto")
        worst = float((panel.max(dim=1).values - 1).mean())
        axis.set_title(f"{name}: mean MaxVio {worst:.2f}", fontsize=FONT_SIZE, loc="left")
        axis.set_ylabel("layer")
        axis.set_yticks(range(panel.shape[0]))
        axis.set_xticks(range(0, panel.shape[1], max(1, panel.shape[1] // 16)))
    axes[-1].set_xlabel("expert")
    extend = "max" if deviation > reach else "neither"
    label = "load / fair share\n(1 = fair)"
    figure.colorbar(axes[0].images[0], ax=list(axes), extend=extend, label=label, aspect=30)
    figure.suptitle(title, fontsize=FONT_SIZE + 2)
    return figure


@large_print
def max_vio_curves(curves: Mapping[str, Values], *, window: int = 10) -> Figure:
    """MaxVio of each training batch over the steps, on a log axis.

    Args:
        curves: router name -> (S,) one run, or (R, S) several seeds; mean over layers of max load / mean load - 1.
        window: steps of the running mean that the thick line shows.

    Returns:
        The figure: thick lines are centred running means (over seeds too), pale are one run's raw values or the range
        over the seeds.
    """
    figure = new_figure(4.8)
    axis = figure.subplots()
    label = "MaxVio = max load / mean load - 1\n(log scale, mean over layers)"
    runs = _arrays(curves, 2, "curves", one_run=True)
    _draw_curves(axis, runs, window, label, "Imbalance of the training batches", _explain_lines(runs, window))
    axis.set_yscale("log", nonpositive="clip")
    _label_log_axis(axis)
    axis.set_xlabel("optimizer step")
    axis.legend(framealpha=0.9)
    return figure


@large_print
def loss_curves(
    train: Mapping[str, Values],
    validation: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    *,
    window: int = 10,
) -> Figure:
    """Training and validation loss over the steps, and below it how far each router is from the first.

    Args:
        train: router name -> (S,) or (R, S) bits per byte of each training batch, of the same text for all routers.
        validation: router name -> (step, bits per byte) of each validation pass, drawn as markers.
        window: steps of the running mean that the thick line shows.
    """
    runs = _arrays(train, 2, "train", one_run=True)
    first_name, first = next(iter(runs.items()))
    compared = len(runs) > 1 and all(values.shape == first.shape for values in runs.values())
    figure = new_figure(7.8 if compared else 4.8)
    grid = figure.subplots(1 + compared, 1, squeeze=False, sharex=True, height_ratios=[3, 2][: 1 + compared])
    axis, *below = grid[:, 0]
    explanation = _explain_lines(runs, window) + ("; markers: validation" if validation else "")
    _draw_curves(axis, runs, window, "cross-entropy (bits per byte)", "Loss", explanation)
    points = {name: dict((validation or {}).get(name, ())) for name in runs}
    _draw_markers(axis, points)
    axis.legend(framealpha=0.9)
    for difference in below:
        # The batches are the same for every router, so most of their noise cancels.
        gaps = {name: values - first for name, values in runs.items()}
        heading = f"Loss above that of {first_name} on the same text"
        _draw_curves(difference, gaps, window, "difference\n(bits per byte)", heading, "below 0: better")
        zero = points[first_name]
        marks = {name: {step: own[step] - zero[step] for step in own if step in zero} for name, own in points.items()}
        _draw_markers(difference, marks)
    figure.axes[-1].set_xlabel("optimizer step")
    return figure


@large_print
def direction_similarity(similarities: Mapping[str, Values], *, less_mean: Collection[str] = ()) -> Figure:
    """Cosine between the directions of every two experts, routers down, layers across.

    Experts of like directions stand side by side, so that those which ask for the same tokens make a block.

    Args:
        similarities: router name -> (L, E, E) pairwise cosines in [-1, 1].
        less_mean: the names of those whose cosines are of directions less the mean of all, as
            `metrics.differences_cosine` gives them: what all directions share decides no choice, and hides what does.

    Returns:
        The figure; above each matrix stands the mean off its diagonal, or for `less_mean`, whose mean is about
        -1 / (E - 1) whatever they are, the mean over experts of the cosine with the nearest other one.
    """
    panels = _arrays(similarities, 3, "similarities")
    num_layers = max(panel.shape[0] for panel in panels.values())
    figure = new_figure(1.2 + 1.85 * len(panels) + 0.5 * sum(name in less_mean for name in panels))
    axes = figure.subplots(len(panels), num_layers, squeeze=False)
    for row, (name, panel) in enumerate(panels.items()):
        num_experts = panel.shape[1]
        for layer in range(num_layers):
            axis = axes[row, layer]
            if layer >= panel.shape[0]:
                axis.set_axis_off()
                continue
            order = _by_likeness(panel[layer])
            axis.imshow(panel[layer][order][:, order].numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
            if name in less_mean:
                number, what = float(metrics.nearest_cosine(panel[layer])), "\nnearest"
            else:
                off_diagonal = panel[layer].sum() - panel[layer].trace()
                number, what = float(off_diagonal / max(1, num_experts * (num_experts - 1))), ":"
            # Adding 0 turns a rounded -0.0 into 0.0.
            axis.set_title(f"layer {layer}{what} {round(number, 2) + 0.0:+.2f}", fontsize=FONT_SIZE - 1)
            axis.set_xticks([])
            axis.set_yticks([])
        size = f"{num_experts} experts"
        told = [*name.split(", "), *([] if size in name else [size]), *(["less their mean"] * (name in less_mean))]
        axes[row, 0].set_ylabel("\n".join(told))
    figure.colorbar(axes[0, 0].images[0], ax=axes.ravel().tolist(), label="cosine of\ntwo directions", aspect=30)
    parted = sum(name in less_mean for name in panels)
    numbers = ["number: mean off the diagonal"] if parted < len(panels) else []
    numbers += ["nearest: mean cosine with the expert most alike"] if parted else []
    gap = "\n" if parted else " "
    figure.suptitle(f"Similarity of the experts' directions{gap}({'; '.join(numbers)})", fontsize=FONT_SIZE + 1)
    reading = "A square is two experts. A block as dark as the diagonal: they ask for the same tokens."
    if parted:
        reading += "\nPale: no two directions are alike. How often two are chosen together, effective experts tell."
    figure.supxlabel(reading, fontsize=FONT_SIZE - 1)
    return figure


def _by_likeness(cosine_EE: Tensor) -> Tensor:
    """An order (E,) in which each expert is followed by the one most like it of those that are left."""
    left = cosine_EE.nan_to_num(-2.0).clone()
    order = [0]
    for _ in range(len(left) - 1):
        left[:, order[-1]] = -torch.inf
        order.append(int(left[order[-1]].argmax()))
    return torch.tensor(order)


def new_figure(height_in: float) -> Figure:
    """An empty one, `WIDTH_IN` wide."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_IN, height_in), layout="constrained", facecolor="white")


def _label_log_axis(axis: Axes) -> None:
    """Ticks such as 0.1, 0.2, 0.5, 1; closer ones where the values span less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_ylim()
    subs = (1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _draw_curves(
    axis: Axes, curves: Mapping[str, Tensor], window: int, label: str, heading: str, explanation: str
) -> None:
    """Thick running means over pale raw values or ranges, and what they are."""
    from matplotlib.ticker import MaxNLocator

    axis.set_ylabel(label)
    axis.set_title(f"{heading}\n({explanation})", fontsize=FONT_SIZE - 1, loc="left")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3, which="both", linewidth=0.6)
    for position, (name, runs_RS) in enumerate(curves.items()):
        color, style = STYLES[position % len(STYLES)]
        steps = torch.arange(1, runs_RS.shape[1] + 1)
        smooth_RS = torch.stack([_running_mean(run, window) for run in runs_RS])
        if runs_RS.shape[0] == 1:
            axis.plot(steps.numpy(), runs_RS[0].numpy(), color=color, alpha=0.25, linewidth=0.8)
        else:
            low, high = smooth_RS.min(dim=0).values, smooth_RS.max(dim=0).values
            axis.fill_between(steps.numpy(), low.numpy(), high.numpy(), color=color, alpha=0.2, linewidth=0)
        mean_S = smooth_RS.mean(dim=0)
        axis.plot(steps.numpy(), mean_S.numpy(), color=color, linestyle=style, linewidth=2.4, label=name)


def _draw_markers(axis: Axes, points: Mapping[str, Mapping[int, float]]) -> None:
    """Hollow markers at step -> value, a shape and colour a router."""
    for position, steps in enumerate(points.values()):
        color, shape = STYLES[position % len(STYLES)][0], "osD^vP"[position % 6]
        (line,) = axis.plot(list(steps), list(steps.values()), linestyle="none", marker=shape, markersize=9, zorder=5)
        line.set(markerfacecolor="none", markeredgecolor=color, markeredgewidth=2)


def _running_mean(values_S: Tensor, window: int) -> Tensor:
    """Mean of the `window` values around each; of fewer at both ends."""
    total = torch.cat([values_S.new_zeros(1), values_S.cumsum(0)])
    start = torch.arange(values_S.shape[0]) - (window - 1) // 2
    end = (start + window).clamp(max=values_S.shape[0])
    start = start.clamp(min=0)
    return (total[end] - total[start]) / (end - start)


def _explain_lines(runs: Mapping[str, Tensor], window: int) -> str:
    seeds = max(values.shape[0] for values in runs.values())
    pale = "pale: each step" if seeds == 1 else f"pale: range over {seeds} seeds"
    return f"thick: running mean of {window} steps; {pale}"


def _arrays(given: Mapping[str, Values], ndim: int, name: str, *, one_run: bool = False) -> dict[str, Tensor]:
    """Router name -> fp64 on the CPU; with one_run, a curve alone is a row of such."""
    if not given:
        raise ValueError(f"{name} must hold at least one router, got none")
    found = {}
    for router, values in given.items():
        array = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
        array = array[None] if one_run and array.ndim == 1 else array
        if array.ndim != ndim or not array.numel():
            raise ValueError(
                f"{name}[{router!r}] must have {ndim} dimensions and values, got shape {tuple(array.shape)}"
            )
        found[router] = array
    return found
