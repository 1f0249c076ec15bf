"""Named times: every second belongs to one phase."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from pipeline.base.timing import PHASES, CudaTimer, PhaseTimer, StartupTimer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time.perf_counter gives; a test sets its only element."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def row(**milliseconds: float) -> list[float]:
    return [milliseconds.get(phase, 0.0) for phase in PHASES]


def test_the_time_between_two_laps_belongs_to_the_phase_that_ended(clock: list[float]) -> None:
    timer = PhaseTimer()
    timer.start()
    for _ in range(2):
        timer.begin_step()
        for phase, seconds in (("data", 1.0), ("forward", 2.0), ("update", 0.5), ("data", 0.25)):
            clock[0] += seconds
            timer.lap(phase)
    times = timer.read()
    assert times.seconds == 7.5
    assert list(times.milliseconds) == row(data=1250, forward=2000, update=500)


def test_what_lies_before_start_belongs_to_no_phase_and_reading_forgets(clock: list[float]) -> None:
    timer = PhaseTimer()
    timer.start()
    timer.begin_step()
    clock[0] += 50
    timer.start()  # an evaluation took 50 s
    clock[0] += 1
    timer.lap("backward")
    assert timer.read().seconds == 1
    assert timer.read().seconds == 0


class PassedEvent:
    """A CUDA event that the GPU passes as soon as it is recorded, by the clock of the test."""

    def __init__(self, *, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: PassedEvent) -> float:
        return 1e3 * (later.at - self.at)


def test_on_a_gpu_one_step_after_each_reading_is_timed_by_events(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", PassedEvent)
    timer = CudaTimer()
    timer.start()
    for seconds in (1.0, 5.0, 7.0):  # the first is the sample
        timer.begin_step()
        for phase in ("data", "graph"):
            clock[0] += seconds
            timer.lap(phase)
    times = timer.read()
    assert list(times.milliseconds) == row(data=1000, graph=1000)
    assert times.seconds == 26  # the host counts all
    timer.begin_step()
    clock[0] += 3
    timer.lap("graph")
    timer.start()  # cut off by an evaluation
    timer.begin_step()
    clock[0] += 2
    timer.lap("graph")
    timer.begin_step()
    assert list(timer.read().milliseconds) == row(graph=2000)


class Points(dict[str, float]):
    def metrics(self, values: Mapping[str, float], step: int) -> None:
        assert not self.keys() & values.keys()
        self.update(values)


def test_the_first_step_is_recorded_once_with_all_that_went_before(clock: list[float]) -> None:
    startup, points = StartupTimer(), Points()
    for phase in ("config", "data"):
        clock[0] += 2
        startup.lap(phase)
    clock[0] += 1
    for step in (1, 2):
        assert startup.after_step(points.metrics, step) == (step == 1)
        clock[0] += 10
    assert [points[f"startup/{phase}_seconds"] for phase in ("config", "data", "first_step")] == [2, 2, 1]
    phases = sum(value for name, value in points.items() if name != "startup/total_seconds")
    assert points["startup/total_seconds"] == pytest.approx(phases)


def test_the_imports_are_counted_from_the_start_of_the_process() -> None:
    code = "import time; time.sleep(1); import pipeline.base.timing as s; print(s.StartupTimer()._seconds['imports'])"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 1.0 < float(done.stdout) < time.monotonic() - began + 0.02
