"""Convoy's training with the calls timed that record, time and save it, beside the time of its whole loop.

torchrun --nproc_per_node=2 -m benchmarks.programs.timed_convoy train.epochs=2 [key=value ...]

Takes what train/main.py takes. The first epoch is not counted, nor what lies outside the loop over the batches.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from benchmarks.harness import ROOT, print_result
from pipeline.base.launch import Launch
from pipeline.base.logs import start_logging
from pipeline.base.signals import StopRequest
from pipeline.base.startup import StartupTimer
from pipeline.base.timing import PhaseTimer, build_timer
from pipeline.config import CommandLine, Config
from pipeline.parallel.rank import Rank
from train import build
from train.attempt.session import Session, open_session
from train.main import read_config
from train.output import FolderOutput
from train.trainer import Trainer

WARM_UP_EPOCHS = 1
NUM_REPLAYS = 5

Call = tuple[str, tuple[Any, ...]]
"""Name of a method, and its arguments."""


class LoopClock:
    """Seconds that calls take inside the loop, by label; what a timed call takes inside another is the former's alone.

    A wrapped call costs two readings of the clock and some book-keeping more, which count as its own.
    """

    def __init__(self) -> None:
        self.loop_seconds = 0.0
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.is_running = False
        self._inner: list[float] = []
        """Of each call under way, the seconds of those inside it."""

    @contextmanager
    def loop(self) -> Iterator[None]:
        """What happens in here counts."""
        self.is_running = True
        started = time.perf_counter()
        yield
        self.loop_seconds += time.perf_counter() - started
        self.is_running = False

    def time_calls(self, owner: object, name: str, label: str) -> None:
        """From now on the method `name` of this one object counts under `label`."""
        function = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            if not self.is_running:
                return function(*arguments, **named)
            started = time.perf_counter()
            self._inner.append(0.0)
            result = function(*arguments, **named)
            seconds = time.perf_counter() - started
            self.seconds[label] += seconds - self._inner.pop()  # type: ignore[assignment]
            self.calls[label] += 1
            if self._inner:
                self._inner[-1] += seconds
            return result

        setattr(owner, name, timed)


def main() -> None:
    launch = Launch.from_environment(os.environ)
    start_logging(launch.rank)
    command, config = read_config(None, launch)
    with build.join(config, launch) as rank:
        session = measure(config, command, launch, rank)
    session.close()


def measure(config: Config, command: CommandLine, launch: Launch, rank: Rank) -> Session:
    """Collective: every rank must call. Rank 0, the one that writes, prints its figures."""
    clock, timer_calls = LoopClock(), list[Call]()
    dataset = build.build_data(config, rank)
    with open_session(config, command.config_path.stem, launch, rank, dataset, ROOT) as session:
        trainer = build.build_trainer(
            config, rank, dataset, session.output, StopRequest(), StartupTimer(), session.start.run_id
        )
        time_parts(trainer, clock)
        log_timer(trainer.timer, timer_calls, lambda: clock.is_running)
        time_epochs(trainer, clock)
        outcome = trainer.fit()
        timer_seconds = time_timer(timer_calls, rank.device)  # on all ranks at once, as in the loop
        session.end(outcome, trainer)
    if rank.is_main:
        print_result(
            {
                "loop_seconds": clock.loop_seconds,
                "steps": sum(name == "begin_step" for name, _ in timer_calls),
                "seconds": {**clock.seconds, "timers": timer_seconds},
                "calls": {**clock.calls, "timers": len(timer_calls)},
            }
        )
    return session


def time_parts(trainer: Trainer, clock: LoopClock) -> None:
    """Of a record: `reduction` sends the sums of this rank, `arrival` waits for those of all, `journal` writes,
    `display` shows, `records` is all else. Of a checkpoint: `state` collects it, where the ranks meet, `save` writes.
    """
    for name in ("begin_record", "finish_record"):
        clock.time_calls(trainer, name, "records")
    if isinstance(trainer.output, FolderOutput):  # of rank 0
        clock.time_calls(trainer.output.journal, "metrics", "journal")
    reduce = trainer.meter.reduce

    def reduce_and_time_its_arrival(*arguments: Any) -> Any:
        record = reduce(*arguments)
        clock.time_calls(record, "result", "arrival")
        return record

    setattr(trainer.meter, "reduce", reduce_and_time_its_arrival)  # noqa: B010 (mypy forbids the assignment)
    clock.time_calls(trainer.meter, "reduce", "reduction")
    clock.time_calls(trainer.display, "record", "display")
    clock.time_calls(trainer, "save", "save")
    clock.time_calls(trainer, "state", "state")
    clock.time_calls(trainer.ballot, "after_step", "votes")


def time_epochs(trainer: Trainer, clock: LoopClock) -> None:
    train_epoch = trainer.train_epoch

    def timed() -> bool:
        if trainer.position.epoch < WARM_UP_EPOCHS:
            return train_epoch()
        with clock.loop():
            return train_epoch()

    setattr(trainer, "train_epoch", timed)  # noqa: B010


def log_timer(timer: PhaseTimer, calls: list[Call], is_counting: Callable[[], bool]) -> None:
    """Write down the calls of a timer; timed one by one, the reading of the clock would be most of each."""

    def log(name: str) -> None:
        function = getattr(timer, name)

        def logged(*arguments: Any) -> Any:
            if is_counting():
                calls.append((name, arguments))
            return function(*arguments)

        setattr(timer, name, logged)

    for name in ("start", "begin_step", "lap", "read"):
        log(name)


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
    """Seconds that the same calls take of a fresh timer, without those of repeating them."""
    real = median(replay(calls, build_timer(device)) for _ in range(NUM_REPLAYS))
    empty = median(replay(calls, NoTimer()) for _ in range(NUM_REPLAYS))
    return real - empty


def replay(calls: Sequence[Call], timer: object) -> float:
    """Seconds."""
    started = time.perf_counter()
    for name, arguments in calls:
        getattr(timer, name)(*arguments)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
