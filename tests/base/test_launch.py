"""What the launcher says about this process: torchrun, Slurm, or nobody."""

from __future__ import annotations

import os
import re
import socket

import pytest

from pipeline.base.launch import Launch
from pipeline.parallel.rank import Rank
from tests.ranks import run_ranks

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
        (["MASTER_ADDR"], "MASTER_ADDR"),
        (["MASTER_ADDR", "MASTER_PORT"], "MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_half_of_torchruns_variables_are_refused_and_the_others_named(missing: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=f"RANK is set, but not {named}: start with torchrun"):
        Launch.from_environment(without(*missing))


def test_the_run_id_may_be_absent() -> None:
    assert Launch.from_environment(without("TORCHELASTIC_RUN_ID")).run_id is None


def launch_id_without_job(rank: Rank | None = None) -> str | None:
    return Launch.from_environment(TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}).run_id


def test_torchruns_default_run_id_becomes_that_of_the_agent() -> None:
    own = launch_id_without_job()
    assert own is not None
    assert own.startswith(f"{socket.gethostname()}-{os.getppid()}-")
    assert own == launch_id_without_job()
    first, second = [run_ranks(1, launch_id_without_job)[0] for _ in range(2)]
    assert first == second  # as before and after an elastic restart: other processes of the same parent
    assert first.startswith(f"{socket.gethostname()}-{os.getpid()}-")
    assert first != own


@pytest.mark.parametrize(
    "name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE"]
)
def test_processes_of_another_launcher_do_not_train_each_by_itself(name: str) -> None:
    assert Launch.from_environment({name: "1"}) == Launch()
    assert Launch.from_environment(TORCHRUN | {name: "2"}).world_size == 8  # it started torchrun on two nodes
    with pytest.raises(ValueError, match=f"started 4 processes .*{name}.*start torchrun once on each node"):
        Launch.from_environment({name: "4"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_CPUS_ON_NODE", "2(x2)"),
        ("SLURM_RESTART_COUNT", "once"),
        ("CONVOY_WORLD_SIZE", "abc"),
        ("WORLD_SIZE", "-1"),
        ("TORCHELASTIC_MAX_RESTARTS", "1.5"),
    ],
)
def test_a_variable_that_is_no_number_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}={value}: accepted: a whole number >= 0")):
        Launch.from_environment(TORCHRUN | {name: value})


def test_an_empty_variable_is_as_none() -> None:
    assert Launch.from_environment({"SLURM_CPUS_ON_NODE": "", "PMI_SIZE": ""}) == Launch()
