"""`sync RUN_DIR ...`: publish what the publisher of a run could not."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pipeline.commands.publish import publish, start_logging
from pipeline.run_folder import RunFolder, is_being_trained, without_credentials
from pipeline.tracking.journal import read_journal

HELP = "publish to MLflow what is in a run's journal and not there yet; safe to repeat"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, nargs="+", help="run folders, e.g. runs/mnist")
    parser.add_argument("--uri", help="MLflow server or store; default: MLFLOW_TRACKING_URI, else that of the run")


def run(arguments: argparse.Namespace) -> int:
    start_logging()
    return max([_sync(RunFolder(path.absolute()), arguments.uri) for path in arguments.run_dir])


def _sync(folder: RunFolder, uri: str | None) -> int:
    if not folder.journal.is_file():
        print(f"{folder.path}: no run folder (it has no journal.jsonl)", file=sys.stderr)
        return 2
    if is_being_trained(folder):
        print(f"{folder.path}: is being trained now; its own publisher is at work", file=sys.stderr)
        return 1
    run = next((record for record in read_journal(folder.journal)[0] if record["kind"] == "run"), None)
    if run is None:
        print(f"{folder.path}: its journal does not name its run; there is nothing to publish", file=sys.stderr)
        return 1
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or run["tracking_uri"]
    published = publish(folder, uri, lambda: False)
    outcome = "published" if published else "NOT published (give --uri for another server)"
    print(f"{folder.path}: {outcome} to {without_credentials(uri)}")
    return 0 if published else 1
