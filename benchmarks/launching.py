"""Where the ranks of a benchmark are started: on this machine, or on the nodes of a Slurm job."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    ROOT,
    Finished,
    clean_environment,
    describe_machine,
    format_machine,
    run_command,
    torchrun,
)


@dataclass(frozen=True)
class ThisMachine:
    num_gpus: int | None
    """None: CPU ranks, as many as are wanted."""

    num_nodes = 1
    ranks_per_node = None
    fewest_ranks = 1
    reference = "one rank"
    scratch = None
    """The folder for what is thrown away; None: the system's."""

    def default_ranks(self) -> list[int]:
        return [1, 2, 4] if self.num_gpus is None else powers_of_two(self.num_gpus)

    def check(self, ranks: Sequence[int]) -> None:
        """Raise ValueError for more than there are GPUs."""
        if self.num_gpus is not None and ranks[-1] > self.num_gpus:
            raise ValueError(f"--ranks {ranks[-1]}: torch sees {self.num_gpus} GPU(s) here")

    def run(self, arguments: Sequence[str], num_ranks: int, timeout: float) -> Finished:
        """Start a program on so many ranks and wait for them. Raises BenchmarkError as `run_command` does."""
        environment = clean_environment(os.environ)
        return run_command(torchrun(arguments, num_ranks), environment=environment, timeout=timeout)

    def describe_machine(self) -> dict[str, Any]:
        return describe_machine()

    def format_machine(self, machine: Mapping[str, Any]) -> str:
        return format_machine(machine)


@dataclass(frozen=True)
class SlurmNodes:
    """All nodes of the job that this process is in; it runs on the first of them."""

    hosts: tuple[str, ...]
    ranks_per_node: int
    job_id: int
    container: tuple[str, ...]
    """What stands before a command of the Python environment."""
    scratch: Path
    """A folder that all nodes see."""

    @classmethod
    def of_this_job(
        cls, ranks_per_node: int, *, num_gpus: int | None, container: Sequence[str], scratch: Path
    ) -> SlurmNodes:
        """Return the nodes. `num_gpus`: of this node, None for CPU ranks. Raises ValueError outside of a job."""
        missing = [name for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if name not in os.environ]
        missing += [program for program in ("srun", "scontrol") if shutil.which(program) is None]
        if missing:
            raise ValueError(f"--ranks-per-node: no {', '.join(missing)}: it is for a job, see slurm/scaling.sbatch")
        if ranks_per_node < 1 or (num_gpus is not None and ranks_per_node > num_gpus):
            seen = "" if num_gpus is None else f", torch sees {num_gpus} GPU(s) here"
            raise ValueError(f"--ranks-per-node {ranks_per_node}: at least 1{seen}")
        listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        hosts = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
        return cls(tuple(hosts), ranks_per_node, int(os.environ["SLURM_JOB_ID"]), tuple(container), scratch)

    @property
    def num_nodes(self) -> int:
        return len(self.hosts)

    @property
    def fewest_ranks(self) -> int:
        return self.ranks_per_node

    @property
    def reference(self) -> str:
        return f"one node ({self.ranks_per_node} rank{'s' if self.ranks_per_node > 1 else ''})"

    def default_ranks(self) -> list[int]:
        return [self.ranks_per_node * nodes for nodes in (*powers_of_two(self.num_nodes), self.num_nodes)]

    def check(self, ranks: Sequence[int]) -> None:
        """Raise ValueError for a part of a node, and for more nodes than there are."""
        wrong = [number for number in ranks if number % self.ranks_per_node]
        wrong += [number for number in ranks if number > self.ranks_per_node * self.num_nodes]
        if wrong:
            raise ValueError(
                f"--ranks {wrong[0]}: has to be a multiple of --ranks-per-node {self.ranks_per_node}, "
                f"{self.num_nodes} times that at most: the job has {self.num_nodes} node(s)"
            )

    def run(self, arguments: Sequence[str], num_ranks: int, timeout: float) -> Finished:
        """Start a program on the first of the nodes and wait for it. Raises BenchmarkError as `run_command` does."""
        granted = {name: value for name, value in os.environ.items() if name.startswith("SLURM_")}
        if "SLURM_GPUS" in granted:  # of all nodes together, which a part of them cannot have
            granted["SLURM_GPUS_PER_NODE"] = granted["SLURM_GPUS_ON_NODE"]
            del granted["SLURM_GPUS"]
        # Every rank compares it with the world it finds itself in.
        environment = clean_environment(os.environ) | granted | {"CONVOY_WORLD_SIZE": str(num_ranks)}
        return run_command(self.command(arguments, num_ranks), environment=environment, timeout=timeout)

    def command(self, arguments: Sequence[str], num_ranks: int) -> list[str]:
        """Return a command: a torchrun on each of as many nodes as the ranks need, with all that was granted there."""
        hosts = self.hosts[: num_ranks // self.ranks_per_node]
        port = 15000 + self.job_id % 10000  # jobs that share a node must not share a port
        return [
            *("srun", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1"),
            # Without it Slurm might choose nodes among which the rendezvous is not.
            f"--nodelist={','.join(hosts)}",
            *("--cpu-bind=none", "--export=ALL", "--kill-on-bad-exit=1", f"--chdir={ROOT}"),
            *(*self.container, sys.executable, "-m", "torch.distributed.run"),
            *(f"--nnodes={len(hosts)}", f"--nproc-per-node={self.ranks_per_node}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0]}:{port}", f"--rdzv-id={uuid.uuid4().hex}"),
            *arguments,
        ]

    def describe_machine(self) -> dict[str, Any]:
        return describe_machine() | {"nodes": self.num_nodes, "ranks_per_node": self.ranks_per_node}

    def format_machine(self, machine: Mapping[str, Any]) -> str:
        """Return the machine as one line; only the first node was looked at."""
        return f"{self.num_nodes} node(s) with {self.ranks_per_node} rank(s) each, the first: {format_machine(machine)}"


Launcher = ThisMachine | SlurmNodes


def powers_of_two(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]
