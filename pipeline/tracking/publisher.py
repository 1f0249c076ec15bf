"""From the journal to MLflow: an MLflow run is a view of a run folder, and can be made again from it.

Publishing the same records twice changes nothing (points and tags have their own identity in MLflow, files are
overwritten, the run is found by a tag of ours). So the offset in the journal is stored once the server has acknowledged
what stands before it, and a crash in between costs a repetition.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from pipeline.base.credentials import without_credentials
from pipeline.base.logs import logger
from pipeline.run.folder import RunFolder
from pipeline.run.journal import KILLED, iterate, last_moment, run_record
from pipeline.run.published import Progress
from pipeline.run.records import Record, State
from pipeline.tracking.store import MlflowRun, find_or_create_run, open_store, run_exists, set_status, update_sweep
from pipeline.tracking.uploads import KINDS_WITH_FILES, TAG_LENGTH, UploadError, describe, upload

METRICS_PER_REQUEST = 1000
VALUES_PER_REQUEST = 100
PARAM_LENGTH = 6000
REASON_LENGTH = 500
MLFLOW_STATUS = {"running": "RUNNING", "finished": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}


class Publisher:
    """Publishes one run folder to one MLflow store. Methods raise whatever MLflow raises; nothing is lost by that."""

    def __init__(self, folder: RunFolder, uri: str):
        self._folder = folder
        self._uri = uri
        self._progress = Progress(folder, uri)
        self._run: MlflowRun | None = None
        self.counts: Counter[str] = Counter()
        self.failed_files: set[tuple[Path, int]] = set()
        """Journal and offset of the records whose files could not be published; not tried again by this publisher."""

    def drain(self, is_training_alive: Callable[[], bool] = lambda: True) -> State | None:
        """Publish all records beyond the stored offsets; return the state of the run by the last status among them.

        A run that the journal says is running, but whose training is dead, is marked as failed, and that first of all.
        Files come last, so that where only they cannot be stored, all else is there.
        """
        try:
            run = self._run = self._run or self._connect()
            self._drain_records(run, is_training_alive)
            self._drain_files(run)
            if self._progress.get("mlflow_state") != self._progress.get("described_state"):
                describe(run)
            state: State | None = self._progress.get("state")
            return state
        except Exception:
            self._run = None  # to be connected anew, which finds a run that was deleted meanwhile
            raise

    def _drain_records(self, run: MlflowRun, is_training_alive: Callable[[], bool]) -> None:
        found_dead = False
        for path in self._progress.paths():
            end = _force_to_disk(path)
            start = self._progress.offset(path)
            for batch, offset, behind in _make_batches(iterate(path, start, end), start):
                kind = batch[0]["kind"]
                found_dead = found_dead or self._show_death(run, is_training_alive)
                if not (found_dead and kind == "status"):  # what is shown is newer
                    _send(run, batch)
                self._progress.advance(path, behind, offset if kind in KINDS_WITH_FILES else None)
        if not found_dead:
            self._show_death(run, is_training_alive)

    def _drain_files(self, run: MlflowRun) -> None:
        for path, offset in self._progress.files_left:
            if (path, offset) in self.failed_files:
                continue
            record, _ = next(iterate(path, offset), (None, 0))
            if record is None:  # damaged since, which was said
                self._progress.file_is_published(path, offset)
                continue
            try:
                upload(run, record, offset)
            except MlflowException as error:
                _pass_over(run, f"the {record['kind']} {record.get('path', '')}".strip(), error)
            except UploadError as error:
                logger.warning("%s", error)
                self.failed_files.add((path, offset))
                continue
            self._progress.file_is_published(path, offset)

    def _connect(self) -> MlflowRun:
        record, progress, client = run_record(self._folder.journal), self._progress, open_store(self._uri)
        assert record is not None, "what is published has begun"
        run_id, experiment_id = progress.get("mlflow_run_id"), progress.get("mlflow_experiment_id")
        is_known = bool(run_id) and run_exists(client, run_id)
        if not is_known:
            if run_id:
                logger.warning("run %s is not in %s any more: publishing all again", run_id, progress.store_uri)
                progress.forget()
            name = f"{record['sweep']['name']}/{record['name']}" if "sweep" in record else record["name"]
            run_id, experiment_id = find_or_create_run(client, self._uri, record["experiment"], name, record)
        run = MlflowRun(self._folder, record, client, self._uri, run_id, progress, self.counts)
        if not is_known:
            update_sweep(run)
            progress.update(mlflow_run_id=run_id, mlflow_experiment_id=experiment_id)
        if self._folder.status().get("tracking_uri", progress.store_uri) == progress.store_uri:  # not copied elsewhere
            self._folder.update_status(mlflow_run_id=run_id, mlflow_experiment_id=experiment_id)
        return run

    def _show_death(self, run: MlflowRun, is_training_alive: Callable[[], bool]) -> bool:
        """Show that the training has died if its last record does not say how it ended; return whether that is so."""
        if is_training_alive():
            return False
        records = (record for record, _ in iterate(self._folder.journal, kinds=("status",)))
        states = [record["state"] for record in records if record["kind"] == "status"]
        if not states or states[-1] != "running":
            return False
        number = states.count("running")
        if self._progress.get("killed_attempt") != number:
            run.client.set_tag(run.id, f"attempt.{number}.end", KILLED)
            _show_state(run, "failed", last_moment(self._folder.journal))
            if not is_training_alive():  # else another has resumed the run meanwhile
                self._folder.update_status(state="failed")
            self._progress.update(killed_attempt=number)
        return True


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
            state = publisher.drain(lambda: is_parent_alive() or is_being_trained())
        except Exception as error:  # whatever it is, the run folder has everything and the training goes on
            if not outage:
                reason = without_credentials(f"{type(error).__name__}: {error}".splitlines()[0])[:REASON_LENGTH]
                logger.warning("tracking does not work now, will be tried again: %s", reason)
            outage, pause = True, min(pause * 2, 10.0)
        else:
            if outage:
                logger.info("tracking works again")
            if not alive or state not in (None, "running"):
                return not publisher.failed_files
            outage, pause = False, 0.5
        if time.monotonic() + pause > deadline:
            return False
        time.sleep(pause)


def _force_to_disk(path: Path) -> int:
    """Return how many bytes of `path` a failure of the machine cannot take: the steps in them are repeated."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        os.fdatasync(file.fileno())
    return size


