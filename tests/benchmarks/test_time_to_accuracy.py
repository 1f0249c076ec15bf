"""What is run for each seed, what its journal gives, and what the seeds amount to."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import time_to_accuracy
from benchmarks.harness import BenchmarkError
from benchmarks.time_to_accuracy import SeedRun, Summary
from pipeline.config import load_config, parse_command_line
from pipeline.run.journal import Journal, read_journal
from pipeline.run.records import Record

ROOT = Path(__file__).parents[2]


def runs(*accuracies: float) -> list[SeedRun]:
    return [SeedRun(seed, accuracy, 2.0 + seed, 10.0 + seed, 0.0) for seed, accuracy in enumerate(accuracies)]


def journal_records(
    path: Path, epoch_seconds: Sequence[float], accuracies: Sequence[float], epochs: int
) -> list[Record]:
    """Return the records as a training writes them."""
    journal = Journal(path)
    journal.append({"kind": "params", "values": {"train.epochs": epochs}})
    for step, seconds in enumerate(epoch_seconds, 1):
        journal.metrics({"train/accuracy": 1.0, "perf/epoch_seconds": seconds}, step)
    for step, accuracy in enumerate(accuracies, 1):
        journal.metrics({"eval/accuracy": accuracy}, step)
    journal.close()
    return read_journal(path)[0]


def test_seconds_are_those_of_all_epochs_and_accuracy_is_that_of_the_last(tmp_path: Path) -> None:
    records = journal_records(tmp_path / "journal.jsonl", [3.0, 2.0, 2.5], [0.97, 0.993, 0.991], epochs=3)
    run = time_to_accuracy.read_run(records, seed=4, wall_seconds=11.0, cpu_by_others=0.1)
    assert run == SeedRun(seed=4, accuracy=0.991, training_seconds=7.5, wall_seconds=11.0, cpu_by_others=0.1)


@pytest.mark.parametrize(("epoch_seconds", "accuracies"), [([3.0], [0.97, 0.99]), ([3.0, 2.0], [0.97]), ([], [])])
def test_a_training_that_is_not_whole_is_no_result(
    tmp_path: Path, epoch_seconds: Sequence[float], accuracies: Sequence[float]
) -> None:
    records = journal_records(tmp_path / "journal.jsonl", epoch_seconds, accuracies, epochs=2)
    with pytest.raises(BenchmarkError, match="seed 0: of 2 epochs"):
        time_to_accuracy.read_run(records, seed=0, wall_seconds=1.0, cpu_by_others=0.0)


def test_a_summary_has_the_standard_deviation_of_a_sample() -> None:
    assert Summary.of([1.0, 2.0, 6.0]) == Summary(mean=3.0, std=7**0.5, minimum=1.0, maximum=6.0)
    assert Summary.of([2.0]).std is None


@pytest.mark.parametrize(
    ("accuracies", "reached"),
    [([0.98, 1.0], True), ([0.989, 0.9908, 0.9901], False), ([0.9899], False), ([0.9847, 0.9953], True)],
)
def test_the_mean_has_to_reach_the_target(accuracies: Sequence[float], reached: bool) -> None:
    assert time_to_accuracy.reaches_target(runs(*accuracies), 0.99) == reached
    assert ("reaches 99.00%" if reached else "misses 99.00%") in time_to_accuracy.verdict(runs(*accuracies), 0.99)


def test_a_mean_just_below_the_target_does_not_read_like_it() -> None:
    below = runs(0.9899, 0.9900)
    assert "98.995%, misses 99.00%" in time_to_accuracy.verdict(below, 0.99)
    assert "98.995%" in time_to_accuracy.table(below)


def test_the_table_has_a_row_for_each_seed_and_for_what_they_amount_to() -> None:
    lines = time_to_accuracy.table(runs(0.99, 0.992)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2:] == [
        ["0", "99.000%", "2.000", "10.0", "0%"],
        ["1", "99.200%", "3.000", "11.0", "0%"],
        ["mean", "99.100%", "2.500", "10.5", "0%"],
        ["standard deviation", "0.141%", "0.707", "0.7", "0%"],
        ["lowest", "99.000%", "2.000", "10.0", "0%"],
        ["highest", "99.200%", "3.000", "11.0", "0%"],
    ]


def test_one_rank_is_started_without_a_launcher_and_more_by_torchrun(tmp_path: Path) -> None:
    alone = time_to_accuracy.training_command(time_to_accuracy.read_options(["--ranks", "1"]), 3, tmp_path)
    assert alone[:2] == [sys.executable, str(ROOT / "train" / "main.py")]
    several = time_to_accuracy.training_command(time_to_accuracy.read_options(["--ranks", "3"]), 3, tmp_path)
    assert "--nproc_per_node=3" in several
    assert several[several.index(alone[1]) :] == alone[1:]


def test_the_seed_and_the_settings_given_arrive_in_the_training(tmp_path: Path) -> None:
    options = time_to_accuracy.read_options(["optim.lr=0.25", "--seeds", "2", "data.root=elsewhere", "--ranks", "1"])
    configs = []
    for seed in options.seeds:
        arguments = time_to_accuracy.training_command(options, seed, tmp_path)[2:]
        configs.append(load_config(parse_command_line(arguments), []))
    assert [config.run.seed for config in configs] == [0, 1]
    assert len({config.run.name for config in configs}) == 2
    for config in configs:
        assert (config.optim.lr, config.data.root, config.run.dir) == (0.25, "elsewhere", str(tmp_path))
        assert not config.tracking.enabled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds and --ranks from 1"),
        (["--ranks", "0"], "--seeds and --ranks from 1"),
        (["--target", "99"], "above 0, up to 1"),
        (["optim.lr"], "accepted: key=value"),
        (["run.seed=3"], "run.seed is set here for each seed"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        time_to_accuracy.read_options(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("target", "exit_code"), [("0.985", 0), ("0.99", 1)])
def test_the_exit_code_and_the_stored_result_say_whether_the_target_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str, exit_code: int
) -> None:
    monkeypatch.setattr(
        time_to_accuracy, "train_seed", lambda options, seed: SeedRun(seed, 0.98 + seed / 100, 2.0, 9.0, 0.0)
    )
    out = tmp_path / "results" / "time"
    assert time_to_accuracy.main(["--seeds", "2", "--target", target, "--out", str(out)]) == exit_code

    stored = json.loads(out.with_suffix(".json").read_text())
    assert stored["reached"] == (exit_code == 0)
    assert stored["accuracy"]["mean"] == pytest.approx(0.985)
    assert stored["training_seconds"] == {"mean": 2.0, "std": 0.0, "minimum": 2.0, "maximum": 2.0}
    assert [run["seed"] for run in stored["runs"]] == [0, 1]
    assert out.with_suffix(".md").read_text().strip() in capsys.readouterr().out


def test_a_training_that_fails_ends_the_measurement_with_its_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "time"
    assert time_to_accuracy.main(["--ranks", "1", "--seeds", "2", "--out", str(out), "train.epoch=1"]) == 1
    assert "did you mean train.epochs" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
