"""The figures of a run: what is drawn can be read, and an older file is never damaged."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray

from pipeline.figures.drawing import draw_confusion_matrix, draw_filters, draw_learning_curves, draw_predictions, smooth

Array = NDArray[Any]
History = dict[str, list[tuple[int, float]]]
NAN, INF = float("nan"), float("inf")
TEN = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]


def pixels(path: Path) -> Array:
    """The picture as [H, W, 3] in 0..1; fails if it is not a PNG, or of a size nobody wants to look at."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = imread(path)[:, :, :3]
    height, width = picture.shape[:2]
    assert 600 <= width <= 2400 and 300 <= height <= 2600
    return picture


def brightness(picture: Array) -> Array:
    """Luminance [H, W], all that is left to an eye that sees no hue (ITU-R BT.709)."""
    return np.asarray(picture @ np.array([0.2126, 0.7152, 0.0722]))


def share_of(picture: Array, colour: tuple[int, int, int], tolerance: float = 0.02) -> float:
    near = np.abs(picture - np.array(colour) / 255).max(axis=2) < tolerance
    return float(near.mean())


BLUE, VERMILLION, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)


def history(steps: int = 200, every: int = 20) -> History:
    noise = np.random.default_rng(0).normal(0, 0.2, steps)
    loss = [(i, float(2.3 * np.exp(-i / 40 + noise[i]) + 0.02)) for i in range(steps)]
    return {
        "train/loss": loss,
        "train/accuracy": [(i, 1 / (1 + value)) for i, value in loss],
        "eval/loss": loss[::every],
        "eval/accuracy": [(i, 1 - 0.8 * float(np.exp(-i / 40))) for i in range(0, steps, every)],
        "train/lr": [(i, 1e-3 * (1 - i / steps)) for i in range(steps)],
        "perf/images_per_second": [(i, 4.5e4 + i) for i in range(0, steps, every)],
    }


def confusion(classes: int, right: float = 0.98, each: int = 1000) -> Array:
    rng = np.random.default_rng(classes)
    odds = rng.dirichlet(np.full(classes, 0.2), classes) * (1 - right) + np.eye(classes) * right
    return rng.multinomial(each, odds / odds.sum(axis=1, keepdims=True))


Predictions = tuple[Array, Array, Array, Array]  # images, labels, predicted, confidence


def predictions(count: int, channels: int = 1, wrong: Sequence[int] = ()) -> Predictions:
    """`count` grey images of which those at the places `wrong` are predicted wrongly."""
    images = np.full((count, channels, 28, 28), 128, dtype=np.uint8)
    labels = np.arange(count) % 10
    predicted = labels.copy()
    predicted[list(wrong)] = (labels[list(wrong)] + 1) % 10
    return images, labels, predicted, np.full(count, 0.9)


# learning curves


@pytest.fixture(scope="module")
def usual_curves(tmp_path_factory: pytest.TempPathFactory) -> Array:
    path = tmp_path_factory.mktemp("figures") / "curves.png"
    assert draw_learning_curves(history(), path, title="a run", steps_per_epoch=20) == path
    return pixels(path)


def test_learning_curves_of_a_run_show_training_and_validation(usual_curves: Array) -> None:
    assert share_of(usual_curves, BLUE) > 0.001 and share_of(usual_curves, VERMILLION) > 0.001


@pytest.mark.parametrize("missing", ["loss", "eval", "perf"])
def test_learning_curves_do_without_some_metrics(tmp_path: Path, missing: str) -> None:
    some = {key: points for key, points in history(40).items() if missing not in key}
    pixels(draw_learning_curves(some, tmp_path / "curves.png", title="a run", steps_per_epoch=20))


@pytest.mark.parametrize(
    "some",
    [
        {},
        {key: [] for key in history()},
        {key: [(1, NAN), (2, INF)] for key in history()},
        {key: [(7, 0.1)] for key in history()},
        {key: [(0, 0.0)] for key in history()},
        {key: [(0, -1.0), (5, -1.0)] for key in history()},
        {"train/loss": [(i, 10.0 ** (9 - i)) for i in range(18)]},
    ],
    ids=["no keys", "no points", "none finite", "one point", "a zero", "negative", "18 decades"],
)
def test_learning_curves_of_odd_histories_are_drawn(tmp_path: Path, some: History) -> None:
    pixels(draw_learning_curves(some, tmp_path / "curves.png", title="a run", steps_per_epoch=20))


