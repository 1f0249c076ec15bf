"""Curves of several runs in one chart: where every line, tick and label of it is, in units of the drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.report.comparison import Curve, Run

WIDTH, HEIGHT = 560.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 526.0, 12.0, 258.0
MAX_POINTS = 240
"""Of a line: more would not be seen in so many units of the drawing."""
MAX_MARKERS = 40
LABEL_HEIGHT = 15.0

Scale = Literal["linear", "log"]
Points = list[tuple[float, float]]
"""(epoch, value)"""


@dataclass(frozen=True)
class Panel:
    key: str
    title: str
    unit: str
    is_smoothed: bool = False
    factor: float = 1.0
    from_zero: bool = False


PANELS = (
    Panel("eval/accuracy", "Evaluation accuracy", "%", factor=100),
    Panel("eval/loss", "Evaluation loss", ""),
    Panel("train/loss", "Training loss", "", is_smoothed=True),
    Panel("perf/images_per_second", "Throughput", "images/s", is_smoothed=True, from_zero=True),
)


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Line:
    run: int
    """Index of its run."""
    points: Points
    """As drawn: x, y."""
    epochs: list[float]
    values: list[float]
    has_markers: bool
    label_x: float
    label_y: float


@dataclass(frozen=True)
class Chart:
    panel: Panel
    scale: Scale
    x_unit: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]


@dataclass(frozen=True)
class Axis:
    """From values to places."""

    low: float
    high: float
    start: float
    end: float
    scale: Scale = "linear"

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.scale == "log":
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def draw_charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each panel that any run has points for."""
    x_unit = "epochs" if all(run.steps_per_epoch for run in runs) else "optimizer steps"
    charts = [_draw(panel, runs, x_unit) for panel in PANELS]
    return [chart for chart in charts if chart.lines]


def _draw(panel: Panel, runs: Sequence[Run], x_unit: str) -> Chart:
    divisors = [run.steps_per_epoch if x_unit == "epochs" else 1 for run in runs]
    curves = [_points(run.curve(panel.key), d or 1, panel) for run, d in zip(runs, divisors, strict=True)]
    drawn = [curve for curve in curves if curve]
    if not drawn:
        return Chart(panel, "linear", x_unit, [], [], [])
    last = max(curve[-1][0] for curve in drawn)
    x_axis = Axis(0.0, last or 1.0, LEFT, RIGHT)
    y_axis = _value_axis(panel, drawn)
    lines = [_line(i, curve, panel, x_axis, y_axis) for i, curve in enumerate(curves) if curve]
    x_ticks = [Tick(x_axis.place(value), f"{value:,.10g}") for value in nice_ticks(0, x_axis.high, 6)]
    y_values = log_ticks(y_axis.low, y_axis.high) if y_axis.scale == "log" else nice_ticks(y_axis.low, y_axis.high, 5)
    y_ticks = [Tick(y_axis.place(value), f"{value:,.10g}") for value in y_values]
    return Chart(panel, y_axis.scale, x_unit, x_ticks, y_ticks, _spread_labels(lines))


def _points(curve: Curve, steps_per_unit: int, panel: Panel) -> Points:
    values = [panel.factor * value for _, value in curve]
    if panel.is_smoothed:
        values = smooth(values, len(values) // 20)
    points = [(step / steps_per_unit, value) for (step, _), value in zip(curve, values, strict=True)]
    every = math.ceil(len(points) / MAX_POINTS)
    return points[:-1:every] + points[-1:] if every > 1 else points


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Centred means over `width` values; at the ends over as many as there are on both sides."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        reach = min(width // 2, i, len(values) - 1 - i)
        means.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return means


def _value_axis(panel: Panel, curves: Sequence[Points]) -> Axis:
    """Losses that fall to less than a fifth on a log scale; accuracies without their steep beginning."""
    values = [value for curve in curves for _, value in curve]
    low, high = min(values), max(values)
    if panel.key.endswith("/accuracy"):
        low = min(value for curve in curves for _, value in curve[len(curve) // 4 :])
        return Axis(max(0.0, low - 0.1 * (100 - low) - 0.1), min(100.0, high + 0.1 * (high - low) + 0.2), BOTTOM, TOP)
    if panel.from_zero:
        return Axis(0.0, 1.08 * high or 1.0, BOTTOM, TOP)
    if 0 < 5 * low < high:
        return Axis(low / 1.1, high * 1.1, BOTTOM, TOP, "log")
    margin = 0.06 * (high - low) or abs(high) / 10 or 1.0
    return Axis(low - margin, high + margin, BOTTOM, TOP)


def _line(run: int, curve: Points, panel: Panel, x_axis: Axis, y_axis: Axis) -> Line:
    points = [(round(x_axis.place(x), 1), round(y_axis.place(y), 1)) for x, y in curve]
    has_markers = len(points) == 1 or (len(points) <= MAX_MARKERS and not panel.is_smoothed)
    epochs, values = zip(*curve, strict=True)
    return Line(run, points, list(epochs), list(values), has_markers, points[-1][0] + 9, points[-1][1])


def _spread_labels(lines: list[Line]) -> list[Line]:
    """Labels at the right edge stand at the ends of their lines, moved apart as far as they would overlap."""
    at_edge = sorted((line for line in lines if line.label_x > RIGHT - 20), key=lambda line: line.label_y)
    places: list[float] = []
    for line in at_edge:
        places.append(max(line.label_y, places[-1] + LABEL_HEIGHT if places else TOP))
    limit = BOTTOM
    for i in reversed(range(len(places))):  # what was pushed out below moves up again
        places[i] = min(places[i], limit)
        limit = places[i] - LABEL_HEIGHT
    moved = {line.run: place for line, place in zip(at_edge, places, strict=True)}
    return [replace(line, label_y=moved.get(line.run, line.label_y)) for line in lines]


def nice_ticks(low: float, high: float, at_most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within the limits."""
    rough = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; powers alone over more than four decades."""
    factors = (1, 2, 5) if high < 1e4 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for factor in factors if low <= (tick := factor * 10.0**power) <= high]
