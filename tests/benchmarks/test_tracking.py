"""What counts as a call of tracking, when a cost is too high, and a tiny training through a fault."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tracking
from benchmarks.programs.timed_tracking import CallLog


class Journal:
    def metrics(self) -> str:
        time.sleep(0.02)
        self.append_all()
        return "result"

    def append_all(self) -> None:
        time.sleep(0.03)


class Trainer:
    def __init__(self, journal: Journal):
        self.journal = journal

    def train_epoch(self) -> None:
        assert self.journal.metrics() == "result"
        self.journal.append_all()
        time.sleep(0.01)


def test_calls_count_within_the_loop_and_once() -> None:
    log, journal = CallLog(), Journal()
    trainer = Trainer(journal)
    log.time_loop(trainer, "train_epoch")
    for name in ("metrics", "append_all"):
        log.time_calls(journal, name)
    journal.metrics()  # outside of the loop
    trainer.train_epoch()
    summary = log.summary()
    assert {name: each["calls"] for name, each in summary.items()} == {"metrics": 1, "append_all": 1}
    assert summary["metrics"]["longest_seconds"] >= 0.05 > summary["append_all"]["longest_seconds"] >= 0.03
    assert log.loop_seconds >= sum(each["seconds"] for each in summary.values()) + 0.01


def run_of(seconds: float, longest: float, differences: list[str] | None = None) -> dict[str, Any]:
    calls = {"metrics": {"calls": 100, "seconds": seconds, "longest_seconds": longest}}
    run = {"condition": "refused", "loop_seconds": 10.0, "steps": 100, "calls": calls, "points": 1300}
    return run | {"differences": differences or []}


def test_medians_have_to_keep_the_limits_and_every_run_has_to_arrive() -> None:
    within = run_of(0.1, 0.010)
    assert tracking.find_excesses([within, within, run_of(0.5, 0.5)]) == []
    share, longest = tracking.find_excesses([within, run_of(0.3, 0.1), run_of(0.3, 0.1)])
    assert "3.00%" in share and "limit 2%" in share
    assert "0.100" in longest and "limit 0.020" in longest
    (line,) = tracking.find_excesses([within, within, run_of(0.1, 0.010, ["2 runs in MLflow"])])
    assert line == "refused: 2 runs in MLflow"


def test_the_table_says_what_did_not_arrive() -> None:
    lines = tracking.tabulate([run_of(0.1, 0.01), run_of(0.1, 0.01, ["train/loss: ..."])]).splitlines()
    assert lines[-1].startswith("| refuses connections | 1.00% (1.00% to 1.00%) | 10.0 (10.0 to 10.0) | 1,000 ")
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
    assert run["calls"]["sync"]["calls"] == 3
    assert 0 < tracking.share_of(run) < 1
    assert run["points"] > 60 * 10
