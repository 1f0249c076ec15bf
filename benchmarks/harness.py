"""What all benchmarks share: starting ranks, reading what they say, statistics of rounds, the machine, the tables."""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RESULT_PREFIX = "RESULT "
"""Begins the one line of a program's output that is for the benchmark: a JSON object follows."""
TERMINATION_SECONDS = 45.0
"""How long a command may take to end on request; torchrun gives its ranks 30 s of it."""
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "SLURM_", "MLFLOW_", "ACCELERATE_", "PL_", "OMP_", "MKL_")
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class BenchmarkError(Exception):
    """A measured command failed, hung or did not say what it had to."""


@dataclass(frozen=True)
class Finished:
    """A command that ended with exit code 0."""

    output: str
    """Of stdout."""
    wall_seconds: float
    """From starting the command to its exit."""
    cpu_by_others: float
    """The share of the machine's cores that was busy meanwhile, but not for this command."""


def torchrun(arguments: Sequence[str], num_ranks: int) -> list[str]:
    """Return the command that starts `arguments` (a file, or `-m` and a module) on ranks of this machine.

    --standalone takes a free port by itself, so that nobody can take it in between.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [*launcher, f"--nproc_per_node={num_ranks}", *arguments]


def clean_environment(environment: Mapping[str, str], num_threads: int | None = None) -> dict[str, str]:
    """Return `environment` without what another launcher, tracker or thread setting left in it.

    `num_threads` sets OMP_NUM_THREADS; without it torchrun sets 1, as it does for everybody.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    return kept if num_threads is None else kept | {"OMP_NUM_THREADS": str(num_threads)}


def run_command(
    command: Sequence[str], *, environment: Mapping[str, str], timeout: float, folder: Path = ROOT
) -> Finished:
    """Run `command` in `folder`. Raises BenchmarkError with the end of its output if it fails or outlasts `timeout` s.

    Nothing it started outlives it: torchrun, which starts its ranks in sessions of their own, is asked to end them.
    """
    load, started = Load.now(), time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        output, errors = _end(process)
        raise BenchmarkError(_describe_failure(command, f"still ran after {timeout:g} s", output, errors)) from None
    except BaseException:
        _end(process)
        raise
    wall_seconds = time.perf_counter() - started
    if process.returncode != 0:
        raise BenchmarkError(_describe_failure(command, f"exit code {process.returncode}", output, errors))
    return Finished(output, wall_seconds, Load.now().share_of_others(load, wall_seconds))


@dataclass(frozen=True)
class Load:
    """Seconds of CPU since some beginning."""

    machine: float
    """That all cores were busy, or taken away by the host of a virtual machine."""
    ours: float
    """Used by commands that this process has started and that have ended."""

    @classmethod
    def now(cls) -> Load:
        times = os.times()
        ours = times.children_user + times.children_system
        try:
            columns = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return cls(ours, ours)  # not to be known here
        user, nice, system, _idle, _iowait, interrupt, soft_interrupt, stolen = (int(column) for column in columns)
        busy = user + nice + system + interrupt + soft_interrupt + stolen
        return cls(busy / os.sysconf("SC_CLK_TCK"), ours)

    def share_of_others(self, before: Load, seconds: float) -> float:
        """Return the share of all cores that others used in the `seconds` since `before`."""
        by_others = (self.machine - before.machine) - (self.ours - before.ours)
        return max(0.0, by_others / (seconds * (os.cpu_count() or 1)))


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    process.send_signal(signal.SIGTERM)
    try:
        return process.communicate(timeout=TERMINATION_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    try:
        return process.communicate(timeout=TERMINATION_SECONDS)
    except subprocess.TimeoutExpired:  # ranks in sessions of their own may hold the pipes
        return "", ""


def _describe_failure(command: Sequence[str], what: str, output: str, errors: str, num_lines: int = 40) -> str:
    tails = ("\n".join(text.splitlines()[-num_lines:]) for text in (output, errors))
    return f"{' '.join(command)}\n{what}; its output ended with:\n" + "\n".join(tail for tail in tails if tail)


def print_result(result: Mapping[str, Any]) -> None:
    """Print the line that `parse_results` finds, on rank 0."""
    print(RESULT_PREFIX + json.dumps(dict(result), allow_nan=False), flush=True)


def parse_results(output: str) -> list[dict[str, Any]]:
    """Return the objects of all result lines, whatever stands between them. Raises BenchmarkError for a torn one."""
    lines = [line.removeprefix(RESULT_PREFIX) for line in output.splitlines() if line.startswith(RESULT_PREFIX)]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise BenchmarkError(f"a result line is no JSON ({error}): {lines}") from error


def parse_result(output: str) -> dict[str, Any]:
    """Return the object of the one result line. Raises BenchmarkError if there is none or more than one."""
    results = parse_results(output)
    if len(results) != 1:
        raise BenchmarkError(f"{len(results)} result lines where 1 was due; the output ended with:\n{output[-2000:]}")
    return results[0]


@dataclass(frozen=True)
class Spread:
    """One figure over the rounds."""

    median: float
    minimum: float
    maximum: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def format(self, form: str = ",.0f") -> str:
        """Return `median (lowest to highest)`; of a single value only that."""
        extremes = f" ({self.minimum:{form}} to {self.maximum:{form}})" if self.count > 1 else ""
        return f"{self.median:{form}}{extremes}"


def pairwise_ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return `values / others` by round: what disturbed a round disturbed both, so that their ratio is steadier."""
    return [value / other for value, other in zip(values, others, strict=True)]


def alternate(things: Sequence[T], round_index: int) -> list[T]:
    """Return the order of a round: forwards, then backwards, so that a machine growing slower favours nobody."""
    return list(things) if round_index % 2 == 0 else list(reversed(things))


def num_cores() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def describe_machine() -> dict[str, Any]:
    """Return what a figure depends on besides the code: to be stored beside it."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": num_cores(),
        "gpus": gpus,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def format_machine(machine: Mapping[str, Any]) -> str:
    """Return the machine as one line."""
    counts = Counter(machine["gpus"])
    gpus = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items()) or "no GPU"
    versions = f"torch {machine['torch']}, Python {machine['python']}, commit {machine['commit']}"
    return f"{machine['cores']} cores of {machine['cpu']}, {gpus}; {versions}; {machine['date']}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _commit() -> str:
    """Return the abbreviated commit, with + where tracked files were changed since; `unknown` without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is text; the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_results(base: Path, results: Mapping[str, Any], markdown: str) -> tuple[Path, Path]:
    """Write `base`.json, with everything, and `base`.md, for people; return both paths. `base` may contain dots."""
    base.parent.mkdir(parents=True, exist_ok=True)
    paths = base.with_name(base.name + ".json"), base.with_name(base.name + ".md")
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    paths[1].write_text(markdown + "\n")
    return paths
