"""MLflow's store as the publisher finds it: opened safely, with the experiment and the run that are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.base.files import locked

RUN_ID_TAG = "convoy.run_id"


def open_store(uri: str) -> MlflowClient:
    """A client whose store exists. Processes that create one SQLite file at once would destroy it, hence the lock."""
    database = sqlite_path(uri)
    if database is None:
        return MlflowClient(tracking_uri=uri)
    with locked(database.with_name(database.name + ".lock")):
        if not database.exists():
            _create(database)
        return MlflowClient(tracking_uri=uri)


def _create(database: Path) -> None:
    """Under another name first: a file whose tables are half made, by whoever was killed, can never be opened again."""
    unfinished = database.with_name(f".creating-{database.name}")
    for path in (unfinished, unfinished.with_name(unfinished.name + "-journal")):
        path.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{unfinished}")  # creates the tables
    unfinished.replace(database)


def run_exists(client: MlflowClient, run_id: str) -> bool:
    """Raises RuntimeError for a run in MLflow's bin, which takes no records."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.get_http_status_code() == 404:
            return False
        raise
    if run.info.lifecycle_stage != "active":
        raise RuntimeError(f"run {run_id} was deleted; to have it back: mlflow runs restore --run-id {run_id}")
    return True


def find_or_create_run(client: MlflowClient, uri: str, record: dict[str, Any]) -> tuple[str, str]:
    """Ids of the MLflow run and experiment of a `run` record, found by our own id: creating is not idempotent."""
    experiment_id = find_or_create_experiment(client, uri, record["experiment"])
    run_id = record["run_id"]
    if not _find_runs(client, experiment_id, run_id):
        tags = {RUN_ID_TAG: run_id, "mlflow.source.name": "convoy", "mlflow.source.type": "LOCAL"}
        start = record.get("timestamp_ms")  # of the training, however late it is published
        client.create_run(experiment_id, start, tags, record["name"])
    # more than one if the server was so late with an earlier request that it was given up
    kept, *surplus = _find_runs(client, experiment_id, run_id)
    for other in surplus:
        client.delete_run(other)
    return kept, experiment_id


def _find_runs(client: MlflowClient, experiment_id: str, run_id: str) -> list[str]:
    """MLflow's ids, always in the same order."""
    return sorted(run.info.run_id for run in client.search_runs([experiment_id], f"tags.`{RUN_ID_TAG}` = '{run_id}'"))


def find_or_create_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """An SQLite store gets its artifacts beside it, wherever a server is started from; a server has its own place."""
    database = sqlite_path(uri)
    location = None if database is None else (database.parent / "mlartifacts").as_uri()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another run created it in the meantime; or it cannot be, which the next line shows
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def sqlite_path(uri: str) -> Path | None:
    """The file of a `sqlite:///` URI, absolute."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute() if uri.startswith("sqlite:///") else None


def is_refusal(error: MlflowException) -> bool:
    """Whether the server understood and said no, so that asking again will not help.

    A database that fails is a BAD_REQUEST to MLflow, and may work again.
    """
    return bool(error.error_code == "INVALID_PARAMETER_VALUE" or error.get_http_status_code() == 413)
