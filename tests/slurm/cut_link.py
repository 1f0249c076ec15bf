"""What becomes of a training on two nodes when the link between them is cut; a table of what was seen.

Each node has a network of its own, on a real Slurm cluster that this starts. The link of one node of the job is cut
while it trains, and stays so. Every rank has to end by itself within `train.hang_timeout` and what a collective is more
patient, no checkpoint may be half written, and the requeued job has to finish on other nodes as if nothing had been.

    python -m tests.slurm.cut_link --rounds 3
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.run.checkpoint import CheckpointError, load_checkpoint
from tests.slurm.cluster import Cluster, poll, start_cluster
from tests.slurm.test_training import (
    LONG,
    assert_nothing_lost,
    log,
    submit,
    undisturbed,
    wait_for_end,
    wait_for_progress,
)

HANG_TIMEOUT = 20
LIMIT = HANG_TIMEOUT + 35
"""Seconds: the watchdog of a rank that waits leaves 30 more to whoever is the cause; and it looks each second."""


@dataclass(frozen=True)
class Seen:
    cut_rank: int
    """On the node that was cut off."""
    seconds_to_end: float
    """From the cut until no rank is left on either node."""
    seconds_to_finish: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args(argv).rounds
    with tempfile.TemporaryDirectory(prefix="convoy-cut-") as name:
        folder = Path(name)
        (folder / "reference").mkdir()
        reference = undisturbed(folder / "reference", *LONG)
        seen = []
        for index in range(rounds):
            (folder / str(index)).mkdir()
            seen.append(cut_once(folder / str(index), reference, cut_rank=index % 2))
            print(seen[-1], flush=True)
    print("\n" + format_table(seen))
    return 0


def cut_once(folder: Path, reference: Path, cut_rank: int) -> Seen:
    """Raises AssertionError if anything is lost, or anybody stays."""
    with start_cluster(Path(tempfile.mkdtemp(prefix="convoy-slurm-")), nodes=4, separate_networks=True) as cluster:
        settings = (*LONG, f"train.hang_timeout={HANG_TIMEOUT}")
        job = submit(cluster, folder, ("--nodes=2",), *settings)
        wait_for_progress(cluster, folder, job, 0)
        time.sleep(random.random())  # anywhere in a step or a save
        ranks = find_ranks(cluster, job)
        node_of = {process.environ()["RANK"]: process.environ()["SLURMD_NODENAME"] for process in ranks}
        cut_node = node_of[str(cut_rank)]
        cut_at = time.monotonic()
        cluster.cut(cut_node)
        poll(lambda: not any(map(is_alive, ranks)), LIMIT + 30, lambda: log(folder, job))
        seconds = time.monotonic() - cut_at
        assert seconds <= LIMIT, f"the last rank ended {seconds:.0f} s after the cut\n{log(folder, job)}"
        check_checkpoints(folder)
        wait_for_end(cluster, folder, job)
        finished = time.monotonic() - cut_at
        assert cluster.restarts(job) == 1
        assert_nothing_lost(folder, reference)
    return Seen(cut_rank, seconds, finished)


def find_ranks(cluster: Cluster, job: str) -> list[psutil.Process]:
    return [process for process in cluster.job_processes(job) if "RANK" in process.environ()]


def is_alive(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


def check_checkpoints(folder: Path) -> None:
    """Each that there is can be loaded."""
    found = sorted((folder / "run" / "checkpoints").glob("step-*"))
    assert found
    for path in found:
        try:
            load_checkpoint(path)
        except (CheckpointError, FileNotFoundError):
            if path.exists():  # else the requeued training has removed it meanwhile
                raise


def format_table(seen: Sequence[Seen]) -> str:
    lines = ["| cut off | all ranks gone after, s | job finished after, s |", "| --- | ---: | ---: |"]
    lines += [f"| rank {s.cut_rank} | {s.seconds_to_end:.0f} | {s.seconds_to_finish:.0f} |" for s in seen]
    median = statistics.median(s.seconds_to_end for s in seen)
    return "\n".join([*lines, "", f"Median until all ranks are gone: {median:.0f} s; limit: {LIMIT} s."])


if __name__ == "__main__":
    sys.exit(main())
