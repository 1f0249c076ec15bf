"""A thread of each rank that sees from outside what the training cannot: that it stands still, or that nobody wants it.

Once a second it looks whether the training still gives signs of life, whether the launcher is still there, and, on rank
0, whether a file asks for a checkpoint or for the end.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import unwrap
from pathlib import Path
from types import CodeType, FrameType

from torch.autograd import graph
from torch.nn.parallel import DistributedDataParallel

from pipeline.base.launch import Launch
from pipeline.base.signals import StopRequest
from pipeline.config import Config
from pipeline.data.resident import ResidentLoader
from pipeline.data.streamed import StreamedLoader
from pipeline.learning.evaluation import Evaluator
from pipeline.learning.precision import Precision
from pipeline.parallel.node_sum import NodeAverage
from pipeline.parallel.ordered import Shards
from pipeline.parallel.rank import PendingSum, Rank
from train.attempt.session import Session
from train.steps.captured import StaticStep
from train.steps.eager import StepParts
from train.trainer import Trainer

LOOK_EVERY = 1.0
"""Seconds."""
LAST_WORDS = 5.0
"""Seconds."""
GRACE = 25.0
"""Seconds in which a training without a launcher has to save and to leave."""
WAITING = "waiting for other ranks"
logger = logging.getLogger("convoy")

PHASES: dict[Callable[..., object], str] = {
    Trainer.save: "the save of a checkpoint",
    Evaluator.evaluate: "the evaluation",
    ResidentLoader.__iter__: "the loading of data",
    StreamedLoader.__iter__: "the loading of data",
    StepParts.compute_gradient: "the forward pass",
    StaticStep.__call__: "the captured step",
    Precision.backward: "the backward pass",
    Precision.update: "the update of the weights",
    DistributedDataParallel._pre_forward: WAITING,  # for buckets and buffers
    NodeAverage.average: WAITING,
    Shards.sum: WAITING,
    PendingSum.values: WAITING,
    Rank.reduce_sum: WAITING,
    Rank.gather: WAITING,
}
"""By the innermost of these that is being executed."""


class Watchdog:
    """What one rank's thread looks at."""

    def __init__(
        self,
        rank: Rank,
        progress: Callable[[], object],
        timeout: float,
        fail: Callable[[BaseException], None],
        *,
        waits_in_backward: bool = False,
    ):
        """`progress` is another value whenever the training has come further; `timeout`: seconds that it may be the
        same. `fail` records the end of the run. `waits_in_backward`: there the gradients of the ranks meet."""
        self._rank = rank
        self._progress = progress
        self._timeout = timeout
        self._fail = fail
        phases = PHASES | ({graph._engine_run_backward: WAITING} if waits_in_backward else {})
        # unwrapped: all functions with the same decorator have its code
        self._phases: dict[CodeType, str] = {unwrap(function).__code__: name for function, name in phases.items()}
        self._last = progress()
        self._looked_at = time.monotonic()
        self._silent = 0.0
        self._thread_id = threading.get_ident()

    def look(self) -> None:
        """Ends this process if the training stands still."""
        now, current = time.monotonic(), self._progress()
        # a process that was suspended did not stand still meanwhile
        passed, self._looked_at = min(now - self._looked_at, 2 * LOOK_EVERY), now
        self._silent = self._silent + passed if current == self._last else 0.0
        self._last = current
        # who waits is not the cause: that rank's own watchdog is to speak first, then the collective that times out
        if self._silent >= self._timeout + (30.0 if self._phase() == WAITING else 0.0):
            self._end()

    def _phase(self) -> str:
        frame: FrameType | None = sys._current_frames().get(self._thread_id)
        while frame is not None:
            if frame.f_code in self._phases:
                return self._phases[frame.f_code]
            frame = frame.f_back
        return "the training loop"

    def _end(self) -> None:
        reason = f"rank {self._rank.rank} stood still for {self._silent:.0f} s in {self._phase()} (train.hang_timeout)"
        logger.error("%s; where its threads are:", reason)
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        # in a thread of its own: the file system may be what stands still
        last_words = threading.Thread(target=self._fail, args=(TimeoutError(reason),), daemon=True)
        last_words.start()
        last_words.join(LAST_WORDS)
        os._exit(1)


class StopFiles:
    """What rank 0 is asked by files: `stop` and `save` in the run folder, and the one that CONVOY_STOP_FILE names."""

    def __init__(self, folder: Path, named: str | None, request: StopRequest):
        """A request in the folder that was made before the start is none for this training."""
        self._request = request
        self._save = folder / "save"
        self._stops = [folder / "stop"]
        for path in (self._save, *self._stops):
            path.unlink(missing_ok=True)
        if named:  # whoever named it removes it
            self._stops.append(Path(named))

    def look(self) -> None:
        if self._save.exists():
            self._save.unlink(missing_ok=True)
            self._request.wants_save = True
        for path in self._stops:
            if path.exists() and not self._request:
                self._request.ask(f"request by {path}")
                self._stops[0].unlink(missing_ok=True)


class Launcher:
    """Whether torchrun, which started this process, is still there."""

    def __init__(self, pid: int, request: StopRequest, *, is_replaceable: bool = False):
        """`is_replaceable`: the launchers of other nodes go on without this node."""
        self._pid = pid
        self._request = request
        self._is_replaceable = is_replaceable
        self._died_at: float | None = None

    def look(self) -> None:
        """Without it, ask to stop; and end this process if that takes too long, or if others will go on."""
        if os.getppid() == self._pid:
            return
        now = time.monotonic()
        if self._is_replaceable:
            logger.error("the launcher (process %d) is gone: leaving the training to the other nodes", self._pid)
            os._exit(1)
        if self._died_at is None:
            self._died_at = now
            logger.error("the launcher (process %d) is gone: saving, and leaving", self._pid)
            self._request.ask("the death of the launcher")
        elif now - self._died_at > GRACE:
            os._exit(1)


@contextmanager
def watching(*looks: Callable[[], None]) -> Iterator[None]:
    """Call each of `looks` every second, in a thread."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_EVERY):
            for look in looks:
                try:
                    look()
                except OSError as error:  # of a folder that is gone, say: the others are needed all the same
                    logger.warning("the watchdog cannot look: %s", error)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * LOOK_EVERY)


def build_looks(config: Config, session: Session, trainer: Trainer) -> Iterator[Callable[[], None]]:
    """What the thread of this rank has to look at while it trains."""

    def progress() -> object:
        return trainer.pulse.num_beats, trainer.timer.last

    timeout, in_backward = config.train.hang_timeout, trainer.waits_in_backward
    yield Watchdog(trainer.rank, progress, timeout, session.fail, waits_in_backward=in_backward).look
    if trainer.rank.is_main:
        yield StopFiles(session.start.folder, os.environ.get("CONVOY_STOP_FILE"), trainer.stop).look


@contextmanager
def watching_launcher(launch: Launch, stop: StopRequest) -> Iterator[None]:
    if launch.launcher_pid is None:
        yield
        return
    launcher = Launcher(launch.launcher_pid, stop, is_replaceable=launch.is_replaceable)
    with watching(launcher.look):
        yield
