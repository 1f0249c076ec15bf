"""The publisher as the training sees it: a process to start, and to wait for at the end. Imports no mlflow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from pipeline.preemption import SIGNALS


class PublisherProcess:
    """The process that drains the journal into MLflow. It outlives a crash of the training by 30 s at most.

    A process and not a thread, because a thread would stall the loop at the GIL; in a session of its own, so that
    Ctrl-C stops the training, which then ends properly, and not the publisher.
    """

    def __init__(self, run_folder: Path, tracking_uri: str):
        root = Path(__file__).resolve().parents[2]
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "MLFLOW_TRACKING_URI": tracking_uri,
            # the training has the cores; and no GPU may be held from here
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        # Inherited, so that a signal to the whole job cannot end it before it has learnt to ignore it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with (run_folder / "publisher.log").open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "pipeline", "publish", str(run_folder), "--follow", str(os.getpid())],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def wait(self, timeout: float) -> bool:
        """Whether all was published within `timeout` seconds. What was not remains in the journal."""
        try:
            return self._process.wait(timeout) == 0
        except subprocess.TimeoutExpired:
            return False
