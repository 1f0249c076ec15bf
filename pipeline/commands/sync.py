"""`sync [RUN_DIR ...]`: publish what the publisher of a run could not."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.base.credentials import without_credentials
from pipeline.commands.publish import publish, start_logging
from pipeline.run.folder import RunFolder
from pipeline.run.journal import iterate
from pipeline.run.locks import is_being_trained
from pipeline.run.published import Progress
from pipeline.run.sweep import find_all_runs, find_runs, of_folder, queued

HELP = "publish to MLflow what is in the journals of runs and not there yet; safe to repeat; tries each for 30 s"
COLUMNS = ("points", "params", "tags", "files", "models")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir",
        type=Path,
        nargs="*",
        help="run folders or sweeps, e.g. runs/mnist; default: all of --runs with something left",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where to look for run folders (runs)")
    parser.add_argument("--uri", help="MLflow server or store; default: that of the run")


def run(arguments: argparse.Namespace) -> int:
    """0: nothing is left; 1: something could not be published; 2: there is no such run."""
    start_logging()
    named = [RunFolder(path.absolute()) for path in find_runs(arguments.run_dir)]
    sweeps = [path.absolute() for path in arguments.run_dir if of_folder(path)]
    if empty := [path for path in sweeps if not find_runs([path])]:
        print(f"{empty[0]}: a sweep without a run yet; the logs of its jobs say why", file=sys.stderr)
        return 1
    missing = [folder for folder in named if not folder.journal.is_file()]
    for folder in missing:
        print(f"{folder.path}: no run folder (it has no journal.jsonl)", file=sys.stderr)
    if missing:
        return 2
    if not named and not arguments.runs.is_dir():
        print(f"{arguments.runs}: no such folder; name run folders, or the folder of all with --runs", file=sys.stderr)
        return 2
    folders = named or [RunFolder(path.absolute()) for path in find_all_runs(arguments.runs)]
    rows, exit_code = [], 0
    for folder in folders:
        try:
            row, succeeded = sync(folder, arguments.uri, only_if_left=not named)
        except (OSError, ValueError) as error:  # a folder of somebody else, say: the others are published all the same
            row, succeeded = {"run": folder.name, "outcome": f"cannot be read: {error}"}, False
        if row is not None:
            rows.append(row)
        exit_code = max(exit_code, 0 if succeeded else 1)
    print(format_table(rows) if rows else "nothing is left to publish")
    return max([exit_code, *(0 if conclude(path, arguments.uri) else 1 for path in sweeps)])


def conclude(sweep: Path, uri: str | None) -> bool:
    """Give the MLflow run of a sweep its state, whatever its runs could not say of it; whether that was possible."""
    runs = [RunFolder(path.absolute()) for path in find_runs([sweep])]
    is_under_way = queued(sweep) or any(run.status().get("state") == "running" for run in runs)
    from pipeline.tracking import sweep_run as parents  # imports mlflow, as publishing has done
    from pipeline.tracking.store import open_store

    try:
        for run in runs:
            record = next(record for record, _ in iterate(run.journal, kinds=("run",)))
            store = uri or home_of(run, record)
            client = open_store(store)
            if mlflow_id := Progress(run, store).get("mlflow_run_id"):
                parents.attach(client, store, run, record, mlflow_id)  # again, should the parent have been deleted
        parents.show_state(client, store, run, record, are_all_over=not is_under_way)
    except Exception as error:
        print(f"{sweep}: its state cannot be shown: {without_credentials(str(error))}", file=sys.stderr)
        return False
    return True


def sync(folder: RunFolder, uri: str | None, *, only_if_left: bool) -> tuple[dict[str, str] | None, bool]:
    """A row of the table, None for a run that is not to be mentioned; and whether nothing is left of the run."""
    row = {"run": folder.name}
    if is_being_trained(folder):
        outcome = "is being trained now; its own publisher is at work"
        return (None, True) if only_if_left else (row | {"outcome": outcome}, False)
    record = next((record for record, _ in iterate(folder.journal, kinds=("run",))), None)
    if record is None:  # killed before it recorded anything
        return (None, True) if only_if_left else (row | {"outcome": "nothing was recorded"}, True)
    uri = uri or home_of(folder, record)
    if only_if_left and Progress(folder, uri).is_complete():
        return None, True
    succeeded, counts = publish(folder, uri, lambda: False)
    where = without_credentials(uri)
    what = "published" if counts else "already published"
    outcome = f"{what} to {where}" if succeeded else f"NOT all published to {where} (--uri names another server)"
    mlflow_id = str(Progress(folder, uri).get("mlflow_run_id") or "")
    return row | {"MLflow run": mlflow_id, **{c: f"{counts[c]:,}" for c in COLUMNS}, "outcome": outcome}, succeeded


def home_of(folder: RunFolder, record: Mapping[str, Any]) -> str:
    """The store that a run was meant for."""
    return with_credentials(str(folder.status().get("tracking_uri", record["tracking_uri"])))


def with_credentials(uri: str) -> str:
    """Run folders have no credentials: they come from the environment, if that names the same store."""
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    return known if without_credentials(known) == uri else uri


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Columns in line, what is counted to the right."""
    names = ("run", "MLflow run", *COLUMNS, "outcome")
    table = [dict(zip(names, names, strict=True)), *rows]
    widths = {name: max(len(row.get(name, "")) for row in table) for name in names}
    lines = []
    for row in table:
        cells = [
            row.get(name, "").rjust(widths[name]) if name in COLUMNS else row.get(name, "").ljust(widths[name])
            for name in names
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
