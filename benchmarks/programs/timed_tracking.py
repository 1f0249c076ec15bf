"""Convoy's training with every call timed that records something, beside the time of its whole loop.

torchrun --nproc_per_node=2 -m benchmarks.programs.timed_tracking train.log_every=1 [key=value ...]

Takes what train/main.py takes. All epochs count, from the first step on, with their evaluations and checkpoints, but
nothing before or behind them.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from benchmarks.harness import print_result
from benchmarks.programs.convoy import read_invocation
from pipeline.base.launch import Launch
from pipeline.base.logs import start_rank_logging
from pipeline.base.signals import StopRequest
from pipeline.base.timing import StartupTimer
from pipeline.run.folder import RunFolder
from pipeline.run.journal import Journal
from train.main import run
from train.output import FolderOutput, Outcome
from train.trainer import Trainer

LOOPS: tuple[tuple[type, str], ...] = ((Trainer, "train_epoch"), (Trainer, "evaluate"))
"""Nothing counts but in these; none calls another."""
CALLS: tuple[tuple[type, str], ...] = (
    (Journal, "metrics"),
    (Journal, "append"),
    (Journal, "status"),
    (Journal, "sync"),
    (FolderOutput, "predictions"),
    (RunFolder, "update_status"),
)
"""All that a training does for what is shown of it, in MLflow and in its status."""


class CallLog:
    """Seconds of each call, by label; a call inside another belongs to that one."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.cpu_seconds: dict[str, list[float]] = defaultdict(list)
        """What is left of a long call without waiting for a core or the disk."""
        self.loop_seconds = 0.0
        self.num_steps = 0
        self._is_running = False
        self._is_inside = False

    def wrap_loop(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, during whose calls the others count."""

        def timed(*arguments: Any) -> Any:
            self._is_running, started = True, time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.loop_seconds += time.perf_counter() - started
                self._is_running = False

        return timed

    def wrap(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        """Return `function` with its calls counted under `label`."""

        def timed(*arguments: Any, **named: Any) -> Any:
            if self._is_inside or not self._is_running:
                return function(*arguments, **named)
            self._is_inside, started, cpu_started = True, time.perf_counter(), time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[label].append(time.perf_counter() - started)
                self.cpu_seconds[label].append(time.thread_time() - cpu_started)
                self._is_inside = False

        return timed

    def summary(self) -> dict[str, dict[str, float]]:
        return {
            name: {
                "calls": len(seconds),
                "seconds": sum(seconds),
                "longest_seconds": max(seconds),
                "longest_cpu_seconds": max(self.cpu_seconds[name]),
            }
            for name, seconds in self.seconds.items()
        }


def main() -> None:
    launch = Launch.from_environment(os.environ)
    start_rank_logging(launch.rank)
    log = CallLog()
    with timing(log):
        run(read_invocation(sys.argv[1:], launch), StopRequest(), StartupTimer())
    if launch.rank == 0:
        print_result({"loop_seconds": log.loop_seconds, "steps": log.num_steps, "calls": log.summary()})


@contextmanager
def timing(log: CallLog) -> Iterator[None]:
    """Log the calls of the trainings inside.

    Classes are patched, not objects: a trainer whose own method is replaced by a function that holds it would be kept
    until a garbage collection, and with it what has to be gone before the process group is left.
    """
    with ExitStack() as stack:
        for owner, name in LOOPS:
            stack.enter_context(mock.patch.object(owner, name, log.wrap_loop(getattr(owner, name))))
        for owner, name in CALLS:
            stack.enter_context(mock.patch.object(owner, name, log.wrap(getattr(owner, name), name)))
        stack.enter_context(mock.patch.object(Trainer, "fit", count_steps(Trainer.fit, log)))
        yield


def count_steps(fit: Callable[[Trainer], Outcome], log: CallLog) -> Callable[[Trainer], Outcome]:
    def counted(trainer: Trainer) -> Outcome:
        outcome = fit(trainer)
        log.num_steps = trainer.position.global_step
        return outcome

    return counted


if __name__ == "__main__":
    main()
