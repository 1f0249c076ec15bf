"""Datasets that are downloaded: MNIST and its relatives, and CIFAR-10. The layout on disk is torchvision's."""

import math
import pickle
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.samples import Content, Dataset, PixelSamples
from pipeline.data.sources.download import PublishedFiles, fetch_archive

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
UNSIGNED_BYTES = 0x0800
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four files."""
MNIST_SHA256 = (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
FASHION_MNIST_SHA256 = (
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
FASHION = "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
KMNIST_MD5_OF_ARCHIVES = (
    "bdb82020997e1d708af4cf47b453dcf7",
    "e144d726b3acfaa3e44228e80efcd344",
    "5c965bf0a639b31b8f53240b1b52f4d7",
    "7320c461ea6c1c855c0b718fb2a4b134",
)
CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}


@dataclass(frozen=True)
class IdxSource:
    """A grey dataset of four IDX files, which lie in `<root>/<torchvision_name>/raw`."""

    name: str
    torchvision_name: str
    """Name of the class that knows the mirrors."""
    mean: float
    std: float
    classes: Sequence[str]
    origin: str
    checksums: Mapping[str, str]
    sizes: tuple[int, int] = (60_000, 10_000)
    """Samples for training and validation."""
    side: int = 28
    fallback_folder: Path | None = None
    hint: str = ""

    def __call__(self, root: Path, seed: int) -> Dataset:
        fetch, subfolder = partial(_fetch, self.torchvision_name), f"{self.torchvision_name}/raw"
        files = PublishedFiles(
            self.name, root, subfolder, self.checksums, self._parse, fetch, self.fallback_folder, self.hint
        )
        return Dataset(
            name=self.name,
            train=self._split(files, self.sizes[0], *NAMES[:2]),
            validation=self._split(files, self.sizes[1], *NAMES[2:]),
            classes=tuple(self.classes),
            channels=1,
            image_size=self.side,
            mean=(self.mean,),
            std=(self.std,),
            origin=f"{self.origin}, IDX files; validation is the published test split",
            files=files,
        )

    def _split(self, files: PublishedFiles, size: int, images: str, labels: str) -> PixelSamples:
        known = " ".join(self.checksums.get(name, "") for name in (images, labels)).strip()
        return PixelSamples(size, lambda: (files.read(images)[:, None], files.read(labels).long(), known))

    def _parse(self, name: str, content: memoryview) -> Tensor:
        size = self.sizes[NAMES.index(name) // 2]
        shape = (size, self.side, self.side) if "images" in name else (size,)
        return parse_idx(content, shape, len(self.classes))


def parse_idx(content: memoryview, shape: tuple[int, ...], num_classes: int) -> Tensor:
    """Return the uint8 tensor of `shape` in an IDX file; one dimension means labels.

    Raises ValueError unless header, size to the byte and labels are as expected, for files of unknown checksum. The
    header is 0x08 for "unsigned bytes" with the number of dimensions, and each dimension, as big-endian integers of
    four bytes (http://yann.lecun.com/exdb/mnist/).
    """
    header = struct.pack(f">{1 + len(shape)}i", UNSIGNED_BYTES + len(shape), *shape)
    size, begin = len(header) + math.prod(shape), content[: len(header)]
    if len(content) != size or begin != header:
        raise ValueError(f"{len(content)} bytes that begin {begin.hex(' ', 4)}, expected {size}, {header.hex(' ', 4)}")
    values = torch.frombuffer(content, dtype=torch.uint8, offset=len(header)).view(shape)
    if len(shape) == 1 and values.max() >= num_classes:
        raise ValueError(f"label {int(values.max())}, expected 0 to {num_classes - 1}")
    return values


def _fetch(torchvision_name: str, names: Sequence[str], root: Path) -> None:
    import torchvision  # slow, as in fetch_archive

    published = getattr(torchvision.datasets, torchvision_name)
    for archive, md5 in published.resources:
        if archive.removesuffix(".gz") in names:
            fetch_archive([mirror + archive for mirror in published.mirrors], md5, root / torchvision_name / "raw")


def cifar10(root: Path, seed: int) -> Dataset:
    files = PublishedFiles("cifar10", root, "cifar-10-batches-py", CIFAR10_MD5, _unpickle_verified, _fetch_cifar10)

    def split(size: int, *names: str) -> PixelSamples:
        def load() -> Content:
            batches = [files.read(name) for name in names]
            pixels = torch.from_numpy(np.concatenate([batch["data"] for batch in batches])).view(-1, 3, 32, 32)
            labels = torch.tensor([label for batch in batches for label in batch["labels"]])
            return pixels, labels, " ".join(CIFAR10_MD5[name] for name in names)

        return PixelSamples(size, load)

    return Dataset(
        name="cifar10",
        train=split(50_000, *(f"data_batch_{index}" for index in range(1, 6))),
        validation=split(10_000, "test_batch"),
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        channels=3,
        image_size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        origin="CIFAR-10 (Krizhevsky, University of Toronto), python version; validation is the published test split",
        files=files,
    )


def _unpickle_verified(name: str, content: memoryview) -> Any:
    """Return the object in a pickle, whatever code is in it: only for content whose checksum was verified."""
    return pickle.loads(content, encoding="latin1")


def _fetch_cifar10(names: Sequence[str], root: Path) -> None:
    from torchvision.datasets import CIFAR10  # slow, as in fetch_archive

    fetch_archive([CIFAR10.url], CIFAR10.tgz_md5, root)


# Means and deviations of MNIST and Fashion-MNIST are measured (a test does it again); those of KMNIST and CIFAR-10 are
# the ones quoted in the literature.
SOURCES = {
    "mnist": IdxSource(
        "mnist",
        "MNIST",
        mean=0.1307,
        std=0.3081,
        classes="0123456789",
        origin="MNIST (LeCun, Cortes, Burges)",
        checksums=dict(zip(NAMES, MNIST_SHA256, strict=True)),
    ),
    "fashion_mnist": IdxSource(
        "fashion_mnist",
        "FashionMNIST",
        mean=0.2860,
        std=0.3530,
        classes=FASHION,
        origin="Fashion-MNIST (Zalando)",
        checksums=dict(zip(NAMES, FASHION_MNIST_SHA256, strict=True)),
        fallback_folder=DEBIAN_FASHION_MNIST,
        hint="install it: apt-get install dataset-fashion-mnist (Debian, Ubuntu)",
    ),
    "kmnist": IdxSource(
        "kmnist",
        "KMNIST",
        mean=0.1918,
        std=0.3483,
        classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        origin="Kuzushiji-MNIST (ROIS-DS CODH)",
        checksums=dict(zip((f"{name}.gz" for name in NAMES), KMNIST_MD5_OF_ARCHIVES, strict=True)),
    ),
    "cifar10": cifar10,
}
