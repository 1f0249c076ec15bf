"""Charts: lines where their values are, and told apart without colour."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.charts import COLOURS, DASHES, PANELS, build_chart, draw_charts
from pipeline.report.comparison import Run, read_run, read_runs
from pipeline.run.journal import Journal
from tests.report.recorded import record_run

ACCURACY, LOSS, TRAINING_LOSS, THROUGHPUT = PANELS


def axes_of(figure: Figure | None) -> Axes:
    assert figure is not None
    return figure.axes[0]


def eight_runs(folder: Path, spread: float) -> list[Run]:
    """Runs whose curves lie `spread` apart."""
    return read_runs(record_run(folder / str(i), accuracy=0.9 + i * spread).path for i in range(8))


def test_lines_are_where_the_values_are(tmp_path: Path) -> None:
    accuracy = axes_of(build_chart(ACCURACY, eight_runs(tmp_path, 0.001)))
    assert accuracy.get_xlabel() == "epoch"
    for i, line in enumerate(accuracy.lines):
        assert np.asarray(line.get_xdata()).tolist() == [1, 2, 3, 4]
        assert np.asarray(line.get_ydata())[-1] == pytest.approx(0.9 + i / 1000)


@pytest.mark.parametrize("spread", [0.0, 0.001, 0.01])
def test_each_line_has_the_number_of_its_run_and_no_number_hides_another(tmp_path: Path, spread: float) -> None:
    runs = eight_runs(tmp_path, spread)
    for panel in PANELS:
        figure = build_chart(panel, runs)
        ax = axes_of(figure)
        assert [text.get_text() for text in ax.texts] == [str(i + 1) for i in range(8)]
        assert figure is not None
        figure.draw_without_rendering()
        circles = [text.get_bbox_patch().get_window_extent() for text in ax.texts]  # type: ignore[union-attr]
        assert not any(a.overlaps(b) for a, b in combinations(circles, 2))
        for line, text in zip(ax.lines, ax.texts, strict=True):
            points = ax.transData.transform(np.column_stack([line.get_xdata(), line.get_ydata()]))
            place = ax.transData.transform(text.get_position())
            assert _distance_to(points, place) < 2


def _distance_to(points: np.ndarray, place: np.ndarray) -> float:
    """Of a place to the line through points, in pixels."""
    fine = np.linspace(0, len(points) - 1, 2000)
    line = np.column_stack([np.interp(fine, range(len(points)), points[:, axis]) for axis in (0, 1)])
    return float(np.hypot(*(line - place).T).min())


def test_a_single_run_needs_no_number(tmp_path: Path) -> None:
    assert not axes_of(build_chart(ACCURACY, [read_run(record_run(tmp_path / "run"))])).texts


def test_thirty_five_runs_differ_in_dashes_or_colour() -> None:
    assert len({(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]) for i in range(35)}) == 35


def test_losses_that_fall_far_get_a_log_scale_and_say_so(tmp_path: Path) -> None:
    run = read_run(record_run(tmp_path / "run"))
    falling = axes_of(build_chart(TRAINING_LOSS, [run]))  # from 1 to 0.05
    flat = axes_of(build_chart(LOSS, [run]))  # from 1/50 to 1/200
    assert (falling.get_yscale(), falling.get_title(loc="left")) == ("log", "Training loss, smoothed (log scale)")
    assert (flat.get_yscale(), flat.get_title(loc="left")) == ("linear", "Validation loss")


def test_accuracies_are_shown_without_their_steep_beginning_and_throughput_from_zero(tmp_path: Path) -> None:
    folder = record_run(tmp_path / "run", accuracy=0.99)
    journal = Journal(folder.journal)
    journal.metrics({"eval/accuracy": 0.99}, 250)
    journal.close()
    run = read_run(folder)  # 84, 89, 94, 99, 99%
    low, high = axes_of(build_chart(ACCURACY, [run])).get_ylim()
    assert 0.84 < low < 0.89 and high > 0.99
    assert axes_of(build_chart(THROUGHPUT, [run])).get_ylim()[0] == 0


@pytest.mark.parametrize("accuracy", [0.0, 0.15, 1.0])
def test_axes_hold_whatever_was_recorded(tmp_path: Path, accuracy: float) -> None:
    charts = draw_charts([read_run(record_run(tmp_path / "run", accuracy=accuracy))])
    assert list(charts) == list(PANELS.values())
    assert all(uri.startswith("data:image/svg+xml;base64,") for uri in charts.values())


def test_without_steps_per_epoch_the_axis_counts_steps(tmp_path: Path) -> None:
    runs = [read_run(record_run(tmp_path / "a")), read_run(record_run(tmp_path / "b", {"steps_per_epoch": None}))]
    accuracy = axes_of(build_chart(ACCURACY, runs))
    assert accuracy.get_xlabel() == "optimizer step"
    assert [np.asarray(line.get_xdata())[-1] for line in accuracy.lines] == [200, 200]
