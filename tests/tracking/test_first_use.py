"""The first use of an SQLite file: by several trainings at once, and by one that is killed in its middle."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.tracking.history import differences, find_runs, recorded_history, stored_history
from tests.tracking.recording import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

NUM_TRAININGS = 3
OPEN = "import sys; from pipeline.tracking.store import open_store; open_store(sys.argv[1]).search_experiments()"
TINY = (
    "data.dataset=synthetic",
    "data.image_size=12",
    "data.arguments.train_size=640",
    "data.arguments.validation_size=64",
)
FIGURES = {f"figures/{name}.png" for name in ("learning_curves", "confusion_matrix", "samples", "wrong", "filters")}


def test_three_trainings_started_at_once_on_a_new_file_are_three_complete_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train" / "main.py"), *TINY, "train.epochs=2", "train.threads=1"]
    started = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(NUM_TRAININGS)
    ]
    for training in started:
        output, _ = training.communicate(timeout=200)
        assert training.returncode == 0, output
        assert "look at the run" in output  # all was published
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == NUM_TRAININGS
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    for run in runs:
        assert_complete(client, run)


def assert_complete(client: MlflowClient, run: Path) -> None:
    (found,) = find_runs(client, run)
    assert found.info.status == "FINISHED"
    assert differences(recorded_history(run), stored_history(client, found.info.run_id)) == []
    assert found.data.params["data.dataset"] == "synthetic"
    assert {"host", "world_size"} <= found.data.tags.keys()
    assert {artifact.path for artifact in client.list_artifacts(found.info.run_id, "figures")} >= FIGURES
    models = client.search_logged_models([found.info.experiment_id])
    assert [model.status.name for model in models if model.source_run_id == found.info.run_id] == ["READY"]


KILLED_BEFORE = """
import os, sys
import sqlalchemy

num_statements, last = 0, int(sys.argv[2])

def count(*_):
    global num_statements
    num_statements += 1
    if num_statements > last:
        os.kill(os.getpid(), 9)

sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", count)
"""


@pytest.mark.parametrize("num_statements", [20, 500])
def test_a_file_whose_making_was_killed_is_made_again(tmp_path: Path, num_statements: int) -> None:
    """Behind so many statements of the database, of the more than a thousand in which MLflow makes its tables."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = [sys.executable, "-c", KILLED_BEFORE + OPEN, uri, str(num_statements)]
    assert subprocess.run(command, cwd=ROOT, timeout=100, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "mlflow.db").exists()
    assert [path for path in tmp_path.iterdir() if path.stat().st_size], "it was killed before it began"
    assert subprocess.run([sys.executable, "-c", OPEN, uri], cwd=ROOT, timeout=100, check=False).returncode == 0
