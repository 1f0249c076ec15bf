"""The figures of a run, from its records to PNG files in its folder."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.figures import drawing
from pipeline.run.folder import RunFolder
from pipeline.run.journal import iterate
from pipeline.run.records import EvaluationRecord, PredictionsRecord

MAX_POINTS = 100_000
"""Points of a curve at most: more than a figure can show."""


def draw_evaluation(folder: RunFolder, record: EvaluationRecord) -> list[Path]:
    """Draw the confusion matrix, the first images with prediction and truth, and the most confidently wrong ones."""
    names, matrix = record["class_names"], folder.figures / "confusion_matrix.png"
    with np.load(folder.path / record["path"], allow_pickle=False) as data:
        paths = [drawing.draw_confusion_matrix(data["confusion"], names, matrix, title=folder.name)]
        for group, title in (("samples", "first images"), ("wrong", "most confidently wrong")):
            images, labels, predicted, confidence = (
                data[f"{group}_{what}"] for what in ("images", "labels", "predicted", "confidence")
            )
            path, title = folder.figures / f"{group}.png", f"{folder.name}: {title}"
            paths.append(drawing.draw_predictions(images, labels, predicted, confidence, names, path, title=title))
    return paths


def draw_snapshot(folder: RunFolder, record: PredictionsRecord) -> list[Path]:
    """Draw what was predicted at one evaluation for the first images."""
    predicted, confidence = np.array(record["predicted"]), np.array(record["confidence"])
    with np.load(folder.path / "evaluation" / "samples.npz", allow_pickle=False) as data:
        images, labels = data["images"][: len(predicted)], data["labels"][: len(predicted)]
        names = data["class_names"].tolist()
    path = folder.figures / "predictions" / f"step-{record['step']:08d}.png"
    title = f"{folder.name}: step {record['step']:,}"
    return [drawing.draw_predictions(images, labels, predicted, confidence, names, path, title=title)]


def draw_history(folder: RunFolder) -> list[Path]:
    """Draw learning curves from the metrics of the journal; nothing for a run that recorded none."""
    history: dict[str, list[tuple[int, float]]] = defaultdict(list)
    steps_per_epoch = 1
    for record, _ in iterate(folder.journal, kinds=("params",), keys=drawing.CURVES):
        if record["kind"] == "params":
            steps_per_epoch = int(record["values"]["steps_per_epoch"])
        elif record["kind"] == "metric":
            points = history[record["key"]]
            points.append((record["step"], record["value"]))
            if len(points) > MAX_POINTS:
                del points[1::2]
    if not history:
        return []
    path = folder.figures / "learning_curves.png"
    return [drawing.draw_learning_curves(history, path, title=folder.name, steps_per_epoch=steps_per_epoch)]


def draw_filters(folder: RunFolder, model: Any) -> list[Path]:
    """Draw the first convolution of a network; nothing for one without."""
    filters = next((p for p in model.parameters() if p.ndim == 4), None)
    if filters is None:
        return []
    path = folder.figures / "filters.png"
    return [drawing.draw_filters(filters.detach().numpy(), path, title=f"{folder.name}: first layer")]
