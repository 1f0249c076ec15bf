"""How a process becomes a rank: its device and threads, and how ranks find each other past what dead ones left."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from pipeline.base.launch import Launch
from pipeline.config.schema import TrainConfig
from pipeline.parallel.rank import Rank
from pipeline.parallel.start import choose_device, cpu_quota, meet, num_threads, start_rank
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def inside_a_started_rank(rank: Rank) -> list[Any]:
    with start_rank(Launch(), TrainConfig(device="cpu", threads=3)) as started:
        return [started, torch.get_num_threads(), dist.is_initialized()]


def test_starting_a_world_of_one_sets_the_threads_and_joins_no_group() -> None:
    assert run_ranks(1, inside_a_started_rank) == [[Rank(0, 0, 1, 1, torch.device("cpu"), "none", 3), 3, False]]


def meet_all(store: Store, world_size: int) -> list[Store]:
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: meet(store, rank, world_size, timeout=20.0), range(world_size)))


def test_ranks_meet_past_what_dead_ranks_left_in_the_store() -> None:
    store = HashStore()
    for key, value in {"hello/1": "dead", "welcome/1": "dead old", "seen/1": "old", "hello/2": "dead"}.items():
        store.set(key, value)
    first = meet_all(store, 3)
    first[0].set("address", "here")
    assert [room.get("address") for room in first] == [b"here"] * 3
    second = meet_all(store, 3)  # restarted: what the first attempt left is not seen
    assert not any(room.check(["address"]) for room in second)
    second[2].set("address", "there")
    assert second[0].get("address") == b"there"
    assert first[0].get("address") == b"here"


@pytest.mark.parametrize(("rank", "missing"), [(0, "1, 2"), (2, "0")])
def test_a_rank_whose_waiting_times_out_names_the_missing_ranks(rank: int, missing: str) -> None:
    with pytest.raises(TimeoutError, match=rf"rank {rank} timed out after 0\.1 s waiting for rank\(s\) \[{missing}\]"):
        meet(HashStore(), rank, 3, timeout=0.1)


def test_no_thread_of_the_process_group_outlives_it(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        """
import os, torch
from dataclasses import replace
from pipeline.base.launch import Launch
from pipeline.base.timing import PhaseTimer
from pipeline.config.schema import TrainConfig
from pipeline.parallel.replicas import build_replicas
from pipeline.parallel.start import start_rank

with start_rank(Launch.from_environment(os.environ), TrainConfig()) as rank:
    apart = replace(rank, local_world_size=1)  # as on two nodes: over the process group
    build_replicas(TrainConfig(), torch.nn.Linear(3, 2), apart, PhaseTimer(), torch.zeros(1, 3))
os.write(1, b"threads at the end: %d\\n" % len(os.listdir("/proc/self/task")))  # in one piece: both ranks write here
"""
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("threads at the end: 1\n") == 2, done.stdout + done.stderr


def see_gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("num_gpus", "local_rank", "local_world_size", "device", "backend", "expected"),
    [
        (0, 0, 1, "auto", "auto", "cpu"),
        (0, 1, 2, "auto", "auto", "cpu"),
        (0, 0, 1, "cpu", "gloo", "cpu"),
        (4, 3, 4, "cpu", "auto", "cpu"),
        (4, 0, 1, "auto", "auto", "cuda:0"),
        (4, 3, 4, "auto", "auto", "cuda:3"),
        (4, 3, 4, "cuda", "nccl", "cuda:3"),
        (8, 2, 3, "auto", "auto", "cuda:2"),
        (2, 3, 4, "auto", "gloo", "cuda:1"),
        (1, 3, 4, "cuda", "gloo", "cuda:0"),
    ],
)
def test_the_device_of_a_rank(
    num_gpus: int,
    local_rank: int,
    local_world_size: int,
    device: str,
    backend: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    see_gpus(num_gpus, monkeypatch)
    launch = Launch(local_rank, local_rank, local_world_size, local_world_size)
    assert choose_device(launch, device, backend) == torch.device(expected)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(0, monkeypatch)
    with pytest.raises(
        ValueError, match=r"train\.device = cuda: torch sees no GPU here; use train\.device=cpu or auto"
    ):
        choose_device(Launch(), "cuda", "auto")


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("backend", ["auto", "nccl"])
def test_more_ranks_than_gpus_are_refused_with_what_to_do(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    see_gpus(2, monkeypatch)
    for local_rank in range(4):  # every rank says the same
        with pytest.raises(ValueError, match="cannot use NCCL") as caught:
            choose_device(Launch(local_rank, local_rank, 4, 4), device, backend)
        message = str(caught.value)
        parts = [
            "4 ranks on this node",
            "sees 2 GPU(s)",
            "--nproc_per_node=2",
            "train.device=cpu",
            "train.backend=gloo",
        ]
        assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("cores", "local_world_size", "threads", "expected"),
    [(8, 1, None, 8), (8, 4, None, 2), (8, 3, None, 2), (2, 4, None, 1), (8, 4, 5, 5), (2, 1, 1, 1)],
)
def test_cores_are_divided_among_the_ranks_of_the_node(
    cores: int, local_world_size: int, threads: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(100, 100 + cores)))
    launch = Launch(world_size=64, local_world_size=local_world_size)
    assert num_threads(TrainConfig(threads=threads), launch) == expected


def test_threads_are_of_the_cores_that_slurm_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    for granted, expected in ((16, 4), (None, 16), (256, 16)):
        launch = Launch(world_size=8, local_world_size=4, num_cores=granted)
        assert num_threads(TrainConfig(), launch) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, 4), ({"reproducible": True}, 1), ({"reproducible": True, "threads": 3}, 3), ({"threads": 5}, 5)],
)
def test_a_reproducible_training_has_one_thread_unless_set(
    config: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert num_threads(TrainConfig(**config), Launch(world_size=2, local_world_size=2)) == expected


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "9:name=systemd:/\n4:cpu,cpuacct:/docker/17\n3:cpuset:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",  # a container sees its own group as the root
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/t\n",
                "sys/fs/cgroup/cpu/t/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/t/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_the_quota_of_a_container_is_found(tmp_path: Path, files: dict[str, str], quota: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota


def test_threads_are_at_most_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr("pipeline.parallel.start.cpu_quota", lambda: 6)
    assert num_threads(TrainConfig(), Launch(local_world_size=2)) == 3
    assert num_threads(TrainConfig(), Launch(local_world_size=2, num_cores=4)) == 2
    monkeypatch.setattr("pipeline.parallel.start.cpu_quota", lambda: None)
    assert num_threads(TrainConfig(), Launch(local_world_size=2)) == 32


def _is_deterministic(rank: Rank, setting: str) -> bool:
    with start_rank(Launch(), TrainConfig(device="cpu", threads=1, **{setting: True})):
        return torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("setting", "expected"), [("reproducible", True), ("deterministic", True), ("compile", False)])
def test_kernels_are_deterministic_where_that_is_set(setting: str, expected: bool) -> None:
    assert run_ranks(1, _is_deterministic, setting) == [expected]
