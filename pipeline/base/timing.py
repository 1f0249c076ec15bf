"""Named times, always on: of the phases of a step, and of what lies before the first step."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from pipeline.base.launch import start_ticks
from pipeline.base.logs import logger
from pipeline.base.phases import PHASES as PHASES


@dataclass(frozen=True)
class PhaseTimes:
    """The times of one rank since the reading before."""

    seconds: float  # all phases together, on the clock of the host
    milliseconds: tuple[float, ...]  # per optimizer step, by PHASES


class PhaseTimer:
    """For devices that compute while the call lasts: every step is timed, at 0.1 microseconds a lap."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._num_steps = 0
        self.last = 0.0
        """When the last lap was, on a clock of its own."""

    def start(self) -> None:
        """Begin to count; what lies between the last lap and now belongs to no phase."""
        self.last = time.perf_counter()

    def begin_step(self) -> None:
        """Count a new optimizer step, which begins here."""
        self._num_steps += 1

    def lap(self, phase: str) -> None:
        """Count the time since the last lap or start as spent in `phase`."""
        now = time.perf_counter()
        self._seconds[phase] += now - self.last
        self.last = now

    def read(self) -> PhaseTimes:
        """Return the times since the last reading, and forget them."""
        seconds = [self._seconds[phase] for phase in PHASES]
        milliseconds = tuple(1e3 * value / max(1, self._num_steps) for value in seconds)
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._num_steps = 0
        return PhaseTimes(sum(seconds), milliseconds)


class CudaTimer(PhaseTimer):
    """For GPUs, where a call returns before its work is done: the first step after each reading is timed by events.

    Events of the other steps would cost more than their phases where a step takes 100 microseconds. An event is read
    only when the GPU has passed it, so that reading never waits, and gives the last step that was timed to its end; no
    time at all before there is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._sampled = (0.0,) * len(PHASES)
        self._state = "idle"  # -> sampling -> complete, until read

    def start(self) -> None:
        super().start()
        if self._state == "sampling":  # an evaluation or a save has cut the step off
            self._state, self._events = "idle", []

    def begin_step(self) -> None:
        super().begin_step()
        if self._state == "idle":
            self._state = "sampling"
            self._record("begin")
        elif self._state == "sampling":
            self._state = "complete"

    def lap(self, phase: str) -> None:
        super().lap(phase)
        if self._state == "sampling":
            self._record(phase)

    def read(self) -> PhaseTimes:
        if self._state == "complete" and self._events[-1][1].query():  # type: ignore[no-untyped-call]
            totals = dict.fromkeys(PHASES, 0.0)
            for (_, before), (phase, event) in pairwise(self._events):
                totals[phase] += before.elapsed_time(event)
            self._sampled = tuple(totals.values())
            self._state, self._events = "idle", []
        return PhaseTimes(super().read().seconds, self._sampled)

    def _record(self, phase: str) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append((phase, event))


def build_timer(device: torch.device) -> PhaseTimer:
    return CudaTimer() if device.type == "cuda" else PhaseTimer()


class StartupTimer:
    """Times the phases from the start of this process to its first optimizer step."""

    def __init__(self) -> None:
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")
        self._last = time.perf_counter() - age
        self._seconds: dict[str, float] = {}
        self.lap("imports")  # and the interpreter before them

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[phase] = now - self._last
        self._last = now

    def after_step(self, record: Callable[[Mapping[str, float], int], None], step: int) -> bool:
        """Record `startup/<phase>_seconds` and their sum behind the first step, and return True; later do nothing."""
        if "first_step" in self._seconds:
            return False
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        self.lap("first_step")
        total = sum(self._seconds.values())
        seconds = {f"startup/{phase}_seconds": value for phase, value in self._seconds.items()}
        record(seconds | {"startup/total_seconds": total}, step)
        parts = ", ".join(f"{phase.replace('_', ' ')} {value:.1f}" for phase, value in self._seconds.items())
        logger.info("first step %.1f s after the start of the process: %s", total, parts)
        return True
