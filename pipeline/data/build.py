"""From a config to datasets and loaders."""

import ctypes
import hashlib
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.base.timing import PhaseTimer
from pipeline.config.arguments import convert_arguments
from pipeline.config.schema import DataConfig, TrainConfig
from pipeline.data.augment import Augment
from pipeline.data.catalog import source
from pipeline.data.inputs import Prepare
from pipeline.data.loaders import Gather, Loader, ResidentLoader, StreamedLoader
from pipeline.data.order import Blocks, Order
from pipeline.data.packed import share_on_node
from pipeline.data.samples import Content, DataError, Dataset, PixelSamples, Samples, fingerprint
from pipeline.models.normalize import Normalize
from pipeline.parallel.rank import Rank, RemoteError

MIN_BLOCKS = 8
"""A small evaluation is cut into so many blocks, so that it is shared among some ranks too."""
RESIZE_CHUNK_PIXELS = 2**24
"""So many pixels are floats at a time: 64 MiB."""


def list_dataset(config: DataConfig, seed: int) -> Dataset:
    """Return the dataset as the training will use it, without reading it. Raises ValueError for a wrong config."""
    function = source(config.dataset)
    arguments = convert_arguments(function, config.arguments, ("root", "seed"))
    dataset = function(root=Path(config.root), seed=seed, **arguments)
    if not isinstance(dataset, Dataset):
        kind = type(dataset).__name__
        raise ValueError(f"data.dataset = {config.dataset}: returned {kind}, accepted: pipeline.data.samples.Dataset")
    return replace(
        dataset,
        classes=tuple(map(str, dataset.classes)),
        image_size=config.image_size or dataset.image_size,
        mean=config.mean or dataset.mean,
        std=config.std or dataset.std,
    )


def load_dataset(config: DataConfig, dataset: Dataset, rank: Rank) -> Dataset:
    """Collective. Return a listed dataset with its digest and its pixels, verified and resized, once per node.

    Raises DataError on the rank that finds it absent or damaged, RemoteError on the others.
    """

    loaded = share_on_node(rank, lambda: _load(dataset, config.download))
    digests = rank.gather((loaded.digest, socket.gethostname()))
    for digest, host in digests:
        if digest != digests[0][0]:
            reason = f"data.dataset={dataset.name} is not the same on {host} ({digest}) as on {digests[0][1]} "
            reason += f"({digests[0][0]}): compare data.root on both"
            raise DataError(reason) if rank.is_main else RemoteError(reason)
    with suppress(OSError, AttributeError):  # not glibc, whose malloc may keep what loading took besides the dataset
        ctypes.CDLL(None).malloc_trim(0)
    return loaded


def num_bytes(dataset: Dataset) -> int:
    """Return the bytes of all pixels of a loaded dataset."""
    return sum(samples.pixels.nbytes for samples in dataset.splits.values() if isinstance(samples, PixelSamples))


def build_train_loader(
    config: DataConfig,
    train: TrainConfig,
    seed: int,
    dataset: Dataset,
    rank: Rank,
    *,
    placement: str,
    dtype: torch.dtype,
    timer: PhaseTimer,
) -> Loader:
    """Return a loader of the training samples. `placement` is `device` or `workers`, `dtype` that of the images."""
    order = Order(
        len(dataset.train),
        global_batch_size=config.global_batch_size,
        world_size=rank.world_size,
        rank=rank.rank,
        accumulate=train.accumulate,
        virtual_ranks=train.virtual_ranks if train.reproducible else None,
        seed=seed,
    )
    given = convert_arguments(Augment, config.augment, ("seed", "device"))
    augment = Augment(seed=seed, device=rank.device, **given) if any(given.values()) else nn.Identity()
    normalize = Normalize(dataset.mean, dataset.std, dtype).to(rank.device)
    return _build_loader(dataset.train, order, augment, normalize, placement, config.workers, timer)


