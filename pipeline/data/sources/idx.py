"""IDX files (the format of MNIST and its relatives), read strictly: what is damaged is refused."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.sources.download import check_md5, damaged, fetch_archive, is_there, unreadable

Bytes = npt.NDArray[np.uint8]

# An IDX header is a magic number (0x08 for "unsigned bytes", then the number of dimensions) and each
# dimension, as big-endian integers of four bytes (http://yann.lecun.com/exdb/mnist/).
_UNSIGNED_BYTES = 0x0800
_UNPACK_CHUNK_BYTES = 2**20

TORCHVISION_NAMES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
"""Name of a dataset -> its class in torchvision, which is also its folder under the root."""

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four files; used when they are not under the root."""

SHA256: dict[str, tuple[str, str, str, str]] = {
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion_mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
"""Of the unpacked files: training images and labels, evaluation images and labels. For KMNIST only the MD5 of
the archives is at hand, in torchvision."""


@dataclass(frozen=True)
class IdxFile:
    """One file of a dataset and what it must hold."""

    name: str
    """Without `.gz`; the file may lie there plain or as `<name>.gz`."""
    shape: tuple[int, ...]
    """(samples, height, width) of images, (samples,) of labels."""
    num_classes: int | None = None
    """Of labels: each must be below it."""
    sha256: str | None = None
    """Of the plain content, where it is published."""

    @property
    def magic(self) -> int:
        return _UNSIGNED_BYTES + len(self.shape)

    @property
    def header_bytes(self) -> int:
        return 4 * (1 + len(self.shape))

    @property
    def total_bytes(self) -> int:
        return self.header_bytes + math.prod(self.shape)


@dataclass(frozen=True)
class IdxContent:
    """What an IDX file holds."""

    values: Bytes
    """Of shape `IdxFile.shape`, writable."""
    sha256: str
    """Of the plain content, header included, also where the file is packed."""


@dataclass(frozen=True)
class IdxFolder:
    """The IDX files of a dataset: in `folder`, or in one of the folders that may stand in for it."""

    torchvision_name: str
    """Of the class that knows the mirrors and the checksums of the archives there."""
    files: tuple[IdxFile, ...]
    folder: Path
    elsewhere: tuple[Path, ...] = ()

    def absent(self) -> list[str]:
        """Names of the files that are nowhere."""
        return [file.name for file in self.files if self._find(file) is None]

    def verify(self) -> None:
        """Check all that is known of the files that are there. Raises DataError."""
        for file in self.files:
            if path := self._find(file):
                self._read_verified(path, file)

    def fetch(self, names: Sequence[str]) -> None:
        """Download files into `folder`. Raises DataError with what the mirrors answered."""
        mirrors: Sequence[str] = self._published().mirrors
        for name in names:
            archive = f"{name}.gz"
            fetch_archive([mirror + archive for mirror in mirrors], self._archives()[archive], self.folder)

    def read(self, *, verify: bool) -> list[IdxContent]:
        """The content of each of `files`, in their order; none may be absent. Raises DataError.

        With `verify` all that is known of them is checked on the way, else what can be told without checksums.
        """
        read = self._read_verified if verify else read_idx
        return [read(self._find(file) or self.folder / file.name, file) for file in self.files]

    def _read_verified(self, path: Path, file: IdxFile) -> IdxContent:
        content = read_idx(path, file)
        if file.sha256 is not None and content.sha256 != file.sha256:
            raise damaged(path, f"SHA-256 {content.sha256}", file.sha256)
        if file.sha256 is None and path.suffix == ".gz":
            check_md5(path, self._archives()[path.name])
        return content

    def _find(self, file: IdxFile) -> Path | None:
        names = (file.name, f"{file.name}.gz")
        candidates = (folder / name for folder in (self.folder, *self.elsewhere) for name in names)
        return next((path for path in candidates if is_there(path)), None)

    def _archives(self) -> dict[str, str]:
        return dict(self._published().resources)

    def _published(self) -> Any:
        # torchvision is slow to import (about 2.5 s), and most runs find their data in place.
        import torchvision

        return getattr(torchvision.datasets, self.torchvision_name)


def idx_folder(name: str, root: Path, *, sizes: tuple[int, int], image_size: int, num_classes: int) -> IdxFolder:
    """Where under `root` a dataset of TORCHVISION_NAMES lies and what its files must hold.

    `sizes` counts the samples for training and for evaluation.
    """
    known = iter(SHA256.get(name, (None,) * 4))
    files = []
    for split, size in zip(("train", "t10k"), sizes, strict=True):
        shape = (size, image_size, image_size)
        files.append(IdxFile(f"{split}-images-idx3-ubyte", shape, sha256=next(known)))
        files.append(IdxFile(f"{split}-labels-idx1-ubyte", (size,), num_classes, sha256=next(known)))
    folder = root / TORCHVISION_NAMES[name] / "raw"
    elsewhere = (DEBIAN_FASHION_MNIST,) if name == "fashion_mnist" else ()
    return IdxFolder(TORCHVISION_NAMES[name], tuple(files), folder, elsewhere)


def read_idx(path: Path, file: IdxFile) -> IdxContent:
    """The content of an IDX file and its SHA-256, whatever that is.

    Raises DataError unless magic number, dimensions, size to the byte and range of labels are as expected.
    """
    content = _read_content(path, file)
    _check_header_and_size(path, file, content)
    values = content[file.header_bytes :].reshape(file.shape)
    if file.num_classes is not None:
        _check_labels(path, values, file.num_classes)
    return IdxContent(values, hashlib.sha256(content.data).hexdigest())


def _read_content(path: Path, file: IdxFile) -> Bytes:
    """At most one byte more than expected: enough to see that a file is too long, however far it unpacks."""
    limit = file.total_bytes + 1
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as packed:
                return _unpack(packed, limit)
        return np.fromfile(path, dtype=np.uint8, count=limit)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise damaged(path, str(error), "a whole gzip file") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _unpack(packed: gzip.GzipFile, limit: int) -> Bytes:
    """Chunk by chunk into its place: to read all at once would hold the content twice."""
    content, size = np.empty(limit, dtype=np.uint8), 0
    while count := packed.readinto(content[size : size + _UNPACK_CHUNK_BYTES].data):
        size += count
    return content[:size]


def _check_header_and_size(path: Path, file: IdxFile, content: Bytes) -> None:
    if content.size < file.header_bytes:
        raise damaged(path, f"{content.size} bytes", f"{file.total_bytes}")
    magic, *shape = (int(value) for value in content[: file.header_bytes].view(">u4"))
    if magic != file.magic:
        raise damaged(path, f"it begins with {magic:#010x}", f"{file.magic:#010x} (IDX)")
    if tuple(shape) != file.shape:
        raise damaged(path, f"its header says {tuple(shape)}", f"{file.shape}")
    if content.size != file.total_bytes:
        found = f"{content.size}" if content.size < file.total_bytes else f"more than {file.total_bytes}"
        raise damaged(path, f"{found} bytes", f"{file.total_bytes}")


def _check_labels(path: Path, labels: Bytes, num_classes: int) -> None:
    wrong = np.flatnonzero(labels >= num_classes)
    if wrong.size:
        raise damaged(path, f"label {labels[wrong[0]]} at position {wrong[0]}", f"0 to {num_classes - 1}")
