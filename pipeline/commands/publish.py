"""`publish RUN_DIR`: the process that a training starts beside itself; `sync` is its form for people."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.preemption import SIGNALS
from pipeline.run_folder import RunFolder, is_being_trained, locked

HELP = "publish one run's journal to MLflow (what a training starts by itself)"

# MLflow's defaults keep one call to a dead server waiting for 4 to 20 minutes
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--follow", type=int, metavar="PID", help="go on until this parent, the training, has ended")


def run(arguments: argparse.Namespace) -> int:
    if arguments.follow:
        # what a job is sent is meant for the training, which tells this process by the journal
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked by whoever started this, until here
    os.nice(10)
    start_logging()
    folder = RunFolder(arguments.run_dir.absolute())
    return 0 if publish(folder, os.environ["MLFLOW_TRACKING_URI"], lambda: os.getppid() == arguments.follow) else 1


def publish(folder: RunFolder, uri: str, is_parent_alive: Callable[[], bool], after_death: float = 30.0) -> bool:
    """Publish a folder, one process at a time. Returns whether all was published."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    from pipeline.tracking.publisher import Publisher, follow  # imports mlflow: 3 s, and reads the settings above

    with locked(folder.path / ".publisher.lock"):
        publisher = Publisher(folder, uri, load_network)
        return follow(publisher, is_parent_alive, lambda: is_being_trained(folder), after_death=after_death)


def load_network(run_folder: Path, record: dict[str, Any]) -> Any:
    """The network of a `model` record on the CPU, in eval mode, taking float32 pixels in 0..255."""
    import torch

    from pipeline.data.loading import Normalize
    from pipeline.models import build_model

    network = build_model(
        record["name"], record["channels"], record["image_size"], record["num_classes"], record["arguments"]
    )
    network.load_state_dict(torch.load(run_folder / record["path"], map_location="cpu", weights_only=True))
    return torch.nn.Sequential(Normalize(record["mean"], record["std"]), network).eval()


def start_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("convoy")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
