"""What the launcher says, the device and threads of a rank, and a world of one."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from pipeline.base.launch import Launch
from pipeline.base.logs import start_logging
from pipeline.parallel.machine import choose_device, choose_threads
from pipeline.parallel.rank import Rank, is_lost_connection
from pipeline.parallel.rendezvous import meet, start_rank
from tests.ranks import run_ranks

CPU = torch.device("cpu")
TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "job-17",
}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in TORCHRUN.items() if name not in names}


def test_torchruns_variables_make_the_launch() -> None:
    assert Launch.from_environment(TORCHRUN) == Launch(5, 1, 8, 4, "job-17", launcher_pid=os.getppid())


@pytest.mark.parametrize(
    ("restarts", "local", "is_replaceable"), [("0", "4", False), ("3", "8", False), ("3", "4", True)]
)
def test_a_node_is_replaceable_where_launchers_of_others_may_restart(
    restarts: str, local: str, is_replaceable: bool
) -> None:
    environment = TORCHRUN | {"TORCHELASTIC_MAX_RESTARTS": restarts, "LOCAL_WORLD_SIZE": local}
    assert Launch.from_environment(environment).is_replaceable == is_replaceable


def test_without_torchrun_it_is_a_world_of_one() -> None:
    assert Launch.from_environment({}) == Launch(0, 0, 1, 1, None)
    assert Launch.from_environment({"PATH": "/bin", "SLURM_JOB_ID": "17"}) == Launch()


@pytest.mark.parametrize(
    "environment", [{"WORLD_SIZE": "4"}, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, without("RANK")]
)
def test_without_rank_it_is_a_world_of_one(environment: dict[str, str]) -> None:
    assert Launch.from_environment(environment) == Launch()


@pytest.mark.parametrize("world", ["8", "1"])
def test_a_world_of_another_size_than_was_granted_is_refused(world: str) -> None:
    """Each node would train by itself."""
    environment = TORCHRUN if world == "8" else {}
    assert Launch.from_environment(environment | {"CONVOY_WORLD_SIZE": world}).world_size == int(world)
    with pytest.raises(ValueError, match=f"{world} rank.s. found each other where 16 were to be started"):
        Launch.from_environment(environment | {"CONVOY_WORLD_SIZE": "16"})


def test_tasks_of_srun_without_torchrun_are_refused() -> None:
    with pytest.raises(ValueError, match="srun started 4 processes that do not know each other"):
        Launch.from_environment({"SLURM_STEP_NUM_TASKS": "4"})
    assert Launch.from_environment({"SLURM_STEP_NUM_TASKS": "1"}) == Launch()
    assert Launch.from_environment(TORCHRUN | {"SLURM_STEP_NUM_TASKS": "4"}).world_size == 8


def test_threads_are_of_the_cores_that_slurm_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    for granted, threads in (({"SLURM_CPUS_ON_NODE": "16"}, 4), ({}, 16), ({"SLURM_CPUS_ON_NODE": "256"}, 16)):
        assert choose_threads(Launch.from_environment(TORCHRUN | granted), None) == threads


def test_only_a_restart_or_a_requeue_may_meet_an_attempt_before_it() -> None:
    for environment, expected in (
        ({}, False),
        ({"SLURM_RESTART_COUNT": "1"}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, True),
    ):
        assert Launch.from_environment(TORCHRUN | environment).may_be_early == expected


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (["LOCAL_RANK"], "LOCAL_RANK"),
        (["WORLD_SIZE"], "WORLD_SIZE"),
        (["LOCAL_WORLD_SIZE"], "LOCAL_WORLD_SIZE"),
        (["LOCAL_RANK", "LOCAL_WORLD_SIZE"], "LOCAL_RANK, LOCAL_WORLD_SIZE"),
        (["MASTER_ADDR"], "MASTER_ADDR and MASTER_PORT"),
        (["MASTER_PORT"], "MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_half_of_torchruns_variables_are_refused_and_the_others_named(missing: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=f"RANK is set, but not {named}: start with torchrun"):
        Launch.from_environment(without(*missing))


def test_the_run_id_may_be_absent() -> None:
    assert Launch.from_environment(without("TORCHELASTIC_RUN_ID")).run_id is None


def launch_id_without_job(rank: Rank) -> str | None:
    return Launch.from_environment(TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}).run_id


def test_torchruns_default_run_id_becomes_that_of_the_agent() -> None:
    own = launch_id_without_job(Rank(0, 0, 1, 1, CPU, "none", 1))
    assert own is not None
    assert own.startswith(f"{socket.gethostname()}-{os.getppid()}-")
    assert own == launch_id_without_job(Rank(0, 0, 1, 1, CPU, "none", 1))
    first, second = [run_ranks(1, launch_id_without_job)[0] for _ in range(2)]
    assert first == second  # as before and after an elastic restart: other processes of the same parent
    assert first.startswith(f"{socket.gethostname()}-{os.getpid()}-")
    assert first != own


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
    assert choose_threads(launch, threads) == expected


ALONE = Rank(0, 0, 1, 1, CPU, "none", 1)


def fail() -> NoReturn:
    raise ZeroDivisionError("of rank 0")


def test_a_world_of_one_is_main_and_needs_no_process_group() -> None:
    assert ALONE.is_main
    assert not dist.is_initialized()
    tensor = torch.tensor([1.0, 2.0])
    assert ALONE.reduce_sum(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    assert ALONE.gather({"a": 1}) == [{"a": 1}]
    assert ALONE.from_main(lambda: "result") == "result"
    assert ALONE.from_main(lambda: None) is None


@pytest.mark.parametrize("flag", [True, False])
def test_in_a_world_of_one_any_is_its_own_flag(flag: bool) -> None:
    assert ALONE.any(flag) is flag


def test_in_a_world_of_one_errors_are_its_own() -> None:
    with pytest.raises(ZeroDivisionError, match="of rank 0"):
        ALONE.from_main(fail)
    with pytest.raises(ZeroDivisionError, match="of rank 0"):
        ALONE.together(fail)


def test_in_a_world_of_one_an_action_runs_once() -> None:
    calls: list[str] = []
    ALONE.together(lambda: calls.append("together"))
    ALONE.from_main(lambda: calls.append("main"))
    assert calls == ["together", "main"]


def inside_a_started_rank(rank: Rank) -> list[Any]:
    with start_rank(Launch(), device="cpu", threads=3) as started:
        return [started, torch.get_num_threads(), dist.is_initialized()]


def test_starting_a_world_of_one_sets_the_threads_and_joins_no_group() -> None:
    assert run_ranks(1, inside_a_started_rank) == [[Rank(0, 0, 1, 1, CPU, "none", 3), 3, False]]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:1234"), True),
        (RuntimeError("Connection reset by peer"), True),
        (dist.DistBackendError("NCCL error"), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("connection reset"), False),
        (ZeroDivisionError(), False),
    ],
)
def test_the_loss_of_another_rank_is_told_from_a_failure_of_this_one(error: BaseException, expected: bool) -> None:
    assert is_lost_connection(error) is expected


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("convoy")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.mark.usefixtures("_logging_as_before")
def test_the_first_rank_says_all_and_the_others_only_warn(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = list(root.handlers), root.level
    for rank in (0, 3, 0):  # the second time replaces the handler of the first
        logger = start_logging(rank)
        logger.info("information")
        logger.warning("a warning")
        logger.debug("detail")
    plain = "information\na warning\n"
    assert capsys.readouterr().out == f"{plain}[rank 3 on {socket.gethostname()}] WARNING a warning\n{plain}"
    assert (list(root.handlers), root.level) == before


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
def test_a_rank_that_waits_in_vain_says_for_whom(rank: int, missing: str) -> None:
    with pytest.raises(TimeoutError, match=rf"rank {rank} waited 0\.1 s in vain for rank\(s\) \[{missing}\]"):
        meet(HashStore(), rank, 3, timeout=0.1)
