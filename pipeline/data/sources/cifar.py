"""CIFAR-10 as torchvision reads it, its errors turned into ours."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.sources.download import DataError, check_md5, fetch_archive, is_there


@dataclass(frozen=True)
class CifarFolder:
    """`cifar-10-batches-py` under `root`. torchvision unpickles its files, having checked their MD5."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "cifar-10-batches-py"

    def absent(self) -> list[str]:
        """Names of the files that are not there."""
        return [name for name in self._checksums() if not is_there(self.folder / name)]

    def verify(self) -> None:
        """Check the MD5 of the files that are there. Raises DataError."""
        for name, expected in self._checksums().items():
            path = self.folder / name
            if is_there(path):
                check_md5(path, expected)

    def fetch(self, names: Sequence[str]) -> None:
        """Download and unpack the archive of all files, whichever are asked for. Raises DataError."""
        published = _published()
        fetch_archive([published.url], published.tgz_md5, self.root)

    def read(self) -> list[npt.NDArray[Any]]:
        """Training images uint8 [N, 3, 32, 32] and labels int64 [N], then the same for evaluation.

        Raises DataError.
        """
        return [*self._read_split(train=True), *self._read_split(train=False)]

    def _read_split(self, *, train: bool) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        try:
            split = _published()(self.root, train=train, download=False)
        except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            self.verify()  # names the damaged file, if that is the reason
            raise DataError(f"CIFAR-10 cannot be read from {self.folder}: {error}") from error
        return split.data.transpose(0, 3, 1, 2), np.array(split.targets, dtype=np.int64)

    def _checksums(self) -> dict[str, str]:
        published = _published()
        meta = published.meta
        return dict([*published.train_list, *published.test_list, (meta["filename"], meta["md5"])])


def _published() -> Any:
    # Imported here because it takes about 2.5 s, which runs on other data need not pay.
    from torchvision.datasets import CIFAR10

    return CIFAR10
