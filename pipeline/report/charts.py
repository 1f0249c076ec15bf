"""Curves of several runs, one chart for each metric.

Colour and dashes tell runs apart, and so does their number, which stands on each curve. All text of a chart is ours:
nothing from a run folder gets into it.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.spatial.distance import cdist

from pipeline.figures import drawing
from pipeline.figures.drawing import FAINT, GREY, INK, Array, by_epoch, scale_loss, smooth
from pipeline.report.comparison import Run

COLOURS = (drawing.BLUE, drawing.VERMILLION, drawing.GREEN, "#CC79A7", drawing.ORANGE, drawing.SKY, "#444444")
DASHES: Sequence[Any] = ("-", (0, (6, 3)), (0, (1.5, 2)), (0, (8, 2, 2, 2)), (0, (12, 3)))
"""The numbers of colours and dashes have no common divisor, so that 35 lines differ."""
MAX_POINTS_WITH_DOTS = 40
PANELS = {
    "eval/accuracy": "Validation accuracy",
    "eval/loss": "Validation loss",
    "train/loss": "Training loss, smoothed",
    "perf/images_per_second": "Throughput in images/s, smoothed",
}
"""Metric -> title of its chart."""


def colour_of(index: int) -> str:
    """Return the colour of a run, by its place in the comparison."""
    return COLOURS[index % len(COLOURS)]


def draw_charts(runs: Sequence[Run]) -> dict[str, str]:
    """Return title -> address of an SVG image, for each panel that any run has points for."""
    figures = {title: build_chart(key, runs) for key, title in PANELS.items()}
    return {title: _as_svg(figure) for title, figure in figures.items() if figure}


def build_chart(key: str, runs: Sequence[Run]) -> Figure | None:
    """Return the curves of all runs that have this metric, one of PANELS; None if none has."""
    unit = "epoch" if all(run.steps_per_epoch for run in runs) else "optimizer step"
    is_smoothed = not key.startswith("eval/")
    lines: dict[int, drawing.Curve] = {}
    for i, run in enumerate(runs):
        x, y = by_epoch(run.curve(key), (run.steps_per_epoch or 1) if unit == "epoch" else 1)
        if len(x):
            lines[i] = x, smooth(y) if is_smoothed else y
    if not lines:
        return None
    figure = Figure((5.6, 3.1), layout="constrained")
    ax = figure.subplots()
    for i, (x, y) in lines.items():
        marker = "o" if len(x) == 1 or (len(x) <= MAX_POINTS_WITH_DOTS and not is_smoothed) else ""
        ax.plot(x, y, color=colour_of(i), linestyle=DASHES[i % len(DASHES)], lw=1.6, marker=marker, ms=3)
    scale = _set_value_axis(key, ax, lines)
    ax.set_title(PANELS[key] + scale, loc="left", size=11, weight="bold", color=INK)
    ax.set_xlabel(unit, color=GREY)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    ax.grid(color=FAINT)
    ax.tick_params(colors=GREY, length=0)
    ax.spines[:].set_visible(False)
    if len(runs) > 1:
        _number_lines(ax, lines)
    return figure


def _set_value_axis(key: str, ax: Axes, lines: Mapping[int, drawing.Curve]) -> str:
    """Set limits, scale and labels: accuracies without their steep beginning. Return what the title says about it."""
    ax.yaxis.set_major_formatter("{x:,.10g}")
    match key:
        case "eval/accuracy":
            low = min(float(y[len(y) // 4 :].min()) for _, y in lines.values())
            high = max(float(y.max()) for _, y in lines.values())
            ax.set_ylim(max(-0.002, low - 0.1 * (1 - low) - 0.002), high + 0.1 * (high - low) + 0.002)
            ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        case "perf/images_per_second":
            ax.set_ylim(bottom=0)
        case _:
            return scale_loss(ax, np.concatenate([y for _, y in lines.values()]))
    return ""


def _number_lines(ax: Axes, lines: Mapping[int, drawing.Curve]) -> None:
    """Write the number of its run on each line, where it is far from the other lines and numbers."""
    scale = ax.yaxis.get_transform()
    paths: dict[int, Array] = {}
    for i, (x, y) in lines.items():
        places = np.linspace(x[0], x[-1], 64)[2:-2]
        heights = scale.inverted().transform(np.interp(places, x, scale.transform(y)))
        path = ax.transData.transform(np.column_stack([places, heights]))
        inside = path[np.abs(ax.transAxes.inverted().transform(path) - 0.5).max(axis=1) <= 0.5]
        paths[i] = inside if len(inside) else path[-1:]
    numbers = np.empty((0, 2))
    for i, path in paths.items():
        others = np.concatenate([other for j, other in paths.items() if j != i] or [numbers])
        # pixels to the nearest of them, as far as they matter
        room = cdist(path, others).min(axis=1, initial=12) + cdist(path, numbers).min(axis=1, initial=40)
        best = path[room.argmax()]
        numbers = np.vstack([numbers, best])
        circle = {"boxstyle": "circle,pad=0.22", "facecolor": "white", "edgecolor": colour_of(i), "linewidth": 1.4}
        x, y = ax.transData.inverted().transform(best)
        ax.text(x, y, str(i + 1), ha="center", va="center", size=7, weight="bold", color=INK, bbox=circle)


def _as_svg(figure: Figure) -> str:
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "convoy"}):  # the same runs make the same page
        figure.savefig(file, format="svg", metadata={"Date": None})
    return embed(file.getvalue(), "svg+xml")


def embed(content: bytes, kind: str) -> str:
    """Return the `data:` address of an image."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