def test_an_empty_panel_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = record_figures(monkeypatch)
    draw_learning_curves({"train/loss": [(1, 2.3)]}, tmp_path / "a.png", title="a run", steps_per_epoch=20)
    said = {ax.get_title(loc="left"): [text.get_text() for text in ax.texts] for ax in figures[0].axes}
    assert said == {"loss": [], "accuracy (%)": ["no data yet"], "learning rate": ["no data yet"]}


def test_values_that_are_not_finite_change_nothing(tmp_path: Path, usual_curves: Array) -> None:
    some = {key: [*points, (5, NAN), (9, INF), (11, -INF)] for key, points in history().items()}
    path = draw_learning_curves(some, tmp_path / "curves.png", title="a run", steps_per_epoch=20)
    assert np.array_equal(pixels(path), usual_curves)


def test_steps_repeated_by_a_resume_count_with_their_last_value(tmp_path: Path, usual_curves: Array) -> None:
    some = {key: [(step, 77.0) for step, _ in points[:9]] + points for key, points in history().items()}
    path = draw_learning_curves(some, tmp_path / "curves.png", title="a run", steps_per_epoch=20)
    assert np.array_equal(pixels(path), usual_curves)


def test_the_best_evaluation_is_labelled_with_its_percentage_and_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = record_figures(monkeypatch)
    some = {"eval/accuracy": [(20, 0.5), (40, 0.9812), (60, 0.97)]}
    draw_learning_curves(some, tmp_path / "curves.png", title="a run", steps_per_epoch=20)
    labels = [str(line.get_label()) for ax in figures[0].axes for line in ax.lines]
    assert "best validation 98.12% (epoch 2)" in labels


def test_smoothing_takes_noise_away_and_shifts_nothing() -> None:
    line = np.linspace(3, -1, 200)
    assert np.allclose(smooth(line)[10:-10], line[10:-10])
    assert np.allclose(smooth(np.full(200, 2.0)), 2.0)
    noise = np.random.default_rng(0).normal(size=200)
    assert smooth(noise).std() < 0.5 * noise.std()


def test_a_loss_that_falls_far_is_drawn_on_a_log_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = record_figures(monkeypatch)
    for last in (0.3, 0.1):
        some = {"eval/loss": [(20, 1.0), (40, last)]}
        draw_learning_curves(some, tmp_path / "curves.png", title="a run", steps_per_epoch=20)
    axes = [figure.axes[0] for figure in figures]
    assert [ax.get_yscale() for ax in axes] == ["linear", "log"]
    assert [ax.get_title(loc="left") for ax in axes] == ["loss", "loss (log scale)"]


# confusion matrix


@pytest.mark.parametrize("classes", [2, 20, 100])
def test_confusion_matrix_names_every_class_whatever_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    figures = record_figures(monkeypatch)
    names = [f"quite a long class name {i}" for i in range(classes)]
    path = tmp_path / "confusion.png"
    assert draw_confusion_matrix(confusion(classes), names, path, title="a run") == path
    pixels(path)
    for axis in (figures[0].axes[0].xaxis, figures[0].axes[0].yaxis):
        assert len({label.get_text() for label in axis.get_ticklabels()}) == classes


def test_one_error_in_a_thousand_can_be_seen_beside_the_diagonal(tmp_path: Path) -> None:
    counts = np.eye(7, dtype=np.int64) * 1000
    perfect = pixels(draw_confusion_matrix(counts, TEN[:7], tmp_path / "perfect.png", title="a run"))
    one_error = counts.copy()
    one_error[2, 5] = 1
    erring = pixels(draw_confusion_matrix(one_error, TEN[:7], tmp_path / "erring.png", title="a run"))
    changed = np.abs(brightness(perfect) - brightness(erring)) > 0.08
    cell = 0.6 * 150  # pixels of a side
    assert changed.sum() > 0.8 * cell**2


