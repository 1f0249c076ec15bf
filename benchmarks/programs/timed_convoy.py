"""Convoy's training with the calls timed that record, time and save it, beside the time of its whole loop.

torchrun --nproc_per_node=2 -m benchmarks.programs.timed_convoy [--without-freeze] train.epochs=2 [key=value ...]

Takes what train/main.py takes. The first epoch is not counted, nor what lies outside the loop over the batches.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, Literal
from unittest import mock

import torch

from benchmarks.harness import print_result
from benchmarks.programs.convoy import read_invocation
from pipeline.base.launch import Launch
from pipeline.base.logs import start_rank_logging
from pipeline.base.signals import StopRequest
from pipeline.base.timing import StartupTimer, build_timer
from pipeline.parallel.rank import PendingSum, Rank
from pipeline.run.journal import Journal
from train.agreement import Agreement
from train.display import BarDisplay, LineDisplay
from train.main import run
from train.output import Outcome
from train.recording import Recording
from train.trainer import Trainer

WARM_UP_EPOCHS = 1
NUM_REPLAYS = 5
TIMER_METHODS = ("start", "begin_step", "lap", "read")

TIMED_CALLS: tuple[tuple[type, str, str, str | None], ...] = (
    (Recording, "begin", "records", None),
    (Recording, "finish", "records", None),
    (Journal, "metrics", "journal", None),
    (Rank, "reduce_sum_later", "reduction", "records"),
    (PendingSum, "values", "arrival", "records"),
    (LineDisplay, "record", "display", None),
    (BarDisplay, "record", "display", None),
    (Trainer, "save", "save", None),
    (Trainer, "state", "state", None),
    (Agreement, "after_step", "votes", None),
)
"""Class, method, label, and the label of the calls inside which it counts (None: all).

Of a record: `reduction` sends the sums of this rank, `arrival` waits for those of all, `journal` writes, `display`
shows, `records` is all else. Of a checkpoint: `state` collects it, where the ranks meet, `save` writes.
"""
LABELS = (*dict.fromkeys(label for _, _, label, _ in TIMED_CALLS), "timers", "collection")
"""`timers` are the calls of the phase timer, `collection` is Python's garbage collection."""
Call = tuple[str, tuple[Any, ...]]
"""Name of a method of a timer, and its arguments."""


