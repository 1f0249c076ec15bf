"""Where a run comes from: code, machine and job, as tags."""

import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

OF_JOB = (
    *("slurm_job_id", "slurm_array_job_id", "slurm_array_task_id"),
    *("slurm_job_nodelist", "slurm_job_partition", "slurm_restart_count"),
)
"""Tags, and in capitals the variables that hold their values."""


def collect_provenance(environment: Mapping[str, str], repository: Path) -> dict[str, str]:
    """Return tags of host, torch and Slurm, and of the commit if `repository` is a git checkout."""
    tags = {"host": socket.gethostname(), "torch": torch.__version__}
    if torch.cuda.is_available():
        tags["gpu"] = torch.cuda.get_device_name()
    tags |= {tag: environment[tag.upper()] for tag in OF_JOB if tag.upper() in environment}
    commit = _git(repository, "rev-parse", "HEAD")
    if commit is not None:
        changes = _git(repository, "status", "--porcelain", "--untracked-files=no")
        tags |= {"mlflow.source.git.commit": commit, "git.dirty": str(bool(changes)).lower()}
    return tags


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
