"""One attempt at a run: what it claims first, what it leaves at its end, and what it forces to the disk."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.base.launch import Launch
from pipeline.config.schema import DataConfig
from pipeline.data.build import list_dataset
from pipeline.data.samples import DataError, Dataset, PixelSamples
from pipeline.models.bundle import Bundle
from pipeline.parallel.rank import Rank
from pipeline.run.folder import RunFolder
from tests.base.disk import Event, record_disk
from tests.faults.trainings import ROOT, STEPS_PER_EPOCH, records, settings_of, state, train_as_rank
from tests.ranks import RankFailed, run_ranks
from tests.train.helpers import config_of
from tests.train.test_resume import run
from train import main
from train.attempt import attempt
from train.attempt.claim import Invocation
from train.attempt.finish import evaluate_test_split
from train.output import FolderOutput, Outcome
from train.trainer import Trainer

WITH_TEST = ("data.arguments.test_size=30", "train.epochs=2")


def values(folder: Path, key: str) -> list[tuple[int, float]]:
    return [(r["step"], r["value"]) for r in records(folder) if r["kind"] == "metric" and r["key"] == key]


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_test_split_is_evaluated_once_at_the_end_with_the_best_weights(tmp_path: Path, world_size: int) -> None:
    run(tmp_path, *WITH_TEST, world_size=world_size)
    accuracies = values(tmp_path, "eval/accuracy")
    best_step = max(accuracies, key=lambda point: (point[1], -point[0]))[0]
    config = config_of(*settings_of(tmp_path, *WITH_TEST))
    test = list_dataset(config.data, config.run.seed).test
    assert isinstance(test, PixelSamples) and len(test) == 30
    model = Bundle.open(tmp_path / "run" / "model").load("best")
    with torch.no_grad():
        output = model(test.pixels.float())
    ((step, accuracy),) = values(tmp_path, "test/accuracy")
    ((_, loss),) = values(tmp_path, "test/loss")
    assert step == best_step
    assert accuracy == pytest.approx(float((output.argmax(1) == test.labels).float().mean()))
    assert loss == pytest.approx(float(torch.nn.functional.nll_loss(output, test.labels)), rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_request_to_stop_while_the_test_split_is_evaluated_is_heard_and_the_next_attempt_evaluates_it(
    tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_meanwhile(output: FolderOutput | None, trainer: Trainer) -> list[str] | None:
        if trainer.rank.is_main:
            trainer.stop.ask("the test")
        return evaluate_test_split(output, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(attempt, "evaluate_test_split", stop_meanwhile)
        run(tmp_path, *WITH_TEST, world_size=world_size)
    assert RunFolder(tmp_path / "run").status()["state"] == "preempted"
    assert values(tmp_path, "test/accuracy") == []
    run(tmp_path, *WITH_TEST, world_size=world_size)
    assert RunFolder(tmp_path / "run").status()["state"] == "finished"
    run(tmp_path / "undisturbed", *WITH_TEST, world_size=world_size)
    assert values(tmp_path, "test/accuracy") == values(tmp_path / "undisturbed", "test/accuracy")


def test_a_request_to_stop_is_heard_in_the_evaluation_of_a_run_that_has_nothing_left_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_once(self: Trainer) -> Outcome:
        if self.last_evaluation is None and self.position.epoch == self.config.epochs:
            self.stop.ask("the test")
        return fit(self)

    fit = Trainer.fit
    with monkeypatch.context() as patch:
        patch.setattr(attempt, "write_results", no_data)  # fails after the last epoch
        with pytest.raises(RankFailed, match="the data were asked for"):
            run(tmp_path, "train.epochs=1", world_size=1)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", stop_at_once)
        run(tmp_path, "train.epochs=1", world_size=1)
    assert RunFolder(tmp_path / "run").status()["state"] == "preempted"
    run(tmp_path, "train.epochs=1", world_size=1)
    assert RunFolder(tmp_path / "run").status()["state"] == "finished"


def test_a_run_without_a_test_split_has_no_test_metrics(tmp_path: Path) -> None:
    run(tmp_path, "train.epochs=1", world_size=1)
    assert values(tmp_path, "test/accuracy") == []


def no_data(*_: object) -> None:
    raise DataError("the data were asked for")


def test_a_finished_run_is_left_before_its_data_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, "train.epochs=1", world_size=1)
    monkeypatch.setattr(main, "load_dataset", no_data)
    run(tmp_path, "train.epochs=1", world_size=1)


def test_another_training_is_refused_before_its_data_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, "train.epochs=1", world_size=1)
    monkeypatch.setattr(main, "load_dataset", no_data)
    with pytest.raises(RankFailed, match=r"run\.seed was 0, is 1"):
        run(tmp_path, "train.epochs=1", "run.seed=1", world_size=1)


def test_a_run_whose_data_cannot_be_had_leaves_no_folder_and_an_older_one_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(main, "load_dataset", no_data)
        with pytest.raises(RankFailed, match="the data were asked for"):
            run(tmp_path, world_size=2)
        assert list(tmp_path.iterdir()) == []
    run(tmp_path, "train.epochs=1", world_size=1)
    before = state(tmp_path)
    monkeypatch.setattr(main, "load_dataset", no_data)
    with pytest.raises(RankFailed, match="the data were asked for"):
        run(tmp_path, "train.epochs=2", world_size=1)
    assert state(tmp_path) == before


def test_what_a_resume_needs_is_forced_to_the_disk_before_it_gets_its_name(tmp_path: Path) -> None:
    """Else a power failure behind the rename could leave it empty."""
    (events,) = run_ranks(1, _recorded_events, settings_of(tmp_path, "train.epochs=1"))
    places = {"config.yaml": "run", "status.json": "run", "model.json": "model", "samples.npz": "evaluation"}
    for name, folder in places.items():
        temporary = f".writing-{name}"
        renamed = events.index(("rename", temporary, name))
        assert [event for event in events[:renamed] if event[:2] == ("fsync", temporary) and event[2] != 0]
        assert ("fsync", folder, 0) in events[renamed:]


def _recorded_events(rank: Rank, settings: tuple[str, ...]) -> list[Event]:
    with pytest.MonkeyPatch.context() as patch:
        events = record_disk(patch)
        train_as_rank(rank, settings)
    return events


def test_a_source_that_fails_on_one_rank_ends_all_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "list_dataset", fail_on_rank_1)
    with pytest.raises(RankFailed, match="only here"):
        run(tmp_path, world_size=2)
    assert list(tmp_path.iterdir()) == []


def fail_on_rank_1(config: DataConfig, seed: int) -> Dataset:
    if torch.distributed.get_rank() == 1:
        raise OSError("only here")
    return list_dataset(config, seed)


@pytest.mark.parametrize("setting", ["data.mean=[0.1]", "data.arguments.classes=9"])
def test_a_resumed_run_keeps_what_its_model_was_made_for(tmp_path: Path, setting: str) -> None:
    run(tmp_path, "data.mean=[0.5]", "data.std=[0.5]", at_step=5, to=(0,), world_size=1)
    with pytest.raises(RankFailed, match="is another training"):
        run(tmp_path, "data.mean=[0.5]", "data.std=[0.5]", setting, world_size=1)


@pytest.mark.parametrize(("field", "value"), [("classes", tuple("abcdefghij")), ("mean", (0.25,)), ("std", (0.75,))])
def test_a_source_of_other_classes_or_another_normalisation_is_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: Any
) -> None:
    run(tmp_path, at_step=5, to=(0,), world_size=1)
    changed = {field: value}
    monkeypatch.setattr(main, "list_dataset", lambda config, seed: replace(list_dataset(config, seed), **changed))
    with pytest.raises(RankFailed, match=f"is another training: {field} was"):
        run(tmp_path, world_size=1)


def test_numbers_written_in_another_way_are_the_same_setting(tmp_path: Path) -> None:
    run(tmp_path, "model.arguments.dropout=0.10", at_step=5, to=(0,), world_size=1)
    run(tmp_path, "model.arguments.dropout=1e-1", world_size=1)
    assert state(tmp_path)["state"] == "finished"


BY_LOSS = ("checkpoint.metric=eval/loss", "train.epochs=2")


def _die_at_the_second_best(self: FolderOutput, weights: Mapping[str, torch.Tensor], step: int) -> bool:
    if self.bundle.step_of("best") is not None:
        os._exit(9)
    return save_best(self, weights, step)


save_best = FolderOutput.save_best


def logged_model(folder: Path) -> tuple[int, str]:
    return [(record["step"], record["sha256"]) for record in records(folder) if record["kind"] == "model"][-1]


@pytest.mark.parametrize("trains_on", [False, True])
def test_best_weights_that_a_kill_kept_from_being_written_are_written_by_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trains_on: bool
) -> None:
    settings = (*BY_LOSS, *(("train.epochs=4", "optim.lr=1e-12") if trains_on else ()))
    with monkeypatch.context() as patch:
        patch.setattr(FolderOutput, "save_best", _die_at_the_second_best)
        with pytest.raises(RankFailed):
            run(tmp_path, *BY_LOSS, world_size=1)
    run(tmp_path, *settings, world_size=1)
    run(tmp_path / "undisturbed", *BY_LOSS, world_size=1)
    ours, theirs = (Bundle.open(folder / "run" / "model") for folder in (tmp_path, tmp_path / "undisturbed"))
    assert ours.step_of("best") == theirs.step_of("best") == 2 * STEPS_PER_EPOCH
    assert all(torch.equal(ours.load_weights("best")[key], value) for key, value in theirs.load_weights("best").items())
    assert logged_model(tmp_path) == logged_model(tmp_path / "undisturbed")


@pytest.mark.parametrize("kept", [0, 1])
def test_best_weights_that_somebody_removed_are_restored_or_count_no_more(tmp_path: Path, kept: int) -> None:
    """From the checkpoint of that step, if it is kept."""
    settings = (*BY_LOSS, "train.epochs=1", f"checkpoint.keep_best={kept}", "checkpoint.keep=1")
    run(tmp_path, *settings, world_size=1)
    best = Bundle.open(tmp_path / "run" / "model")
    before = best.load_weights("best")
    worse = ("train.epochs=3", "optim.lr=0.5")
    best.path("best").unlink()
    with pytest.raises(RankFailed):  # behind some steps that make it worse
        run(tmp_path, *settings, *worse, world_size=1, at_step=STEPS_PER_EPOCH + 5, send=signal.SIGKILL, to=(0,))
    if kept:
        assert all(torch.equal(value, before[key]) for key, value in best.load_weights("best").items())
    best.path("best").unlink(missing_ok=True)
    run(tmp_path, *settings, *worse, world_size=1)
    assert best.step_of("best") == logged_model(tmp_path)[0]


@pytest.mark.parametrize("emptied", [False, True])
def test_a_journal_that_was_lost_beside_its_checkpoints_is_told_and_recorded(tmp_path: Path, emptied: bool) -> None:
    run(tmp_path, "train.epochs=1", world_size=1)
    journal = tmp_path / "run" / "journal.jsonl"
    journal.write_bytes(b"") if emptied else journal.unlink()
    run(tmp_path, "train.epochs=2", world_size=1)
    tags = {key: value for r in records(tmp_path) if r["kind"] == "tags" for key, value in r["values"].items()}
    assert tags["journal"] == f"lost up to step {STEPS_PER_EPOCH}"
    (step,) = (step for step, _ in values(tmp_path, "eval/accuracy"))
    assert step == 2 * STEPS_PER_EPOCH


def test_a_stop_is_recorded_when_the_metrics_of_all_nodes_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close_late(self: attempt.Attempt) -> None:
        if self.rank.rank == 1:
            time.sleep(1.0)
            (tmp_path / "closed").touch()

    end = FolderOutput.end

    def end_behind(self: FolderOutput, *how: Any) -> None:
        assert (tmp_path / "closed").exists()
        end(self, *how)

    monkeypatch.setattr(attempt.Attempt, "close_monitor", close_late)
    monkeypatch.setattr(FolderOutput, "end", end_behind)
    run(tmp_path, at_step=5)


@pytest.mark.parametrize(
    ("outcome", "seconds"), [("finished", 99.0), ("preempted", attempt.PREEMPTED_TIMEOUT), (None, 99.0)]
)
def test_who_asks_to_stop_need_not_wait_for_all_to_be_published(tmp_path: Path, outcome: Any, seconds: float) -> None:
    waited: list[float] = []
    publisher: Any = SimpleNamespace(wait=lambda limit: waited.insert(0, limit))
    call = Invocation(config_of("tracking.close_timeout=99"), "default", Launch(), ROOT)
    nothing: Any = None
    output = FolderOutput(RunFolder(tmp_path), nothing, nothing, nothing)
    attempt.Attempt(call, nothing, tmp_path, False, None, output, outcome=outcome, publisher=publisher).close()
    assert waited == [seconds]


def test_the_wrong_predictions_that_are_shown_are_the_most_confident(tmp_path: Path) -> None:
    run(tmp_path, "train.epochs=1", world_size=1)
    shown = np.load(tmp_path / "run" / "evaluation" / f"step-{STEPS_PER_EPOCH:08d}.npz")["wrong_confidence"]
    assert len(shown) > 1
    assert (np.diff(shown) <= 0).all()
