"""MLflow's store as the publisher finds it: opened safely, with the experiment, the run, and the run of its sweep."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.base.files import locked, sqlite_path, sqlite_uri
from pipeline.run.folder import RunFolder
from pipeline.run.published import Progress
from pipeline.run.records import RunRecord, SweepInfo
from pipeline.run.sweep import read_sweep_folder

RUN_ID_TAG = "convoy.run_id"
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"


@dataclass(frozen=True)
class MlflowRun:
    """A run folder, the store that it is published to, and its run there."""

    folder: RunFolder
    record: RunRecord
    client: MlflowClient
    uri: str
    id: str
    progress: Progress
    counts: Counter[str]
    """Number of things published from here, by kind: points, params, tags, files, models."""


def open_store(uri: str) -> MlflowClient:
    """Return a client of a store, which is made if it is an SQLite file that does not exist."""
    database = sqlite_path(uri)
    if database is None:
        return MlflowClient(tracking_uri=uri)
    with locked(database.with_name(database.name + ".lock")):  # processes that create one at once would destroy it
        if not database.exists():
            # under another name: if a process is killed in between, a file with half of its tables never opens
            unfinished = database.with_name(f".creating-{database.name}")
            for path in (unfinished, unfinished.with_name(unfinished.name + "-journal")):
                path.unlink(missing_ok=True)
            MlflowClient(tracking_uri=sqlite_uri(unfinished))  # creates the tables
            unfinished.replace(database)
        return MlflowClient(tracking_uri=uri)


def run_exists(client: MlflowClient, run_id: str) -> bool:
    """Return whether the store has a run. Raises RuntimeError if it is in MLflow's bin, where it takes no records."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.get_http_status_code() == 404:
            return False
        raise
    if run.info.lifecycle_stage != "active":
        raise RuntimeError(f"run {run_id} was deleted; to have it back: mlflow runs restore --run-id {run_id}")
    return True


def find_or_create_run(
    client: MlflowClient, uri: str, experiment: str, name: str, record: RunRecord | SweepInfo
) -> tuple[str, str]:
    """Return MLflow's ids of a run and its experiment.

    The run is found by the id in its record, as a tag: creating is not idempotent. It starts when the training did,
    however late it is published.
    """
    experiment_id, own_id = _create_or_find_experiment(client, uri, experiment), record["run_id"]

    def find() -> list[str]:
        return sorted(r.info.run_id for r in client.search_runs([experiment_id], f"tags.`{RUN_ID_TAG}` = '{own_id}'"))

    if not find():
        tags = {RUN_ID_TAG: own_id, "mlflow.source.name": "convoy", "mlflow.source.type": "LOCAL"}
        client.create_run(experiment_id, record["timestamp_ms"], tags, name)
    # more than one if the server was so late with an earlier request that it was given up
    kept, *surplus = find()
    for other in surplus:
        client.delete_run(other)
    return kept, experiment_id


def _create_or_find_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Return the id of an experiment, made if there is none; in an SQLite store with its artifacts beside the file."""
    # wherever a server is started for the file; a server has a place of its own
    database = sqlite_path(uri)
    location = None if database is None else (database.parent / "mlartifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:  # it exists; or it cannot be, which the next line shows
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
    return str(experiment.experiment_id)


def set_status(client: MlflowClient, run_id: str, status: str, end_ms: int | None = None) -> None:
    """Give a run its status. `end_ms` is when it ended, if it has; without it, now."""
    if status == "RUNNING":
        client.update_run(run_id, status=status)
    else:
        client.set_terminated(run_id, status, end_ms)


def update_sweep(run: MlflowRun, *, are_all_over: bool = False) -> None:
    """Make a run of a sweep the child of the sweep's MLflow run, and give that the state that its runs have.

    The sweep's MLflow run is made again if it was deleted. It is running until all runs of the sweep have finished or
    failed. With `are_all_over`, those that have neither will not go on by themselves: the sweep was stopped, or failed.
    """
    if "sweep" not in run.record:
        return
    recorded, folder, client = run.record["sweep"], run.folder.path.parent, run.client
    sweep = read_sweep_folder(folder)  # None for a run folder that was copied out of it
    with locked(folder / ".sweep.lock") if sweep else nullcontext():  # whoever comes last sees the states of all
        parent_id, _ = find_or_create_run(client, run.uri, run.record["experiment"], recorded["name"], recorded)
        about = sweep or recorded
        settings = f", with {' '.join(about['settings'])}" if about["settings"] else ""
        note = f"A sweep of {len(about['names'])} runs{settings}:\n\n```yaml\n{about['text'].strip()}\n```"
        client.set_tag(parent_id, NOTE_TAG, note)
        client.set_tag(run.id, PARENT_TAG, parent_id)
        if sweep:
            runs = (Progress(RunFolder(folder / name), run.uri) for name in sweep["names"])
            set_status(client, parent_id, _status({each.get("mlflow_state") for each in runs}, are_all_over))


def _status(states: set[str | None], are_all_over: bool) -> str:
    if states == {"finished"}:
        return "FINISHED"
    if are_all_over and states <= {"finished", "preempted"}:
        return "KILLED"
    return "FAILED" if are_all_over or states <= {"finished", "failed"} else "RUNNING"
