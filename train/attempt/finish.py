"""The end of an attempt on rank 0: weights, predictions and evaluation of a finished training, or where it stopped."""

import hashlib
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.base.files import write_atomically
from pipeline.config import Config
from pipeline.data.samples import Dataset
from pipeline.learning.evaluation import Predictions
from pipeline.learning.metrics import Evaluation
from pipeline.run.folder import RunError
from pipeline.run.records import EvaluationRecord, ModelRecord
from pipeline.run.sweep import read_sweep_folder
from train.output import FolderOutput
from train.trainer import Trainer

GRID = 42
"""Images in each of the two grids of predictions: six rows of seven."""


def write_results(
    output: FolderOutput, config: Config, dataset: Dataset, trainer: Trainer, predictions: Predictions
) -> list[str]:
    """Write what a finished training leaves, for the publisher to draw and package; return lines for people.

    Evaluation, predictions and weights are of the end; the model to be logged is the best.
    """
    evaluation, step = trainer.last_evaluation, trainer.position.global_step
    assert evaluation is not None
    path = output.folder.path / "evaluation" / f"step-{step:08d}.npz"
    arrays = _evaluation_arrays(dataset, evaluation, predictions)
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
    record: EvaluationRecord = {
        "kind": "evaluation",
        "path": str(path.relative_to(output.folder.path)),
        "step": step,
        "class_names": dataset.classes,
        "accuracy": evaluation.accuracy,
        "count": evaluation.count,
        "recall": dict(zip(dataset.classes, _finite(evaluation.recall), strict=True)),
    }
    output.bundle.save("final", trainer.model.state_dict(), step)
    which, logged_step = best_weights(output, trainer)
    weights = output.bundle.path(which)
    model: ModelRecord = {
        "kind": "model",
        "path": str(weights.relative_to(output.folder.path)),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "step": logged_step,
        "metric": config.checkpoint.metric,
        "dataset": dataset.name,
        "dataset_digest": dataset.digest,
        "register": config.tracking.register,
    }
    output.journal.append(record, model)
    best = f", {config.checkpoint.metric} {trainer.best.value:.5g}" if trainer.best else ""
    result = f"finished: {evaluation.accuracy:.2%} of {evaluation.count:,} validation images right"
    return [f"{result} (the model is of step {logged_step:,}{best})", _describe_first(dataset, predictions)]


def best_weights(output: FolderOutput, trainer: Trainer) -> tuple[str, int]:
    """Return "best" and its step if these weights were ever written, else "final" and the present step."""
    if trainer.best is not None and output.bundle.path("best").is_file():
        return "best", trainer.best.global_step
    return "final", trainer.position.global_step


def evaluate_test_split(output: FolderOutput | None, trainer: Trainer) -> list[str] | None:
    """Collective. Evaluate the best weights on the test split once, at the end; return lines for people.

    None if a request to stop interrupted it. The model is left with these weights. `output` is rank 0's.
    """
    if trainer.test_evaluator is None:
        return []
    which, step = best_weights(output, trainer) if output else ("", 0)
    trainer.model.load_state_dict(trainer.rank.broadcast_state(output.bundle.load_weights(which) if output else None))
    evaluation = trainer.run_evaluation(trainer.test_evaluator)
    if evaluation is None:
        return None
    if output is None:
        return []
    output.metrics({"test/loss": evaluation.loss, "test/accuracy": evaluation.accuracy}, step)
    return [f"test: {evaluation.accuracy:.2%} of {evaluation.count:,} test images right (weights of step {step:,})"]


def record_stop(output: FolderOutput, trainer: Trainer) -> list[str]:
    """Record that the training stopped on request; return lines for people. Raises RunError if it was not saved."""
    reason = f"on {trainer.stop.reason}" if trainer.stop else "as another rank was asked to"
    step, name = trainer.position.global_step, output.folder.name
    if output.saved_step != step:
        raise RunError(
            f"stopped {reason} behind step {step}, which could not be saved; run.name={name} goes on "
            f"behind step {output.saved_step or 0}"
        )
    output.end("preempted", f"stopped {reason} behind step {step}")
    if read_sweep_folder(output.folder.path.parent):
        how = "; to continue, submit its sweep again"
    elif os.environ.get("CONVOY_STOP_FILE", "no file") in reason:  # the batch job that made it says what follows
        how = ""
    else:
        how = f"; to continue, the same command with run.name={name}"
    return [f"stopped {reason} behind step {step}, all saved{how}"]


def _evaluation_arrays(dataset: Dataset, evaluation: Evaluation, predictions: Predictions) -> dict[str, Any]:
    wrong = (predictions.predicted != predictions.labels).nonzero().flatten()
    worst = wrong[predictions.confidence[wrong].argsort(descending=True)]
    arrays = {"confusion": evaluation.confusion.numpy()}
    for group, chosen in (("samples", torch.arange(min(GRID, evaluation.count))), ("wrong", worst[:GRID])):
        images = [dataset.validation.read(index) for index in chosen.tolist()]
        blank = torch.zeros(0, dataset.channels, dataset.image_size, dataset.image_size, dtype=torch.uint8)
        arrays |= {
            f"{group}_images": (torch.stack(images) if images else blank).numpy(),
            f"{group}_labels": predictions.labels[chosen].numpy(),
            f"{group}_predicted": predictions.predicted[chosen].numpy(),
            f"{group}_confidence": predictions.confidence[chosen].numpy(),
        }
    return arrays


def _finite(recall: Tensor) -> list[float | None]:
    """Return a list with None for NaN, which JSON has not: a class without samples has no recall."""
    return [value if value == value else None for value in recall.tolist()]


def _describe_first(dataset: Dataset, predictions: Predictions) -> str:
    truth, predicted = (dataset.classes[int(t[0])] for t in (predictions.labels, predictions.predicted))
    confidence = float(predictions.confidence[0])
    return f"validation sample 0: predicted {predicted} ({confidence:.1%} confident), truth {truth}"
