"""What a training gives up on, what it saves besides, and what it refuses to go on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.run.folder import RunError, RunFolder
from pipeline.run.resume import check_same_training
from tests.faults.inject import Fault
from tests.faults.trainings import history, state, train_forked
from tests.train.helpers import config_of


def test_gradients_that_stay_infinite_end_the_training_on_all_ranks_with_the_weights_of_before(tmp_path: Path) -> None:
    end = train_forked(tmp_path, 2, "optim.name=sgd", "optim.lr=1e30", "train.max_nonfinite=5")
    assert end.failure is not None
    assert "the gradients of " in end.failure
    assert "train.max_nonfinite = 5" in end.failure
    assert state(tmp_path)["state"] == "failed"
    skipped = [value for key, _, value in history(tmp_path) if key == "train/skipped_steps"]
    assert skipped[-1] >= 5


def test_a_run_that_fails_again_and_again_without_a_new_checkpoint_is_given_up(tmp_path: Path) -> None:
    fault = Fault("kill", "step", 1, (0,))
    for _ in range(3):
        assert train_forked(tmp_path, 1, "run.max_attempts=3", fault=fault).failure == "rank 0 died without a word"
    end = train_forked(tmp_path, 1, "run.max_attempts=3")
    assert "run run has ended 3 times in a row without a new checkpoint" in str(end.failure)
    assert train_forked(tmp_path, 1, "run.max_attempts=4").failure is None


def test_attempts_that_come_further_or_were_asked_to_stop_do_not_count(tmp_path: Path) -> None:
    for _ in range(3):
        train_forked(tmp_path, 1, "run.max_attempts=1", fault=Fault("kill", "step", 5, (0,)))
    stopped = train_forked(tmp_path, 1, "run.max_attempts=1", fault=Fault("SIGTERM", "step", 1, (0,)))
    assert stopped.failure is None
    assert train_forked(tmp_path, 1, "run.max_attempts=1").failure is None


def test_a_checkpoint_is_saved_by_the_clock_too(tmp_path: Path) -> None:
    settings = ("checkpoint.every_steps=null", "checkpoint.keep=100")
    assert train_forked(tmp_path / "steps", 2, *settings).failure is None
    assert train_forked(tmp_path / "clock", 2, *settings, "checkpoint.every_minutes=0.00001").failure is None
    saved = [len(list((tmp_path / name / "run" / "checkpoints").glob("step-*"))) for name in ("steps", "clock")]
    assert saved[0] == 2  # the ends of the epochs
    assert saved[1] > 4


@pytest.mark.parametrize(
    ("saved", "digest", "message"),
    [
        ({"model.name": "lenet_5x5"}, "same", "model.name was lenet_5x5, is convnet"),
        ({"data.mean": [0.5]}, "same", "data.mean was [0.5], is null"),
        ({}, "other", "digits has other images or labels (digest other, now same)"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    tmp_path: Path, saved: dict[str, object], digest: str, message: str
) -> None:
    config, folder = config_of(), RunFolder(tmp_path / "run")
    check_same_training(folder, config, config.flat(), "same", "same")
    with pytest.raises(RunError) as error:
        check_same_training(folder, config, config.flat() | saved, digest, "same")
    assert message in str(error.value)


def test_threads_matter_to_a_reproducible_run_only(tmp_path: Path) -> None:
    folder, saved = RunFolder(tmp_path / "run"), config_of("train.reproducible=true").flat()
    check_same_training(folder, config_of("train.threads=2"), config_of().flat(), "", "")
    with pytest.raises(RunError, match=r"train\.threads was null, is 2"):
        check_same_training(folder, config_of("train.reproducible=true", "train.threads=2"), saved, "", "")


def without_a_value(channels: int, image_size: int, num_classes: int) -> torch.nn.Module:
    linear = torch.nn.Linear(channels * image_size**2, num_classes)
    torch.nn.init.constant_(linear.weight, torch.nan)
    return torch.nn.Sequential(torch.nn.Flatten(), linear)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_training_none_of_whose_steps_changed_the_weights_has_failed(tmp_path: Path, world_size: int) -> None:
    settings = (f"model.name={__name__}:without_a_value", "loss=cross_entropy", "data.global_batch_size=203")
    end = train_forked(tmp_path, world_size, *settings)
    assert "the gradients of all 2 steps were not finite" in str(end.failure)
    assert state(tmp_path)["state"] == "failed"
