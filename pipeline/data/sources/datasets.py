"""A dataset's name -> its images and labels as uint8 and int64 tensors, verified before they are used.

`prepare_dataset` makes a dataset present, `load_dataset` only reads it, `obtain_dataset` does both at one reading. The
layout on disk is torchvision's: `MNIST/raw/train-images-idx3-ubyte`, `cifar-10-batches-py/data_batch_1`...
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

from pipeline.data.sources.cifar import CifarFolder
from pipeline.data.sources.download import DataError, exclusive, install, staging_folder
from pipeline.data.sources.idx import TORCHVISION_NAMES, IdxFolder, idx_folder

__all__ = [
    "DATASETS",
    "DataError",
    "Dataset",
    "DatasetInfo",
    "ImageSet",
    "load_dataset",
    "obtain_dataset",
    "prepare_dataset",
    "synthetic_info",
]


@dataclass(frozen=True)
class DatasetInfo:
    """All that is known of a dataset without reading a file."""

    name: str
    channels: int
    num_classes: int
    image_size: int
    """Side in pixels of the images as they are stored (digits: as they are enlarged to by default)."""
    train_size: int
    eval_size: int
    mean: tuple[float, ...]
    """Of pixels in [0, 1], per channel, over the training images."""
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    source: str
    """Where the data come from, one line, for the tracking record."""


@dataclass(frozen=True)
class ImageSet:
    images: torch.Tensor
    """uint8 [N, C, H, W]."""
    labels: torch.Tensor
    """int64 [N]."""


@dataclass(frozen=True)
class Dataset:
    info: DatasetInfo
    """With `image_size` as loaded."""
    train: ImageSet
    evaluation: ImageSet
    digest: str
    """16 hex digits that change when the data or their size do, the same on every machine."""


@dataclass(frozen=True)
class _Content:
    """A dataset as it is stored, whatever the size of its images."""

    train: ImageSet
    """Of digits the images are floats in 0..255, to be rounded only once."""
    evaluation: ImageSet
    checksums: Sequence[str]
    """SHA-256 of each part, in a fixed order: of the files, where these were hashed to be verified."""


_DIGIT_NAMES = tuple("0123456789")
_FASHION_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_DIGITS_SOURCE = "scikit-learn load_digits (UCI optical recognition of handwritten digits), 8x8, enlarged"
_KMNIST_NAMES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _like_mnist(name: str, mean: float, std: float, class_names: tuple[str, ...], source: str) -> DatasetInfo:
    return DatasetInfo(name, 1, 10, 28, 60_000, 10_000, (mean,), (std,), class_names, source)


# Means and deviations of digits, MNIST and Fashion-MNIST are measured (a test does it again); those of KMNIST
# and CIFAR-10 are the ones quoted in the literature.
_INFOS = (
    DatasetInfo("digits", 1, 10, 28, 1437, 360, (0.3054,), (0.3247,), _DIGIT_NAMES, _DIGITS_SOURCE),
    _like_mnist("mnist", 0.1307, 0.3081, _DIGIT_NAMES, "MNIST (LeCun, Cortes, Burges), IDX files"),
    _like_mnist("fashion_mnist", 0.2860, 0.3530, _FASHION_NAMES, "Fashion-MNIST (Zalando), IDX files"),
    _like_mnist("kmnist", 0.1918, 0.3483, _KMNIST_NAMES, "Kuzushiji-MNIST (ROIS-DS CODH), IDX files"),
    DatasetInfo(
        name="cifar10",
        channels=3,
        num_classes=10,
        image_size=32,
        train_size=50_000,
        eval_size=10_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        class_names=_CIFAR10_NAMES,
        source="CIFAR-10 (Krizhevsky, University of Toronto), python version",
    ),
)
DATASETS: dict[str, DatasetInfo] = {info.name: info for info in _INFOS}

_MADE_HERE = ("digits", "synthetic")
_SYNTHETIC_LEVELS = 128
_SYNTHETIC_GRID = 8
_RESIZE_CHUNK_PIXELS = 2**24
"""How many pixels are floats at a time: 64 MiB."""


def synthetic_info(*, channels: int, num_classes: int, image_size: int, train_size: int, eval_size: int) -> DatasetInfo:
    """Random images of any shape that a network can learn: for benchmarks and tests."""
    # A pixel is the sum of two independent uniform integers below _SYNTHETIC_LEVELS, hence these two.
    mean = (_SYNTHETIC_LEVELS - 1) / 255
    std = ((_SYNTHETIC_LEVELS**2 - 1) / 6) ** 0.5 / 255
    return DatasetInfo(
        name="synthetic",
        channels=channels,
        num_classes=num_classes,
        image_size=image_size,
        train_size=train_size,
        eval_size=eval_size,
        mean=(round(mean, 4),) * channels,
        std=(round(std, 4),) * channels,
        class_names=tuple(f"class {index}" for index in range(num_classes)),
        source="random prototypes plus noise, made from the seed",
    )


def prepare_dataset(info: DatasetInfo, root: Path, *, download: bool) -> None:
    """Make the dataset present under `root` and verify it.

    Nothing is written if it is complete. Any number of processes may do the same at once, and what is
    downloaded is verified before it gets its name. Raises DataError if the dataset is absent, damaged or
    cannot be had.
    """
    if info.name in _MADE_HERE:
        return
    stored = _stored(info, root)
    stored.verify()
    if not stored.absent():
        return
    if not download:
        raise _absent_error(info, root, "data.download=false forbids to fetch them")
    try:
        _download(info, root)
    except DataError as error:
        raise _absent_error(info, root, f"the download failed: {error}") from error
    except OSError as error:
        raise _absent_error(info, root, f"they could not be stored: {error}") from error


def is_present(info: DatasetInfo, root: Path) -> bool:
    """Whether all its files are under `root`, sound or not."""
    return info.name in _MADE_HERE or not _stored(info, root).absent()


def obtain_dataset(info: DatasetInfo, root: Path, *, download: bool, image_size: int | None, seed: int = 0) -> Dataset:
    """As `prepare_dataset` and then `load_dataset`, but each file that is there is read and hashed only once."""
    if not is_present(info, root):
        prepare_dataset(info, root, download=download)
    return load_dataset(info, root, image_size=image_size, seed=seed, verify=True)


def load_dataset(
    info: DatasetInfo, root: Path, *, image_size: int | None, seed: int = 0, verify: bool = False
) -> Dataset:
    """Read what `prepare_dataset` left under `root`, resized to `image_size` pixels a side if given.

    Writes nothing. `seed` matters to the synthetic dataset alone. With `verify`, the checksums are checked as
    `prepare_dataset` does. Raises DataError if files are absent or damaged.
    """
    size = info.image_size if image_size is None else image_size
    if size < 1:
        raise DataError(f"data.image_size={size}: accepted are 1 and more, or null for the dataset's own.")
    content = _read(info, root, seed, verify=verify)
    sizes = len(content.train.labels), len(content.evaluation.labels)
    assert sizes == (info.train_size, info.eval_size), info
    return Dataset(
        info=replace(info, image_size=size),
        train=_resize(content.train, size, antialias=info.name != "digits"),
        evaluation=_resize(content.evaluation, size, antialias=info.name != "digits"),
        # Of the images as stored: resizing computes in floats, whose last bits may differ between processors.
        digest=hashlib.sha256(" ".join([str(size), *content.checksums]).encode()).hexdigest()[:16],
    )


def _download(info: DatasetInfo, root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with exclusive(root):
        stored = _stored(info, root)
        stored.verify()
        missing = stored.absent()  # perhaps none by now: another process held the lock before us
        if missing:
            with staging_folder(root, info.name) as staging:
                fresh = _stored(info, staging)
                fresh.fetch(missing)
                fresh.verify()
                install(missing, fresh.folder, stored.folder)


def _stored(info: DatasetInfo, root: Path) -> IdxFolder | CifarFolder:
    if info.name == "cifar10":
        return CifarFolder(root)
    if info.name not in TORCHVISION_NAMES:
        raise DataError(f"data.dataset={info.name}: accepted are {', '.join([*DATASETS, 'synthetic'])}.")
    sizes = (info.train_size, info.eval_size)
    return idx_folder(info.name, root, sizes=sizes, image_size=info.image_size, num_classes=info.num_classes)


def _absent_error(info: DatasetInfo, root: Path, reason: str) -> DataError:
    stored = _stored(info, root)
    ways_out = [
        f"- copy these files into {stored.folder} from a machine that has them",
        f"- set data.root to a folder that holds {stored.folder.relative_to(root)}/ with these files",
        "- run once with data.download=true on a machine that has a network and shares data.root",
        "- set data.dataset=digits, which needs no download",
    ]
    if info.name == "fashion_mnist":
        ways_out.insert(0, "- install it: apt-get install dataset-fashion-mnist (Debian, Ubuntu)")
    files = ", ".join(stored.absent()) + (" (or with .gz)" if isinstance(stored, IdxFolder) else "")
    problem = f"data.dataset={info.name}: {stored.folder} lacks {files}; {reason}."
    return DataError("\n".join([problem, "Ways out:", *ways_out]))


def _read(info: DatasetInfo, root: Path, seed: int, *, verify: bool) -> _Content:
    if info.name == "digits":
        return _checksummed(*_read_digits(info))
    if info.name == "synthetic":
        return _checksummed(*_make_synthetic(info, seed))
    stored = _stored(info, root)
    if stored.absent():
        raise _absent_error(info, root, "they must be prepared first")
    if isinstance(stored, CifarFolder):
        return _checksummed(*_image_sets(info, stored.read()))  # which torchvision never reads unverified
    files = stored.read(verify=verify)
    return _Content(*_image_sets(info, [file.values for file in files]), [file.sha256 for file in files])


def _image_sets(info: DatasetInfo, arrays: Sequence[npt.NDArray[Any]]) -> tuple[ImageSet, ImageSet]:
    train_images, train_labels, eval_images, eval_labels = arrays
    return _image_set(info, train_images, train_labels), _image_set(info, eval_images, eval_labels)


def _image_set(info: DatasetInfo, images: npt.NDArray[Any], labels: npt.NDArray[Any]) -> ImageSet:
    """Images [N, H, W] or [N, C, H, W] and labels [N] -> the tensors."""
    side = images.shape[-1]
    pixels = torch.from_numpy(images).reshape(-1, info.channels, side, side)
    return ImageSet(pixels.contiguous(), torch.from_numpy(labels).long())


def _read_digits(info: DatasetInfo) -> tuple[ImageSet, ImageSet]:
    # Imported here because it takes over a second, which runs on other data need not pay.
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(f"data.dataset=digits needs `pip install scikit-learn`: {error}") from error

    digits = load_digits()
    images, labels = (digits.images * (255 / 16)).astype(np.float32), digits.target  # stored as 0..16
    parts = train_test_split(images, labels, test_size=info.eval_size, random_state=0, stratify=labels)
    train_images, eval_images, train_labels, eval_labels = parts
    return _image_sets(info, [train_images, train_labels, eval_images, eval_labels])


def _make_synthetic(info: DatasetInfo, seed: int) -> tuple[ImageSet, ImageSet]:
    """A class is a coarse random pattern, a sample its pattern plus as strong a noise, pixel by pixel.

    Integers throughout, so that the bits are the same on every machine.
    """
    grid = min(_SYNTHETIC_GRID, info.image_size)
    shape = (info.num_classes, info.channels, grid, grid)
    coarse = np.random.default_rng([seed, 0]).integers(0, _SYNTHETIC_LEVELS, shape, dtype=np.uint8)
    cell = np.arange(info.image_size) * grid // info.image_size
    prototypes = coarse[:, :, cell][:, :, :, cell]

    def draw(stream: int, size: int) -> ImageSet:
        generator = np.random.default_rng([seed, stream])
        labels = generator.permutation(np.arange(size) % info.num_classes)
        images = prototypes[labels]
        for start in range(0, size, 256):  # the noise of all at once would double the memory
            chunk = images[start : start + 256]
            chunk += generator.integers(0, _SYNTHETIC_LEVELS, chunk.shape, dtype=np.uint8)
        return _image_set(info, images, labels)

    return draw(1, info.train_size), draw(2, info.eval_size)


def _resize(images: ImageSet, size: int, *, antialias: bool) -> ImageSet:
    """Bilinear, to `size` x `size` uint8; a chunk at a time, so that memory holds few floats."""
    pixels = images.images
    count, channels, _, side = pixels.shape
    if side == size and pixels.dtype == torch.uint8:
        return images
    resized = torch.empty((count, channels, size, size), dtype=torch.uint8)
    step = max(1, _RESIZE_CHUNK_PIXELS // (channels * max(side, size) ** 2))
    for start in range(0, count, step):
        part = pixels[start : start + step].float()
        part = interpolate(part, (size, size), mode="bilinear", align_corners=False, antialias=antialias)
        resized[start : start + step] = part.round()
    return ImageSet(resized, images.labels)


def _checksummed(train: ImageSet, evaluation: ImageSet) -> _Content:
    tensors = (train.images, train.labels, evaluation.images, evaluation.labels)
    return _Content(train, evaluation, [_checksum(tensor) for tensor in tensors])


def _checksum(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    digest.update(tensor.numpy().data)
    return digest.hexdigest()
