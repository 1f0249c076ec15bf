"""Whose time a call inside another is, what counts of it, and when a cost is too high."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import overhead
from benchmarks.harness import clean_environment, parse_result, run_command, torchrun
from benchmarks.programs import timed_convoy
from benchmarks.programs.timed_convoy import LABELS, Call, LoopClock, NoTimer, listing, replay, time_timer
from pipeline.base.timing import PhaseTimer


class Clock:
    """Stands for `time` where calls are timed: it goes on only when somebody works."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def work(self, seconds: float) -> None:
        self.seconds += seconds

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timed_convoy, "time", clock)
    return clock


def test_a_call_inside_another_is_counted_once_as_its_own(time: Clock) -> None:
    clock = LoopClock()
    inner = clock.wrap(lambda: time.work(5.0), "inner")

    def call_twice() -> str:
        time.work(2.0)
        inner()
        inner()
        return "result"

    outer = clock.wrap(call_twice, "outer")
    outer()  # outside of the loop nothing counts
    with clock.loop():
        assert outer() == "result"
        time.work(1.0)
    inner()
    assert clock.calls == {"outer": 1, "inner": 2}
    assert clock.seconds == {"outer": 2.0, "inner": 10.0}
    assert clock.loop_seconds == 13.0


def test_a_call_that_counts_within_another_alone_belongs_elsewhere_to_its_caller(time: Clock) -> None:
    clock = LoopClock()
    wait = clock.wrap(lambda: time.work(2.0), "wait", within="record")
    record, vote = clock.wrap(wait, "record"), clock.wrap(wait, "vote")
    with clock.loop():
        wait()
        record()
        vote()
    assert clock.calls == {"record": 1, "wait": 1, "vote": 1}
    assert clock.seconds == {"record": 0.0, "wait": 2.0, "vote": 2.0}


def test_a_garbage_collection_is_counted_and_not_as_the_call_in_which_it_happens() -> None:
    clock, objects = LoopClock(), [list[object]() for _ in range(200_000)]  # what a collection visits
    collect = clock.wrap(gc.collect, "call")
    gc.callbacks.append(clock.collecting)
    try:
        collect()  # outside of the loop nothing counts
        with clock.loop():
            collect()
    finally:
        gc.callbacks.remove(clock.collecting)
    assert clock.calls == {"call": 1, "collection": 1}
    assert clock.seconds["collection"] > 10 * clock.seconds["call"]
    assert len(objects) == 200_000


def test_the_calls_of_a_timer_are_written_down_while_counting_and_still_made() -> None:
    calls: list[Call] = []
    timer, counting = PhaseTimer(), [False]
    with listing(PhaseTimer, calls, lambda: counting[0]):
        timer.start()
        timer.lap("data")
        counting[0] = True
        timer.begin_step()
        timer.lap("forward")
    timer.lap("forward")
    assert calls == [("begin_step", ()), ("lap", ("forward",))]
    assert timer.read().milliseconds[2] > 0


def test_a_timer_costs_more_than_none() -> None:
    calls: list[Call] = [("start", ()), *[("begin_step", ()), ("lap", ("data",)), ("read", ())] * 2000]
    assert replay(calls, NoTimer()) > 0
    assert time_timer(calls, torch.device("cpu")) > 0


def run_of(loop_seconds: float = 10.0, **seconds: float) -> dict[str, Any]:
    """Return a run of which what is not given cost nothing, as it had no calls."""
    calls = {label: 100 if label in seconds else 0 for label in LABELS}
    return {"loop_seconds": loop_seconds, "steps": 100, "seconds": dict.fromkeys(LABELS, 0.0) | seconds, "calls": calls}


def excesses_of(*runs: dict[str, Any]) -> list[str]:
    return overhead.find_excesses(overhead.find_shares("calls", {overhead.USUAL: runs}))


def test_the_labels_of_the_costs_are_those_that_are_timed() -> None:
    assert {label for cost in overhead.COSTS for label in cost.labels} == {*LABELS} - {"collection"}


def test_the_median_has_to_keep_the_limit() -> None:
    within, over = run_of(journal=0.1, reduction=0.05, records=0.04), run_of(journal=0.1, reduction=0.1, records=0.04)
    assert excesses_of(within, within, over) == []
    (line,) = excesses_of(within, over, over)
    assert "tracking" in line and "2.40%" in line and "limit 2%" in line
    (line,) = excesses_of(run_of(save=0.4, state=0.2))
    assert "checkpoint" in line and "6.00%" in line


