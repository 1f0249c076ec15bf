"""What a finished training leaves: its weights, what it predicted, and a few last lines to read."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.sources.datasets import Dataset, DatasetInfo
from pipeline.learning.evaluation import Predictions
from pipeline.learning.metrics import Evaluation
from pipeline.run.folder import RunFolder
from pipeline.run.published import Progress
from train.build import network_arguments
from train.output import FolderOutput

GRID = 42
"""Images in each of the two grids of predictions: six rows of seven."""


def write_results(
    output: FolderOutput,
    config: Config,
    dataset: Dataset,
    evaluation: Evaluation,
    predictions: Predictions,
    weights: dict[str, Tensor],
    global_step: int,
    best_step: int,
) -> None:
    """Files in the run folder, and the records that let the publisher draw and package them.

    `evaluation`, `predictions` and `weights` are of the end, at `global_step`; the model logged is the best.
    """
    folder, info = output.folder, dataset.info
    path = folder.path / "evaluation" / f"step-{global_step:08d}.npz"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **_evaluation_arrays(dataset, evaluation, predictions))
    temporary.replace(path)
    output.journal.append(
        "evaluation",
        path=str(path.relative_to(folder.path)),
        step=global_step,
        class_names=info.class_names,
        accuracy=evaluation.accuracy,
        count=evaluation.count,
        recall=dict(zip(info.class_names, _finite(evaluation.recall), strict=True)),
    )
    output.save_final(weights)
    output.journal.append(
        "model",
        **output.weights_to_log(best_step, global_step),
        metric=config.checkpoint.metric,
        dataset=info.name,
        dataset_digest=dataset.digest,
        register=config.tracking.register,
        **describe_network(config, info),
    )


def write_slide_images(folder: RunFolder, dataset: Dataset, count: int) -> None:
    """The images whose predictions are recorded at each evaluation."""
    path = folder.path / "evaluation" / "samples.npz"
    path.parent.mkdir(exist_ok=True)
    images, labels = dataset.evaluation.images[:count].numpy(), dataset.evaluation.labels[:count].numpy()
    temporary = path.with_name(f".writing-{path.name}")
    with temporary.open("wb") as file:
        np.savez_compressed(file, images=images, labels=labels, class_names=np.array(dataset.info.class_names))
    temporary.replace(path)


def describe_network(config: Config, info: DatasetInfo) -> dict[str, Any]:
    """All it takes to build the network again and to feed it."""
    return {
        "name": config.model.name,
        "channels": info.channels,
        "image_size": info.image_size,
        "num_classes": info.num_classes,
        "arguments": network_arguments(config),
        "mean": info.mean,
        "std": info.std,
    }


def _evaluation_arrays(dataset: Dataset, evaluation: Evaluation, predictions: Predictions) -> dict[str, Any]:
    wrong = (predictions.predicted != predictions.labels).nonzero().flatten()
    worst = wrong[predictions.confidence[wrong].argsort(descending=True)]
    arrays = {"confusion": evaluation.confusion.numpy()}
    for group, chosen in (("samples", torch.arange(min(GRID, evaluation.count))), ("wrong", worst[:GRID])):
        arrays |= {
            f"{group}_images": dataset.evaluation.images[chosen].numpy(),
            f"{group}_labels": predictions.labels[chosen].numpy(),
            f"{group}_predicted": predictions.predicted[chosen].numpy(),
            f"{group}_confidence": predictions.confidence[chosen].numpy(),
        }
    return arrays


def _finite(recall: Tensor) -> list[float | None]:
    """JSON has no NaN: a class without samples has no recall."""
    return [value if value == value else None for value in recall.tolist()]


def describe_sample(info: DatasetInfo, predictions: Predictions) -> str:
    names = info.class_names
    truth, predicted = (names[int(t[0])] for t in (predictions.labels, predictions.predicted))
    return f"test sample 0: predicted {predicted} ({float(predictions.confidence[0]):.1%} confident), truth {truth}"


def sync_command(folder: RunFolder) -> str:
    return f"python -m pipeline sync {shlex.quote(os.path.relpath(folder.path))}"


def describe_model(progress: Progress) -> list[str]:
    """What the publisher made of the best weights, if it did."""
    model_id, outcome = progress.get("model_id"), progress.get("model_outcome")
    return [f"the model in MLflow: models:/{model_id}" + (f", {outcome}" if outcome else "")] if model_id else []


def describe_opening(folder: RunFolder, progress: Progress, *, published: bool) -> str:
    """How to look at the run, or how to publish what is missing."""
    uri, ids = progress.store_uri, (progress.get("mlflow_experiment_id"), progress.get("mlflow_run_id"))
    if not published:
        return f"MLflow at {uri} has not everything yet; nothing is lost, publish the rest with: {sync_command(folder)}"
    page = f"#/experiments/{ids[0]}/runs/{ids[1]}?workflowType=machine_learning"
    if uri.startswith("http"):
        return f"look at the run: {uri.rstrip('/')}/{page}"
    is_default = uri == f"sqlite:///{Path('mlflow.db').absolute()}"  # what a bare `mlflow server` opens
    store = "" if is_default else f" --backend-store-uri {shlex.quote(uri)}"
    return f"look at the run: mlflow server{store}, then open http://127.0.0.1:5000/{page}"
