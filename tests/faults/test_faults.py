"""A short selection of the campaign: `python -m tests.faults` runs all of it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.faults import rounds
from tests.faults.__main__ import KINDS
from tests.faults.inject import Fault
from tests.faults.rounds import Context
from tests.faults.trainings import differences, train_forked

SHORT = {
    "kill_ranks": 3,
    "kill_in_save": 4,
    "kill_launcher": 1,
    "stop_by_signal": 5,
    "resume_within_an_epoch": 1,
    "damage_checkpoint": 40,
    "fill_disk": 1,
    "damage_dataset": 2,
    "compute_nan": 2,
    "sleep_on_one_rank": 1,
    "load_malicious": 10,
}
"""Rounds by kind."""


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(tmp_path_factory.mktemp("references"))


@pytest.mark.parametrize("kind", SHORT)
def test_nothing_is_lost(context: Context, tmp_path: Path, kind: str) -> None:
    if kind == "fill_disk" and os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    for index in range(SHORT[kind]):
        context.next_operation = 3 + 29 * index  # of the saves that kill_in_save breaks off
        folder = tmp_path / str(index)
        folder.mkdir()
        assert KINDS[kind].round(context, folder, random.Random(f"test {kind} {index}")) == []


def test_the_campaign_sees_what_is_lost(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that forgets its optimizer in a checkpoint ends with other weights, and one resumed too late skips."""
    from train.trainer import Trainer

    state = Trainer.state

    def forgetful(self: Trainer) -> object:
        whole = state(self)
        whole.update["optimizer"]["state"].clear()
        return whole

    monkeypatch.setattr(Trainer, "state", forgetful)
    train_forked(tmp_path, 1, fault=Fault("kill", "step", 8, (0,)))
    assert train_forked(tmp_path, 1).failure is None
    monkeypatch.undo()
    assert differences(tmp_path, context.reference(1)) == ["weights of final", "weights of best", "history"]


def test_a_checkpoint_that_no_manifest_covers_would_be_noticed(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.checkpoint._verify", lambda path: None)
    lost = []
    for index in range(40):
        folder = tmp_path / str(index)
        folder.mkdir()
        lost += rounds.damage_checkpoint(context, folder, random.Random(f"unverified {index}"))
    assert lost
