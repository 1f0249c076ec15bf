"""Datasets: splits of samples in a fixed order, and all that is known of them without reading."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

from torch import Tensor


class DataError(Exception):
    """A dataset is absent, damaged or cannot be had; the message is for the user."""


class Samples(Protocol):
    """One split in a fixed order. Sample i is the same on every rank, however often it is read."""

    @property
    def labels(self) -> Tensor:
        """int64 [N], in memory."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """Return one image as stored, uint8 [C, height, width]. An error names the file."""


Content = tuple[Tensor, Tensor, str]
"""Pixels uint8 [N, C, height, width], labels int64 [N], and what tells them from any others, on every machine alike;
an empty text stands for their own SHA-256."""


class PixelSamples:
    """Samples in memory or in a mapped file, loaded at first use."""

    def __init__(self, size: int, load: Callable[[], Content]):
        """`load` reads the content of `size` samples, anew at each call."""
        self._size = size
        self.load = load

    @classmethod
    def of(cls, pixels: Tensor, labels: Tensor) -> Self:
        """Return samples that are loaded already."""
        return cls(len(labels), lambda: (pixels, labels, ""))

    @cached_property
    def _content(self) -> Content:
        return self.load()

    @property
    def pixels(self) -> Tensor:
        return self._content[0]

    @property
    def labels(self) -> Tensor:
        return self._content[1]

    def __len__(self) -> int:
        return self._size

    def read(self, index: int) -> Tensor:
        return self.pixels[index]


class Files(Protocol):
    def missing(self) -> list[str]:
        """Return the names of the files that are not there."""

    def prepare(self, *, download: bool) -> None:
        """Have all files there and verified; nothing is written if they are. Any number of processes may do so at once.

        Raises DataError if a file is absent, damaged or cannot be had.
        """


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The result of a source, a function `(root: Path, seed: int, **arguments)` that reads nothing."""

    name: str
    train: Samples
    validation: Samples
    """Chooses the best weights."""
    test: Samples | None = None
    """Looked at once, at the end."""
    classes: tuple[str, ...]
    channels: int
    image_size: int
    """Side in pixels of the images as stored; after `list_dataset`, as the training uses them."""
    mean: tuple[float, ...]
    """Per channel, of pixels in [0, 1], over the training images."""
    std: tuple[float, ...]
    origin: str
    """Where the data and the splits come from, one line."""
    note: str = ""
    """Said at the start and the end of a training."""
    digest: str = ""
    """16 hex digits that change with the data and `image_size`, the same on every machine; empty until loaded."""
    files: Files | None = None
    """None: the data are made here."""

    @property
    def splits(self) -> dict[str, Samples]:
        """Return the splits there are, by name."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: samples for name, samples in found.items() if samples is not None}


def fingerprint(*tensors: Tensor) -> str:
    """Return the SHA-256 of the shapes and bytes of `tensors`."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
