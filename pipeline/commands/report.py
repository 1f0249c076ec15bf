"""Write one HTML page that compares runs, from their folders alone."""

import argparse
import sys
from datetime import datetime
from pathlib import Path

from pipeline.base.files import write_atomically
from pipeline.report.comparison import find_stores, read_runs
from pipeline.run.folder import RunError
from pipeline.run.sweep import find_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, nargs="+", help="run folders or sweeps, e.g. runs/mnist runs/three")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Return 0; 1 if the page cannot be written, and 2 if a folder is no run folder: then nothing is written."""
    try:
        folders = find_runs(arguments.run_dir)
        if not folders:
            raise RunError(f"{arguments.run_dir[0]}: a sweep without a run yet")
        runs = read_runs(folders)
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    from pipeline.report.page import render  # imports jinja2, which the other commands need not wait for

    stores = find_stores(runs)
    page = render(runs, stores, at=datetime.now())
    try:
        write_atomically(arguments.out, page)
    except OSError as error:
        print(f"{arguments.out} cannot be written: {error.strerror or error}; choose another --out", file=sys.stderr)
        return 1
    print(f"{arguments.out}: {len(runs)} run{'s' * (len(runs) > 1)}, {len(page.encode()) / 1e6:.1f} MB")
    for store in stores:
        print(f"in MLflow at {store.uri}:")
        if store.server_command:
            print(f"  first start: {store.server_command}")
        for title, address in store.pages:
            print(f"  {title}: {address}")
    return 0
