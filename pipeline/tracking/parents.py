"""The MLflow run above those of a sweep: found or made by its own id, and in the state that its runs give it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from pipeline.run_folder import RunFolder, locked
from pipeline.sweep import find_runs, of_folder
from pipeline.tracking.store import find_or_create_run

PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"


def attach(client: MlflowClient, uri: str, folder: RunFolder, record: dict[str, Any], run_id: str) -> str:
    """Make the MLflow run `run_id` a child of its sweep's, by the `run` record of its journal; the parent's id."""
    sweep = record["sweep"]
    parent = {"run_id": sweep["run_id"], "name": sweep["name"], "timestamp_ms": sweep["timestamp_ms"]}
    note = f"A sweep of {sweep['num_runs']} runs:\n\n```yaml\n{sweep['text'].strip()}\n```"
    with _one_at_a_time(folder.path.parent):
        parent_id, _ = find_or_create_run(
            client, uri, parent | {"experiment": record["experiment"], "tags": {NOTE_TAG: note}}
        )
    client.set_tag(run_id, PARENT_TAG, parent_id)
    return parent_id


def _one_at_a_time(sweep_folder: Path) -> AbstractContextManager[None]:
    """Publishers of the same sweep; nothing for a run folder that was copied out of it."""
    return locked(sweep_folder / ".sweep.lock") if of_folder(sweep_folder) else nullcontext()


def show_state(client: MlflowClient, folder: RunFolder, parent_id: str) -> None:
    """Running until all runs of the sweep have ended; then finished if all are, failed otherwise."""
    sweep = of_folder(folder.path.parent)
    if sweep is None:
        return
    states = [RunFolder(path).status().get("state") for path in find_runs([folder.path.parent])]
    if len(states) < sweep["num_runs"] or not {"finished", "failed"}.issuperset(states):
        client.update_run(parent_id, status="RUNNING")
    else:
        client.set_terminated(parent_id, "FAILED" if "failed" in states else "FINISHED")
