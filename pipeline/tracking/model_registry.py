"""The model as something to use: logged once, tied to its metrics, and registered if that is wanted."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from pipeline.run.folder import RunFolder
from pipeline.run.journal import iterate

Record = dict[str, Any]
WEIGHTS_TAG = "convoy.weights"
CHAMPION = "champion"


def file_digest(path: Path) -> str:
    """SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def log_model(folder: RunFolder, client: MlflowClient, uri: str, run_id: str, record: Record, model: Any) -> str:
    """Log the network once as an MLflow model in the pt2 format, which holds no pickle; the id of the logged model.

    `model` is on the CPU, in eval mode, and takes float32 pixels in 0..255, normalising them itself, so that it
    answers as the training evaluated.
    """
    run = client.get_run(run_id)
    logged = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'")
    mine = [m for m in logged if m.tags.get(WEIGHTS_TAG) == record["sha256"]]
    ready = [m for m in mine if m.status.name == "READY"]
    if ready:
        return str(ready[0].model_id)
    for interrupted in mine:
        client.delete_logged_model(interrupted.model_id)
    entry = client.create_logged_model(
        run.info.experiment_id,
        record["name"],
        run_id,
        {WEIGHTS_TAG: record["sha256"], "run": folder.name},
        run.data.params,
    )
    _log_pt2(uri, run_id, entry.model_id, record, model)
    return str(entry.model_id)


def _log_pt2(uri: str, run_id: str, model_id: str, record: Record, model: Any) -> None:
    """The entry is made before, and no run is made active, which would say that it is running."""
    import mlflow.pytorch  # torch comes with it: 3 s that a run without a model to log need not wait for
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    shape = (record["channels"], record["image_size"], record["image_size"])
    pixels = np.dtype(np.float32)
    mlflow.set_tracking_uri(uri)
    mlflow.pytorch.log_model(
        model,
        run_id=run_id,
        model_id=model_id,
        # two images, because export takes a batch of one for a constant
        input_example=np.zeros((2, *shape), np.float32),
        signature=ModelSignature(
            inputs=Schema([TensorSpec(pixels, (-1, *shape))]),
            outputs=Schema([TensorSpec(pixels, (-1, record["num_classes"]))]),
        ),
        # stated, because finding them out starts pip, which a node without a network cannot do
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "mlflow", "numpy")],
        serialization_format="pt2",
    )


def tie_to_metrics(folder: RunFolder, client: MlflowClient, run_id: str, record: Record, model_id: str) -> None:
    """Show the evaluation that the weights of a `model` record had as metrics of the logged model."""
    points = _evaluation_of(folder, record)
    data = {"dataset_name": record["dataset"], "dataset_digest": record["dataset_digest"]}
    metrics = [Metric(r["key"], r["value"], r["timestamp_ms"], r["step"], model_id, **data) for r in points]
    if metrics:
        client.log_batch(run_id, metrics=metrics)


def _evaluation_of(folder: RunFolder, record: Record) -> list[Record]:
    """The points of the evaluation at the step of a `model` record."""
    points = (r for r, _ in iterate(folder.journal, keys=("eval/accuracy", "eval/loss")))
    return [r for r in points if r["step"] == record["step"]]


def register(folder: RunFolder, client: MlflowClient, run_id: str, record: Record, model_id: str) -> str:
    """Register the logged model once, as `record["register"]`; what happened, as a line for people.

    The alias `champion` moves to it only if it is better than the present one by the same metric of the same data.
    """
    name, metric = record["register"], record["metric"]
    value = next((r["value"] for r in _evaluation_of(folder, record) if r["key"] == metric), None)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    mine = next((v.version for v in versions if v.tags.get(WEIGHTS_TAG) == record["sha256"]), None)
    if mine is None:
        tags = {
            WEIGHTS_TAG: record["sha256"],
            "metric": metric,
            "value": repr(value),
            "dataset": record["dataset"],
            "dataset_digest": record["dataset_digest"],
            "run": folder.name,
        }
        mine = client.create_model_version(
            name, f"models:/{model_id}", run_id, {k: v for k, v in tags.items() if v is not None}, model_id=model_id
        ).version
    return f"registered as {name} version {mine}: {_challenge(client, name, str(mine))}"


def _challenge(client: MlflowClient, name: str, version: str) -> str:
    """Make `version` the champion if it is to be; what was decided."""
    mine, champion = client.get_model_version(name, version), _find_champion(client, name)
    if champion is not None and champion.version == mine.version:
        return "it is the champion"
    if mine.tags["value"] == "None":
        return f"{CHAMPION} stays: its {mine.tags['metric']} is not finite"
    if champion is None:
        client.set_registered_model_alias(name, CHAMPION, version)
        return f"it is the first {CHAMPION}"
    for key in ("metric", "dataset_digest"):
        if champion.tags.get(key) != mine.tags[key]:
            return (
                f"{CHAMPION} stays version {champion.version}: it cannot be compared, its {key} is "
                f"{champion.tags.get(key)}, and that of version {version} is {mine.tags[key]}"
            )
    values = f"{mine.tags['metric']} {_value(mine):.6g} against {_value(champion):.6g} of version {champion.version}"
    if not _beats(mine, champion):
        return f"{CHAMPION} stays version {champion.version}: {values}"
    client.set_registered_model_alias(name, CHAMPION, version)
    return f"it is the new {CHAMPION}: {values}"


def _value(version: Any) -> float:
    return float(version.tags["value"])


def _beats(version: Any, other: Any) -> bool:
    lower_is_better = version.tags["metric"].endswith("loss")
    return _value(version) < _value(other) if lower_is_better else _value(version) > _value(other)


def _find_champion(client: MlflowClient, name: str) -> Any:
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        # "not found" under several codes, by kind of store
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
