"""From the journal to MLflow: an MLflow run is a view of a run folder, and can be made again from it.

Publishing the same records twice changes nothing (points and tags have their own identity in MLflow, files are
overwritten, the run is found by a tag of ours), so the offset in the journal is stored after the server has
acknowledged what stands before it, and a crash in between costs a repetition.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from PIL import Image

from pipeline.run_folder import RunFolder, without_credentials
from pipeline.tracking.artifacts import draw_evaluation, draw_filters, draw_history, draw_samples
from pipeline.tracking.description import describe_run
from pipeline.tracking.journal import KILLED, iterate, read_journal
from pipeline.tracking.models import file_digest, log_model, register, tie_to_metrics
from pipeline.tracking.progress import Progress
from pipeline.tracking.store import find_or_create_run, is_refusal, open_store, run_exists

Record = dict[str, Any]
LoadModel = Callable[[Path, Record], Any]
"""(run folder, `model` record) -> the network in eval mode, taking float32 pixels in 0..255."""

METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
REASON_LENGTH = 500
MLFLOW_STATUS = {"running": "RUNNING", "finished": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}
logger = logging.getLogger("convoy")


class Publisher:
    """Publishes one run folder to one MLflow store. Methods raise whatever MLflow raises; nothing is lost by that."""

    def __init__(self, folder: RunFolder, uri: str, load_model: LoadModel):
        self._folder = folder
        self._uri = uri
        self._load_model = load_model
        self._client: MlflowClient | None = None
        self._progress = Progress(folder, uri)
        self.counts: Counter[str] = Counter()
        """What was published from here, by kind: points, params, tags, files, models."""

    @property
    def state(self) -> str | None:
        """The state of the run by the last status record that was published."""
        state: str | None = self._progress.get("state")
        return state

    def drain(self, *, training_alive: bool) -> None:
        """Publish what journal and samples hold beyond the stored offsets.

        A run that the journal says is running, but whose training is dead, is marked as failed.
        """
        client = self._connect()
        for path in self._progress.files():
            for batch, end in batches(iterate(path, self._progress.offset(path))):
                self._publish_accepted(client, batch)
                self._progress.advance(path, end)
        if not training_alive and self._progress.get("shown") == "running":
            self._show_death(client)

    def _publish_accepted(self, client: MlflowClient, records: list[Record]) -> None:
        """What the server refuses is named and left out. It would take its whole request along, so halves go apart."""
        try:
            self._publish(client, records)
        except MlflowException as error:
            if not is_refusal(error):
                raise
            parts = halves(records)
            if not parts:
                logger.warning("the server refuses %s: %s", _name(records[0]), error)
            for part in parts:
                self._publish_accepted(client, part)

    def _publish(self, client: MlflowClient, records: list[Record]) -> None:
        """Records that `batches` has put together."""
        record = records[0]
        match record["kind"]:
            case "metric":
                self._log_metrics(client, [Metric(*_point(r)) for r in records])
            case "params":
                self._log_params(client, record["values"])
            case "tags":
                self._log_tags(client, record["values"])
            case "dataset":
                client.log_inputs(self._run_id, [DatasetInput(_dataset(record))])
            case "predictions":
                self._log_predictions(client, record)
            case "evaluation":
                self._log_figures(client, partial(draw_evaluation, self._folder, record))
            case "model":
                self._publish_model(client, record)
            case "artifact":
                self._log_file(client, record["path"])
            case "status":
                self._progress.store(state=record["state"])
                self._show_state(client, record["state"], record.get("timestamp_ms"))

    def _publish_model(self, client: MlflowClient, record: Record) -> None:
        weights = self._folder.path / record["path"]
        if not weights.is_file() or file_digest(weights) != record["sha256"]:
            logger.warning("%s is gone, or was replaced by a later one: not logged", record["path"])
            return
        try:
            model = self._load_model(self._folder.path, record)
            self._log_figures(client, partial(draw_filters, self._folder, model))
            model_id = log_model(self._folder, client, self._uri, self._run_id, record, model)
            tie_to_metrics(self._folder, client, self._run_id, record, model_id)
            self.counts["models"] += 1
            self._folder.update_status(mlflow_model_id=model_id)
            if record.get("register"):
                outcome = register(self._folder, client, self._run_id, record, model_id)
                logger.info("%s", outcome)
                self._folder.update_status(mlflow_model_outcome=outcome)
        except (MlflowException, OSError):
            raise  # the server; tried again
        except Exception as error:
            logger.warning("the model cannot be logged, its weights are in %s: %s", record["path"], error)

    @property
    def _run_id(self) -> str:
        return str(self._progress.get("mlflow_run_id"))

    def _connect(self) -> MlflowClient:
        if self._client is None:
            client = open_store(self._uri)
            if self._progress.get("mlflow_run_id") and not run_exists(client, self._run_id):
                logger.warning(
                    "run %s is not in %s any more: publishing all again", self._run_id, without_credentials(self._uri)
                )
                self._progress.forget()
            if not self._progress.get("mlflow_run_id"):
                record = next(record for record, _ in iterate(self._folder.journal) if record["kind"] == "run")
                run_id, experiment_id = find_or_create_run(client, self._uri, record)
                self._progress.store(mlflow_run_id=run_id, mlflow_experiment_id=experiment_id)
                self._folder.update_status(mlflow_run_id=run_id, mlflow_experiment_id=experiment_id)
            self._client = client
        return self._client

    def _log_metrics(self, client: MlflowClient, metrics: list[Metric]) -> None:
        client.log_batch(self._run_id, metrics=metrics)
        self.counts["points"] += len(metrics)

    def _log_params(self, client: MlflowClient, values: dict[str, Any]) -> None:
        params = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in values.items()]
        for begin in range(0, len(params), PARAMS_PER_REQUEST):
            client.log_batch(self._run_id, params=params[begin : begin + PARAMS_PER_REQUEST])
        self.counts["params"] += len(params)
        self._log_artifact(client, self._folder.config, "")

    def _log_tags(self, client: MlflowClient, values: dict[str, Any]) -> None:
        client.log_batch(self._run_id, tags=[RunTag(key, str(value)[:TAG_LENGTH]) for key, value in values.items()])
        self.counts["tags"] += len(values)

    def _log_artifact(self, client: MlflowClient, path: Path, place: str) -> None:
        client.log_artifact(self._run_id, str(path), place or None)
        self.counts["files"] += 1

    def _log_figures(self, client: MlflowClient, draw: Callable[[], list[Path]]) -> None:
        """A figure that cannot be drawn must not keep what stands behind it in the journal from being published."""
        try:
            figures = draw()
        except Exception as error:
            logger.warning("a figure cannot be drawn: %s: %s", type(error).__name__, error)
            return
        for figure in figures:
            self._log_artifact(client, figure, "figures")

    def _log_predictions(self, client: MlflowClient, record: Record) -> None:
        """As a slide of the predictions, once: MLflow gives each upload a name of its own."""
        names = [Path(file.path).name for file in client.list_artifacts(self._run_id, "images")]
        # of its two files the last; MLflow separates with + or, in earlier versions, %
        if any(re.fullmatch(rf"predictions[+%]step[+%]{record['step']}[+%].*\.webp", name) for name in names):
            return
        try:
            image = Image.open(draw_samples(self._folder, record)).convert("RGB")
        except Exception as error:
            logger.warning("a figure cannot be drawn: %s: %s", type(error).__name__, error)
            return
        client.log_image(self._run_id, image, key="predictions", step=record["step"])
        self.counts["files"] += 1

    def _log_file(self, client: MlflowClient, path: str) -> None:
        file = self._folder.path / path
        if not file.is_file():
            logger.warning("%s is gone: not logged", path)
            return
        self._log_artifact(client, file, str(Path(path).parent))

    def _show_state(self, client: MlflowClient, state: str, end_time: int | None) -> None:
        if state == "running":
            client.update_run(self._run_id, status=MLFLOW_STATUS[state])
        else:
            self._log_figures(client, partial(draw_history, self._folder))
            client.set_terminated(self._run_id, MLFLOW_STATUS[state], end_time)
        description = describe_run((record for record, _ in iterate(self._folder.journal)), str(self._folder.path))
        client.set_tag(self._run_id, "mlflow.note.content", without_credentials(description)[:TAG_LENGTH])
        self._progress.store(shown=state)

    def _show_death(self, client: MlflowClient) -> None:
        """Of a training that could not say its last word; it ended when it recorded its last."""
        records = read_journal(self._folder.journal)[0]
        times = [record["timestamp_ms"] for record in records if "timestamp_ms" in record]
        number = sum(record["kind"] == "status" and record["state"] == "running" for record in records)
        client.set_tag(self._run_id, f"attempt.{number}.end", KILLED)
        self._show_state(client, "failed", max(times, default=None))
        self._folder.update_status(state="failed")


def batches(entries: Iterable[tuple[Record, int]]) -> Iterator[tuple[list[Record], int]]:
    """What goes to the server in one piece, each with the offset behind it: metrics together, all else by itself."""
    batch: list[Record] = []
    end = 0
    for record, offset in entries:
        joins = batch and record["kind"] == batch[0]["kind"] == "metric" and len(batch) < METRICS_PER_REQUEST
        if batch and not joins:
            yield batch, end
            batch = []
        batch.append(record)
        end = offset
    if batch:
        yield batch, end


def halves(records: list[Record]) -> list[list[Record]]:
    """Of several records, or of the values of one; empty for what cannot be divided."""
    if len(records) > 1:
        middle = len(records) // 2
        return [records[:middle], records[middle:]]
    values = list(records[0].get("values", {}).items())
    if len(values) < 2:
        return []
    middle = len(values) // 2
    return [[records[0] | {"values": dict(part)}] for part in (values[:middle], values[middle:])]


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
                reason = without_credentials(f"{type(error).__name__}: {error}".splitlines()[0])[:REASON_LENGTH]
                logger.warning("tracking does not work now, will be tried again: %s", reason)
            outage, pause = True, min(pause * 2, 10.0)
        if time.monotonic() + pause > deadline:
            return False
        time.sleep(pause)


def _point(record: Record) -> tuple[str, float, int, int]:
    return record["key"], record["value"], record["timestamp_ms"], record["step"]


def _name(record: Record) -> str:
    """Of what a record holds, for people."""
    match record:
        case {"kind": "metric", "key": key, "step": step}:
            return f"{key} at step {step}"
        case {"kind": kind, "values": values}:
            return f"the {kind} {', '.join(values)}"
    return f"the {record['kind']} {record.get('path', record.get('name', ''))}".rstrip()


def _dataset(record: Record) -> Dataset:
    profile = json.dumps({"num_train": record["num_train"], "num_eval": record["num_eval"]})
    return Dataset(record["name"], record["digest"], "local", json.dumps({"uri": record["source"]}), None, profile)
