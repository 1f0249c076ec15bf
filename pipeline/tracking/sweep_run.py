"""The MLflow run above those of a sweep: found or made by its own id, and in the state that its runs give it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from pipeline.base.files import locked
from pipeline.run.folder import RunFolder
from pipeline.run.published import Progress
from pipeline.run.sweep import of_folder
from pipeline.tracking.store import find_or_create_run

PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"


def attach(client: MlflowClient, uri: str, folder: RunFolder, record: dict[str, Any], run_id: str) -> None:
    """Make the MLflow run `run_id` a child of its sweep's, by the `run` record of its journal."""
    with _one_at_a_time(folder.path.parent):
        client.set_tag(run_id, PARENT_TAG, _find_or_create(client, uri, folder, record))


def show_state(
    client: MlflowClient, uri: str, folder: RunFolder, record: dict[str, Any], *, are_all_over: bool = False
) -> None:
    """Behind a change of a run's state in MLflow: running until all runs of the sweep are finished, or have failed.

    With `are_all_over` those that are neither will not go on by themselves: it was stopped, or has failed.
    """
    sweep = of_folder(folder.path.parent)
    if sweep is None:  # a run folder that was copied out of it
        return
    with _one_at_a_time(folder.path.parent):  # whoever comes last sees the states of all
        parent_id = _find_or_create(client, uri, folder, record)
        states = [Progress(RunFolder(folder.path.parent / name), uri).get("shown") for name in sweep["names"]]
        status = _status(states, are_all_over)
        if status == "RUNNING":
            client.update_run(parent_id, status=status)
        else:
            client.set_terminated(parent_id, status)


def _status(states: Iterable[str | None], are_all_over: bool) -> str:
    known = set(states)
    if known == {"finished"}:
        return "FINISHED"
    if are_all_over and known <= {"finished", "preempted"}:
        return "KILLED"
    return "FAILED" if are_all_over or known <= {"finished", "failed"} else "RUNNING"


def _find_or_create(client: MlflowClient, uri: str, folder: RunFolder, record: dict[str, Any]) -> str:
    """Also one that was deleted meanwhile. Its description is the file of the sweep as it is now."""
    sweep = of_folder(folder.path.parent) or record["sweep"]
    parent = {key: record["sweep"][key] for key in ("run_id", "name", "timestamp_ms")}
    parent_id, _ = find_or_create_run(client, uri, parent | {"experiment": record["experiment"]})
    settings = f", with {' '.join(sweep['settings'])}" if sweep.get("settings") else ""
    note = f"A sweep of {len(sweep['names'])} runs{settings}:\n\n```yaml\n{sweep['text'].strip()}\n```"
    client.set_tag(parent_id, NOTE_TAG, note)
    return parent_id


def _one_at_a_time(sweep_folder: Path) -> AbstractContextManager[None]:
    """Publishers of the same sweep; nothing for a run folder that was copied out of it."""
    return locked(sweep_folder / ".sweep.lock") if of_folder(sweep_folder) else nullcontext()