def test_the_table_has_the_parts_and_the_time_of_a_call() -> None:
    runs = {overhead.USUAL: [run_of(journal=0.1, timers=0.001)]}
    lines = overhead.tabulate("calls", runs, overhead.find_shares("calls", runs)).splitlines()
    assert "| records and tracking | 1.00% | 2% | 1,000.0 |  |  |" in lines
    assert "| - tracking: writing the journal | 1.00% |  | 1,000.0 | 100 | 1,000.0 |" in lines
    assert "| timers | 0.01% | 1% | 10.0 | 100 | 10.0 |" in lines
    assert "| - writing it | 0.00% |  | 0.0 |  |  |" in lines


def test_by_difference_a_cost_is_what_the_loop_is_shorter_without_it_in_the_same_round() -> None:
    runs = {
        overhead.USUAL: [run_of(10.0), run_of(20.0), run_of(10.0)],
        "records and tracking": [run_of(9.9), run_of(19.8), run_of(5.0)],
        "checkpoints": [run_of(9.0), run_of(18.0), run_of(10.0)],
    }
    shares = overhead.find_shares("difference", runs)
    assert {cost.name: of for cost, of in shares.items()} == {
        "records and tracking": pytest.approx([0.01, 0.01, 0.5]),
        "checkpoints": pytest.approx([0.1, 0.1, 0.0]),
    }
    (line,) = overhead.find_excesses(shares)
    assert "checkpoints takes 10.00%" in line
    lines = overhead.tabulate("difference", runs, shares).splitlines()
    assert "| records and tracking | 1.00% (1.00% to 50.00%) | 2% | 2,000.0 |  |  |" in lines


def test_collections_are_shown_with_and_without_the_freeze() -> None:
    runs = {overhead.USUAL: [run_of()], overhead.UNFROZEN: [run_of(collection=0.01)]}
    lines = overhead.tabulate_collections(runs).splitlines()
    assert lines[2:] == [
        "| as it is | 0.000% | 0.0 |  |  |",
        "| without gc.freeze() | 0.100% | 100.0 | 100 | 100.0 |",
    ]


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
    assert run["seconds"].keys() == run["calls"].keys() == {*LABELS}
    # each step's record is begun behind it, and read behind the next, before a save, or at the end of the epoch
    assert run["calls"]["reduction"] == run["calls"]["arrival"] == run["calls"]["display"] == 4
    assert run["calls"]["save"] == run["calls"]["state"] == 2
    # 4 records, 2 saves, the time of the epoch
    assert run["calls"]["journal"] == 7
    timed = {label: seconds for label, seconds in run["seconds"].items() if label != "collection"}
    assert all(0 < seconds < run["loop_seconds"] for seconds in timed.values())
    assert sum(run["seconds"].values()) < run["loop_seconds"]


def test_what_is_switched_off_costs_nothing(tmp_path: Path) -> None:
    options = overhead.read_options(["--ranks=1", "--steps=4", "--batch=2", "--checkpoint-every=2", "--device=cpu"])
    off = [setting for cost in overhead.COSTS for setting in cost.off]
    arguments = ["--without-freeze", *overhead.settings_of(options, str(tmp_path)), *off]
    command = torchrun(["-m", "benchmarks.programs.timed_convoy", *arguments], 1)
    run = parse_result(run_command(command, environment=clean_environment(os.environ), timeout=200).output)
    assert run["calls"]["save"] == run["calls"]["state"] == 0
    assert run["calls"]["reduction"] == 1  # of the last step


def test_by_difference_each_round_trains_without_each_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {overhead.USUAL: 10.0, overhead.UNFROZEN: 10.1, "records and tracking": 9.9, "checkpoints": 9.0}
    monkeypatch.setattr(overhead, "run_once", lambda options, way: run_of(seconds[way], collection=0.01))
    out = tmp_path / "overhead"
    assert overhead.main(["--rounds=2", "--device=cpu", "--by=difference", f"--out={out}"]) == 1
    said = capsys.readouterr()
    assert said.err == "too much: checkpoints takes 10.00% (10.00% to 10.00%) of the loop, limit 5%\n"
    assert "| without gc.freeze() | 0.099% (0.099% to 0.099%) |" in said.out
    stored = json.loads(out.with_suffix(".json").read_text())
    assert {way: len(runs) for way, runs in stored["runs"].items()} == dict.fromkeys(seconds, 2)
    assert stored["costs"]["records and tracking"] == {"limit": 0.02, "shares": [pytest.approx(0.01)] * 2}
