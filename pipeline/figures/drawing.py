"""The figures of a run as PNG files: learning curves, confusion matrix, predictions, first filters.

Drawn with matplotlib's object interface only: pyplot keeps every figure alive in global state. Colours are
Okabe and Ito's (https://jfly.uni-koeln.de/color/), told apart with any colour vision; none speaks alone.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from pipeline.base.files import write_atomically

DPI = 150
BLUE, SKY, ORANGE, VERMILLION, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73"
INK, GREY, FAINT = "#222222", "#666666", "#DDDDDD"
CORRECT = LinearSegmentedColormap.from_list("correct", ["white", SKY, BLUE])
ERRORS = LinearSegmentedColormap.from_list("errors", ["white", ORANGE, VERMILLION, "#6B2F00"])
CURVES = ("train/loss", "eval/loss", "train/accuracy", "eval/accuracy", "train/lr", "perf/images_per_second")
MAX_CLASSES_WITH_COUNTS = 20

Array = NDArray[Any]
Curve = tuple[Array, Array]  # epochs [P] and values [P], float64


def draw_learning_curves(
    history: Mapping[str, Sequence[tuple[int, float]]], path: Path, *, title: str, steps_per_epoch: int
) -> Path:
    """Draw loss, accuracy (shares, 0 to 1, as %), learning rate and, where measured, throughput by epoch.

    `history` maps each of CURVES to (optimizer step, value) pairs; any may be missing or empty. Non-finite values are
    left out; of a step recorded twice (as a resumed run does) the last value counts.
    """
    curves = [by_epoch(history.get(name, ()), steps_per_epoch) for name in CURVES]
    last = max((epochs[-1] for epochs, _ in curves if len(epochs)), default=0.0) or 1.0
    figure = _new_figure(8.4, 4.4, title)
    layout: Any = [["loss", "accuracy"], ["rate", "speed" if len(curves[5][0]) else "rate"]]
    grid = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": 0.18, "hspace": 0.38}
    axes: dict[str, Axes] = figure.subplot_mosaic(layout, height_ratios=[4, 1], gridspec_kw=grid)
    scale = scale_loss(axes["loss"], np.concatenate([smooth(curves[0][1]), curves[1][1]]))
    _draw_splits(axes["loss"], f"loss{scale}", curves[0], curves[1], "upper right")
    _draw_accuracy(axes["accuracy"], curves[2], curves[3])
    _draw_strip(axes["rate"], "learning rate", *curves[4])
    if "speed" in axes:
        _draw_strip(axes["speed"], "images / s", *curves[5])
    for ax in axes.values():
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlim(-0.02 * last, 1.02 * last)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=bool(last >= 3)))
        if not ax.lines:
            ax.text(0.5, 0.5, "no data yet", transform=ax.transAxes, ha="center", va="center", color=GREY)
            ax.set_yticks([])
    figure.supxlabel(f"epoch  (1 epoch = {steps_per_epoch:,} steps)", y=-0.08, va="top")
    return _save(figure, path)


def draw_confusion_matrix(confusion: Array, classes: Sequence[str], path: Path, *, title: str) -> Path:
    """Draw the confusion matrix, int [C, C] with the truth in rows and the prediction in columns.

    The colour is a cell's share of its row on a cube root scale from 0 to 1: one error in a thousand shows, and figures
    of different runs compare. Counts are written for C <= 20 (an empty cell is a zero).
    """
    count, total = len(confusion), int(confusion.sum())
    cell = min(max(0.6, 4.2 / count), 10.0 / count)  # inches
    side = cell * count
    correct = f"{np.trace(confusion) / total:.2%} of {total:,} correct (blue)" if total else "no data yet"
    figure = _new_figure(side, side, title, correct)
    ax = figure.add_axes((0, 0, 1, 1))
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    diagonal, scale = np.eye(count, dtype=bool), PowerNorm(1 / 3, 0, 1)
    # Correct ones and errors have a colour each: beside 98% on one scale, 0.5% would not be seen.
    ax.imshow(np.ma.masked_array(shares, ~diagonal), CORRECT, scale, interpolation="nearest")
    errors = ax.imshow(np.ma.masked_array(shares, diagonal), ERRORS, scale, interpolation="nearest")
    bar = figure.colorbar(errors, cax=ax.inset_axes((1 + 1.2 / side, 0, 0.18 / side, 1)))
    bar.set_ticks([0, 0.001, 0.01, 0.1, 0.5, 1], labels=["0", "0.1%", "1%", "10%", "50%", "100%"])
    bar.set_label("errors, as share of their true class", size=11)
    _label_classes(ax, classes, 72 * cell)
    recall, edge, inch = np.diag(shares), count - 0.5 + 0.1 / cell, 1 / cell
    ax.text(edge, -0.5 - 0.12 * inch, "recall", size=12, color=GREY)
    ax.hlines(range(count), edge, edge + 0.9 * inch * recall, color=SKY, lw=58 * cell, clip_on=False)
    ax.set_xlim(-0.5, count - 0.5)
    if count <= MAX_CLASSES_WITH_COUNTS:
        for row, share in enumerate(recall):
            text = f"{share:.1%}" if confusion[row].any() else "none"
            ax.text(edge + 0.06 * inch, row, text, va="center", color=INK)
        size = min(11.0, 72 * cell / (0.75 * len(str(confusion.max()))))
        for row, column in np.argwhere(confusion):
            number, colour = str(confusion[row, column]), "white" if shares[row, column] > 0.2 else INK
            ax.text(column, row, number, ha="center", va="center", size=size, color=colour, in_layout=False)
    return _save(figure, path)


def draw_predictions(
    images: Array, labels: Array, predicted: Array, confidence: Array, classes: Sequence[str], path: Path, *, title: str
) -> Path:
    """Draw images with their predictions: uint8 [N, C, H, W], N from 0 to some 64.

    C = 3 is drawn as RGB, of any other C the first channel. `labels` and `predicted` are int [N] (indices into
    `classes`), `confidence` float [N] (0 to 1). A wrong prediction has a thick frame, a cross and its truth.
    """
    count = len(images)
    columns = max(2, math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns) or 0.5
    pitch, tall = max(1.35, 5.4 / columns), 1.28  # inches from tile to tile; a tile's height in its widths
    names = [_literal(name, 14) for name in classes]
    size = min(13.0, 7 * pitch, 72 * pitch / (0.67 * (9 + max(map(len, names), default=0))))
    correct = labels == predicted
    note = f"all {count} correct" if correct.all() else f"{(~correct).sum()} of {count} wrong (thick frame, ✗)"
    figure = _new_figure(columns * pitch, rows * pitch * tall, title, note if count else "")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    for i in range(count):
        caption = f"{names[predicted[i]]} ({confidence[i]:.0%})"
        caption = caption if correct[i] else f"✗ {caption}\ntrue: {names[labels[i]]}"
        pixels = images[i].transpose(1, 2, 0) if images.shape[1] == 3 else images[i, 0]
        x, y = i % columns, i // columns * tall
        ax.imshow(pixels, "gray", vmin=0, vmax=255, extent=(x, x + 0.93, y + 0.93, y), aspect="auto")
        colour, width, weight = (BLUE, 1.0, "normal") if correct[i] else (VERMILLION, 4.5, "bold")
        ax.add_patch(Rectangle((x, y), 0.93, 0.93, fill=False, edgecolor=colour, lw=width))
        ax.text(x, y + 0.97, caption, va="top", size=size, weight=weight, color=INK, linespacing=1.1)
    if not count:
        ax.text(1, 0.3, "✓ none", ha="center", va="center", size=26, color=GREEN)
    ax.set(xlim=(-0.03, columns - 0.03), ylim=(rows * tall, -0.03))
    return _save(figure, path)


def draw_filters(weight: Array, path: Path, *, title: str) -> Path:
    """Draw the filters of a first convolution, float [out, in, kh, kw], on one scale centred at 0.

    Up to 4 input channels stand one below the other (the mean of a colour opponent filter would be near 0), of more the
    mean is drawn; the figure says which. Non-finite weights are left grey, as the gaps are.
    """
    count, channels, height, width = weight.shape
    filters = np.where(np.isfinite(weight), weight, np.nan).astype(np.float64)
    note = f"{count} filter{'s' * (count > 1)} of {height} by {width}"
    if channels > 4:
        filters = filters.mean(axis=1, keepdims=True)
        note += f", mean over {channels} input channels"
    elif channels > 1:
        note += f", {channels} input channels one below the other"
    limit = float(np.nan_to_num(np.abs(filters)).max()) or 1.0
    image = _tile(filters)
    inch = min(7.0 / image.shape[1], 5.5 / image.shape[0])
    figure = _new_figure(inch * image.shape[1], inch * image.shape[0], title, note)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    colours = colormaps["RdBu_r"].with_extremes(bad="#BBBBBB")
    drawn = ax.imshow(image, colours, vmin=-limit, vmax=limit, interpolation="nearest")
    figure.colorbar(drawn, cax=ax.inset_axes((1.02, 0, 0.025, 1)), label="weight")
    return _save(figure, path)


def _new_figure(width: float, height: float, title: str, note: str = "") -> Figure:
    """Return a figure of `width` by `height` inches below its title, which is large enough for a thumbnail."""
    figure, size = Figure((width, height), dpi=DPI), min(max(2.0 * width, 14.0), 20.0)
    lines = textwrap.fill(_literal(title), int(72 * max(width, 5.0) / (0.7 * size)))
    figure.text(0, 1 + 28 / (72 * height), lines, size=size, weight="bold", color=INK)
    figure.text(0, 1 + 8 / (72 * height), note, size=12, color=GREY)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, on a page that holds what stands around the axes too; return `path`."""
    FigureCanvasAgg(figure)
    # bbox_inches="tight" would draw all twice for it
    page = figure.get_tightbbox().padded(0.15)
    write_atomically(path, lambda file: figure.savefig(file, format="png", bbox_inches=page))
    return path


