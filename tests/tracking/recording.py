"""A recording under way as a test sees it: the process, its publisher, and what the server has of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mlflow import MlflowClient

from pipeline.run.folder import RunFolder
from tests.servers import MlflowServer
from tests.tracking.history import recorded_history
from tests.tracking.recorder import NOT_ALL_PUBLISHED

ROOT = Path(__file__).parents[2]
PATIENCE = 100.0
"""Seconds that anything may take here, where many processes share two cores."""
BEGINS, ENDS = "tracking does not work now", "tracking works again"
"""What the publisher says of an outage."""


class Recording:
    """Asks the server itself, past whatever faults there are between it and the publisher."""

    def __init__(self, run: Path, uri: str, server: MlflowServer, *, close_timeout: float = PATIENCE):
        self.run = run
        self.client = MlflowClient(server.url)
        command = [sys.executable, "-m", "tests.tracking.recorder", str(run), uri, str(close_timeout)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)
        self.wait_for(lambda: (self.run / "publisher.log").exists())

    def wait_until_caught_up(self) -> None:
        """Until the server has what was recorded before this call."""
        self.wait_for(lambda: "train/loss" in recorded_history(self.run))
        last_step = recorded_history(self.run)["train/loss"][-1][0]
        self.wait_for(lambda: self._last_stored_step() >= last_step)

    def wait_for_line(self, text: str, count: int = 1) -> None:
        """Until the publisher has said so, `count` times in all."""
        self.wait_for(lambda: self.num_lines(text) >= count)

    def finish(self) -> int:
        """End the training, which waits for its publisher. Its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(PATIENCE)

    def wait_until_unpublished(self) -> float:
        """Until its publisher has ended too; seconds."""
        started = time.monotonic()
        self.wait_for(lambda: publisher_pid(self.run) is None)
        return time.monotonic() - started

    def log(self) -> list[str]:
        """Of the publisher, without the address of the run, which MLflow prints."""
        path = self.run / "publisher.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if " View run " not in line and " View experiment " not in line]

    def num_lines(self, text: str) -> int:
        return sum(text in line for line in self.log())

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            log = "\n".join(self.log()[-5:])
            assert time.monotonic() < deadline, f"{self.run.name} waits in vain; the publisher's log ends with\n{log}"
            assert self._process.poll() in (None, 0, NOT_ALL_PUBLISHED), f"{self.run.name}: the recording failed"
            time.sleep(0.5)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _last_stored_step(self) -> int:
        """By the loss, which is 1 / step."""
        run_id = RunFolder(self.run).status().get("mlflow_run_id")
        loss = self.client.get_run(run_id).data.metrics.get("train/loss") if run_id else None
        return round(1 / loss) if loss else 0


def publisher_pid(run: Path) -> int | None:
    """Of the process that publishes this run folder, if there is one."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has ended in between
            continue
        if b"publish" in words and str(run).encode() in words:
            return int(path.parent.name)
    return None


def sync(*runs: Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "sync", *map(str, runs)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, check=False)
