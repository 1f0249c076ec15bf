"""slurm/scaling.sbatch on a real Slurm."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, poll

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "scaling.sbatch"
SECONDS = 200.0


def submit(cluster: Cluster, folder: Path, *arguments: str) -> str:
    """A job of two nodes with one rank each."""
    environment = {
        "CONVOY_ROOT": str(ROOT),
        "CONVOY_RANKS_PER_NODE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    options = ("--modes", "weak", "--batch", "8", *arguments)
    return cluster.submit("--nodes=2", str(SCRIPT), *options, cwd=folder, env=environment)


def test_one_job_measures_one_node_and_two(empty_cluster: Cluster, tmp_path: Path) -> None:
    job = submit(empty_cluster, tmp_path, "--rounds", "1", "--steps", "20")
    log = tmp_path / "logs" / f"slurm-{job}.log"
    assert empty_cluster.wait_for(job, "COMPLETED", "FAILED", timeout=SECONDS) == "COMPLETED", log.read_text()
    report = tmp_path / f"scaling-{job}"
    stored = json.loads(report.with_suffix(".json").read_text())
    assert (stored["machine"]["nodes"], stored["machine"]["ranks_per_node"]) == (2, 1)
    assert [(case["ranks"], case["global_batch"]) for case in stored["cases"]] == [(1, 8), (2, 16)]
    assert all(case["runs"][0]["images_per_second"] > 0 for case in stored["cases"])
    first, second = (case["runs"][0]["milliseconds"]["communication"] for case in stored["cases"])
    assert first < second
    table = report.with_suffix(".md").read_text()
    assert "| 1 on 1 node |" in table and "| 2 on 2 nodes |" in table
    assert "over that on one node (1 rank)" in table
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["logs", *(f"{report.name}.{ending}" for ending in ("json", "md", "png"))]
    assert [path.name for path in log.parent.iterdir()] == [log.name]


def test_a_cancelled_job_leaves_only_its_log(empty_cluster: Cluster, tmp_path: Path) -> None:
    job = submit(empty_cluster, tmp_path, "--steps", "1000", "--epochs", "1000")
    poll(lambda: any(tmp_path.glob("convoy-scaling-*/scaling/journal.jsonl")), SECONDS, empty_cluster.logs)
    empty_cluster.run("scancel", job)
    empty_cluster.wait_until_idle()
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    assert empty_cluster.job_processes(job) == []
