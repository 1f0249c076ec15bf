"""Publish to MLflow what is in the journals of runs and not there yet; safe to repeat; tries each for 30 s."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.base.credentials import without_credentials
from pipeline.base.logs import start_command_logging
from pipeline.commands.publish import publish
from pipeline.run.folder import RunFolder, is_being_trained
from pipeline.run.journal import run_record
from pipeline.run.published import Progress
from pipeline.run.records import RunRecord
from pipeline.run.sweep import find_all_runs, find_runs, queued_numbers, read_sweep_folder

COLUMNS = ("points", "params", "tags", "files", "models")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about_folders = "run folders or sweeps, e.g. runs/mnist; default: all of --runs with something left"
    parser.add_argument("run_dir", type=Path, nargs="*", help=about_folders)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where to look for run folders (runs)")
    parser.add_argument("--uri", help="MLflow server or store; default: that of the run")


def run(arguments: argparse.Namespace) -> int:
    """Return 0 if nothing is left, 1 if something could not be published, 2 if there is no such run."""
    start_command_logging()
    sweeps = [path.absolute() for path in arguments.run_dir if read_sweep_folder(path)]
    if empty := [path for path in sweeps if not find_runs([path])]:
        print(f"{empty[0]}: a sweep without a run yet; the logs of its jobs say why", file=sys.stderr)
        return 1
    named = [RunFolder(path.absolute()) for path in find_runs(arguments.run_dir)]
    if missing := [folder for folder in named if not folder.journal.is_file()]:
        for folder in missing:
            print(f"{folder.path}: no run folder (it has no journal.jsonl)", file=sys.stderr)
        return 2
    if not named and not arguments.runs.is_dir():
        print(f"{arguments.runs}: no such folder; name run folders, or the folder of all with --runs", file=sys.stderr)
        return 2
    rows, all_succeeded = [], True
    for folder in named or [RunFolder(path.absolute()) for path in find_all_runs(arguments.runs)]:
        try:
            row, succeeded = sync_run(folder, arguments.uri, only_if_left=not named)
        except (OSError, ValueError) as error:  # a folder of somebody else, say: the others are published all the same
            row, succeeded = {"outcome": f"cannot be read: {error}"}, False
        if row:
            rows.append({"run": folder.name} | row)
        all_succeeded &= succeeded
    print(format_table(rows) if rows else "nothing is left to publish")
    for path in sweeps:
        all_succeeded &= sync_sweep(path, arguments.uri)
    return 0 if all_succeeded else 1


def sync_run(folder: RunFolder, uri: str | None, *, only_if_left: bool) -> tuple[dict[str, str], bool]:
    """Return a row of the table, empty for a run not to be mentioned; and whether nothing is left of the run."""
    if is_being_trained(folder):
        row = {"outcome": "is being trained now; its own publisher is at work"}
        return ({}, True) if only_if_left else (row, False)
    record = run_record(folder.journal)
    if record is None:
        return {} if only_if_left else {"outcome": "nothing was recorded"}, True
    uri = uri or own_store(folder, record)
    if only_if_left and Progress(folder, uri).is_complete():
        return {}, True
    succeeded, counts = publish(folder, uri, lambda: False)
    where = without_credentials(uri)
    what = "published" if counts else "already published"
    outcome = f"{what} to {where}" if succeeded else f"NOT all published to {where} (the lines above say why)"
    mlflow_id = str(Progress(folder, uri).get("mlflow_run_id") or "")
    return {"MLflow run": mlflow_id, **{c: f"{counts[c]:,}" for c in COLUMNS}, "outcome": outcome}, succeeded


def sync_sweep(sweep: Path, uri: str | None) -> bool:
    """Give the MLflow run of a sweep its state, though runs may be missing; return whether that was possible.

    All its runs become its children again, should it have been deleted.
    """
    from pipeline.tracking.store import MlflowRun, open_store, update_sweep  # imports mlflow, as publishing has done

    folders = [RunFolder(path) for path in find_runs([sweep])]
    is_under_way = queued_numbers(sweep) or any(folder.status().get("state") == "running" for folder in folders)
    try:
        for folder in folders:
            if record := run_record(folder.journal):
                store = uri or own_store(folder, record)
                progress = Progress(folder, store)
                if mlflow_id := progress.get("mlflow_run_id"):
                    run = MlflowRun(folder, record, open_store(store), store, mlflow_id, progress, Counter())
                    update_sweep(run, are_all_over=not is_under_way)
    except Exception as error:
        print(f"{sweep}: its state cannot be shown: {without_credentials(str(error))}", file=sys.stderr)
        return False
    return True


def own_store(folder: RunFolder, record: RunRecord) -> str:
    """Return the store of a run, with the credentials of the environment if that names it: a run folder has none."""
    uri = str(folder.status().get("tracking_uri", record["tracking_uri"]))
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    return known if without_credentials(known) == uri else uri


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return lines of aligned columns, counts to the right."""
    names = ("run", "MLflow run", *COLUMNS, "outcome")
    table = [dict(zip(names, names, strict=True)), *rows]
    widths = {name: max(len(row.get(name, "")) for row in table) for name in names}
    forms = {name: f"{'>' if name in COLUMNS else '<'}{width}" for name, width in widths.items()}
    return "\n".join("  ".join(format(row.get(name, ""), forms[name]) for name in names).rstrip() for row in table)
