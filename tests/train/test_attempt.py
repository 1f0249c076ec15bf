"""One attempt at a run: what it claims first, what it leaves at its end, and what it forces to the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import DataConfig
from pipeline.data.build import list_dataset
from pipeline.data.samples import DataError, Dataset, PixelSamples
from pipeline.models.bundle import Bundle
from pipeline.parallel.rank import Rank
from pipeline.run.folder import RunFolder
from tests.base.disk import Event, record_disk
from tests.faults.trainings import records, settings_of, state, train_as_rank
from tests.ranks import RankFailed, run_ranks
from tests.train.helpers import config_of
from tests.train.test_resume import run
from train import main
from train.attempt import attempt
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


def test_a_source_whose_classes_have_other_names_is_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, at_step=5, to=(0,), world_size=1)
    monkeypatch.setattr(main, "list_dataset", renamed_classes)
    with pytest.raises(RankFailed, match=r"is another training: classes was"):
        run(tmp_path, world_size=1)


def renamed_classes(config: DataConfig, seed: int) -> Dataset:
    listed = list_dataset(config, seed)
    return replace(listed, classes=tuple(f"other {name}" for name in listed.classes))


def test_numbers_written_in_another_way_are_the_same_setting(tmp_path: Path) -> None:
    run(tmp_path, "model.arguments.dropout=0.10", at_step=5, to=(0,), world_size=1)
    run(tmp_path, "model.arguments.dropout=1e-1", world_size=1)
    assert state(tmp_path)["state"] == "finished"
