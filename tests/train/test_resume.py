"""A training that is stopped or killed and run again ends with the bits of one that never was."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.order import Batch
from pipeline.models.bundle import Bundle
from pipeline.parallel.rank import Rank
from tests.faults.trainings import history, settings_of, state, train_as_rank
from tests.ranks import RankFailed, run_ranks
from train.steps.eager import EagerStep
from train.steps.parts import Step


def run(
    folder: Path,
    *settings: str,
    world_size: int = 2,
    at_step: int | None = None,
    send: signal.Signals = signal.SIGUSR1,
    to: tuple[int, ...] = (1,),
    step: type = EagerStep,
) -> None:
    """Train in `folder`/run; before `at_step`, executed by `step`, the ranks `to` send themselves a signal."""
    run_ranks(
        world_size, _train, settings_of(folder, "checkpoint.every_steps=null", *settings), at_step, send, to, step
    )


def _train(
    rank: Rank, settings: tuple[str, ...], at_step: int | None, send: signal.Signals, to: tuple[int, ...], step: Any
) -> None:
    if at_step is not None and rank.rank in to:
        step.__call__ = _with_signal(step.__call__, at_step, send)
    train_as_rank(rank, settings)


def _with_signal(step: Callable[..., torch.Tensor], at_step: int, send: signal.Signals) -> Any:
    def call(self: Step, batch: Batch, number: int) -> torch.Tensor:
        if number == at_step:
            os.kill(os.getpid(), send)
        return step(self, batch, number)

    return call


def weights(folder: Path, which: str = "final") -> dict[str, torch.Tensor]:
    return Bundle.open(folder / "run" / "model").load_weights(which)


def content(folder: Path) -> dict[Path, bytes]:
    """All files of the run but its lock, which names the last process that held it."""
    files = (path for path in (folder / "run").rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.suffix != ".lock"}


def assert_same_run(folder: Path, reference: Path) -> None:
    for name in ("final", "best"):
        ours, theirs = weights(folder, name), weights(reference, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert history(folder) == history(reference)
    assert state(folder)["state"] == "finished"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder)
    assert [step for key, step, _ in history(folder) if key == "train/loss"] == [4, 8, 12, 16, 20, 24, 26]
    assert [step for key, step, _ in history(folder) if key == "eval/accuracy"] == [13, 26]
    return folder


@pytest.mark.parametrize(
    "stops",
    [(12,), (5,), (17,), (2, 6, 9), (1, 12, 14, 25)],
    ids=["after_the_first_epoch", "mid_epoch", "mid_second_epoch", "thrice_in_one_epoch", "four_times"],
)
def test_a_training_asked_to_stop_and_run_again_ends_with_the_same_bits_and_history(
    tmp_path: Path, uninterrupted: Path, stops: tuple[int, ...]
) -> None:
    for at_step in stops:
        run(tmp_path, at_step=at_step)
        if at_step < 25:
            assert state(tmp_path)["state"] == "preempted"
            assert not (tmp_path / "run" / "model" / "final.safetensors").exists()
    run(tmp_path)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("killed", [(0,), (1,), (0, 1)], ids=["rank_0", "rank_1", "all"])
@pytest.mark.parametrize("at_step", [3, 11, 20])
def test_a_training_killed_and_run_again_ends_with_the_same_bits_and_history(
    tmp_path: Path, uninterrupted: Path, killed: tuple[int, ...], at_step: int
) -> None:
    with pytest.raises(RankFailed):
        run(tmp_path, "checkpoint.every_steps=7", at_step=at_step, send=signal.SIGKILL, to=killed)
    run(tmp_path, "checkpoint.every_steps=7")
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    "settings",
    [
        ("train.accumulate=3",),
        ("optim.name=sgd", "optim.momentum=0.9"),
        ("optim.name=adadelta",),
        ("optim.name=rmsprop",),
    ],
    ids=["accumulation", "sgd", "adadelta", "rmsprop"],
)
def test_resuming_is_exact_with_accumulation_and_every_kind_of_optimizer_state(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    run(tmp_path / "one_go", *settings)
    run(tmp_path / "two", *settings, at_step=6)
    run(tmp_path / "two", *settings)
    assert_same_run(tmp_path / "two", tmp_path / "one_go")


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_resuming_is_exact_on_any_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    run(tmp_path / "one_go", world_size=world_size)
    for at_step in (2, 7, 17):
        run(tmp_path / "many", world_size=world_size, at_step=at_step, to=(world_size - 1,))
    run(tmp_path / "many", world_size=world_size)
    assert_same_run(tmp_path / "many", tmp_path / "one_go")


def test_resuming_on_another_number_of_ranks_goes_on_with_the_same_training(tmp_path: Path) -> None:
    exact = ("train.precision=fp64", "model.arguments.dropout=0", "model.arguments.dropout2d=0")
    run(tmp_path / "one", *exact, world_size=1)
    for world_size, at_step in ((4, 3), (2, 8), (1, 15), (3, None)):
        to = (world_size - 1,)
        run(tmp_path / "many", *exact, world_size=world_size, at_step=at_step, to=to)
    ours, theirs = weights(tmp_path / "many"), weights(tmp_path / "one")
    assert max((ours[key] - theirs[key]).abs().max() for key in theirs) < 1e-9
    for (key, step, value), (key_, step_, value_) in zip(
        history(tmp_path / "many"), history(tmp_path / "one"), strict=True
    ):
        assert (key, step) == (key_, step_)
        assert value == pytest.approx(value_, abs=1e-9)


def test_a_finished_run_is_left_as_it_is_and_goes_on_when_epochs_grew(tmp_path: Path, uninterrupted: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    run(tmp_path)
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before
    run(tmp_path, "train.epochs=3")
    assert state(tmp_path)["epoch"] == 3
    assert state(tmp_path)["state"] == "finished"
    assert [step for key, step, _ in history(tmp_path) if key == "eval/accuracy"] == [13, 26, 39]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("run.seed=1", "run.seed was 0, is 1"),
        ("model.name=net_conv10_20 data.arguments.image_size=16", "model.name was convnet, is net_conv10_20"),
        ("data.global_batch_size=17", "data.global_batch_size was 16, is 17"),
        ("data.arguments.train_size=204", "data.arguments.train_size was 203, is 204"),
        ("run.resume=never", "holds a run already"),
    ],
)
def test_another_training_in_the_same_folder_is_refused_and_the_folder_untouched(
    tmp_path: Path, setting: str, message: str
) -> None:
    run(tmp_path, "train.epochs=1", world_size=1)
    before = content(tmp_path)
    with pytest.raises(RankFailed, match=message):
        run(tmp_path, *setting.split(), world_size=2)
    assert content(tmp_path) == before


def test_resume_must_needs_a_checkpoint_and_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="no usable checkpoint"):
        run(tmp_path, "run.resume=must")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, uninterrupted: Path) -> None:
    run(tmp_path, at_step=17)
    latest = max((tmp_path / "run" / "checkpoints").iterdir())
    data = bytearray((latest / "model.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (latest / "model.pt").write_bytes(data)
    run(tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_a_setting_that_may_change_is_recorded_when_it_does(tmp_path: Path) -> None:
    run(tmp_path, world_size=1, at_step=5, to=(0,))
    run(tmp_path, "optim.weight_decay=0.1", world_size=1)
    records = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    tags: dict[str, str] = {}
    for record in records:
        if record["kind"] == "tags":
            tags |= record["values"]
    assert tags["attempt.2.optim.weight_decay"] == "0.1"
    assert "attempt.2.host" in tags
