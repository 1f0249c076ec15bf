"""slurm/train.sbatch on a real Slurm: one node or many, and whatever ends a job early, with nothing lost."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.trainings import differences, records, settings_of, state, train_forked
from tests.slurm.cluster import Cluster, poll
from tests.tracking.history import find_runs, recorded_history, stored_history

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "slurm" / "train.sbatch")
PATIENCE = 240.0
"""Seconds for whatever a job is waited for; its start alone takes some 20 on a machine that is busy."""
ENVIRONMENT = {"CONVOY_ROOT": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
SHORT = ("train.reproducible=true",)
LONG = (*SHORT, "train.epochs=80", "checkpoint.every_steps=10", "checkpoint.keep=2")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("short"), *SHORT)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("long"), *LONG)


def undisturbed(folder: Path, *settings: str) -> Path:
    """The same training in one process."""
    end = train_forked(folder, 1, *settings)
    assert end.failure is None, end.failure
    return folder


def submit(cluster: Cluster, folder: Path, options: tuple[str, ...], *settings: str, **environment: str) -> str:
    """The run is `folder`/run, and so are the store and the logs in `folder`."""
    tracking = ("tracking.enabled=true", f"tracking.uri=sqlite:///{folder}/mlflow.db")
    arguments = settings_of(folder, *tracking, *settings)
    return cluster.submit(*options, TRAIN, *arguments, cwd=folder, env=ENVIRONMENT | environment)


def log(folder: Path, job: str) -> str:
    path = folder / "logs" / f"slurm-{job}.log"
    return path.read_text() if path.exists() else "no log"


def wait_for_end(cluster: Cluster, folder: Path, job: str) -> None:
    state = cluster.wait_for(job, "COMPLETED", "FAILED", timeout=PATIENCE)
    assert state == "COMPLETED", log(folder, job)


def wait_for_progress(cluster: Cluster, folder: Path, job: str, restarts: int) -> None:
    """Until the attempt after so many requeues has saved twice."""

    def has_come_further() -> bool:
        now, begun = state(folder), f"{job}-{restarts}"
        assert now.get("state") != "finished", "it was over before it was disturbed"
        return now.get("launch_id") == begun and now["global_step"] > now["began_at_step"] + 10

    poll(has_come_further, PATIENCE, lambda: f"{state(folder)}\n{log(folder, job)}")


def wait_for_requeue(cluster: Cluster, folder: Path, job: str, restarts: int) -> None:
    poll(lambda: cluster.restarts(job) == restarts, PATIENCE, lambda: log(folder, job))


def assert_nothing_lost(folder: Path, reference: Path) -> None:
    """One MLflow run, that has every point once, and weights and history of the training that was never disturbed."""
    from mlflow import MlflowClient

    assert differences(folder, reference) == []
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (run,) = find_runs(client, folder / "run")
    assert run.info.status == "FINISHED"
    assert stored_history(client, run.info.run_id) == recorded_history(folder / "run")


def world_sizes(folder: Path) -> list[str]:
    """Of the attempts, in their order."""
    tags: list[dict[str, Any]] = [record["values"] for record in records(folder) if record["kind"] == "tags"]
    return [str(value) for values in tags for key, value in values.items() if key.endswith("world_size")]


def test_two_nodes_of_two_ranks_end_with_the_weights_of_one_process(
    empty_cluster: Cluster, tmp_path: Path, short: Path
) -> None:
    job = submit(empty_cluster, tmp_path, ("--nodes=2", "--cpus-per-task=2"), *SHORT)
    wait_for_end(empty_cluster, tmp_path, job)
    assert world_sizes(tmp_path) == ["4"]
    assert_nothing_lost(tmp_path, short)


def test_two_jobs_of_two_ranks_at_once_on_one_node_do_not_meet(
    empty_cluster: Cluster, tmp_path: Path, short: Path
) -> None:
    """With GPUs that torch does not see, which is said."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    options = ("--nodelist=n1", "--cpus-per-task=2", "--gpus-per-node=1")
    jobs = [submit(empty_cluster, folder, options, *SHORT) for folder in folders]
    for job in jobs:
        empty_cluster.wait_for(job, "RUNNING", timeout=PATIENCE)
    assert [empty_cluster.state(job) for job in jobs] == ["RUNNING", "RUNNING"]
    for job, folder in zip(jobs, folders, strict=True):
        wait_for_end(empty_cluster, folder, job)
        assert world_sizes(folder) == ["2"]
        assert_nothing_lost(folder, short)
    assert [f"GPUs were granted ({gpu})" in log(folders[gpu], jobs[gpu]) for gpu in (0, 1)] == [True, True]