def test_rows_are_true_classes_and_columns_predicted_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = record_figures(monkeypatch)
    counts = np.zeros((3, 3), np.int64)
    counts[0, 2] = 7  # of the first class, taken for the third
    draw_confusion_matrix(counts, ["a", "b", "c"], tmp_path / "confusion.png", title="a run")
    ax = figures[0].axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")
    assert [text.get_text() for text in ax.get_xticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b", "c"]
    assert [text.get_position() for text in ax.texts if text.get_text() == "7"] == [(2, 0)]
    errors = ax.images[1].get_array()
    assert errors is not None and np.array_equal(np.ma.filled(errors, 0.0), counts / 7)
    assert ax.get_ylim() == (2.5, -0.5)  # the first row on top


def test_counts_and_recall_are_written_and_a_class_without_examples_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = record_figures(monkeypatch)
    counts = np.array([[7, 1, 0], [0, 9, 0], [0, 0, 0]])
    draw_confusion_matrix(counts, ["a", "b", "c"], tmp_path / "confusion.png", title="a run")
    written = sorted(text.get_text() for text in figures[0].axes[0].texts)
    assert written == sorted(["recall", "87.5%", "100.0%", "none", "7", "1", "9"])


def test_a_confusion_matrix_of_zeros_is_drawn(tmp_path: Path) -> None:
    pixels(draw_confusion_matrix(np.zeros((3, 3), np.int64), TEN[:3], tmp_path / "zeros.png", title="a run"))


# predictions


@pytest.mark.parametrize(("count", "channels"), [(0, 1), (0, 3), (1, 3), (5, 2), (64, 1)])
def test_predictions_of_any_number_and_channels(tmp_path: Path, count: int, channels: int) -> None:
    some = predictions(count, channels, wrong=(0,) if count else ())
    path = tmp_path / "predictions.png"
    assert draw_predictions(*some, TEN, path, title="a run") == path
    pixels(path)


def test_wrong_predictions_differ_from_right_ones_in_brightness_not_in_hue_alone(tmp_path: Path) -> None:
    labels = np.array([3])
    images, confidence = np.full((1, 1, 28, 28), 128, np.uint8), np.array([0.9])
    names = ["same"] * 10  # equal captions but for the cross and the truth
    right = draw_predictions(images, labels, labels, confidence, names, tmp_path / "right.png", title="a")
    wrong = draw_predictions(images, labels, labels + 1, confidence, names, tmp_path / "wrong.png", title="a")
    dark = [int((brightness(pixels(path)) < 0.48).sum()) for path in (right, wrong)]
    assert dark[1] > dark[0] + 1500, "the thick frame, the cross and the second line must add ink"


def test_captions_name_the_truth_only_where_the_prediction_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = record_figures(monkeypatch)
    draw_predictions(*predictions(3, wrong=(1,)), TEN, tmp_path / "some.png", title="a run")
    captions = [text.get_text() for text in figures[0].axes[0].texts]
    assert captions == ["T-shirt/top (90%)", "✗ Pullover (90%)\ntrue: Trouser", "Pullover (90%)"]


def test_no_predictions_are_shown_as_good_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = record_figures(monkeypatch)
    picture = pixels(draw_predictions(*predictions(0), TEN, tmp_path / "none.png", title="Mistakes"))
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["✓ none"]
    assert share_of(picture, GREEN) > 0.001


def test_three_channels_are_drawn_in_colour_and_other_numbers_by_their_first(tmp_path: Path) -> None:
    images = np.zeros((1, 3, 8, 8), np.uint8)
    images[:, 0], images[:, 1] = 200, 40
    rest = predictions(1)[1:]
    coloured = pixels(draw_predictions(images, *rest, TEN, tmp_path / "rgb.png", title="a run"))
    first = pixels(draw_predictions(images[:, :2], *rest, TEN, tmp_path / "first.png", title="a run"))
    assert share_of(coloured, (200, 40, 0)) > 0.1
    assert share_of(first, (200, 200, 200)) > 0.1


# filters


SHAPES = [(1, 1, 3, 3), (32, 1, 3, 3), (64, 3, 7, 7), (13, 8, 5, 1), (128, 4, 11, 11)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_filters_of_any_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    path = tmp_path / "filters.png"
    assert draw_filters(weight, path, title="a run") == path
    pixels(path)


def test_the_scale_of_filters_is_centred_at_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = record_figures(monkeypatch)
    draw_filters(np.linspace(-0.1, 0.4, 36).reshape(4, 1, 3, 3), tmp_path / "filters.png", title="a run")
    assert figures[0].axes[0].images[0].get_clim() == (-0.4, 0.4)


@pytest.mark.parametrize(
    ("channels", "said"),
    [(1, "2 filters of 3 by 3"), (3, "channels one below the other"), (5, "mean over 5 input channels")],
)
def test_the_figure_of_filters_says_how_input_channels_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int, said: str
) -> None:
    figures = record_figures(monkeypatch)
    draw_filters(np.ones((2, channels, 3, 3)), tmp_path / "filters.png", title="a run")
    assert any(text.get_text().endswith(said) for text in figures[0].texts)


@pytest.mark.parametrize("value", [0.0, NAN])
def test_filters_without_any_weight_get_a_scale_around_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    figures = record_figures(monkeypatch)
    pixels(draw_filters(np.full((3, 2, 3, 3), value), tmp_path / "filters.png", title="a run"))
    assert figures[0].axes[0].images[0].get_clim() == (-1.0, 1.0)


# all of them

Draw = Callable[[Path, str], Path]
DRAW: dict[str, Draw] = {
    "curves": lambda path, title: draw_learning_curves(history(40), path, title=title, steps_per_epoch=20),
    "confusion": lambda path, title: draw_confusion_matrix(confusion(3), TEN[:3], path, title=title),
    "predictions": lambda path, title: draw_predictions(*predictions(4, wrong=(3,)), TEN, path, title=title),
    "filters": lambda path, title: draw_filters(np.ones((8, 1, 3, 3)), path, title=title),
}
each_figure = pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW.keys())


