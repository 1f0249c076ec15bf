"""A run is a folder: its name, who may write in it, and what it says about the state of the run."""

import errno
import fcntl
import json
import os
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pipeline.base.files import locked, read_json, write_atomically
from pipeline.base.launch import Launch
from pipeline.config import Config
from pipeline.config.arguments import NAME_PATTERN


class RunError(Exception):
    """The run folder cannot be used as asked; the message says why and what to do."""


class RunFolder:
    """The folder of a run, which need not exist, and the places in it."""

    def __init__(self, path: Path):
        self.path = path
        self.name = path.name
        self.config = path / "config.yaml"
        self.journal = path / "journal.jsonl"
        self.checkpoints = path / "checkpoints"
        self.figures = path / "figures"
        self.model = path / "model"
        self.lock = path / ".training.lock"

    def status(self) -> dict[str, Any]:
        """Return the content of status.json; empty for a folder that has none, or none that can be read."""
        return read_json(self.path / "status.json")

    def update_status(self, **changes: Any) -> None:
        """Change some keys of status.json. Training and publisher both write it, hence the lock."""
        with locked(self.path / ".status.lock"):
            status = self.status() | changes
            write_atomically(self.path / "status.json", json.dumps(status, indent=1) + "\n")


def batch_run_name(environment: Mapping[str, str]) -> str | None:
    """Return the name that slurm/train.sbatch gives to a run without one, after its job; None for any other training.

    The id of the job alone is no name: all that is started in an allocation has it. Raises RunError for what is none.
    """
    name = environment.get("CONVOY_RUN_NAME") or None
    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        raise RunError(f"CONVOY_RUN_NAME={name} is no name of a run; unset it, or set run.name")
    return name


def choose_run(config: Config, config_name: str, environment: Mapping[str, str], launch: Launch) -> RunFolder:
    """Return the folder of this run: the one named, the batch job's, that of the same launch before a restart, or a
    new one.

    A default name belongs to one launch only: repeating the command without a name is a new run.
    """
    runs = Path(config.run.dir).absolute()
    name = config.run.name or batch_run_name(environment)
    if name is not None:
        return RunFolder(runs / name)
    if config.run.resume == "must":
        raise RunError("run.resume = must: which run? Set run.name to the one to continue")
    if launch.run_id is not None and (earlier := _run_of_launch(runs, launch)):
        return earlier
    stem = f"{config_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        folder = RunFolder(runs / (stem + suffix))
        with suppress(FileExistsError):  # another run was started in this second
            folder.path.mkdir(parents=True)
            return folder
    raise RunError(f"{runs} has a thousand runs of this second; set run.name")


def _run_of_launch(runs: Path, launch: Launch) -> RunFolder | None:
    """Return the run of a launch; a finished one only for a restart, since an id given by hand can be given again."""
    for status in runs.glob("*/status.json"):
        folder = RunFolder(status.parent)
        known = folder.status()
        if known.get("launch_id") == launch.run_id and (launch.is_restart or known.get("state") != "finished"):
            return folder
    return None


@contextmanager
def training_lock(folder: RunFolder, *, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock while a training writes in the folder, which is made if it is not there.

    Waits `patience` seconds for a holder to leave; raises RunError that names it if it does not. A POSIX lock, which
    forked DataLoader workers do not inherit: it is gone with the training itself.
    """
    with ExitStack() as stack:
        for _ in range(20):
            folder.path.mkdir(parents=True, exist_ok=True)
            wait_until_free(folder, patience)
            with suppress(FileNotFoundError):  # who gives a new folder up removes it with its lock: once more then
                file = stack.enter_context(folder.lock.open("a+"))
                _lock(file, folder)
                if os.path.samestat(os.fstat(file.fileno()), folder.lock.stat()):
                    break
        else:
            raise RunError(f"{folder.lock} is another file each time: put run.dir on another filesystem")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _lock(file: IO[str], folder: RunFolder) -> None:
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


def wait_until_free(folder: RunFolder, patience: float) -> None:
    """Wait until nobody trains in the folder, `patience` seconds at most."""
    deadline = time.monotonic() + patience
    while is_being_trained(folder) and time.monotonic() < deadline:
        time.sleep(0.5)


def is_being_trained(folder: RunFolder) -> bool:
    """Return whether another process holds the training lock, without taking it: that could refuse a training that
    starts. The training itself must not ask: it would lose its POSIX lock by closing the file a second time."""
    question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of 64-bit Linux
    try:
        with folder.lock.open("a+") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    except OSError:
        return False
    return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)
