"""The processes that run beside a training: to be started and ended by it. Imports no mlflow."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from pipeline.base.logs import logger
from pipeline.base.signals import SIGNALS
from pipeline.models.bundle import TRUST_VARIABLE
from pipeline.run.node_metrics import host_name


def start_publisher(run_folder: Path, tracking_uri: str) -> subprocess.Popen[bytes]:
    """Start what drains the journal into MLflow, and ends with exit code 0 when all is published.

    A process and not a thread, because a thread would stall the loop at the GIL. It outlives a crash of the training by
    30 s at most; what is not published then remains in the journal.
    """
    command, log = ["publish", str(run_folder)], run_folder / "publisher.log"
    return start_beside(command, log, MLFLOW_TRACKING_URI=tracking_uri)


class MonitorProcess:
    """The system monitor of this node, which writes system/<host>.jsonl in the run folder.

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
            command = ["monitor", str(run_folder), "--every", str(every)]
            self._process = start_beside(command, log, stdin=subprocess.PIPE)
        except OSError as error:
            logger.warning("the system metrics of %s are not recorded: %s", host, error)

    def close(self, timeout: float = 5.0) -> None:
        """Have it take its last sample and end; kill it if it has not within `timeout` seconds."""
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
    """Start `python -m pipeline <command> --follow <this process>`, with its output appended to `log`.

    In its own session, so that Ctrl-C reaches only the training, which then ends properly. It starts with SIGNALS
    blocked until it ignores them (`ignore_stop_signals`).
    """
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    # the training has the cores; and no GPU may be held from there
    settings = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    settings[TRUST_VARIABLE] = "1"  # it was imported here already
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
