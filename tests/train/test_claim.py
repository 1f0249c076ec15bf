"""A run folder is held by one training, from before anything in it is read."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import ExitStack
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from pipeline.base.launch import Launch
from pipeline.run.folder import RunError, RunFolder
from tests.faults.trainings import ROOT, settings_of
from tests.ranks import run_ranks
from tests.train.helpers import config_of
from train.attempt import claim
from train.attempt.claim import Invocation, claim_run

NUM_RACES = 200
FORK = multiprocessing.get_context("fork")


def call(folder: Path, *settings: str) -> Invocation:
    return Invocation(config_of(*settings_of(folder, *settings)), "default", Launch(), ROOT)


def _claim(folder: Path, *settings: str) -> str:
    """The error, or nothing for a claim that was given up again."""
    try:
        with ExitStack() as stack:
            claim_run(call(folder, *settings), stack).give_up()
    except RunError as error:
        return str(error)
    return ""


def _claim_of_another(folder: Path) -> str:
    """What `_claim` returns in a process of its own."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: sender.send(_claim(folder)))
    process.start()
    process.join(60)
    return str(receiver.recv())


@pytest.mark.parametrize("exists", [False, True])
def test_whoever_comes_while_a_folder_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    if exists:
        (tmp_path / "run").mkdir()
    load_state, others = claim.load_state, []

    def meanwhile(*arguments: object) -> object:
        others.append(_claim_of_another(tmp_path))
        return load_state(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(claim, "load_state", meanwhile)
    with ExitStack() as stack:
        claim_run(call(tmp_path), stack)
    (refused,) = others
    assert f"run run is being trained right now by process {os.getpid()} on " in refused


def _race(folder: Path, barrier: Barrier, name: str) -> None:
    for number in range(NUM_RACES):
        barrier.wait(60)
        with ExitStack() as stack:
            try:
                claimed = claim_run(call(folder, f"run.name=race-{number}"), stack)
            except RunError:
                barrier.wait(60)
                continue
            (claimed.folder.path / f"held-by-{name}").touch()
            barrier.wait(60)


def test_of_two_that_start_at_once_one_holds_the_run(tmp_path: Path) -> None:
    barrier = FORK.Barrier(2)
    processes = [FORK.Process(target=_race, args=(tmp_path, barrier, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    held = [[path.name for path in (tmp_path / f"race-{i}").glob("held-by-*")] for i in range(NUM_RACES)]
    assert all(len(holders) == 1 for holders in held)


def test_who_waits_for_a_folder_that_is_given_up_gets_a_new_one(tmp_path: Path) -> None:
    """Not the lock of a file that has no name any more, which a third one would not see."""
    assert run_ranks(1, _wait_for_one_that_is_given_up, tmp_path) == [True]


def _wait_for_one_that_is_given_up(rank: object, folder: Path) -> bool:
    patient = Invocation(call(folder).config, "default", Launch(is_restart=True), ROOT)
    started, ended = FORK.Event(), FORK.Event()

    def hold() -> None:
        with ExitStack() as stack:
            first = claim_run(call(folder), stack)
            started.set()
            ended.wait(1.0)
            first.give_up()

    process = FORK.Process(target=hold)
    process.start()
    started.wait(60)
    with ExitStack() as stack:
        claim_run(patient, stack)
        process.join(60)
        return "is being trained right now" in _claim_of_another(folder)


@pytest.mark.parametrize(("settings", "reason"), [(("run.resume=must",), "there is no usable checkpoint")])
def test_a_new_run_that_is_refused_leaves_nothing(tmp_path: Path, settings: tuple[str, ...], reason: str) -> None:
    assert reason in _claim(tmp_path / "runs", *settings)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_that_was_there_stays_as_it_was(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / "notes.txt").write_text("mine")
    assert "there is no usable checkpoint" in _claim(tmp_path, "run.resume=must")
    assert (folder.path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["run", "null"])
def test_a_new_run_that_is_given_up_leaves_nothing(tmp_path: Path, name: str) -> None:
    assert _claim(tmp_path / "runs", f"run.name={name}") == ""
    assert list(tmp_path.iterdir()) == []