def record_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures saved from here on, to look at what they say."""
    saved: list[Figure] = []
    save = Figure.savefig

    def save_and_record(figure: Figure, *args: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", save_and_record)
    return saved


@each_figure
def test_an_older_file_is_replaced_and_nothing_else_is_left(tmp_path: Path, draw: Draw) -> None:
    path = tmp_path / "new folder" / "figure.png"
    draw(path, "first")
    older = path.read_bytes()
    draw(path, "second")
    assert path.read_bytes() != older
    pixels(path)
    assert list(path.parent.iterdir()) == [path]


@each_figure
def test_a_drawing_that_fails_leaves_the_older_file_as_it_was(
    tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "figure.png"
    path.write_bytes(b"older")

    def disk_full(figure: Figure, file: IO[bytes], **options: Any) -> None:
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", disk_full)
    with pytest.raises(OSError, match="No space left"):
        draw(path, "a run")
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


@each_figure
def test_a_title_of_dollars_or_of_great_length_is_text(tmp_path: Path, draw: Draw) -> None:
    pixels(draw(tmp_path / "figure.png", r"run $\nonsense$ " + "a-very-long-run-name " * 6))


def test_the_module_needs_neither_pyplot_nor_torch() -> None:
    listing = "import sys, pipeline.figures.drawing; print(*sys.modules)"
    root = Path(__file__).parents[2]
    modules = subprocess.check_output([sys.executable, "-c", listing], cwd=root, text=True).split()
    assert "matplotlib.figure" in modules and {"matplotlib.pyplot", "torch"}.isdisjoint(modules)


def test_the_curves_of_a_long_run_are_drawn_in_seconds(tmp_path: Path) -> None:
    long = history(30_000)
    started = time.process_time()
    draw_learning_curves(long, tmp_path / "curves.png", title="a run", steps_per_epoch=100)
    assert time.process_time() - started < 5.0  # about 0.7 s; a quadratic loop would take minutes
