"""Files that other processes read: replaced as a whole, and locked while they change."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote


def write_atomically(path: Path, content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Replace `path` so that it holds either its old content or all of the new one, also after a power failure.

    `content` may be a function that writes into the open file. Makes the folder of `path`. Raises OSError, with `path`
    as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    try:
        write_synced(temporary, content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_synced(path: Path, content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Write a file and force it to the disk."""
    # never through a link that somebody else put there
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)) as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if there is no such file, or it is damaged."""
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (FileNotFoundError, NotADirectoryError, TypeError, ValueError):
        return {}


def sqlite_uri(path: Path) -> str:
    """Return the address of an SQLite file, absolute; what would end the path or change it there is escaped."""
    return "sqlite:///" + str(path.absolute()).replace("%", "%25").replace("?", "%3F")


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of the file of a `sqlite:///` address; None for another address."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])).absolute()


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes, after waiting for it. The kernel releases it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # closing alone would leave the lock with a child that was forked meanwhile
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
