"""Where the time from the start of the process to its first step goes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

logger = logging.getLogger("convoy")


class Recorder(Protocol):
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...


class StartupTimer:
    """Where the seconds from the start of this process to its first optimizer step went."""

    def __init__(self) -> None:
        """What lies before is the interpreter and its imports."""
        self._began = self._last = time.perf_counter() - _process_age()
        self._seconds: dict[str, float] = {}
        self._done = False
        self.lap("imports")

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[phase] = now - self._last
        self._last = now

    def after_step(self, output: Recorder, step: int) -> None:
        """Behind the first step record `startup/<phase>_seconds` and their sum; later nothing."""
        if self._done:
            return
        self._done = True
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        self.lap("first_step")
        total = self._last - self._began
        output.metrics({f"startup/{phase}_seconds": s for phase, s in self._seconds.items()}, step)
        output.metrics({"startup/total_seconds": total}, step)
        parts = ", ".join(f"{phase.replace('_', ' ')} {seconds:.1f}" for phase, seconds in self._seconds.items())
        logger.info("first step %.1f s after the start of the process: %s", total, parts)


def _process_age() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0
