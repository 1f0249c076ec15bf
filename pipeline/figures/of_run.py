"""What a run leaves to look at: from its records to figures in its folder."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.figures import drawing as figures
from pipeline.run.folder import RunFolder
from pipeline.run.journal import iterate

Record = dict[str, Any]
MAX_POINTS = 100_000
"""Of a curve."""


def draw_evaluation(folder: RunFolder, record: Record) -> list[Path]:
    """Confusion matrix, samples with prediction and truth, and the most confidently wrong ones."""
    folder.figures.mkdir(exist_ok=True)
    with np.load(folder.path / record["path"], allow_pickle=False) as data:
        evaluation = {name: data[name] for name in data.files}
    names = record["class_names"]
    paths = [
        figures.draw_confusion_matrix(
            evaluation["confusion"], names, folder.figures / "confusion_matrix.png", title=folder.name
        )
    ]
    for group, title in (("samples", "Test samples"), ("wrong", "Most confidently wrong")):
        paths.append(
            figures.draw_predictions(
                evaluation[f"{group}_images"],
                evaluation[f"{group}_labels"],
                evaluation[f"{group}_predicted"],
                evaluation[f"{group}_confidence"],
                names,
                folder.figures / f"{group}.png",
                title=f"{folder.name}: {title.lower()}",
            )
        )
    return paths


def draw_samples(folder: RunFolder, record: Record) -> Path:
    """What was predicted at one evaluation for the first test images."""
    with np.load(folder.path / "evaluation" / "samples.npz", allow_pickle=False) as data:
        images, labels, names = data["images"], data["labels"], data["class_names"].tolist()
    path = folder.figures / "predictions" / f"step-{record['step']:08d}.png"
    predicted, confidence = np.array(record["predicted"]), np.array(record["confidence"])
    images, labels = images[: len(predicted)], labels[: len(predicted)]
    title = f"{folder.name}: step {record['step']:,}"
    return figures.draw_predictions(images, labels, predicted, confidence, names, path, title=title)


def draw_history(folder: RunFolder) -> list[Path]:
    """Learning curves from the metrics of the journal; nothing for a run that recorded none."""
    history: dict[str, list[tuple[int, float]]] = defaultdict(list)
    steps_per_epoch = 1
    for record, _ in iterate(folder.journal, kinds=("params",), keys=figures.CURVES):
        if record["kind"] == "params":
            steps_per_epoch = record["values"]["steps_per_epoch"]
            continue
        points = history[record["key"]]
        points.append((record["step"], record["value"]))
        if len(points) > MAX_POINTS:  # more than a figure can show
            del points[1::2]
    if not history:
        return []
    folder.figures.mkdir(exist_ok=True)
    path = folder.figures / "learning_curves.png"
    return [figures.draw_learning_curves(history, path, title=folder.name, steps_per_epoch=int(steps_per_epoch))]


def draw_filters(folder: RunFolder, model: Any) -> list[Path]:
    """The first convolution of a network; nothing for one without."""
    filters = next((p for p in model.parameters() if p.ndim == 4), None)
    if filters is None:
        return []
    path = folder.figures / "filters.png"
    return [figures.draw_filters(filters.detach().numpy(), path, title=f"{folder.name}: first layer")]
