"""Whose time a call inside another is, what counts of it, and when a cost is too high."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import overhead
from benchmarks.harness import clean_environment, parse_result, run_command, torchrun
from benchmarks.programs.timed_convoy import Call, LoopClock, NoTimer, log_timer, replay, time_timer
from pipeline.base.timing import HostTimer


class Nested:
    def outer(self) -> str:
        time.sleep(0.02)
        self.inner()
        self.inner()
        return "result"

    def inner(self) -> None:
        time.sleep(0.05)


def test_a_call_inside_another_is_counted_once_as_its_own() -> None:
    clock, nested = LoopClock(), Nested()
    clock.time_calls(nested, "outer", "outer")
    clock.time_calls(nested, "inner", "inner")
    nested.outer()  # outside of the loop nothing counts
    with clock.loop():
        assert nested.outer() == "result"
        time.sleep(0.01)
    nested.inner()
    assert clock.calls == {"outer": 1, "inner": 2}
    assert clock.seconds["inner"] >= 0.1
    assert 0.02 <= clock.seconds["outer"] < clock.seconds["inner"]
    assert clock.loop_seconds >= sum(clock.seconds.values()) + 0.01


def test_the_calls_of_a_timer_are_written_down_while_counting_and_still_made() -> None:
    calls: list[Call] = []
    timer, counting = HostTimer(), [False]
    log_timer(timer, calls, lambda: counting[0])
    timer.start()
    timer.lap("data")
    counting[0] = True
    timer.begin_step()
    time.sleep(0.01)
    timer.lap("forward")
    assert calls == [("begin_step", ()), ("lap", ("forward",))]
    assert timer.read().milliseconds[2] >= 10


def test_a_timer_costs_more_than_none() -> None:
    calls: list[Call] = [("start", ()), *[("begin_step", ()), ("lap", ("data",)), ("read", ())] * 2000]
    assert replay(calls, NoTimer()) > 0
    assert time_timer(calls, torch.device("cpu")) > 0


LABELS = {label for cost in overhead.COSTS for label in cost.labels}


def run_of(**seconds: float) -> dict[str, Any]:
    """Labels that are not given cost nothing, as they have no calls."""
    calls = {label: 100 if label in seconds else 0 for label in LABELS}
    return {"loop_seconds": 10.0, "steps": 100, "seconds": dict.fromkeys(LABELS, 0.0) | seconds, "calls": calls}


def test_the_median_has_to_keep_the_limit() -> None:
    within, over = run_of(journal=0.1, reduction=0.05, records=0.04), run_of(journal=0.1, reduction=0.1, records=0.04)
    assert overhead.find_excesses([within, within, over]) == []
    (line,) = overhead.find_excesses([within, over, over])
    assert "tracking" in line and "2.40%" in line and "limit 2%" in line
    (line,) = overhead.find_excesses([run_of(save=0.4, state=0.2)])
    assert "checkpoint" in line and "6.00%" in line


def test_the_table_has_the_parts_and_the_time_of_a_call() -> None:
    lines = overhead.tabulate([run_of(journal=0.1, timers=0.001)]).splitlines()
    assert "| records and tracking | 1.00% | 2% | 1,000.0 |  |  |" in lines
    assert "| - tracking: writing the journal | 1.00% |  | 1,000.0 | 100 | 1,000.0 |" in lines
    assert "| timers | 0.01% | 1% | 10.0 | 100 | 10.0 |" in lines
    assert "| - writing it | 0.00% |  | 0.0 |  |  |" in lines


def test_an_epoch_without_a_checkpoint_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.read_options(["--steps", "50"])
    assert "no checkpoint is due" in capsys.readouterr().err


def test_a_training_on_two_ranks_gives_all_figures(tmp_path: Path) -> None:
    options = overhead.read_options(["--steps=4", "--batch=2", "--checkpoint-every=2", "--log-every=1", "--device=cpu"])
    settings = overhead.settings_of(options, str(tmp_path))
    command = torchrun(["-m", "benchmarks.programs.timed_convoy", *settings], 2)
    done = run_command(command, environment=clean_environment(os.environ), timeout=200)
    run = parse_result(done.output)
    assert run["steps"] == 4
    assert run["seconds"].keys() == run["calls"].keys() == LABELS
    # each step's record is begun behind it, and read behind the next, before a save, or at the end of the epoch
    assert run["calls"]["reduction"] == run["calls"]["arrival"] == run["calls"]["display"] == 4
    assert run["calls"]["save"] == run["calls"]["state"] == 2
    # 4 records, 2 saves, the time of the epoch
    assert run["calls"]["journal"] == 7
    assert all(0 < seconds < run["loop_seconds"] for seconds in run["seconds"].values())
    assert sum(run["seconds"].values()) < run["loop_seconds"]
