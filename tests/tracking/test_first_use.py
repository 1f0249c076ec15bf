"""The first use of an SQLite file: by several trainings at once, and by one that is killed in its middle."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.tracking.history import differences, find_runs, recorded_history, stored_history
from tests.tracking.recording import ROOT

pytestmark = pytest.mark.faults

NUM_TRAININGS = 3
OPEN = "import sys; from pipeline.tracking.store import open_store; open_store(sys.argv[1]).search_experiments()"
TINY = ("data.dataset=synthetic", "data.image_size=12", "data.synthetic_train_size=640", "data.synthetic_eval_size=64")
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


@pytest.mark.parametrize("seconds", [0.0, 0.7])
def test_a_file_whose_making_was_killed_is_made_again(tmp_path: Path, seconds: float) -> None:
    """So long after its first bytes; MLflow takes more than a second to make its tables."""
    command = [sys.executable, "-c", OPEN, f"sqlite:///{tmp_path / 'mlflow.db'}"]
    with subprocess.Popen(command, cwd=ROOT) as first:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in tmp_path.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(seconds)
        first.kill()
    assert first.returncode == -9
    assert subprocess.run(command, cwd=ROOT, timeout=100, check=False).returncode == 0
