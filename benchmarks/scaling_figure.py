"""The figure of benchmarks/scaling.py: efficiency over ranks, and where the time of a step goes.

Drawn with matplotlib's object interface; colours are Okabe and Ito's, told apart with any colour vision.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Spread

if TYPE_CHECKING:  # the benchmark runs without it
    from matplotlib.axes import Axes

MODE_STYLES = {"weak": ("#0072B2", "o", ""), "strong": ("#D55E00", "s", "//")}
"""Line colour, marker, and hatch of the bars."""
PART_COLOURS = {"data": "#56B4E9", "compute": "#009E73", "communication": "#E69F00", "other": "#999999"}
GREY = "#666666"
BAR_WIDTH = 0.38
LINE_CHARACTERS = 150
"""Of the subtitle: what the figure is wide enough for."""

Efficiencies = Mapping[str, Mapping[int, Spread]]
"""By mode and ranks; shares."""
Splits = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Milliseconds per step, by mode, ranks and part."""


def draw_scaling(
    efficiencies: Efficiencies, splits: Splits, path: Path, *, subtitle: str, reference: str, cores: int | None
) -> Path:
    """Draw both figures. `cores` bound what CPU ranks can reach; None for GPUs and several nodes. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    ranks = sorted({number for of in efficiencies.values() for number in of})
    draw_efficiencies(left, efficiencies, ranks, reference, cores)
    draw_splits(right, splits, ranks)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(textwrap.fill(subtitle, LINE_CHARACTERS), fontsize=9, color=GREY)
    figure.savefig(path, dpi=150)
    return path


def draw_efficiencies(
    axes: Axes, efficiencies: Efficiencies, ranks: Sequence[int], reference: str, cores: int | None
) -> None:
    axes.axhline(100, color=GREY, linestyle="--", linewidth=1, label="ideal")
    if cores is not None and ranks[-1] > cores:
        limit = [100 * min(1.0, cores / number) for number in ranks]
        axes.plot(ranks, limit, color=GREY, linestyle=":", linewidth=1.5, label=f"limit of {cores} cores")
        axes.axvspan(cores * 1.05, ranks[-1] * 1.1, color="#EEEEEE", zorder=0, label="ranks share cores")
    for mode, spreads in efficiencies.items():
        colour, marker, _ = MODE_STYLES[mode]
        middle = [100 * spread.median for spread in spreads.values()]
        below = [100 * (spread.median - spread.minimum) for spread in spreads.values()]
        above = [100 * (spread.maximum - spread.median) for spread in spreads.values()]
        axes.errorbar(
            list(spreads), middle, yerr=[below, above], color=colour, marker=marker, capsize=4, label=f"{mode} scaling"
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(number) for number in ranks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(title=f"Efficiency against {reference}", xlabel="ranks", ylabel=f"images/s per rank, % of {reference}")
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def draw_splits(axes: Axes, splits: Splits, ranks: Sequence[int]) -> None:
    ticks: dict[float, str] = {}
    for mode_index, (mode, by_ranks) in enumerate(splits.items()):
        offset = (mode_index - (len(splits) - 1) / 2) * (BAR_WIDTH + 0.04)
        for number, parts in by_ranks.items():
            place, bottom = ranks.index(number) + offset, 0.0
            for part, colour in PART_COLOURS.items():
                axes.bar(
                    place, parts[part], BAR_WIDTH, bottom=bottom, color=colour, edgecolor="white", label=part,
                    hatch=MODE_STYLES[mode][2], linewidth=0.5,
                )  # fmt: skip
                bottom += parts[part]
            ticks[place] = f"{number}\n{mode}"
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=9)
    axes.set(title="Where the time of a step goes", xlabel="ranks and mode", ylabel="ms per optimizer step")
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))  # one of each part: that of the first bar
    axes.set_ylim(top=1.15 * axes.get_ylim()[1])  # room for the legend above all bars
    order = list(reversed(first))
    axes.legend([first[part] for part in order], order, frameon=False, fontsize=9, ncols=4, loc="upper center")