def _literal(text: str, length: int = 500) -> str:
    """Return a text shortened in the middle, its dollars escaped: matplotlib would read mathematics between two."""
    return (text if len(text) <= length else f"{text[: length - 6]}…{text[-5:]}").replace("$", r"\$")


def by_epoch(points: Sequence[tuple[int, float]], steps_per_epoch: int) -> Curve:
    """Return the finite values by epoch; of a step recorded twice the last."""
    by_step = {step: value for step, value in points if math.isfinite(value)}
    table = np.array(sorted(by_step.items()), dtype=np.float64).reshape(-1, 2)
    return table[:, 0] / steps_per_epoch, table[:, 1]


def smooth(values: Array) -> Array:
    """Return centred means over a twentieth of the curve: running ones would lag behind the validation."""
    width = min(len(values) // 20, 500)
    if width < 2:
        return values
    window = np.hanning(width // 2 * 2 + 3)  # odd: one of even length would shift the curve
    weights: Array = np.convolve(np.ones_like(values), window, "same")
    return np.convolve(values, window, "same") / weights


def scale_loss(ax: Axes, values: Array) -> str:
    """Make the y axis logarithmic if losses fall to less than a fifth; return what its title says about that."""
    if not (len(values) and 0 < 5 * values.min() < values.max()):
        return ""
    ax.set_yscale("log")
    factors = (1, 2, 5) if values.max() < 1e4 * values.min() else (1,)  # more labels would overlap
    ax.yaxis.set(major_locator=LogLocator(subs=factors), minor_locator=NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")
    return " (log scale)"


def _draw_splits(ax: Axes, name: str, train: Curve, validation: Curve, legend: str) -> None:
    """Draw both splits; single batches come last, as they would stretch the axis."""
    ax.set_title(name, loc="left", color=GREY, size=12)
    ax.grid(color=FAINT)
    ax.margins(y=0.08)
    if len(train[0]):
        mark = "s" if len(train[0]) == 1 else ""  # a line of one point is not seen
        ax.plot(train[0], smooth(train[1]), color=BLUE, lw=2.2, marker=mark, label="training (smoothed)")
    if len(validation[0]):
        ax.plot(*validation, "o--", color=VERMILLION, lw=2.2, ms=5, label="validation")
    if ax.lines:
        ax.legend(loc=legend)
        ax.set_ylim(ax.get_ylim())
        ax.plot(*train, color=SKY, lw=0.6, alpha=0.6, zorder=1)


def _draw_accuracy(ax: Axes, train: Curve, validation: Curve) -> None:
    train, (epochs, values) = (train[0], 100 * train[1]), (validation[0], 100 * validation[1])
    if len(epochs):
        best = int(values.argmax())
        label = f"best validation {values[best]:.2f}% (epoch {float(epochs[best]):.4g})"
        ax.plot(epochs[best], values[best], "*", color=ORANGE, label=label, ms=17, mec=INK, zorder=3, clip_on=False)
    _draw_splits(ax, "accuracy (%)", train, (epochs, values), "lower right")
    if len(epochs) > 1:  # the steep start would leave no room for what comes after the first validation
        low = min(values.min(), smooth(train[1])[train[0] >= epochs[0]].min(initial=99.0))
        ax.set_ylim(low - 0.2 * (101 - low), 101)


def _draw_strip(ax: Axes, name: str, epochs: Array, values: Array) -> None:
    ax.set_title(name, loc="left", color=GREY, size=12)
    if len(epochs):
        top = float(values.max())
        ax.plot(epochs, values, color=GREEN, lw=1.8, marker="o" if len(epochs) == 1 else "")
        ax.set_ylim(0, 1.15 * top or 1.0)
        ax.set_yticks([0, top], ["0", f"{top:,.0f}" if top >= 100 else f"{top:.3g}"])


def _label_classes(ax: Axes, class_names: Sequence[str], cell: float) -> None:
    """Name rows and columns of `cell` points; past some 100 classes only as many as can be read."""
    every = math.ceil(6.5 / cell)
    size = min(0.85 * cell * every, 11.0)
    names = [_literal(name, 16) for name in class_names[::every]]
    places = range(0, len(class_names), every)
    ax.set_yticks(places, names, size=size)
    ax.set_xticks(places, names, size=size)
    if max(map(len, names)) * 0.7 * size > cell * every:
        for label in ax.get_xticklabels():
            label.set(rotation=45 if size > 8 else 90, rotation_mode="anchor", ha="right", va="center")
    ax.tick_params(length=0)
    ax.spines[:].set_color(FAINT)
    ax.set_xlabel("predicted class", size=12)
    ax.set_ylabel("true class", size=12)


def _tile(filters: Array) -> Array:
    """Return filters [out, in, kh, kw] as one image; gaps are NaN, and wider below the last channel."""
    count, channels, height, width = filters.shape
    columns = min(range(1, count + 1), key=lambda n: -count % n + abs(n - math.sqrt(1.4 * count * channels)))
    below = int(channels > 1)
    tiles = np.pad(filters, ((0, -count % columns), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    tiles = tiles.reshape(-1, columns, channels * (height + 1), width + 1)
    tiles = np.pad(tiles, ((0, 0), (0, 0), (0, below), (0, 0)), constant_values=np.nan)
    return tiles.swapaxes(1, 2).reshape(-1, columns * (width + 1))[: -1 - below, :-1]
