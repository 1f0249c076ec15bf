"""kill -9 of the publisher, of rank 0 and of everything; `kill_campaign` does the same for as many runs as wanted."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.tracking.history import find_runs
from tests.tracking.kill_campaign import VICTIMS, Verdict, draw_kills, kill_and_resume
from tests.tracking.recording import ROOT, sync

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

NUM_RANKS = {0: 1, 1: 1, 2: 1, 3: 2}
"""Of the run with each seed."""
AT_ONCE = 2
"""Runs: each mostly waits, for its imports too."""
TINY = (
    "data.dataset=synthetic",
    "data.image_size=12",
    "data.arguments.train_size=64",
    "data.arguments.validation_size=64",
)


def test_every_run_of_a_campaign_loses_each_of_its_processes() -> None:
    for seed in NUM_RANKS:
        kills = draw_kills(seed)
        assert len(kills) == 5
        assert {kill.victim for kill in kills[:-1]} == set(VICTIMS)
        assert [kill.step for kill in kills] == sorted(kill.step for kill in kills)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Future[Verdict]]]:
    """Of all runs, which are killed meanwhile; each has a store of its own."""
    with ThreadPoolExecutor(AT_ONCE) as executor:
        yield {
            seed: executor.submit(kill_and_resume, tmp_path_factory.mktemp(f"seed-{seed}"), seed, ranks)
            for seed, ranks in NUM_RANKS.items()
        }


@pytest.mark.parametrize("seed", NUM_RANKS)
def test_a_run_killed_again_and_again_is_one_run_with_each_point_once(
    verdicts: dict[int, Future[Verdict]], seed: int
) -> None:
    verdict = verdicts[seed].result()
    assert verdict.faults == [], verdict
    assert verdict.attempts >= 3  # it was killed


def test_a_training_killed_between_its_last_two_words_is_finished_when_it_is_run_again(tmp_path: Path) -> None:
    """It says that it has finished in status.json and in the journal, and dies behind the first that it comes to."""
    script = tmp_path / "main_killed_at_its_end.py"
    script.write_text(
        f"""
import os, sys
sys.path[0] = {str(ROOT)!r}
from pipeline.run.folder import RunFolder
from pipeline.run.journal import Journal
from train.main import main

def dies_behind(function):
    def call(self, *arguments, **named):
        function(self, *arguments, **named)
        if "finished" in (*arguments, *named.values()):
            os.kill(os.getpid(), 9)
    return call

RunFolder.update_status = dies_behind(RunFolder.update_status)
Journal.status = dies_behind(Journal.status)
sys.exit(main())
"""
    )
    settings = (*TINY, "train.epochs=1", "run.name=run", "tracking.enabled=false")
    for path, exit_code in ((script, -signal.SIGKILL), (ROOT / "train" / "main.py", 0)):
        done = subprocess.run([sys.executable, str(path), *settings], cwd=tmp_path, timeout=100, check=False)
        assert done.returncode == exit_code
    run = tmp_path / "runs" / "run"
    assert sync(run).returncode == 0
    (found,) = find_runs(MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}"), run)
    assert found.info.status == "FINISHED"
