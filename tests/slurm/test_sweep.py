"""A sweep on a real Slurm: a job array, an element that fails, and what is missing again."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.faults.trainings import SMALL
from tests.slurm.cluster import Cluster
from tests.slurm.test_training import ENVIRONMENT, PATIENCE, ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
RATES = ("0.01", "0.02", "0.03", "0.04", "0.05", "0.06")


def pipeline(cluster: Cluster, folder: Path, *arguments: str) -> str:
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT), "CONVOY_RANKS_PER_NODE": "1"}
    return cluster.run(sys.executable, "-m", "pipeline", *arguments, cwd=folder, env=environment).stdout


def submit(cluster: Cluster, folder: Path) -> tuple[str, str]:
    """The command line and the job of the array, when it has been published."""
    output = pipeline(cluster, folder, "sweep", "rates.yaml", "--submit")
    (array, command), (sync, _) = re.findall(r"submitted as job (\d+): (.*)", output)
    cluster.wait_for(sync, "COMPLETED", timeout=PATIENCE)
    return command, array


def test_a_failed_element_stops_no_other_and_only_it_is_trained_again(empty_cluster: Cluster, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    settings = [setting for setting in SMALL if not setting.startswith(("optim.lr", "tracking.enabled"))]
    (tmp_path / "rates.yaml").write_text(
        f"config: {ROOT}/configs/default.yaml\nsettings:\n"
        + "".join(f"- {setting}\n" for setting in settings)
        + f"grid:\n  optim.lr: [{', '.join(RATES)}]\n"
    )
    runs = tmp_path / "runs" / "rates"
    runs.mkdir(parents=True)
    (runs / "lr-0.06").touch()  # where a folder should be
    command, array = submit(empty_cluster, tmp_path)
    assert "--array=0,1,2,3,4,5" in command
    assert empty_cluster.state(f"{array}_5") == "FAILED"
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")

    def published() -> tuple[str, dict[str, str]]:
        """Status of the parent, and of its children by name."""
        found = client.search_runs([e.experiment_id for e in client.search_experiments()])
        (parent,) = [run for run in found if run.info.run_name == "rates"]
        children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert len(children) == len(found) - 1
        return parent.info.status, {run.info.run_name: run.info.status for run in children}

    five = {f"rates/lr-{rate}": "FINISHED" for rate in RATES[:5]}
    assert published() == ("FAILED", five)
    pipeline(empty_cluster, tmp_path, "report", "runs/rates", "--out", "page.html")
    page = (tmp_path / "page.html").read_text()
    assert [rate for rate in RATES if f"lr-{rate}" in page] == list(RATES[:5])

    (runs / "lr-0.06").unlink()
    command, _ = submit(empty_cluster, tmp_path)
    assert "--array=5 " in command
    assert published() == ("FINISHED", five | {"rates/lr-0.06": "FINISHED"})
    assert "nothing is missing" in pipeline(empty_cluster, tmp_path, "sweep", "rates.yaml")