def build_eval_loader(
    config: DataConfig,
    dataset: Dataset,
    samples: Samples,
    rank: Rank,
    *,
    placement: str,
    dtype: torch.dtype,
    timer: PhaseTimer,
) -> Loader:
    """Return a loader of `samples`, a split of the dataset, in order and unaugmented."""
    block_size = min(config.eval_batch_size, -(-len(samples) // MIN_BLOCKS))
    order = Blocks(len(samples), block_size=block_size, world_size=rank.world_size, rank=rank.rank)
    normalize = Normalize(dataset.mean, dataset.std, dtype).to(rank.device)
    return _build_loader(samples, order, nn.Identity(), normalize, placement, config.workers, timer)


def _build_loader(
    samples: Samples,
    order: Order,
    augment: nn.Module,
    normalize: Normalize,
    placement: str,
    workers: int,
    timer: PhaseTimer,
) -> Loader:
    assert isinstance(samples, PixelSamples)  # as load_dataset left them
    gather = Gather(samples.pixels, samples.labels)
    if placement == "device":
        return ResidentLoader(order, Prepare(gather.to(normalize.scale.device), augment, normalize))
    return StreamedLoader(gather, order, Prepare(nn.Identity(), augment, normalize), workers, timer)


def _load(dataset: Dataset, download: bool) -> Dataset:
    """Return the dataset with its pixels in memory, of its `image_size`, and its digest."""
    if dataset.files and dataset.files.missing():
        dataset.files.prepare(download=download)
    splits: dict[str, Any] = {}
    parts = [str(dataset.image_size)]
    for name, samples in dataset.splits.items():
        pixels, labels, known = _read(dataset, name, samples)
        # Of the images as stored: resizing computes in floats, whose last bits may differ between processors.
        parts.append(known or fingerprint(pixels, labels))
        splits[name] = PixelSamples.of(resize(pixels, dataset.image_size).contiguous(), labels.contiguous())
    return replace(dataset, digest=hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16], **splits)


def _read(dataset: Dataset, name: str, samples: Samples) -> Content:
    """Return the content of a split, not yet resized if it is of one size.

    Raises DataError if it is not what the dataset says of itself.
    """
    if isinstance(samples, PixelSamples):
        pixels, labels, known = samples.load()
    else:
        images = (samples.read(index) for index in range(len(samples)))
        both = [(fingerprint(image), resize(image[None], dataset.image_size)) for image in images]
        marks, resized = zip(*both, strict=True)
        pixels, labels = torch.cat(resized), samples.labels
        known = " ".join((fingerprint(labels), *marks))
    size, end = len(samples), len(dataset.classes) - 1
    low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, -1)
    kinds, shape = (pixels.dtype, pixels.ndim, labels.dtype), (*pixels.shape[:2], *labels.shape)
    is_sound = kinds == (torch.uint8, 4, torch.int64) and shape == (size, dataset.channels, size)
    if not is_sound or not 0 <= low <= high <= end:
        raise DataError(
            f"data.dataset={dataset.name}: the {name} split has pixels {pixels.dtype} {list(pixels.shape)} and labels "
            f"{labels.dtype} {list(labels.shape)} from {low} to {high}; accepted: torch.uint8 [{size}, "
            f"{dataset.channels}, height, width] and torch.int64 [{size}] from 0 to {end}"
        )
    return pixels, labels, known


def resize(pixels: Tensor, size: int) -> Tensor:
    """Return images uint8 [N, C, height, width] as `size` x `size`, by antialiased bilinear interpolation.

    A chunk at a time, so that memory holds few floats.
    """
    count, channels, *sides = pixels.shape
    if sides == [size, size]:
        return pixels
    resized = torch.empty((count, channels, size, size), dtype=pixels.dtype)
    step = max(1, RESIZE_CHUNK_PIXELS // (channels * max(*sides, size) ** 2))
    for start in range(0, count, step):
        part = pixels[start : start + step].float()
        part = interpolate(part, (size, size), mode="bilinear", align_corners=False, antialias=True)
        resized[start : start + step] = part.round()
    return resized
