"""A run is a folder: its name, who may write in it, and what it says about the state of the run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.base.files import locked
from pipeline.config import Config

State = Literal["running", "finished", "preempted", "failed"]


class RunError(Exception):
    """The run folder cannot be used as asked; the message says why and what to do."""


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def status(self) -> dict[str, Any]:
        """The content of status.json; empty for a folder that has none, or none that can be read."""
        try:
            loaded: dict[str, Any] = json.loads((self.path / "status.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}
        return loaded

    def update_status(self, **changes: Any) -> None:
        """Change some keys of status.json. Training and publisher both write it, hence the lock."""
        with locked(self.path / ".status.lock"):
            status = self.status() | changes
            temporary = self.path / ".writing-status.json"
            temporary.write_text(json.dumps(status, indent=1) + "\n")
            temporary.replace(self.path / "status.json")


def slurm_run_name(environment: Mapping[str, str]) -> str | None:
    """`slurm-<job id>`, or `slurm-<array id>_<task id>` in an array; None outside Slurm."""
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"slurm-{array}_{environment.get('SLURM_ARRAY_TASK_ID', '0')}"
    job = environment.get("SLURM_JOB_ID")
    return f"slurm-{job}" if job else None


def choose_run(
    config: Config, config_name: str, environment: Mapping[str, str], launch_id: str | None, *, is_restart: bool = False
) -> RunFolder:
    """The folder of this run: the one named, Slurm's, that of the same launch before an elastic restart, or a new one.

    A default name belongs to one launch only: repeating the command without a name is a new run.
    """
    runs = Path(config.run.dir).absolute()
    name = config.run.name or slurm_run_name(environment)
    if name is not None:
        return RunFolder(runs / name)
    if config.run.resume == "must":
        raise RunError("run.resume = must: which run? Set run.name to the one to continue")
    if launch_id is not None and (earlier := _run_of_launch(runs, launch_id, finished_too=is_restart)):
        return earlier
    stem = f"{config_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        folder = RunFolder(runs / (stem + suffix))
        try:
            folder.path.mkdir(parents=True)
        except FileExistsError:  # another run was started in this second
            continue
        return folder
    raise RunError(f"{runs} has a thousand runs of this second; set run.name")


def _run_of_launch(runs: Path, launch_id: str, *, finished_too: bool) -> RunFolder | None:
    """A finished one only for a restart: the id of a launch can be given by hand, and given again another day."""
    for status in runs.glob("*/status.json"):
        folder = RunFolder(status.parent)
        known = folder.status()
        if known.get("launch_id") == launch_id and (finished_too or known.get("state") != "finished"):
            return folder
    return None
