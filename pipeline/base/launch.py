"""The facts that torchrun and Slurm give this process. The only reader of RANK and its companions."""

import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

OTHER_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables that count the processes which srun or mpirun starts."""
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """The facts that the launcher gives this process. One process without torchrun is a world of one."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    run_id: str | None = None  # of the job under torchrun, the same across elastic restarts; None without torchrun
    is_restart: bool = False  # by torchrun, after a failure
    launcher_pid: int | None = None  # of torchrun; None without it
    max_restarts: int = 0
    num_cores: int | None = None  # of this node, granted by Slurm, which need not keep processes from using all
    is_requeued: bool = False  # by Slurm, which has started the job before

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Return what the environment says, without RANK a world of one.

        Raises ValueError if RANK is set, but not all that belongs to it, and for processes that do not know each other.
        """
        num_cores = _number("SLURM_CPUS_ON_NODE", environment, default=0) or None
        is_requeued = _number("SLURM_RESTART_COUNT", environment, default=0) > 0
        if "RANK" not in environment:
            _check_world(1, environment)
            return cls(num_cores=num_cores, is_requeued=is_requeued)
        if missing := [name for name in (*NUMBERS, "MASTER_ADDR", "MASTER_PORT") if name not in environment]:
            names = ", ".join(missing)
            raise ValueError(f"RANK is set, but not {names}: start with torchrun, or unset RANK for a single process")
        run_id = environment.get("TORCHELASTIC_RUN_ID")
        if run_id == "none":  # torchrun's default: then the agent, which outlives its workers, stands for the job
            run_id = f"{socket.gethostname()}-{os.getppid()}-{start_ticks(os.getppid())}"
        numbers = {name.lower(): _number(name, environment, default=0) for name in NUMBERS}
        _check_world(numbers["world_size"], environment)
        return cls(
            **numbers,
            run_id=run_id,
            is_restart=_number("TORCHELASTIC_RESTART_COUNT", environment, default=0) > 0,
            launcher_pid=None if run_id is None else os.getppid(),
            max_restarts=_number("TORCHELASTIC_MAX_RESTARTS", environment, default=0),
            num_cores=num_cores,
            is_requeued=is_requeued,
        )

    @property
    def launcher_is_gone(self) -> bool:
        return self.launcher_pid is not None and os.getppid() != self.launcher_pid

    @property
    def may_be_early(self) -> bool:
        """Whether ranks of an earlier attempt may still be there, on a node that nobody reaches."""
        return self.is_restart or self.is_requeued

    @property
    def is_replaceable(self) -> bool:
        """Whether the launchers of other nodes will go on without this node."""
        return self.max_restarts > 0 and self.world_size > self.local_world_size

    def await_end(self, seconds: float) -> None:
        """Wait for the launcher to end this process, once the rank that has the cause of a failure has exited.

        Exiting at once could make the launcher end that rank before it has spoken. Without a launcher it does not wait.
        """
        if self.run_id is not None and self.world_size > 1:
            threading.Event().wait(seconds)


def _check_world(world_size: int, environment: Mapping[str, str]) -> None:
    """Raise ValueError if a batch script was granted another world: the nodes of it would train apart."""
    granted = _number("CONVOY_WORLD_SIZE", environment, default=world_size)
    if world_size != granted:
        raise ValueError(
            f"{world_size} rank(s) found each other where {granted} were to be started (CONVOY_WORLD_SIZE): do the "
            "nodes reach the one that is named at the start of the log?"
        )
    for name in OTHER_LAUNCHERS if "RANK" not in environment else ():
        if (tasks := _number(name, environment, default=1)) > 1:
            raise ValueError(
                f"srun or mpirun started {tasks} processes that do not know each other ({name}): start torchrun once "
                "on each node, as slurm/train.sbatch does"
            )


def _number(name: str, environment: Mapping[str, str], default: int) -> int:
    """Return the whole number in a variable. Raises ValueError that names it."""
    value = environment.get(name) or str(default)
    if not value.isdecimal():
        raise ValueError(f"{name}={value}: accepted: a whole number >= 0; whoever set it should correct or unset it")
    return int(value)


def start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since boot: a later one may have the same number."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
