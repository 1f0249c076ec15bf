"""Publish one run's journal to MLflow (what a training starts by itself; `sync` is its form for people)."""

import argparse
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.base.files import locked
from pipeline.base.logs import start_command_logging
from pipeline.base.signals import ignore_stop_signals
from pipeline.run.folder import RunFolder, is_being_trained

AFTER_DEATH = 30.0
"""Seconds that a publisher goes on after the death of its training."""

# MLflow's defaults keep one call to a dead server waiting for 4 to 20 minutes. Its own retries are turned off: repeated
# blindly, the creation of a run whose reply was lost makes a second one. Slow replies of 5 s are to be waited for.
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with the password that may be in it
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--follow", type=int, required=True, metavar="PID", help="the training, which is the parent")


def run(arguments: argparse.Namespace) -> int:
    ignore_stop_signals()
    os.nice(10)
    start_command_logging()

    def is_parent_alive() -> bool:
        return bool(os.getppid() == arguments.follow)

    threading.Thread(target=end_after, args=(is_parent_alive, AFTER_DEATH + 2), daemon=True).start()
    folder = RunFolder(arguments.run_dir.absolute())
    succeeded, _ = publish(folder, os.environ["MLFLOW_TRACKING_URI"], is_parent_alive)
    return 0 if succeeded else 1


def end_after(is_parent_alive: Callable[[], bool], seconds: float) -> None:
    """End this process `seconds` after its parent's death, whatever it waits for; all is in the journal."""
    while is_parent_alive():
        time.sleep(0.5)
    time.sleep(seconds)
    os._exit(1)


def publish(
    folder: RunFolder, uri: str, is_parent_alive: Callable[[], bool], after_death: float = AFTER_DEATH
) -> tuple[bool, Mapping[str, int]]:
    """Publish a folder, one process at a time, for `after_death` seconds at most after the death of the parent.

    Returns whether all was published, and how much of each kind was.
    """
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    from pipeline.tracking.publisher import Publisher, follow  # imports mlflow: 3 s, and reads the settings above

    with locked(folder.path / ".publisher.lock"):
        publisher = Publisher(folder, uri)
        succeeded = follow(publisher, is_parent_alive, lambda: is_being_trained(folder), after_death=after_death)
        return succeeded, publisher.counts
