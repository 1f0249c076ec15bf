"""From the journal to MLflow: an MLflow run is a view of a run folder, and can be made again from it.

Publishing the same records twice changes nothing (points and tags have their own identity in MLflow, files are
overwritten, the run is found by a tag of ours), so the offset in the journal is stored after the server has
acknowledged what stands before it, and a crash in between costs a repetition.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from pipeline.run_folder import RunFolder, locked, without_credentials
from pipeline.tracking.artifacts import draw_evaluation, draw_filters, draw_history, file_digest, log_model
from pipeline.tracking.journal import read_entries, read_journal

Record = dict[str, Any]
LoadModel = Callable[[Path, Record], Any]
"""(run folder, `model` record) -> the network in eval mode, taking float32 pixels in 0..255."""

METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
RUN_ID_TAG = "convoy.run_id"
MLFLOW_STATUS = {"running": "RUNNING", "finished": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}
logger = logging.getLogger("convoy")


class Publisher:
    """Publishes one run folder to one MLflow store. Methods raise whatever MLflow raises; nothing is lost by that."""

    def __init__(self, folder: RunFolder, uri: str, load_model: LoadModel):
        self._folder = folder
        self._uri = uri
        self._load_model = load_model
        self._client: MlflowClient | None = None
        self._progress_path = folder.path / "published.json"
        self._progress = self._read_progress()

    @property
    def state(self) -> str | None:
        """The state of the run by the last status record that was published."""
        state: str | None = self._progress.get("state")
        return state

    def drain(self, *, training_alive: bool) -> None:
        """Publish what the journal holds beyond the stored offset.

        A run that the journal says is running, but whose training is dead, is marked as failed.
        """
        client = self._connect()
        entries = read_entries(self._folder.journal, self._progress["offset"])
        for kind, group in groupby(entries, key=lambda entry: str(entry[0]["kind"])):
            members = list(group)
            self._publish(client, kind, [record for record, _ in members])
            self._store_progress(offset=members[-1][1])
        if not training_alive and self.state == "running":
            self._show_state(client, "failed")
            self._folder.update_status(state="failed")

    def _publish(self, client: MlflowClient, kind: str, records: list[Record]) -> None:
        if kind == "metric":
            for chunk in _chunks(records, METRICS_PER_REQUEST):
                self._log_metrics(client, [Metric(*_point(r)) for r in chunk])
            return
        for record in records:
            match kind:
                case "params":
                    self._log_params(client, record["values"])
                case "tags":
                    tags = [RunTag(key, str(value)[:TAG_LENGTH]) for key, value in record["values"].items()]
                    client.log_batch(self._run_id, tags=tags)
                case "dataset":
                    client.log_inputs(self._run_id, [DatasetInput(_dataset(record))])
                case "evaluation":
                    self._log_figures(client, partial(draw_evaluation, self._folder, record))
                case "model":
                    self._publish_model(client, record)
                case "artifact":
                    self._log_file(client, record["path"])
                case "status":
                    self._show_state(client, record["state"], record.get("timestamp_ms"))
                    self._progress["state"] = record["state"]

    def _publish_model(self, client: MlflowClient, record: Record) -> None:
        weights = self._folder.path / record["path"]
        if not weights.is_file() or file_digest(weights) != record["sha256"]:
            logger.warning("%s is gone, or was replaced by a later one: not logged", record["path"])
            return
        try:
            model = self._load_model(self._folder.path, record)
            self._log_figures(client, partial(draw_filters, self._folder, model))
            log_model(self._folder, client, self._uri, self._run_id, record, model)
        except (MlflowException, OSError):
            raise  # the server; tried again
        except Exception as error:
            logger.warning("the model cannot be logged, its weights are in %s: %s", record["path"], error)

    @property
    def _run_id(self) -> str:
        return str(self._progress["mlflow_run_id"])

    def _connect(self) -> MlflowClient:
        if self._client is None:
            client = open_store(self._uri)
            if "mlflow_run_id" in self._progress and not run_exists(client, self._run_id):
                logger.warning(
                    "run %s is not in %s any more: publishing all again", self._run_id, without_credentials(self._uri)
                )
                self._progress = {"offset": 0}
            if "mlflow_run_id" not in self._progress:
                self._find_or_create_run(client)
            self._client = client
        return self._client

    def _find_or_create_run(self, client: MlflowClient) -> None:
        run = next(record for record in read_journal(self._folder.journal)[0] if record["kind"] == "run")
        experiment_id = find_or_create_experiment(client, self._uri, run["experiment"])
        found = client.search_runs([experiment_id], f"tags.`{RUN_ID_TAG}` = '{run['run_id']}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
        else:
            tags = {RUN_ID_TAG: run["run_id"], "mlflow.source.name": "convoy", "mlflow.source.type": "LOCAL"}
            start = run.get("timestamp_ms")  # of the training, however late it is published
            run_id = client.create_run(experiment_id, start, tags, run["name"]).info.run_id
        self._store_progress(mlflow_run_id=run_id, mlflow_experiment_id=experiment_id)
        self._folder.update_status(mlflow_run_id=run_id, mlflow_experiment_id=experiment_id)

    def _log_metrics(self, client: MlflowClient, metrics: list[Metric]) -> None:
        """One point that the server refuses would take its whole batch along, so halves are tried apart."""
        try:
            client.log_batch(self._run_id, metrics=metrics)
        except MlflowException as error:
            if not is_refusal(error):
                raise
            if len(metrics) == 1:
                logger.warning("the server refuses %s at step %d: %s", metrics[0].key, metrics[0].step, error)
                return
            self._log_metrics(client, metrics[: len(metrics) // 2])
            self._log_metrics(client, metrics[len(metrics) // 2 :])

    def _log_params(self, client: MlflowClient, values: dict[str, Any]) -> None:
        params = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in values.items()]
        for chunk in _chunks(params, PARAMS_PER_REQUEST):
            client.log_batch(self._run_id, params=chunk)
        client.log_artifact(self._run_id, str(self._folder.config))

    def _log_figures(self, client: MlflowClient, draw: Callable[[], list[Path]]) -> None:
        """A figure that cannot be drawn must not keep what stands behind it in the journal from being published."""
        try:
            figures = draw()
        except Exception as error:
            logger.warning("a figure cannot be drawn: %s: %s", type(error).__name__, error)
            return
        for figure in figures:
            client.log_artifact(self._run_id, str(figure), "figures")

    def _log_file(self, client: MlflowClient, path: str) -> None:
        file = self._folder.path / path
        if not file.is_file():
            logger.warning("%s is gone: not logged", path)
            return
        client.log_artifact(self._run_id, str(file), str(Path(path).parent))

    def _show_state(self, client: MlflowClient, state: str, end_time: int | None = None) -> None:
        if state == "running":
            client.update_run(self._run_id, status=MLFLOW_STATUS[state])
        else:
            self._log_figures(client, partial(draw_history, self._folder))
            client.set_terminated(self._run_id, MLFLOW_STATUS[state], end_time)

    def _read_progress(self) -> Record:
        try:
            known: Record = json.loads(self._progress_path.read_bytes())
        except (FileNotFoundError, ValueError):  # made again by publishing from the start
            known = {}
        progress: Record = known.get(without_credentials(self._uri), {"offset": 0})
        return progress

    def _store_progress(self, **changes: Any) -> None:
        """One entry per store, so that a run can be published to several."""
        self._progress |= changes
        try:
            known = json.loads(self._progress_path.read_bytes())
        except (FileNotFoundError, ValueError):
            known = {}
        known[without_credentials(self._uri)] = self._progress
        temporary = self._progress_path.with_name(".writing-published.json")
        temporary.write_text(json.dumps(known, indent=1) + "\n")
        temporary.replace(self._progress_path)


def follow(
    publisher: Publisher,
    is_parent_alive: Callable[[], bool],
    is_being_trained: Callable[[], bool] = lambda: False,
    *,
    after_death: float = 30.0,
) -> bool:
    """Publish until the run has ended and all is published, or until `after_death` seconds after the parent's death.

    The parent is the training that started this; when it is dead, another may have resumed the run, and brings a
    publisher of its own. Returns whether all was published. An outage is one line at its beginning and one at its end.
    """
    pause, outage, deadline = 0.5, False, float("inf")
    while True:
        alive = is_parent_alive()
        if not alive:
            deadline = min(deadline, time.monotonic() + after_death)
        try:
            publisher.drain(training_alive=alive or is_being_trained())
            pause = 0.5
            if outage:
                logger.info("tracking works again")
            outage = False
            if not alive or publisher.state not in (None, "running"):
                return True
        except Exception as error:  # whatever it is, the run folder has everything and the training goes on
            if not outage:
                reason = without_credentials(f"{type(error).__name__}: {error}")
                logger.warning("tracking does not work now, will be tried again: %s", reason)
            outage, pause = True, min(pause * 2, 10.0)
        if time.monotonic() + pause > deadline:
            return False
        time.sleep(pause)


def open_store(uri: str) -> MlflowClient:
    """A client whose store exists. Processes that create one SQLite file at once would destroy it, hence the lock."""
    database = sqlite_path(uri)
    if database is None:
        return MlflowClient(tracking_uri=uri)
    with locked(database.with_name(database.name + ".lock")):
        return MlflowClient(tracking_uri=uri)  # creates the tables


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
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def is_refusal(error: MlflowException) -> bool:
    """Whether the server understood and said no, so that asking again will not help."""
    return error.get_http_status_code() in (400, 413, 422)


def _point(record: Record) -> tuple[str, float, int, int]:
    return record["key"], record["value"], record["timestamp_ms"], record["step"]


def _dataset(record: Record) -> Dataset:
    profile = json.dumps({"num_train": record["num_train"], "num_eval": record["num_eval"]})
    return Dataset(record["name"], record["digest"], "local", json.dumps({"uri": record["source"]}), None, profile)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
