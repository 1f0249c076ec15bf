"""From the journal to MLflow: an MLflow run is a view of a run folder, and can be made again from it.

Publishing the same records twice changes nothing (points and tags have their own identity in MLflow, files are
overwritten, the run is found by a tag of ours), so the offset in the journal is stored after the server has
acknowledged what stands before it, and a crash in between costs a repetition.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from pipeline.base.credentials import without_credentials
from pipeline.run.folder import RunFolder
from pipeline.run.journal import KILLED, iterate, last_moment
from pipeline.run.published import Progress
from pipeline.tracking import sweep_run as parents
from pipeline.tracking.store import find_or_create_run, is_refusal, open_store, run_exists
from pipeline.tracking.uploads import TAG_LENGTH, LoadModel, Uploads

Record = dict[str, Any]

METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
PARAM_LENGTH = 6000
REASON_LENGTH = 500
MLFLOW_STATUS = {"running": "RUNNING", "finished": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}
logger = logging.getLogger("convoy")


class Publisher:
    """Publishes one run folder to one MLflow store. Methods raise whatever MLflow raises; nothing is lost by that."""

    def __init__(self, folder: RunFolder, uri: str, load_model: LoadModel):
        self._folder = folder
        self._uri = uri
        self._client: MlflowClient | None = None
        self._progress = Progress(folder, uri)
        self.counts: Counter[str] = Counter()
        """What was published from here, by kind: points, params, tags, files, models."""
        self._uploads = Uploads(folder, uri, self._progress, load_model, self.counts)

    @property
    def state(self) -> str | None:
        """The state of the run by the last status record that was published."""
        state: str | None = self._progress.get("state")
        return state

    def drain(self, is_training_alive: Callable[[], bool] = lambda: True) -> None:
        """Publish what journal and samples hold beyond the stored offsets.

        A run that the journal says is running, but whose training is dead, is marked as failed, and that first of all.
        Files come last, so that where only they cannot be stored, all else is there.
        """
        try:
            client = self._connect()
            self._drain_records(client, is_training_alive)
            self._drain_files(client)
            if self._progress.get("shown") != self._progress.get("described"):
                self._uploads.describe(client, self._progress.get("shown"))
        except Exception:
            self._client = None  # to be connected anew, which finds a run that was deleted meanwhile
            raise

    def _drain_records(self, client: MlflowClient, is_training_alive: Callable[[], bool]) -> None:
        found_dead = False
        for path in self._progress.paths():
            end = force_to_disk(path)
            start = self._progress.offset(path)
            for batch, offset, behind in batches(iterate(path, start, end), start):
                if not found_dead and not is_training_alive():
                    found_dead = self._show_death(client, is_training_alive)
                if not (found_dead and batch[0]["kind"] == "status"):  # what is shown is newer
                    self._publish_accepted(client, batch)
                self._progress.advance(path, behind, offset if batch[0]["kind"] in Uploads.KINDS else None)
        if not found_dead and not is_training_alive():
            self._show_death(client, is_training_alive)

    def _drain_files(self, client: MlflowClient) -> None:
        for path, offset in self._progress.files_left:
            record, _ = next(iterate(path, offset))
            try:
                self._uploads.publish(client, record)
            except MlflowException as error:
                self._pass_over(client, record, error)
            self._progress.file_is_published(path, offset)

    def _publish_accepted(self, client: MlflowClient, records: list[Record]) -> None:
        """What the server refuses is named and left out. It would take its whole request along, so halves go apart."""
        try:
            self._publish(client, records)
        except MlflowException as error:
            parts = halves(records)
            if not parts or not is_refusal(error):
                self._pass_over(client, records[0], error)
            for part in parts:
                self._publish_accepted(client, part)

    def _pass_over(self, client: MlflowClient, record: Record, error: MlflowException) -> None:
        """Raises `error` again if it is no refusal of this record: an outage, or a run that is gone or deleted."""
        if not is_refusal(error) or not run_exists(client, self._run_id):
            raise error
        logger.warning("the server refuses %s: %s", _name(record), without_credentials(str(error)))

    def _publish(self, client: MlflowClient, records: list[Record]) -> None:
        """Records that `batches` has put together."""
        record = records[0]
        match record["kind"]:
            case "metric":
                client.log_batch(self._run_id, metrics=[Metric(*_point(r)) for r in records])
                self.counts["points"] += len(records)
            case "params":
                self._log_params(client, record["values"])
            case "tags":
                self._log_tags(client, record["values"])
            case "dataset":
                client.log_inputs(self._run_id, [DatasetInput(_dataset(record))])
            case "status":
                self._show_state(client, record["state"], record.get("timestamp_ms"))
                self._progress.store(state=record["state"])

    @property
    def _run_id(self) -> str:
        return str(self._progress.get("mlflow_run_id"))

    def _connect(self) -> MlflowClient:
        if self._client is None:
            client = open_store(self._uri)
            if self._progress.get("mlflow_run_id") and not run_exists(client, self._run_id):
                logger.warning(
                    "run %s is not in %s any more: publishing all again", self._run_id, self._progress.store_uri
                )
                self._progress.forget()
            if not self._progress.get("mlflow_run_id"):
                record = self._run_record()
                is_element = "sweep" in record
                name = f"{record['sweep']['name']}/{record['name']}" if is_element else record["name"]
                run_id, experiment_id = find_or_create_run(client, self._uri, record | {"name": name})
                if is_element:
                    parents.attach(client, self._uri, self._folder, record, run_id)
                self._progress.store(mlflow_run_id=run_id, mlflow_experiment_id=experiment_id)
            self._name_run()
            self._client = client
        return self._client

    def _name_run(self) -> None:
        """In status.json, unless this is a store to which the run was only copied."""
        status, ids = self._folder.status(), ("mlflow_run_id", "mlflow_experiment_id")
        known = {key: self._progress.get(key) for key in ids}
        own_store = status.get("tracking_uri", self._progress.store_uri) == self._progress.store_uri
        if own_store and {key: status.get(key) for key in ids} != known:
            self._folder.update_status(**known)

    def _log_params(self, client: MlflowClient, values: dict[str, Any]) -> None:
        params = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in values.items()]
        for begin in range(0, len(params), PARAMS_PER_REQUEST):
            client.log_batch(self._run_id, params=params[begin : begin + PARAMS_PER_REQUEST])
        self.counts["params"] += len(params)

    def _log_tags(self, client: MlflowClient, values: dict[str, Any]) -> None:
        client.log_batch(self._run_id, tags=[RunTag(key, str(value)[:TAG_LENGTH]) for key, value in values.items()])
        self.counts["tags"] += len(values)

    def _show_state(self, client: MlflowClient, state: str, end_time: int | None) -> None:
        if state == "running":
            client.update_run(self._run_id, status=MLFLOW_STATUS[state])
        else:
            client.set_terminated(self._run_id, MLFLOW_STATUS[state], end_time)
        self._progress.store(shown=state, described=None)
        record = self._run_record()
        if "sweep" in record:
            parents.show_state(client, self._uri, self._folder, record)

    def _run_record(self) -> Record:
        return next(iterate(self._folder.journal, kinds=("run",)))[0]

    def _show_death(self, client: MlflowClient, is_training_alive: Callable[[], bool]) -> bool:
        """Whether the training is gone without a last word; it ended when it recorded its last."""
        states = [record["state"] for record, _ in iterate(self._folder.journal, kinds=("status",))]
        if not states or states[-1] != "running":
            return False
        number = states.count("running")
        if self._progress.get("killed") != number:
            client.set_tag(self._run_id, f"attempt.{number}.end", KILLED)
            self._show_state(client, "failed", last_moment(self._folder.journal))
            if not is_training_alive():  # else another has resumed the run meanwhile
                self._folder.update_status(state="failed")
            self._progress.store(killed=number)
        return True


def force_to_disk(path: Path) -> int:
    """How many bytes of `path` a failure of the machine cannot take any more.

    Else MLflow could have points of steps that are trained, and recorded, again.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        os.fdatasync(file.fileno())
    return size


def batches(entries: Iterable[tuple[Record, int]], start: int) -> Iterator[tuple[list[Record], int, int]]:
    """What goes to the server in one piece: metrics together, all else by itself.

    Each with the offsets of its last record and of what stands behind that; `start` is the offset of the first.
    """
    batch: list[Record] = []
    begin = end = start
    for record, offset in entries:
        joins = batch and record["kind"] == batch[0]["kind"] == "metric" and len(batch) < METRICS_PER_REQUEST
        if batch and not joins:
            yield batch, begin, end
            batch = []
        batch.append(record)
        begin, end = end, offset
    if batch:
        yield batch, begin, end


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
            publisher.drain(lambda: is_parent_alive() or is_being_trained())
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
