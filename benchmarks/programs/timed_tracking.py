"""Convoy's training with every call timed that records something, beside the time of its whole loop.

torchrun --nproc_per_node=2 -m benchmarks.programs.timed_tracking train.log_every=1 [key=value ...]

Takes what train/main.py takes. All epochs count, from the first step on, with their evaluations and checkpoints, but
nothing before or behind them.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from benchmarks.harness import ROOT, print_result
from pipeline.base.launch import Launch
from pipeline.base.logs import start_logging
from pipeline.base.signals import StopRequest
from pipeline.base.startup import StartupTimer
from pipeline.run.folder import RunFolder
from pipeline.run.journal import Journal
from train import build
from train.attempt.session import open_session
from train.main import read_config
from train.output import FolderOutput

METHODS = {
    Journal: ("metrics", "append", "append_all", "status", "sync"),
    FolderOutput: ("predictions",),
    RunFolder: ("update_status",),
}
"""All that a training does for what is shown of it, in MLflow and in its status."""


class CallLog:
    """Seconds of each call, by label; a call inside another belongs to that one."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.cpu_seconds: dict[str, list[float]] = defaultdict(list)
        """What is left of a long call without waiting for a core or the disk."""
        self.loop_seconds = 0.0
        self._is_running = False
        self._is_inside = False

    def time_loop(self, owner: object, name: str) -> None:
        """Only within calls of the methods that are given to this anything counts; none of them may call another."""
        function = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            self._is_running, started = True, time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.loop_seconds += time.perf_counter() - started
                self._is_running = False

        setattr(owner, name, timed)

    def time_calls(self, owner: object, name: str) -> None:
        """`owner`: an object, or a class for all of its objects."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            if self._is_inside or not self._is_running:
                return function(*arguments, **named)
            self._is_inside, started, cpu_started = True, time.perf_counter(), time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name].append(time.perf_counter() - started)
                self.cpu_seconds[name].append(time.thread_time() - cpu_started)
                self._is_inside = False

        setattr(owner, name, timed)

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
    start_logging(launch.rank)
    command, config = read_config(None, launch)
    log = CallLog()
    with build.join(config, launch) as rank:
        dataset = build.build_data(config, rank)
        with open_session(config, command.config_path.stem, launch, rank, dataset, ROOT) as session:
            trainer = build.build_trainer(
                config, rank, dataset, session.output, StopRequest(), StartupTimer(), session.start.run_id
            )
            for name in ("train_epoch", "evaluate"):
                log.time_loop(trainer, name)
            for owner, names in METHODS.items():
                for name in names:
                    log.time_calls(owner, name)
            session.end(trainer.fit(), trainer)
    if launch.rank == 0:
        steps = trainer.position.global_step
        print_result({"loop_seconds": log.loop_seconds, "steps": steps, "calls": log.summary()})
    session.close()


if __name__ == "__main__":
    main()
