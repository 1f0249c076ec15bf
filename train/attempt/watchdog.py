"""A thread of each rank that sees from outside what the training cannot: that it hangs, or that nobody wants it.

Once a second it checks whether the training still advances, whether the launcher is still there, and, on
rank 0, whether a file asks for a checkpoint or for the end.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import unwrap
from pathlib import Path
from types import CodeType, FrameType

from torch.autograd import graph
from torch.nn.parallel import DistributedDataParallel

from pipeline.base.launch import Launch
from pipeline.base.logs import logger
from pipeline.base.signals import StopRequest
from pipeline.data.loaders import ResidentLoader, StreamedLoader
from pipeline.learning.evaluation import Evaluator
from pipeline.learning.update import Precision, Update
from pipeline.parallel.rank import PendingSum, Rank
from pipeline.parallel.replicas import NodeSum, OrderedReplicas
from train.attempt.attempt import Attempt
from train.steps.captured import CapturedStep
from train.steps.parts import StepParts
from train.trainer import Trainer

CHECK_EVERY = 1.0
"""Seconds between two checks."""
LAST_WORDS = 5.0
"""Seconds that recording the failure may take."""
GRACE = 25.0
"""Seconds in which a training without a launcher has to save and to leave."""
WAITING = "waiting for other ranks"

PHASES: dict[Callable[..., object], str] = {
    Trainer.save: "the save of a checkpoint",
    Evaluator.evaluate: "the evaluation",
    ResidentLoader.batches: "the loading of data",
    StreamedLoader.batches: "the loading of data",
    StepParts.forward: "the forward pass",
    CapturedStep.__call__: "the captured step",
    Precision.backward: "the backward pass",
    Update.__call__: "the update of the weights",
    NodeSum.reduce: WAITING,
    OrderedReplicas.reduce: WAITING,
    PendingSum.values: WAITING,
    Rank.reduce_sum: WAITING,
    Rank.gather: WAITING,
}
"""Name of the phase while the innermost of these functions is being executed."""


def find_phases(*, waits_in_backward: bool) -> dict[CodeType, str]:
    """Return the phases by the code of their functions. `waits_in_backward`: the gradients of the ranks meet there."""
    phases = dict(PHASES)
    private = [(DistributedDataParallel, "_pre_forward")]  # waits for buckets and buffers
    private += [(graph, "_engine_run_backward")] if waits_in_backward else []  # type: ignore[list-item]
    for owner, name in private:
        # without a promise from torch: where it is renamed, a message says less, and the training goes on
        if function := getattr(owner, name, None):
            phases[function] = WAITING
    # unwrapped: all functions with the same decorator have its code
    return {unwrap(function).__code__: name for function, name in phases.items()}


@dataclass
class Watchdog:
    """Ends this process if its training, in the thread that makes the watchdog, hangs.

    `progress()` changes whenever training advances. If it stays the same for `timeout` seconds, `fail` records that,
    and the rank is ended.
    """

    rank: Rank
    progress: Callable[[], object]
    timeout: float
    fail: Callable[[BaseException], None]
    phases: Mapping[CodeType, str]
    """From `find_phases`."""
    _last: object = None
    _silent: float = 0.0
    _checked_at: float = field(default_factory=time.monotonic)
    _thread_id: int = field(default_factory=threading.get_ident)

    def check(self) -> None:
        now, current = time.monotonic(), self.progress()
        # a process that was suspended did not hang meanwhile
        passed, self._checked_at = min(now - self._checked_at, 2 * CHECK_EVERY), now
        self._silent = self._silent + passed if current == self._last else 0.0
        self._last = current
        # who waits is not the cause: that rank's own watchdog is to speak first, then the collective that times out
        if self._silent >= self.timeout + (30.0 if self._phase() == WAITING else 0.0):
            self._exit_hung()

    def _phase(self) -> str:
        frame: FrameType | None = sys._current_frames().get(self._thread_id)
        while frame is not None:
            if frame.f_code in self.phases:
                return self.phases[frame.f_code]
            frame = frame.f_back
        return "the training loop"

    def _exit_hung(self) -> None:
        """Log where all threads are, record the failure, which may take LAST_WORDS, and exit with code 1."""
        reason = f"rank {self.rank.rank} hung for {self._silent:.0f} s in {self._phase()} (train.hang_timeout)"
        logger.error("%s; where its threads are:", reason)
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        # in a thread of its own: the file system may be what stands still
        last_words = threading.Thread(target=self.fail, args=(TimeoutError(reason),), daemon=True)
        last_words.start()
        last_words.join(LAST_WORDS)
        os._exit(1)


class StopFiles:
    """Passes on requests by files: `stop` and `save` in the run folder, and the one that CONVOY_STOP_FILE names."""

    def __init__(self, folder: Path, named: str | None, request: StopRequest):
        """Removes older requests from the folder: they were not meant for this training."""
        self._request = request
        self._save = folder / "save"
        self._stops = [folder / "stop"]
        for path in (self._save, *self._stops):
            path.unlink(missing_ok=True)
        if named:  # whoever named it removes it
            self._stops.append(Path(named))

    def check(self) -> None:
        if self._save.exists():
            self._save.unlink(missing_ok=True)
            self._request.wants_save = True
        for path in self._stops:
            if path.exists() and not self._request:
                self._request.ask(f"request by {path}")
                self._stops[0].unlink(missing_ok=True)


@dataclass
class Launcher:
    """Ends this training if torchrun, which started it, is gone."""

    launch: Launch
    request: StopRequest
    _died_at: float | None = None

    def check(self) -> None:
        """Ask to stop if it is gone; end this process if that takes too long, or if others go on without this node."""
        if not self.launch.launcher_is_gone:
            return
        pid, now = self.launch.launcher_pid, time.monotonic()
        if self.launch.is_replaceable:
            logger.error("the launcher (process %d) is gone: leaving the training to the other nodes", pid)
            os._exit(1)
        if self._died_at is None:
            self._died_at = now
            logger.error("the launcher (process %d) is gone: saving, and leaving", pid)
            self.request.ask("the death of the launcher")
        elif now - self._died_at > GRACE:
            os._exit(1)


@contextmanager
def watching(*checks: Callable[[], None]) -> Iterator[None]:
    """Call each of `checks` every second, in a thread."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(CHECK_EVERY):
            for check in checks:
                try:
                    check()
                except OSError as error:  # of a folder that is gone, say: the other checks are needed all the same
                    logger.warning("the watchdog cannot check: %s", error)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * CHECK_EVERY)


def watching_training(attempt: Attempt, trainer: Trainer) -> AbstractContextManager[None]:
    """Watch the training of this rank, and on rank 0 the stop files of its run folder."""

    def progress() -> object:
        return trainer.timer.last

    phases = find_phases(waits_in_backward=trainer.step.parts.replicas.waits_in_backward)
    checks = [Watchdog(trainer.rank, progress, trainer.config.hang_timeout, attempt.fail, phases).check]
    if trainer.rank.is_main:
        checks.append(StopFiles(attempt.folder, os.environ.get("CONVOY_STOP_FILE"), trainer.stop).check)
    return watching(*checks)


def watching_launcher(launch: Launch, stop: StopRequest) -> AbstractContextManager[None]:
    """Watch the launcher, if there is one."""
    if launch.launcher_pid is None:
        return nullcontext()
    return watching(Launcher(launch, stop).check)
