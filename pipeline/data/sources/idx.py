"""Datasets of four IDX files, the format of MNIST and its relatives."""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.data.samples import Dataset, PixelSamples
from pipeline.data.sources.download import PublishedFiles, fetch_archive

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
UNSIGNED_BYTES = 0x0800


def idx_source(
    name: str,
    torchvision_name: str,
    *,
    mean: float,
    std: float,
    classes: Sequence[str],
    origin: str,
    checksums: Mapping[str, str],
    sizes: tuple[int, int] = (60_000, 10_000),
    side: int = 28,
    elsewhere: Path | None = None,
    hint: str = "",
) -> Callable[[Path, int], Dataset]:
    """Return the source of a grey dataset whose files lie in `<root>/<torchvision_name>/raw`.

    The class of that name knows the mirrors. `sizes` counts the samples for training and validation, `side` the pixels.
    """
    shapes = dict(zip(NAMES, [shape for size in sizes for shape in ((size, side, side), (size,))], strict=True))

    def list_dataset(root: Path, seed: int) -> Dataset:
        def parse(name: str, content: memoryview) -> Tensor:
            return parse_idx(content, shapes[name], len(classes))

        fetch = partial(_fetch, torchvision_name)
        files = PublishedFiles(name, root, f"{torchvision_name}/raw", checksums, parse, fetch, elsewhere, hint)

        def split(size: int, images: str, labels: str) -> PixelSamples:
            known = " ".join(checksums.get(name, "") for name in (images, labels)).strip()
            return PixelSamples(size, lambda: (files.read(images)[:, None], files.read(labels).long(), known))

        return Dataset(
            name=name,
            train=split(sizes[0], *NAMES[:2]),
            validation=split(sizes[1], *NAMES[2:]),
            classes=tuple(classes),
            channels=1,
            image_size=side,
            mean=(mean,),
            std=(std,),
            origin=f"{origin}, IDX files; validation is the published test split",
            files=files,
        )

    return list_dataset


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
