"""The figures of a run as parts of a page."""

from __future__ import annotations

import base64
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

from pipeline.report.comparison import Run

TITLES = {
    "confusion_matrix": "Confusion matrix",
    "wrong": "Most confidently wrong",
    "samples": "Test samples",
    "filters": "First filters",
    "learning_curves": "Learning curves",
}
"""By file name, in the order in which they are shown; others come after them."""
PNG = b"\x89PNG\r\n\x1a\n"


class Picture(NamedTuple):
    title: str
    uri: str
    """`data:`, the picture itself."""
    width: int
    """Pixels."""
    height: int


def collect_pictures(run: Run) -> list[Picture]:
    """All figures of the run folder; of a run that was never published those of its last evaluation are drawn here."""
    paths = sorted(run.folder.figures.glob("*.png"), key=_rank) if run.folder.figures.is_dir() else []
    pictures = [picture for path in paths if (picture := _embed(path))]
    return pictures or _draw(run)


def _rank(path: Path) -> tuple[int, str]:
    return list(TITLES).index(path.stem) if path.stem in TITLES else len(TITLES), path.stem


def _embed(path: Path) -> Picture | None:
    """None for a file that is gone by now, or no picture."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if not content.startswith(PNG) or len(content) < 24:
        return None
    width, height = struct.unpack(">II", content[16:24])  # of the IHDR chunk, which is always the first
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return Picture(TITLES.get(path.stem, path.stem.replace("_", " ").capitalize()), uri, width, height)


def _draw(run: Run) -> list[Picture]:
    """From the arrays of the last evaluation; nothing if there are none that can be read."""
    path = run.folder.path / str(run.evaluation["path"]) if run.evaluation else None
    if path is None or run.evaluation is None or not path.is_file():
        return []
    import numpy as np  # with matplotlib a second that most reports need not wait for

    from pipeline.figures.drawing import draw_confusion_matrix, draw_predictions

    names = run.evaluation["class_names"]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        images, labels, predicted, confidence = (
            arrays[f"wrong_{part}"] for part in ("images", "labels", "predicted", "confidence")
        )
        with tempfile.TemporaryDirectory() as folder:
            matrix, wrong, title = Path(folder) / "confusion_matrix.png", Path(folder) / "wrong.png", run.folder.name
            drawn = [
                draw_confusion_matrix(arrays["confusion"], names, matrix, title=title),
                draw_predictions(
                    images, labels, predicted, confidence, names, wrong, title=f"{title}: most confidently wrong"
                ),
            ]
            return [picture for figure in drawn if (picture := _embed(figure))]
    except Exception:  # whatever a damaged file makes of it: the page has more to say
        return []
