"""What counts as a call of tracking, when a cost is too high, and a tiny training through a fault."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tracking, tracking_runs
from benchmarks.programs import timed_tracking


class Clock:
    """Stands for `time` where calls are timed: it goes on only when somebody works."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def work(self, seconds: float) -> None:
        self.seconds += seconds

    def perf_counter(self) -> float:
        return self.seconds

    thread_time = perf_counter


@dataclass
class Journal:
    clock: Clock

    def metrics(self) -> str:
        self.clock.work(2.0)
        self.append()
        return "result"

    def append(self) -> None:
        self.clock.work(3.0)


@dataclass
class Trainer:
    journal: Journal

    def train_epoch(self) -> None:
        assert self.journal.metrics() == "result"
        self.journal.append()
        self.journal.clock.work(10.0)

    def evaluate(self) -> None:
        self.journal.metrics()
        self.journal.clock.work(20.0)


def test_calls_count_within_the_loop_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timed_tracking, "time", clock)
    log, journal = timed_tracking.CallLog(), Journal(clock)
    trainer = Trainer(journal)
    for name in ("train_epoch", "evaluate"):
        monkeypatch.setattr(Trainer, name, log.wrap_loop(getattr(Trainer, name)))
    for name in ("metrics", "append"):
        monkeypatch.setattr(Journal, name, log.wrap(getattr(Journal, name), name))
    journal.metrics()  # outside of the loop
    trainer.train_epoch()
    trainer.evaluate()
    summary = log.summary()
    assert {name: each["calls"] for name, each in summary.items()} == {"metrics": 2, "append": 1}
    assert (summary["metrics"]["longest_seconds"], summary["metrics"]["seconds"]) == (5.0, 10.0)
    assert summary["append"]["seconds"] == 3.0
    assert log.loop_seconds == 18.0 + 25.0


def run_of(seconds: float, longest: float, differences: list[str] | None = None) -> dict[str, Any]:
    calls = {"metrics": {"calls": 100, "seconds": seconds, "longest_seconds": longest}}
    run = {"condition": "refused", "loop_seconds": 10.0, "steps": 100, "calls": calls, "points": 1300}
    return run | {"differences": differences or []}


def test_the_median_share_and_every_longest_call_keep_their_limits_and_every_run_arrives() -> None:
    within = run_of(0.1, 0.010)
    assert tracking_runs.find_excesses([within, within, run_of(0.5, 0.020)]) == []
    (share,) = tracking_runs.find_excesses([within, run_of(0.3, 0.010), run_of(0.3, 0.010)])
    assert "3.00%" in share and "limit 2%" in share
    (longest,) = tracking_runs.find_excesses([within, within, run_of(0.1, 0.5)])
    assert longest == "too long: refused has a call of 0.500 s, limit 0.020"
    forced = run_of(0.1, 0.005)
    forced["calls"]["sync"] = {"calls": 1, "seconds": 0.05, "longest_seconds": 0.05}  # as long as the disk has it
    assert tracking_runs.find_excesses([forced]) == []
    (line,) = tracking_runs.find_excesses([within, within, run_of(0.1, 0.010, ["2 runs in MLflow"])])
    assert line == "refused: 2 runs in MLflow"


def test_the_table_says_what_did_not_arrive() -> None:
    lines = tracking_runs.tabulate([run_of(0.1, 0.01), run_of(0.1, 0.01, ["train/loss: ..."])]).splitlines()
    assert lines[-1].startswith("| refuses connections | 1.00% (1.00% to 1.00%) | 10.0 (10.0 to 10.0) | 0.0 ")
    assert lines[-1].endswith("| not as recorded: 1 of 2 |")


@pytest.mark.faults
def test_a_training_with_its_server_down_gives_all_figures_and_is_synced(tmp_path: Path) -> None:
    arguments = ["--steps=60", "--batch=4", "--checkpoint-every=20", "--conditions=down"]
    options = tracking.read_options(arguments)
    with ExitStack() as stack:
        run = tracking.run_once(options, "down", tracking.start_server(options, tmp_path, stack), tmp_path / "down")
    assert run["steps"] == 60
    assert run["differences"] == []
    # a record behind each step, and the times of the saves and of the epoch
    assert run["calls"]["metrics"]["calls"] >= 60
    assert run["calls"]["sync"]["calls"] == 4  # and behind the evaluation
    assert run["calls"]["update_status"]["calls"] == 4
    assert run["calls"]["predictions"]["calls"] == 1
    assert 0 < tracking_runs.share_of(run) < 1
    assert run["points"] > 60 * 10