def test_a_warning_that_comes_with_the_last_step_requeues_nothing(
    empty_cluster: Cluster, tmp_path: Path, short: Path
) -> None:
    job = submit(empty_cluster, tmp_path, ("--nodes=4",), *SHORT, CONVOY_RANKS_PER_NODE="1")
    poll(lambda: state(tmp_path).get("state") == "finished", PATIENCE, lambda: log(tmp_path, job))
    empty_cluster.run("scancel", "--signal=USR1", "--batch", job)
    wait_for_end(empty_cluster, tmp_path, job)
    assert "warned that the end is near" in log(tmp_path, job)
    assert empty_cluster.restarts(job) == 0
    assert world_sizes(tmp_path) == ["4"]
    assert_nothing_lost(tmp_path, short)


def test_a_wrong_config_fails_with_2_and_is_not_requeued(empty_cluster: Cluster, tmp_path: Path) -> None:
    job = submit(empty_cluster, tmp_path, ("--nodes=2",), "optim.lr=-1")
    empty_cluster.wait_for(job, "FAILED", timeout=PATIENCE)
    assert (empty_cluster.exit_code(job), empty_cluster.restarts(job)) == (2, 0)
    assert "optim.lr = -1" in log(tmp_path, job)
    assert not (tmp_path / "run").exists()


def test_whatever_ends_it_early_it_goes_on_by_itself(empty_cluster: Cluster, tmp_path: Path, long: Path) -> None:
    """Warned; preempted; requeued; and its node dead, after which there is only one left."""
    cluster = empty_cluster
    job = submit(cluster, tmp_path, ("--nodes=2", "--exclude=n3,n4"), *LONG, CONVOY_RANKS_PER_NODE="1")

    def warn() -> None:
        cluster.run("scancel", "--signal=USR1", "--batch", job)

    def preempt() -> None:
        cluster.submit("--partition=high", "--nodes=2", "--nodelist=n1,n2", "--exclusive", "--wrap=true", cwd=tmp_path)

    def requeue() -> None:
        cluster.run("scontrol", "requeue", job)

    def lose_node() -> None:
        cluster.fail_node("n2")

    for restarts, disturb in enumerate((warn, preempt, requeue, lose_node)):
        wait_for_progress(cluster, tmp_path, job, restarts)
        disturb()
        wait_for_requeue(cluster, tmp_path, job, restarts + 1)
    cluster.run("scontrol", "update", f"jobid={job}", "numnodes=1-1", "numtasks=1")
    wait_for_end(cluster, tmp_path, job)
    cluster.restore_node("n2")
    assert world_sizes(tmp_path) == ["2", "2", "2", "2", "1"]
    assert "stopped early and saved: requeueing" in log(tmp_path, job)
    assert_nothing_lost(tmp_path, long)


def test_elements_of_an_array_share_a_node_and_are_stopped_alone(
    empty_cluster: Cluster, tmp_path: Path, long: Path
) -> None:
    """One is warned, which has the number of the array; the other is cancelled, and goes on when it is asked to."""
    cluster, script = empty_cluster, tmp_path / "element.sh"
    script.write_text(
        '#!/bin/bash\nroot=$CONVOY_ROOT\nsource "$root/slurm/train.sbatch" "$@" run.dir=$PWD/$SLURM_ARRAY_TASK_ID\n'
    )
    options = ("--array=0-1", "--nodelist=n1", "--requeue", "--open-mode=append", "--output=/dev/null")
    array = cluster.submit(*options, str(script), *settings_of(tmp_path, *LONG), cwd=tmp_path, env=ENVIRONMENT)
    first, last = f"{array}_0", f"{array}_1"
    folders = {first: tmp_path / "0", last: tmp_path / "1"}
    for job, folder in folders.items():
        wait_for_progress(cluster, folder, job, 0)
    assert {process.environ()["SLURMD_NODENAME"] for job in folders for process in cluster.job_processes(job)} == {"n1"}
    cluster.run("scancel", first)
    cluster.run("scancel", "--signal=USR1", "--batch", last)
    cluster.wait_for(first, "CANCELLED", timeout=PATIENCE)
    wait_for_end(cluster, folders[last], last)
    assert (cluster.restarts(first), cluster.restarts(last)) == (0, 1)
    assert differences(folders[last], long) == []
    assert state(folders[first])["state"] == "preempted"
    assert cluster.state(first) == "CANCELLED"
    again = cluster.submit(TRAIN, *settings_of(folders[first], *LONG), cwd=tmp_path, env=ENVIRONMENT)
    wait_for_end(cluster, tmp_path, again)
    assert differences(folders[first], long) == []
