"""What a run leaves to look at and to use: figures in the run folder, and the model in MLflow."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.run_folder import RunFolder
from pipeline.tracking import figures
from pipeline.tracking.journal import read_journal

Record = dict[str, Any]


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


def draw_history(folder: RunFolder) -> list[Path]:
    """Learning curves from all metrics of the journal; nothing for a run that recorded none."""
    records, _ = read_journal(folder.journal)
    history: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in records:
        if record["kind"] == "metric":
            history[record["key"]].append((record["step"], record["value"]))
    if not history:
        return []
    steps_per_epoch = next((r["values"]["steps_per_epoch"] for r in records if r["kind"] == "params"), 1)
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


def file_digest(path: Path) -> str:
    """SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def log_model(folder: RunFolder, client: Any, uri: str, run_id: str, record: Record, model: Any) -> None:
    """Log the network once as an MLflow model in the pt2 format, which holds no pickle.

    `model` is on the CPU, in eval mode, and takes float32 pixels in 0..255, normalising them itself, so that it
    answers as the training evaluated.
    """
    experiment_id = client.get_run(run_id).info.experiment_id
    logged = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'")
    # MLflow creates the entry before it uploads: one that is not READY was interrupted
    if not any(m.tags.get("convoy.weights") == record["sha256"] and m.status.name == "READY" for m in logged):
        _log_pt2(folder, uri, run_id, record, model)


def _log_pt2(folder: RunFolder, uri: str, run_id: str, record: Record, model: Any) -> None:
    import mlflow.pytorch  # torch comes with it: 3 s that a run without a model to log need not wait for
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    shape = (record["channels"], record["image_size"], record["image_size"])
    pixels = np.dtype(np.float32)
    mlflow.set_tracking_uri(uri)
    mlflow.start_run(run_id=run_id, log_system_metrics=False)
    try:
        mlflow.pytorch.log_model(
            model,
            name="model",
            # two images, because export takes a batch of one for a constant
            input_example=np.zeros((2, *shape), np.float32),
            signature=ModelSignature(
                inputs=Schema([TensorSpec(pixels, (-1, *shape))]),
                outputs=Schema([TensorSpec(pixels, (-1, record["num_classes"]))]),
            ),
            # stated, because finding them out starts pip, which a node without a network cannot do
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "mlflow", "numpy")],
            serialization_format="pt2",
            tags={"convoy.weights": record["sha256"], "run": folder.name},
        )
    finally:
        mlflow.end_run("RUNNING")  # the state of the run is the journal's to say
