"""What runs beside a training, as the training sees it: processes to start, and to end. Imports no mlflow."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from pipeline.base.signals import SIGNALS
from pipeline.run.node_metrics import host_name

logger = logging.getLogger("convoy")


class PublisherProcess:
    """The process that drains the journal into MLflow. It outlives a crash of the training by 30 s at most.

    A process and not a thread, because a thread would stall the loop at the GIL.
    """

    def __init__(self, run_folder: Path, tracking_uri: str):
        self._process = start_beside(
            ["publish", str(run_folder)], run_folder / "publisher.log", MLFLOW_TRACKING_URI=tracking_uri
        )

    def wait(self, timeout: float) -> bool:
        """Whether all was published within `timeout` seconds. What was not remains in the journal."""
        try:
            return self._process.wait(timeout) == 0
        except subprocess.TimeoutExpired:
            return False

    def kill(self) -> None:
        """At once; what is not published remains in the journal."""
        self._process.kill()


class SamplerProcess:
    """The process that samples this node into system/<host>.jsonl of the run folder: one for each node.

    It ends when this one closes it or dies. A training does not fail for it: where it cannot be started, as on a node
    that does not see the run folder, a warning says so.
    """

    def __init__(self, run_folder: Path, every: float):
        """`every`: seconds between two samples."""
        self._process: subprocess.Popen[bytes] | None = None
        host = host_name()
        log = run_folder / "system" / f"{host}.log"
        try:
            log.parent.mkdir(exist_ok=True)
            command = ["sample", str(run_folder), "--every", str(every)]
            self._process = start_beside(command, log, stdin=subprocess.PIPE)
        except OSError as error:
            logger.warning("the system metrics of %s are not recorded: %s", host, error)

    def close(self, timeout: float = 5.0) -> None:
        """Have it take its last sample and end. It is killed if it has not within `timeout` seconds."""
        process = self._process
        if process is None or process.stdin is None or process.stdin.closed:
            return
        # a word, and not the end of its input alone: forked workers may hold the pipe open
        with suppress(OSError), process.stdin:
            process.stdin.write(b"end\n")
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # a driver may hold it even then
                process.wait(1.0)


def start_beside(
    command: list[str], log: Path, stdin: int = subprocess.DEVNULL, **environment: str
) -> subprocess.Popen[bytes]:
    """`python -m pipeline <command> --follow <this process>`, with what it prints appended to `log`.

    In a session of its own, so that Ctrl-C stops the training, which then ends properly, and not this. It begins with
    all SIGNALS blocked, so that one to the whole job cannot end it before it has learnt to `ignore_stop_signals`.
    """
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    # the training has the cores; and no GPU may be held from there
    settings = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with log.open("ab") as output:
            return subprocess.Popen(
                # -P: not a folder called pipeline where the training was started
                [sys.executable, "-P", "-m", "pipeline", *command, "--follow", str(os.getpid())],
                env=os.environ | settings | environment,
                stdin=stdin,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
