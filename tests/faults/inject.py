"""A fault at a chosen place of a training: a rank that is killed, signalled, raises, exits, sleeps, or computes NaN."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.data.inputs import Inputs
from pipeline.learning.metrics import EvaluationMeter
from pipeline.learning.update import Precision
from pipeline.parallel.replicas import NodeSum, OrderedReplicas
from pipeline.run.checkpoint import Checkpoints, load_checkpoint
from train.recording import Recording
from train.steps.eager import EagerStep, OrderedStep
from train.steps.parts import StepParts
from train.trainer import Trainer

PLACES: dict[str, list[tuple[type, str]]] = {
    "step": [(EagerStep, "__call__"), (OrderedStep, "__call__")],
    "gradient": [(StepParts, "forward")],
    "forward": [(Precision, "autocast")],
    "backward": [(torch.amp.GradScaler, "scale")],
    "all-reduce": [(NodeSum, "reduce"), (OrderedReplicas, "reduce")],
    "update": [(torch.amp.GradScaler, "unscale_")],
    "record": [(Recording, "begin")],
    "evaluation": [(EvaluationMeter, "add")],
    "save": [(Trainer, "save")],
}
"""A fault strikes before one of these is called."""
STEPS_WITHOUT_ROOM = 5
FILLER = "filler"
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
"""Of Python's audit hooks."""


@dataclass(frozen=True)
class Fault:
    what: str
    """kill, kill worker, raise, exit, sleep, nan, fill (the disk of `path`, for 5 steps), or the name of
    a signal."""
    where: str
    """Of PLACES; or `file`: a file operation in the save of a checkpoint, by rank 0."""
    at: int
    """How often that was reached before, in this process."""
    ranks: tuple[int, ...]
    path: str = ""
    mark: str = ""
    """File that is made when it strikes."""


def inject(fault: Fault, rank: int) -> None:
    """Into this process, which is that rank."""
    if rank not in fault.ranks:
        return
    if fault.where == "file":
        _watch_files(fault)
        return
    count = itertools.count()
    for owner, name in PLACES[fault.where]:
        setattr(owner, name, _struck(getattr(owner, name), fault, count))


def _struck(function: Callable[..., Any], fault: Fault, count: itertools.count[int]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        number = next(count)
        if number == fault.at:
            _strike(fault, arguments)
        if fault.what == "fill" and number == fault.at + STEPS_WITHOUT_ROOM:
            _check_that_one_loads(Path(fault.path))
            (Path(fault.path) / FILLER).unlink()
        return function(*arguments, **named)

    return call


def _strike(fault: Fault, arguments: tuple[Any, ...] = ()) -> None:
    if fault.mark:
        os.close(os.open(fault.mark, os.O_CREAT | os.O_WRONLY))
    match fault.what:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise ArithmeticError("the fault")
        case "exit":
            os._exit(3)
        case "kill worker":
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        case "sleep":
            time.sleep(10_000)
        case "nan":
            next(a for a in arguments if isinstance(a, Inputs)).images.fill_(torch.nan)
        case "fill":
            _fill(Path(fault.path) / FILLER)
        case name:
            os.kill(os.getpid(), signal.Signals[name])


def _fill(path: Path) -> None:
    """Until not a byte more goes in, or, for every other process, but for some pages: a part of a file goes in."""
    room = 4096 * (os.getpid() % 2) * random.randrange(1, 20)
    with path.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
        file.truncate(max(0, file.tell() - room))


def _check_that_one_loads(disk: Path) -> None:
    """While there is no room."""
    found = sorted(disk.glob("run/checkpoints/step-*"))
    if found:
        load_checkpoint(found[-1])


def _watch_files(fault: Fault) -> None:
    """Counts opening, renaming, removing and forcing to the disk, from the first save on."""
    count, is_saving, save, fsync = itertools.count(), False, Checkpoints.save, os.fsync

    def strike_if_due() -> None:
        nonlocal is_saving
        if is_saving and next(count) == fault.at:
            is_saving = False  # the mark is a file operation too
            _strike(fault)

    def watched_save(*arguments: Any, **named: Any) -> Any:
        nonlocal is_saving
        is_saving = True
        try:
            return save(*arguments, **named)
        finally:
            is_saving = False

    def watched_fsync(file: Any) -> None:
        strike_if_due()
        fsync(file)

    Checkpoints.save = watched_save  # type: ignore[method-assign]
    os.fsync = watched_fsync  # type: ignore[assignment]
    sys.addaudithook(lambda event, _: strike_if_due() if event in FILE_EVENTS else None)


def random_fault(rng: random.Random, what: str, world_size: int, places: tuple[str, ...] = tuple(PLACES)) -> Fault:
    """On one rank or on all."""
    where = rng.choice(places)
    rare = {"record": 6, "evaluation": 12, "save": 9}
    ranks = tuple(range(world_size)) if rng.random() < 0.25 else (rng.randrange(world_size),)
    return Fault(what, where, rng.randrange(rare.get(where, 26)), ranks)
