"""A run is a folder: its name, who may write in it, and what it says about the state of the run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.config import FIELDS, Config

State = Literal["running", "finished", "preempted", "failed"]

# A run is these: under other values its checkpoints and curves would be of something else.
IDENTITY = (
    "run.seed",
    "data.dataset",
    "data.image_size",
    "data.mean",
    "data.std",
    "data.global_batch_size",
    "data.synthetic_train_size",
    "data.synthetic_eval_size",
    "data.synthetic_channels",
    "data.synthetic_classes",
    "model.name",
    "model.dropout",
    "model.dropout2d",
    "loss",
    "optim.name",
    "train.reproducible",
    "checkpoint.metric",
)
IDENTITY_IF_REPRODUCIBLE = ("train.virtual_shards", "train.threads")
"""Which change the last bits."""


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


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for and hold an exclusive lock between processes; the kernel releases it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def training_lock(folder: RunFolder, *, patience: float = 0.0) -> Iterator[None]:
    """Held while a training writes in the folder. Raises RunError that names the holder if there is one.

    Waits `patience` seconds for a holder to leave. A POSIX lock, which forked DataLoader workers do not inherit: it is
    gone with the training itself.
    """
    wait_until_free(folder, patience)
    with _lock_path(folder).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise RunError(
                    f"{folder.path} cannot be locked against a second training ({error.strerror}): put run.dir on a "
                    "filesystem that has POSIX locks"
                ) from error
            file.seek(0)
            raise RunError(
                f"run {folder.name} is being trained right now by {file.read().strip() or 'another process'}: wait "
                "for it, stop it, or choose another run.name"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def wait_until_free(folder: RunFolder, patience: float) -> None:
    """Until nobody trains in it, for so many seconds at most."""
    deadline = time.monotonic() + patience
    while is_being_trained(folder) and time.monotonic() < deadline:
        time.sleep(0.5)


def is_being_trained(folder: RunFolder) -> bool:
    """Whether another process holds the training lock. Only asks: taking it could refuse a training that starts.

    Not for the training itself, which would lose its POSIX lock by closing the file a second time.
    """
    question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of 64-bit Linux
    try:
        with _lock_path(folder).open("a+") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    except OSError:
        return False
    return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)


def _lock_path(folder: RunFolder) -> Path:
    return folder.path / ".training.lock"


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


def check_resumable(
    folder: RunFolder,
    config: Config,
    *,
    has_checkpoint: bool,
    launch_id: str | None = None,
    is_requeued: bool = False,
) -> None:
    """Raises RunError if `run.resume` or the folder's own config forbids going on in it.

    What the same launch began before an elastic restart may always go on, and so may a job that Slurm starts again.
    """
    resume = config.run.resume
    if resume == "must" and not has_checkpoint:
        raise RunError(
            f"run.resume = must: there is no usable checkpoint in {folder.checkpoints}; correct run.name or run.dir, "
            "or set run.resume=auto to begin anew"
        )
    if not folder.journal.exists():
        return
    if resume == "never" and not _is_same_launch(folder.status().get("launch_id"), launch_id, is_requeued):
        raise RunError(
            f"run.resume = never: {folder.path} holds a run already; choose another run.name, or set run.resume=auto "
            "to continue it"
        )
    changed = [
        f"{key} was {before}, is {now}" for key, before, now in changes(folder, config) if key in identity(config)
    ]
    if changed:
        raise RunError(
            f"run {folder.name} is another training: {'; '.join(changed)}. Choose another run.name, or go back to the "
            f"values of {folder.config}"
        )


def _is_same_launch(known: str | None, launch_id: str | None, is_requeued: bool) -> bool:
    """Of the launches of one job, <job>-<number>, each has an id of its own."""
    if known is None or launch_id is None:
        return False
    return known == launch_id or (is_requeued and known.rpartition("-")[0] == launch_id.rpartition("-")[0])


def is_finished(status: Mapping[str, Any], config: Config) -> bool:
    """Whether nothing is left to train."""
    return bool(status.get("state") == "finished" and status.get("epoch", 0) >= config.train.epochs)


def identity(config: Config) -> tuple[str, ...]:
    return IDENTITY + (IDENTITY_IF_REPRODUCIBLE if config.train.reproducible else ())


def check_same_training(
    folder: RunFolder, config: Config, saved: Mapping[str, Any], saved_digest: str, digest: str
) -> None:
    """Raises RunError if a checkpoint, with its config and digest of its dataset, is of another training than this."""
    now = json.loads(json.dumps({key: config.get(key) for key in identity(config)}))  # as it was saved
    known = [key for key in now if key in saved]
    changed = [f"{key} was {saved[key]}, is {now[key]}" for key in known if saved[key] != now[key]]
    if digest != saved_digest:
        changed.append(f"{config.data.dataset} has other images or labels (digest {saved_digest}, now {digest})")
    if changed:
        raise RunError(
            f"the checkpoints in {folder.checkpoints} are of another training: {'; '.join(changed)}. Choose another "
            "run.name, or go back to what it was"
        )


def changes(folder: RunFolder, config: Config) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of all that differs from the config the folder was last run with."""
    if not folder.config.exists():  # killed at its very beginning
        return []
    try:
        content = yaml.safe_load(folder.config.read_text())
        saved = Config.model_validate({name: _known(name, section) for name, section in content.items()})
    except (ValueError, AttributeError, yaml.YAMLError) as error:
        raise RunError(
            f"{folder.config} is not a config of this version, mend it or choose another run.name: {error}"
        ) from error
    return [(key, saved.get(key), value) for key, value in config.flat().items() if saved.get(key) != value]


def _known(name: str, section: Any) -> Any:
    """A section without the keys of other versions."""
    return {k: v for k, v in section.items() if f"{name}.{k}" in FIELDS} if isinstance(section, dict) else section