class LoopClock:
    """Seconds that calls take inside the loop, by label; what a timed call takes inside another is the former's alone.

    A wrapped call costs two readings of the clock and some book-keeping more, which count as its own.
    """

    def __init__(self) -> None:
        self.loop_seconds = 0.0
        self.seconds: dict[str, float] = {}
        self.calls: Counter[str] = Counter()
        self.is_running = False
        self._under_way: list[tuple[str, float]] = []
        """Label and start of each call, the innermost last."""
        self._inner_seconds: list[float] = []
        """Of each call under way, the seconds of the calls inside it."""

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Count what happens inside."""
        self.is_running, started = True, time.perf_counter()
        yield
        self.loop_seconds += time.perf_counter() - started
        self.is_running = False

    def begin(self, label: str) -> None:
        self._inner_seconds.append(0.0)
        self._under_way.append((label, time.perf_counter()))

    def end(self) -> None:
        label, started = self._under_way.pop()
        seconds = time.perf_counter() - started
        self.seconds[label] = self.seconds.get(label, 0.0) + seconds - self._inner_seconds.pop()
        self.calls[label] += 1
        if self._inner_seconds:
            self._inner_seconds[-1] += seconds

    def wrap(self, function: Callable[..., Any], label: str, within: str | None = None) -> Callable[..., Any]:
        """Return `function` with its calls counted under `label`; with `within` only those that such a call makes."""

        def timed(*arguments: Any, **named: Any) -> Any:
            is_counted = within is None or (self._under_way and self._under_way[-1][0] == within)
            if not (self.is_running and is_counted):
                return function(*arguments, **named)
            self.begin(label)
            try:
                return function(*arguments, **named)
            finally:
                self.end()

        return timed

    def collecting(self, phase: Literal["start", "stop"], info: dict[str, int]) -> None:
        """Count a garbage collection, as one of `gc.callbacks`."""
        if self.is_running:
            self.begin("collection") if phase == "start" else self.end()


def main() -> None:
    launch = Launch.from_environment(os.environ)
    start_rank_logging(launch.rank)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-freeze", action="store_true", help="let every garbage collection visit all objects")
    given, arguments = parser.parse_known_args()
    clock, timer_calls = LoopClock(), list[Call]()
    with ExitStack() as stack:
        if given.without_freeze:
            stack.enter_context(mock.patch.object(gc, "freeze"))
        stack.enter_context(timing(clock, timer_calls))
        run(read_invocation(arguments, launch), StopRequest(), StartupTimer())
    if launch.rank == 0:
        steps = sum(name == "begin_step" for name, _ in timer_calls)
        figures = {"loop_seconds": clock.loop_seconds, "steps": steps}
        seconds, calls = dict.fromkeys(LABELS, 0.0) | clock.seconds, dict.fromkeys(LABELS, 0) | clock.calls
        print_result(figures | {"seconds": seconds, "calls": calls})


@contextmanager
def timing(clock: LoopClock, timer_calls: list[Call]) -> Iterator[None]:
    """Time the trainings inside with `clock`, and list the calls of their timers.

    Classes are patched, not objects: a trainer whose own method is replaced by a function that holds it would be kept
    until a garbage collection, and with it what has to be gone before the process group is left.
    """
    with ExitStack() as stack:
        for owner, name, label, within in TIMED_CALLS:
            stack.enter_context(mock.patch.object(owner, name, clock.wrap(getattr(owner, name), label, within)))
        stack.enter_context(mock.patch.object(Trainer, "train_epoch", count_epochs(Trainer.train_epoch, clock)))
        stack.enter_context(mock.patch.object(Trainer, "fit", time_timers(Trainer.fit, clock, timer_calls)))
        gc.callbacks.append(clock.collecting)
        stack.callback(gc.callbacks.remove, clock.collecting)
        yield


def count_epochs(train_epoch: Callable[[Trainer], bool], clock: LoopClock) -> Callable[[Trainer], bool]:
    """Return `train_epoch` in the loop of `clock`, but for the first epochs."""

    def counted(trainer: Trainer) -> bool:
        if trainer.position.epoch < WARM_UP_EPOCHS:
            return train_epoch(trainer)
        with clock.loop():
            return train_epoch(trainer)

    return counted


def time_timers(fit: Callable[[Trainer], Outcome], clock: LoopClock, calls: list[Call]) -> Callable[[Trainer], Outcome]:
    """Return `fit`, behind which the calls of the trainer's timer are repeated and timed: one by one, in the loop, the
    reading of the clock would be most of each."""

    def timed(trainer: Trainer) -> Outcome:
        with listing(type(trainer.timer), calls, lambda: clock.is_running):
            outcome = fit(trainer)
        clock.seconds["timers"] = time_timer(calls, trainer.rank.device)  # on all ranks at once, as in the loop
        clock.calls["timers"] = len(calls)
        return outcome

    return timed


@contextmanager
def listing(timer: type, calls: list[Call], is_counting: Callable[[], bool]) -> Iterator[None]:
    """Write down the calls of all timers of a class."""

    def listed(name: str) -> Callable[..., Any]:
        function = getattr(timer, name)

        def call(self: object, *arguments: Any) -> Any:
            if is_counting():
                calls.append((name, arguments))
            return function(self, *arguments)

        return call

    with ExitStack() as stack:
        for name in TIMER_METHODS:
            stack.enter_context(mock.patch.object(timer, name, listed(name)))
        yield


class NoTimer:
    """Takes a PhaseTimer's calls and does nothing, as far as calls can."""

    def start(self) -> None:
        pass

    def begin_step(self) -> None:
        pass

    def lap(self, phase: str) -> None:
        pass

    def read(self) -> None:
        pass


def time_timer(calls: Sequence[Call], device: torch.device) -> float:
    """Return the seconds that the same calls take of a fresh timer, without those of repeating them."""
    real = median(replay(calls, build_timer(device)) for _ in range(NUM_REPLAYS))
    empty = median(replay(calls, NoTimer()) for _ in range(NUM_REPLAYS))
    return real - empty


def replay(calls: Sequence[Call], timer: object) -> float:
    """Return the seconds that the calls take."""
    started = time.perf_counter()
    for name, arguments in calls:
        getattr(timer, name)(*arguments)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
