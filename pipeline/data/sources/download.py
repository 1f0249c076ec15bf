"""Fetching archives so that no race, interruption or bad mirror can leave half a dataset behind."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import logging
import os
import platform
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SOCKET_TIMEOUT_SECONDS = 20.0
"""A machine without a network must say so soon; a slow mirror sends something more often than this."""

LOCK_NAME = ".download.lock"

logger = logging.getLogger("convoy")


class DataError(Exception):
    """A dataset is absent, damaged or cannot be had; the message is for the user."""


def damaged(path: Path, found: str, expected: str) -> DataError:
    """The error for a file that is there but not what it should be."""
    return DataError(
        f"{path} is damaged: {found}, expected {expected}. Delete it and run again with data.download=true, "
        "or copy it again from a machine that has it."
    )


def is_there(path: Path) -> bool:
    """Whether it is a file. Raises DataError if that cannot be told."""
    try:
        return path.is_file()
    except OSError as error:
        raise unreadable(path, error) from error


def check_md5(path: Path, expected: str) -> None:
    """Raises DataError if the file has another MD5, or cannot be read."""
    try:
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
    if digest != expected:
        raise damaged(path, f"MD5 {digest}", expected)


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file that the system does not let us read."""
    return DataError(f"{path} cannot be read: {error.strerror or error}. See to its permissions and its disk.")


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """One process of this node at a time holds `root`. The kernel frees the lock when its holder dies.

    Raises OSError if neither `root` nor the folder for temporary files can hold the lock.
    """
    descriptor = _open_lock(root)
    try:
        yield
    finally:
        # Closing alone would leave the lock with a child that was forked meanwhile.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _open_lock(root: Path) -> int:
    try:
        return _lock(root / LOCK_NAME)
    except OSError as error:
        # Some shared filesystems have no flock: processes of one node can still meet in its own /tmp.
        logger.info("no lock in %s (%s), taking one in the folder for temporary files", root, error)
        key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
        return _lock(Path(tempfile.gettempdir()) / f"convoy-{os.getuid()}-{key}.lock")


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that holds %s", path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def staging_folder(root: Path, name: str) -> Iterator[Path]:
    """An empty folder on the filesystem of `root`, removed afterwards. Call it inside `exclusive(root)`.

    Its name is fixed per node and user, so what a killed process left is removed by the next one and never
    piles up, while those who share `root` without sharing the lock do not touch each other's.
    """
    folder = root / f".download-{name}-{platform.node()}-{os.getuid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetch_archive(urls: Sequence[str], md5: str, folder: Path) -> None:
    """Download an archive (.gz or .tar.gz) from the first of `urls` that has it and unpack it into `folder`.

    Raises DataError with what each of them answered.
    """
    # torchvision is slow to import (about 2.5 s), and most runs find their data in place.
    from torchvision.datasets.utils import download_and_extract_archive

    failures = []
    for url in urls:
        try:
            with _socket_timeout(SOCKET_TIMEOUT_SECONDS):
                download_and_extract_archive(url, str(folder), filename=url.rsplit("/", 1)[-1], md5=md5)
            return
        except (OSError, RuntimeError, EOFError, http.client.HTTPException, zlib.error) as error:
            failures.append(f"{url}: {error}")
    raise DataError("; ".join(failures))


def install(names: Iterable[str], source: Path, target: Path) -> None:
    """Move verified files into place; each appears whole or not at all. Raises OSError."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        (source / name).replace(target / name)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision's downloads take no timeout of their own; the default of this process is all they heed."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
