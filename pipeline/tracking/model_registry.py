"""The model as something to use: logged once, tied to its metrics, and registered if that is wanted."""

import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from pipeline.run.journal import metric_records
from pipeline.run.records import MetricRecord, ModelRecord
from pipeline.tracking.store import MlflowRun

if TYPE_CHECKING:  # it imports torch
    from pipeline.models.catalog import ModelSpec

WEIGHTS_TAG = "convoy.weights"
CHAMPION = "champion"


def log_model(run: MlflowRun, record: ModelRecord, spec: "ModelSpec", model: Any) -> str:
    """Log the model once as an MLflow model in the pt2 format; return the id of the logged model.

    `model` is on the CPU, in eval mode, and takes float32 pixels in 0..255, normalising them itself, so that it
    answers as the training evaluated.
    """
    client, info = run.client, run.client.get_run(run.id)
    experiment_id = info.info.experiment_id
    for logged in client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run.id}'"):
        if logged.tags.get(WEIGHTS_TAG) == record["sha256"]:
            if logged.status.name == "READY":
                return str(logged.model_id)
            client.delete_logged_model(logged.model_id)  # its upload was interrupted
    name = re.sub(r"[/:.%\"']", "-", spec.name)  # what MLflow refuses
    tags = {WEIGHTS_TAG: record["sha256"], "run": run.folder.name}
    entry = client.create_logged_model(experiment_id, name, run.id, tags, info.data.params)
    _log_pt2(run, entry.model_id, spec, model)
    return str(entry.model_id)


def _log_pt2(run: MlflowRun, model_id: str, spec: "ModelSpec", model: Any) -> None:
    """Upload the model. The entry is made before, and no run is made active, which would say that it is running."""
    import mlflow.pytorch  # imports torch: 3 s that a run without a model need not wait for
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    shape = (spec.channels, spec.image_size, spec.image_size)
    pixels = np.dtype(np.float32)
    mlflow.set_tracking_uri(run.uri)
    mlflow.pytorch.log_model(
        model,
        run_id=run.id,
        model_id=model_id,
        # two images, because export takes a batch of one for a constant
        input_example=np.zeros((2, *shape), np.float32),
        signature=ModelSignature(
            inputs=Schema([TensorSpec(pixels, (-1, *shape))]),
            outputs=Schema([TensorSpec(pixels, (-1, spec.num_classes))]),
        ),
        # stated, because finding them out starts pip, which a node without a network cannot do
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "mlflow", "numpy")],
        serialization_format="pt2",
    )


def tie_to_metrics(run: MlflowRun, record: ModelRecord, model_id: str) -> None:
    """Show the evaluation that the weights had as metrics of the logged model."""
    data = {"dataset_name": record["dataset"], "dataset_digest": record["dataset_digest"]}
    if points := _evaluation_of(run, record):
        metrics = [Metric(p["key"], p["value"], p["timestamp_ms"], p["step"], model_id, **data) for p in points]
        run.client.log_batch(run.id, metrics=metrics)


def _evaluation_of(run: MlflowRun, record: ModelRecord) -> list[MetricRecord]:
    """Return the points of the evaluation at the step of the weights."""
    points = metric_records(run.folder.journal, "eval/accuracy", "eval/loss")
    return [point for point in points if point["step"] == record["step"]]


def register(run: MlflowRun, record: ModelRecord, model_id: str, name: str) -> str:
    """Register the logged model once under `name`; return what happened, as a line for people.

    The alias `champion` moves to it only if it is better than the present one by the same metric of the same data.
    """
    client, metric = run.client, record["metric"]
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    mine = next((v.version for v in versions if v.tags.get(WEIGHTS_TAG) == record["sha256"]), None)
    if mine is None:
        value = next((point["value"] for point in _evaluation_of(run, record) if point["key"] == metric), None)
        about = {"dataset": record["dataset"], "dataset_digest": record["dataset_digest"], "run": run.folder.name}
        tags = {WEIGHTS_TAG: record["sha256"], "metric": metric, "value": repr(value), **about}
        mine = client.create_model_version(name, f"models:/{model_id}", run.id, tags, model_id=model_id).version
    return f"registered as {name} version {mine}: {_challenge(client, name, str(mine))}"


def _challenge(client: MlflowClient, name: str, version: str) -> str:
    """Make `version` the champion if it is to be; return what was decided."""
    mine, present = client.get_model_version(name, version), client.get_registered_model(name).aliases.get(CHAMPION)
    metric = mine.tags["metric"]
    if str(present) == version:
        return f"it is the {CHAMPION}"
    if mine.tags["value"] == "None":
        return f"{CHAMPION} stays: its {metric} is not finite"
    outcome = f"it is the first {CHAMPION}"
    if present is not None:
        champion, stays = client.get_model_version(name, str(present)), f"{CHAMPION} stays version {present}"
        for key in ("metric", "dataset_digest"):
            if (theirs := champion.tags.get(key)) != mine.tags[key]:
                return f"{stays}: it cannot be compared, its {key} is {theirs}, not {mine.tags[key]}"
        value, other = float(mine.tags["value"]), float(champion.tags["value"])
        values = f"{metric} {value:.6g} against {other:.6g} of version {present}"
        is_better = value < other if metric.endswith("loss") else value > other
        if not is_better:
            return f"{stays}: {values}"
        outcome = f"it is the new {CHAMPION}: {values}"
    client.set_registered_model_alias(name, CHAMPION, version)
    return outcome
