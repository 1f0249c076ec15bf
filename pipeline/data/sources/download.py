"""Published files, verified whenever they are read, and fetched so that no race, interruption or bad mirror can leave
half a dataset behind."""

import gzip
import hashlib
import http.client
import os
import platform
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.base.files import locked
from pipeline.base.logs import logger
from pipeline.data.samples import DataError

SOCKET_TIMEOUT_SECONDS = 20.0
"""A machine without a network must say so soon; a slow mirror sends something more often than this."""
LOCK_NAME = ".download.lock"


@dataclass(frozen=True)
class PublishedFiles:
    """The files of a dataset in a folder under `root`, each plain or packed as `<name>.gz`."""

    dataset: str
    root: Path
    subfolder: str
    checksums: Mapping[str, str]
    """MD5 or SHA-256 of each file, by its name, plain or with .gz."""
    parse: Callable[[str, memoryview], Any]
    """The name of a file and its plain content -> what `read` returns. Raises ValueError if it is damaged."""
    fetch: Callable[[Sequence[str], Path], None]
    """Downloads files of these names into a folder laid out as `root`. Raises DataError or OSError."""
    fallback_folder: Path | None = None
    """A folder that may stand in for the one under `root`."""
    hint: str = ""
    """Another way to get the files."""

    @property
    def folder(self) -> Path:
        return self.root / self.subfolder

    @property
    def names(self) -> list[str]:
        return [name.removesuffix(".gz") for name in self.checksums]

    def missing(self) -> list[str]:
        return [name for name in self.names if self._find(name) is None]

    def prepare(self, *, download: bool) -> None:
        if not self._verify():
            return
        if not download:
            raise self._absent("data.download=false forbids to fetch them")
        try:
            self._download()
        except (DataError, OSError) as error:
            raise self._absent(f"the download failed: {error}") from error

    def read(self, name: str) -> Any:
        """Return what `parse` makes of a file, of the very bytes that were verified. Raises DataError."""
        path = self._find(name)
        if path is None:
            raise self._absent("they must be prepared first")
        try:
            content = np.fromfile(path, np.uint8).data
            if path.suffix == ".gz":
                self._check(path.name, content)
                content = memoryview(bytearray(gzip.decompress(content)))
            self._check(name, content)
            return self.parse(name, content)
        except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
            way_out = "Delete it and run again with data.download=true, or copy it again from a machine that has it."
            raise DataError(f"{path} is damaged: {error}. {way_out}") from error
        except OSError as error:
            raise _unreadable(path, error) from error

    def _check(self, name: str, content: memoryview) -> None:
        if expected := self.checksums.get(name):
            kind = "MD5" if len(expected) == 32 else "SHA-256"
            found = hashlib.new(kind.replace("-", ""), content, usedforsecurity=False).hexdigest()
            if found != expected:
                raise ValueError(f"{kind} {found}, expected {expected}")

    def _verify(self) -> list[str]:
        """Verify the files that are there, and return the names of the others."""
        missing = self.missing()
        for name in self.names:
            if name not in missing:
                self.read(name)
        return missing

    def _find(self, name: str) -> Path | None:
        for folder in (self.folder, self.fallback_folder or self.folder):
            for path in (folder / name, folder / f"{name}.gz"):
                try:
                    if path.is_file():
                        return path
                except OSError as error:
                    raise _unreadable(path, error) from error
        return None

    def _download(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        # One name per node and user: the next download removes what a killed one left, and nothing of anybody else's.
        staging = self.root / f".download-{self.dataset}-{platform.node()}-{os.getuid()}"
        with exclusive(self.root):
            missing = self._verify()
            if not missing:  # another process held the lock before us
                return
            shutil.rmtree(staging, ignore_errors=True)
            try:
                fresh = replace(self, root=staging, fallback_folder=None)
                self.fetch(missing, staging)
                fresh._verify()
                self.folder.mkdir(parents=True, exist_ok=True)
                for name in missing:  # each appears whole or not at all
                    (fresh.folder / name).replace(self.folder / name)
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def _absent(self, reason: str) -> DataError:
        ways_out = (
            *([self.hint] if self.hint else []),
            f"copy these files into {self.folder} from a machine that has them",
            f"set data.root to a folder that holds {self.subfolder}/ with these files",
            "run once with data.download=true on a machine that has a network and shares data.root",
            "set data.dataset to one that needs no download",
        )
        problem = f"{self.folder} lacks {', '.join(self.missing())} (or with .gz); {reason}"
        return DataError("\n- ".join([f"data.dataset={self.dataset}: {problem}.\nWays out:", *ways_out]))


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}. See to its permissions and its disk.")


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Hold `root` for this process alone on this node. Raises OSError if no folder can hold the lock."""
    logger.info("downloading into %s as soon as no other process does", root)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(root / LOCK_NAME))
        except OSError as error:
            # Some shared filesystems have no flock: processes of one node can still meet in its own /tmp.
            logger.info("no lock in %s (%s), taking one in the folder for temporary files", root, error)
            key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
            stack.enter_context(locked(Path(tempfile.gettempdir()) / f"convoy-{os.getuid()}-{key}.lock"))
        yield


def fetch_archive(urls: Sequence[str], md5: str, folder: Path) -> None:
    """Download an archive (.gz, .tar.gz) from the first of `urls` that serves this MD5; unpack it, not atomically.

    Raises DataError with what each of them answered.
    """
    # torchvision is slow to import (about 2.5 s), and most runs find their data in place.
    from torchvision.datasets.utils import download_and_extract_archive

    failures = []
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT_SECONDS)  # torchvision takes none of its own
    try:
        for url in urls:
            try:
                download_and_extract_archive(url, folder, md5=md5)
                return
            except (OSError, RuntimeError, EOFError, http.client.HTTPException, zlib.error) as error:
                failures.append(f"{url}: {error}")
    finally:
        socket.setdefaulttimeout(before)
    raise DataError("; ".join(failures))
