"""Charts: lines where their values are, round ticks, labels that can be read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.report import charts
from pipeline.report.comparison import read_run, read_runs
from tests.report.recorded import record_run


def test_lines_end_where_their_curves_end_and_labels_do_not_overlap(tmp_path: Path) -> None:
    paths = [record_run(tmp_path / str(i), accuracy=0.9 + i / 1000).path for i in range(6)]
    accuracy = charts.draw_charts(read_runs(paths))[0]
    assert accuracy.x_unit == "epochs"
    places = sorted(line.label_y for line in accuracy.lines)
    assert min(b - a for a, b in pairwise(places)) >= charts.LABEL_HEIGHT
    for i, line in enumerate(accuracy.lines):
        assert line.epochs == [1, 2, 3, 4]
        assert line.values[-1] == pytest.approx(90 + i / 10)
        assert line.points[-1][0] == charts.RIGHT
        assert charts.TOP < line.points[-1][1] < charts.BOTTOM


def test_axes_hold_whatever_was_recorded(tmp_path: Path) -> None:
    for accuracy in (0.0, 0.15, 1.0):
        for chart in charts.draw_charts([read_run(record_run(tmp_path / f"at-{accuracy}", accuracy=accuracy))]):
            assert len(chart.y_ticks) >= 2
            assert all(charts.TOP <= tick.at <= charts.BOTTOM for tick in chart.y_ticks)
            assert all(np.isfinite(place) for line in chart.lines for point in line.points for place in point)


def test_ticks_are_round_and_within() -> None:
    assert charts.nice_ticks(0, 12, 6) == [0, 2, 4, 6, 8, 10, 12]
    assert charts.nice_ticks(0.31, 0.59, 5) == [0.4, 0.5]
    assert charts.nice_ticks(1e-13, 5e-13, 5) == [1e-13, 2e-13, 3e-13, 4e-13, 5e-13]
    assert charts.log_ticks(0.03, 2.5) == [0.05, 0.1, 0.2, 0.5, 1, 2]
    assert charts.log_ticks(1e-6, 10) == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10]


def test_smoothing_keeps_the_ends_and_the_straight() -> None:
    assert charts.smooth([1, 2, 3, 4, 5, 6], 4) == [1, 2, 3, 4, 5, 6]
    assert charts.smooth([0, 0, 9, 0, 0], 2) == [0, 3, 3, 3, 0]
    assert charts.smooth([3.0], 9) == [3.0]
