"""Signals become a request that the training answers at its next decision: save, and leave with exit code 0."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAME_REQUEST = 2.0
"""Seconds in which a signal repeats the first: a scheduler that signals every process of a job also signals torchrun,
which passes it on, so that a rank is asked twice."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class StopRequest:
    """Set by a signal or a thread. A handler does nothing else: work in it can deadlock with what it interrupted."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.wants_save = False
        """Whether a checkpoint was asked for, with which the training goes on."""
        self._signalled_at: float | None = None

    def __bool__(self) -> bool:
        return self.reason is not None

    def ask(self, reason: str) -> None:
        """Ask to stop; the reason of the first request is kept."""
        self.reason = self.reason or reason

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Ask to stop by the first signal; end the process at once by a second one."""
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            self.ask(signal.Signals(number).name)
        elif now - self._signalled_at > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def listen_for_stop(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Yield `request`, or a new one, which SIGNALS set, but for SIGHUP under nohup. Only in the main thread, as Python
    has it for handlers."""
    request = StopRequest() if request is None else request
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    heard = [number for number in SIGNALS if number not in ignored]
    before = {number: signal.signal(number, request.receive) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kill_children() -> None:
    """Kill the loader workers that are left at the end of a rank.

    They ignore SIGTERM, with which Python would end them at its exit, to wait for them without a limit. They only read.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises in the handler it has for them
    for child in multiprocessing.active_children():
        child.kill()


def ignore_stop_signals() -> None:
    """Ignore SIGNALS in a process beside a training: what a job is sent is meant for the training, which ends it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked by `start_beside`, until here
