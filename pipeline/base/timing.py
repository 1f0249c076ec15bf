"""Named times of the phases of a step, always on: a clock reading at each boundary and no more."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Protocol

import torch

logger = logging.getLogger("convoy")

PHASES = ("data", "host_to_device", "forward", "backward", "communication", "update", "graph", "other")
"""In the order of a step. `communication` is what of it is not hidden behind `backward`, waiting for other ranks
included; `graph` is all from `data` to `update` where that is replayed as one; `other` is the loop's book-keeping."""


class PhaseTimer(Protocol):
    @property
    def last(self) -> float:
        """When the last lap was, on a clock of its own."""

    def start(self) -> None:
        """Begin to count; what lies between the last lap and now belongs to no phase."""

    def begin_step(self) -> None:
        """A new optimizer step begins here."""

    def lap(self, phase: str) -> None:
        """The time since the last lap (or start) was spent in `phase`."""

    def read(self) -> PhaseTimes:
        """Since the last reading, which is forgotten."""


@dataclass(frozen=True)
class PhaseTimes:
    """Of one rank."""

    seconds: float
    """On the clock of the host, all phases together."""
    milliseconds: tuple[float, ...]
    """Per optimizer step, by PHASES."""


class HostTimer:
    """For devices that compute while the call lasts: every step is timed, at 0.1 microseconds a lap."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._num_steps = 0
        self._last = 0.0

    @property
    def last(self) -> float:
        return self._last

    def start(self) -> None:
        self._last = time.perf_counter()

    def begin_step(self) -> None:
        self._num_steps += 1

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[phase] += now - self._last
        self._last = now

    def read(self) -> PhaseTimes:
        seconds = [self._seconds[phase] for phase in PHASES]
        milliseconds = tuple(1e3 * value / max(1, self._num_steps) for value in seconds)
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._num_steps = 0
        return PhaseTimes(sum(seconds), milliseconds)


class CudaTimer:
    """For GPUs, where a call returns before its work is done: the first step after each reading is timed by events.

    Events of the other steps would cost more than their phases where a step takes 100 microseconds. An event is read
    only when the GPU has passed it, so that reading never waits, and gives the last step that was timed to its end; no
    time at all before there is one.
    """

    def __init__(self) -> None:
        self._host = HostTimer()
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._sampled = (0.0,) * len(PHASES)
        self._state = "idle"  # -> sampling -> complete, until read

    @property
    def last(self) -> float:
        return self._host.last

    def start(self) -> None:
        self._host.start()
        if self._state == "sampling":  # an evaluation or a save has cut the step off
            self._state, self._events = "idle", []

    def begin_step(self) -> None:
        self._host.begin_step()
        if self._state == "idle":
            self._state = "sampling"
            self._record("begin")
        elif self._state == "sampling":
            self._state = "complete"

    def lap(self, phase: str) -> None:
        self._host.lap(phase)
        if self._state == "sampling":
            self._record(phase)

    def read(self) -> PhaseTimes:
        if self._state == "complete" and self._events[-1][1].query():  # type: ignore[no-untyped-call]
            totals = dict.fromkeys(PHASES, 0.0)
            for (_, before), (phase, event) in zip(self._events, self._events[1:], strict=False):
                totals[phase] += before.elapsed_time(event)
            self._sampled = tuple(totals[phase] for phase in PHASES)
            self._state, self._events = "idle", []
        host = self._host.read()
        return PhaseTimes(host.seconds, self._sampled)

    def _record(self, phase: str) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append((phase, event))


def build_timer(device: torch.device) -> PhaseTimer:
    return CudaTimer() if device.type == "cuda" else HostTimer()
