"""Where a run comes from: code, machine and job, as tags."""

import os
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
    """Return tags of host, torch and Slurm, and of the commit if `repository` is a git checkout, and not in one."""
    tags = {"host": socket.gethostname(), "torch": torch.__version__}
    if torch.cuda.is_available():
        tags["gpu"] = torch.cuda.get_device_name()
    tags |= {tag: environment[tag.upper()] for tag in OF_JOB if tag.upper() in environment}
    commit = _git(repository, "rev-parse", "HEAD")
    if commit is not None and _git(repository, "rev-parse", "--show-prefix") == "":
        changes = _git(repository, "status", "--porcelain", "--untracked-files=no")
        tags |= {"mlflow.source.git.commit": commit, "git.dirty": str(bool(changes)).lower()}
    return tags


def _git(repository: Path, *arguments: str) -> str | None:
    """Return what git prints of that repository, whose owner may be somebody else; None if it fails."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-c", f"safe.directory={repository}", "-C", str(repository), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
