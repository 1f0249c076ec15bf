"""Whether a training holds a run folder, and the lock by which it does."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.run.folder import RunError, RunFolder


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
