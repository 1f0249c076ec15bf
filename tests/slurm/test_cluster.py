"""The cluster that the tests of the batch scripts run on: that it is one, and that nothing of it is left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster, poll, start_cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
FOR_EVER = "--wrap=sleep 1000"
KINDS = pytest.mark.parametrize("separate_networks", [False, True], ids=["shared network", "separate networks"])
STARTS_ONE_AND_HANGS = """\
import sys, time
from pathlib import Path
from tests.slurm.cluster import start_cluster
with start_cluster(Path(sys.argv[1]), nodes=1, separate_networks=sys.argv[2] == "True") as cluster:
    cluster.submit("--wrap=sleep 1000", cwd=Path("/"))
    print("started", flush=True)
    time.sleep(1000)
"""


def alive(processes: list[psutil.Process]) -> list[str]:
    return [str(process) for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def namespaces(pids: list[int]) -> set[str]:
    """In which the processes are that still exist."""
    found = set()
    for pid in pids:
        for kind in ("mnt", "net", "pid", "uts"):
            try:
                found.add(str(Path(f"/proc/{pid}/ns/{kind}").readlink()))
            except OSError:
                continue
    return found


def test_all_nodes_are_idle(empty_cluster: Cluster) -> None:
    assert empty_cluster.node_states() == {"n1": "idle", "n2": "idle", "n3": "idle", "n4": "idle"}


def test_a_job_on_two_nodes_knows_them_by_name(empty_cluster: Cluster, tmp_path: Path) -> None:
    script = "--wrap=echo $SLURM_NNODES; srun hostname | sort; getent hosts n1 n2"
    job = empty_cluster.submit("--nodes=2", "--output=out", script, cwd=tmp_path)
    empty_cluster.wait_for(job, "COMPLETED", timeout=SECONDS)
    assert (tmp_path / "out").read_text().split() == ["2", "n1", "n2", "127.0.1.1", "n1", "127.0.1.2", "n2"]


def test_concurrent_jobs_get_different_gpus(empty_cluster: Cluster, tmp_path: Path) -> None:
    arguments = ("--nodelist=n1", "--gpus-per-node=2", "--output=%j", "--wrap=echo $CUDA_VISIBLE_DEVICES; sleep 1000")
    jobs = [empty_cluster.submit(*arguments, cwd=tmp_path) for _ in range(2)]
    outputs = [tmp_path / job for job in jobs]
    poll(
        lambda: all(file.exists() and file.read_text().endswith("\n") for file in outputs), SECONDS, empty_cluster.logs
    )
    assert [empty_cluster.state(job) for job in jobs] == ["RUNNING", "RUNNING"]
    gpus = [file.read_text().strip().split(",") for file in outputs]
    assert sorted(gpus[0] + gpus[1]) == ["0", "1", "2", "3"]


def test_exit_codes_and_the_elements_of_an_array(empty_cluster: Cluster, tmp_path: Path) -> None:
    script = "--wrap=[ $SLURM_ARRAY_TASK_ID = 3 ] && kill -KILL $$; exit $((SLURM_ARRAY_TASK_ID - 1))"
    array = empty_cluster.submit("--array=1-3", "--output=/dev/null", script, cwd=tmp_path)
    states = [empty_cluster.wait_for(f"{array}_{i}", "COMPLETED", "FAILED", timeout=SECONDS) for i in (1, 2, 3)]
    assert states == ["COMPLETED", "FAILED", "FAILED"]
    assert [empty_cluster.exit_code(f"{array}_{i}") for i in (1, 2, 3)] == [0, 1, -9]


def test_what_another_slurm_has_set_does_not_reach_a_job(
    empty_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "elsewhere")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "7")
    script = '--wrap=echo "${SLURM_RESTART_COUNT:-none} $OURS"'
    job = empty_cluster.submit("--output=out", script, cwd=tmp_path, env={"OURS": "kept"})
    empty_cluster.wait_for(job, "COMPLETED", timeout=SECONDS)
    assert (tmp_path / "out").read_text() == "none kept\n"


def test_a_job_of_high_requeues_one_of_low(empty_cluster: Cluster, tmp_path: Path) -> None:
    low = empty_cluster.submit("--nodes=4", "--exclusive", "--output=/dev/null", FOR_EVER, cwd=tmp_path)
    empty_cluster.wait_for(low, "RUNNING", timeout=SECONDS)
    high = empty_cluster.submit("--nodes=4", "--partition=high", "--output=/dev/null", FOR_EVER, cwd=tmp_path)
    empty_cluster.wait_for(high, "RUNNING", timeout=SECONDS)
    assert (empty_cluster.state(low), empty_cluster.restarts(low)) == ("PENDING", 1)


def test_a_node_fails_and_comes_back(empty_cluster: Cluster, tmp_path: Path) -> None:
    arguments = ("--output=/dev/null", "--wrap=srun sleep 1000")
    kept, lost = (empty_cluster.submit(f"--nodelist={name}", *arguments, cwd=tmp_path) for name in ("n1", "n2"))
    poll(lambda: all(_runs(empty_cluster, job, "sleep") for job in (kept, lost)), SECONDS, empty_cluster.logs)
    on_n1, on_n2 = empty_cluster.job_processes(kept), empty_cluster.job_processes(lost)
    empty_cluster.fail_node("n2")
    assert alive(on_n2) == []
    assert len(alive(on_n1)) == len(on_n1)
    # Slurm would find out by itself, 30 s later.
    empty_cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=failed")
    poll(lambda: empty_cluster.restarts(lost) == 1, SECONDS, empty_cluster.logs)
    empty_cluster.restore_node("n2")
    assert empty_cluster.node_states()["n2"] in ("idle", "mixed")
    assert empty_cluster.state(kept) == "RUNNING"


def _runs(cluster: Cluster, job: str, program: str) -> bool:
    return any(program in str(process) for process in cluster.job_processes(job))


def test_a_cut_node_answers_nobody_until_healed(cluster_folder: Path) -> None:
    with start_cluster(cluster_folder, nodes=2, separate_networks=True) as cluster:

        def connect() -> int:  # nobody listens: with a network that is said at once
            command = "timeout 2 bash -c '</dev/tcp/n2/9' || exit $?"
            return cluster.run("srun", "--nodelist=n1", "bash", "-c", command, check=False).returncode

        refused, timed_out = 1, 124
        assert connect() == refused
        cluster.cut("n2")
        assert connect() == timed_out
        cluster.heal("n2")
        assert connect() == refused


def test_two_clusters_do_not_meet(empty_cluster: Cluster, cluster_folder: Path, tmp_path: Path) -> None:
    first = empty_cluster.submit("--output=/dev/null", FOR_EVER, cwd=tmp_path)
    with start_cluster(cluster_folder, nodes=1) as other:
        second = other.submit("--output=/dev/null", FOR_EVER, cwd=tmp_path)
        other.wait_for(second, "RUNNING", timeout=SECONDS)
        empty_cluster.wait_for(first, "RUNNING", timeout=SECONDS)
        assert other.run("squeue", "--noheader", "--format=%i").stdout.split() == [second]
        assert empty_cluster.run("squeue", "--noheader", "--format=%i").stdout.split() == [first]
    assert empty_cluster.state(first) == "RUNNING"


@KINDS
def test_nothing_is_left_of_a_stopped_cluster(cluster_folder: Path, separate_networks: bool) -> None:
    with start_cluster(cluster_folder, nodes=1, separate_networks=separate_networks) as cluster:
        job = cluster.submit("--output=/dev/null", "--wrap=setsid sleep 1000", cwd=cluster_folder)
        poll(lambda: _runs(cluster, job, "sleep"), SECONDS, cluster.logs)
        processes = cluster.processes()
        inside = namespaces([process.pid for process in processes]) - namespaces([psutil.Process().pid])
        assert len(inside) == (8 if separate_networks else 6)
    assert alive(processes) == []
    assert not inside & namespaces(psutil.pids())
    assert str(cluster_folder) not in Path("/proc/mounts").read_text()
    assert not cluster_folder.exists()


@KINDS
def test_nothing_is_left_when_who_started_it_is_killed(cluster_folder: Path, separate_networks: bool) -> None:
    command = [sys.executable, "-c", STARTS_ONE_AND_HANGS, str(cluster_folder), str(separate_networks)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "started\n"
        processes = psutil.Process(starter.pid).children(recursive=True)
        starter.kill()
    poll(lambda: not alive(processes) and not cluster_folder.exists(), SECONDS, lambda: f"left: {alive(processes)}")


def test_a_cluster_that_cannot_start_says_why(cluster_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.slurm.configuration.PARTITIONS", "NoSuchKey=1\n")
    with pytest.raises(AssertionError, match="NoSuchKey"), start_cluster(cluster_folder, nodes=1):
        pass
    assert not cluster_folder.exists()