def _make_batches(entries: Iterable[tuple[Record, int]], start: int) -> Iterator[tuple[list[Record], int, int]]:
    """Yield what goes to the server in one piece: metrics together, all else by itself.

    `start` is the offset of the first entry. With each batch come the offsets of its last record, and behind that.
    """
    batch: list[Record] = []
    begin = end = start
    for record, offset in entries:
        if batch and not (record["kind"] == batch[0]["kind"] == "metric" and len(batch) < METRICS_PER_REQUEST):
            yield batch, begin, end
            batch = []
        batch.append(record)
        begin, end = end, offset
    if batch:
        yield batch, begin, end


def _send(run: MlflowRun, records: list[Record]) -> None:
    """Send what is to go in one piece; what the server refuses of it is named and left out."""
    record = records[0]
    try:
        match record["kind"]:
            case "metric":
                points = (r for r in records if r["kind"] == "metric")
                _log(run, "metrics", [Metric(r["key"], r["value"], r["timestamp_ms"], r["step"]) for r in points])
            case "params" | "tags":
                entity, length = (Param, PARAM_LENGTH) if record["kind"] == "params" else (RunTag, TAG_LENGTH)
                values = [entity(key, str(value)[:length]) for key, value in record["values"].items()]
                for begin in range(0, len(values), VALUES_PER_REQUEST):
                    _log(run, record["kind"], values[begin : begin + VALUES_PER_REQUEST])
            case "dataset":
                profile = json.dumps({key: value for key, value in record.items() if key.startswith("num_")})
                source = json.dumps({"uri": record["source"]})
                dataset = Dataset(record["name"], record["digest"], "local", source, None, profile)
                run.client.log_inputs(run.id, [DatasetInput(dataset)])
            case "status":
                _show_state(run, record["state"], record["timestamp_ms"])
                run.progress.update(state=record["state"])
    except MlflowException as error:
        _pass_over(run, f"the {record['kind']}", error)


def _log(run: MlflowRun, what: str, items: list[Any]) -> None:
    """Log metrics, params or tags. One that is refused would take its whole request along, so the halves go apart."""
    try:
        run.client.log_batch(run.id, **{what: items})
        run.counts["points" if what == "metrics" else what] += len(items)
    except MlflowException as error:
        middle = len(items) // 2
        if middle and _is_refusal(error):
            _log(run, what, items[:middle])
            _log(run, what, items[middle:])
        else:
            key, is_point = items[0].key, what == "metrics"
            _pass_over(run, f"{key} at step {items[0].step}" if is_point else f"the {what} {key}", error)


def _pass_over(run: MlflowRun, what: str, error: MlflowException) -> None:
    """Say what is refused. Raises `error` again if nothing is: an outage, or a run that is gone or deleted."""
    if not _is_refusal(error) or not run_exists(run.client, run.id):
        raise error
    logger.warning("the server refuses %s: %s", what, without_credentials(str(error)))


def _show_state(run: MlflowRun, state: State, end_ms: int | None) -> None:
    """Give the MLflow run, and the one of its sweep, their states. `end_ms` is when the run ended, if it has."""
    set_status(run.client, run.id, MLFLOW_STATUS[state], end_ms)
    run.progress.update(mlflow_state=state, described_state=None)
    update_sweep(run)


def _is_refusal(error: MlflowException) -> bool:
    """Return whether the server understood and said no. A database that fails, a BAD_REQUEST, may work again."""
    return bool(error.error_code == "INVALID_PARAMETER_VALUE" or error.get_http_status_code() == 413)
