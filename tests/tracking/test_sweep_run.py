"""The MLflow run above those of a sweep."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.__main__ import main
from pipeline.parallel.rank import Rank
from pipeline.run.sweep import open_sweep_folder, read_sweep
from tests.faults.inject import Fault, inject
from tests.faults.trainings import SMALL, train_as_rank
from tests.ranks import RankFailed, run_ranks

ROOT = Path(__file__).parents[2]
FILE = "config: {root}/configs/default.yaml\ngrid:\n  optim.lr: [{rates}]\n"


class Sweep:
    def __init__(self, folder: Path):
        self.file = folder / "rates.yaml"
        self.folder = folder / "runs" / "rates"
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.write("0.01, 0.02")

    def write(self, rates: str) -> None:
        self.file.write_text(FILE.format(root=ROOT, rates=rates))
        open_sweep_folder(self.folder, read_sweep(self.file))

    def train(self, rate: str, fault: Fault | None = None) -> None:
        settings = (*SMALL, f"run.dir={self.folder}", f"run.name=lr-{rate}", f"optim.lr={rate}", "train.epochs=1")
        run_ranks(1, _train, settings, fault)

    def sync(self) -> None:
        """In a process of its own: this one forks ranks, and is to have no threads."""
        command = [sys.executable, "-m", "pipeline", "sync", str(self.folder), "--uri", self.uri]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def published(self) -> tuple[str, str, dict[str, str]]:
        """State and description of the parent, and states of its children by name."""
        client = MlflowClient(tracking_uri=self.uri)
        runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        (parent,) = [run for run in runs if run.info.run_name == "rates"]
        children = {
            run.info.run_name: run.info.status
            for run in runs
            if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
        }
        assert len(children) == len(runs) - 1
        return parent.info.status, parent.data.tags["mlflow.note.content"], children


def _train(rank: Rank, settings: tuple[str, ...], fault: Fault | None) -> None:
    if fault is not None:
        inject(fault, 0)
    train_as_rank(rank, settings)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


def test_it_has_the_state_of_its_runs_grows_with_its_file_and_is_made_again(sweep: Sweep) -> None:
    sweep.train("0.01")
    sweep.sync()
    one = {"rates/lr-0.01": "FINISHED"}
    state, note, children = sweep.published()
    assert (state, children) == ("FAILED", one)  # nobody is at work on the other
    assert "A sweep of 2 runs" in note
    client = MlflowClient(tracking_uri=sweep.uri)
    (child,) = client.search_runs(["1"], "tags.`mlflow.parentRunId` != ''")
    client.delete_run(child.data.tags["mlflow.parentRunId"])
    sweep.train("0.02")
    sweep.sync()
    two = one | {"rates/lr-0.02": "FINISHED"}
    assert sweep.published()[::2] == ("FINISHED", two)
    sweep.write("0.01, 0.02, 0.03")
    with pytest.raises(RankFailed):
        sweep.train("0.03", Fault("kill", "step", 5, (0,)))
    sweep.sync()
    state, note, children = sweep.published()
    assert (state, children) == ("FAILED", two | {"rates/lr-0.03": "FAILED"})
    assert "A sweep of 3 runs" in note
    assert "[0.01, 0.02, 0.03]" in note


def test_a_sweep_without_a_run_is_said_and_nothing_else_is_published(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sync", str(sweep.folder), "--uri", sweep.uri]) == 1
    assert "a sweep without a run yet" in capsys.readouterr().err
    assert main(["report", str(sweep.folder), "--out", str(sweep.file.with_name("page.html"))]) == 2
    assert not sweep.file.with_name("page.html").exists()
