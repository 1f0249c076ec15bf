"""Random images of any shape that a model can learn: for benchmarks and tests."""

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Le

from pipeline.data.samples import Content, Dataset, PixelSamples

LEVELS = 128
GRID = 8


def synthetic(
    root: Path,
    seed: int,
    train_size: Annotated[int, Ge(1)] = 4096,
    validation_size: Annotated[int, Ge(1)] = 1024,
    test_size: Annotated[int, Ge(0)] = 0,
    channels: Annotated[int, Ge(1), Le(64)] = 1,
    classes: Annotated[int, Ge(2), Le(10_000)] = 10,
    image_size: Annotated[int, Ge(4), Le(1024)] = 28,
) -> Dataset:
    """Return a random dataset: a sample is the coarse pattern of its class plus noise as strong, drawn from `seed`."""
    draw = partial(_draw, seed, channels, classes, image_size)
    # A pixel is the sum of two independent uniform integers below LEVELS, hence these two.
    mean, std = (LEVELS - 1) / 255, ((LEVELS**2 - 1) / 6) ** 0.5 / 255
    return Dataset(
        name="synthetic",
        train=PixelSamples(train_size, partial(draw, 1, train_size)),
        validation=PixelSamples(validation_size, partial(draw, 2, validation_size)),
        test=PixelSamples(test_size, partial(draw, 3, test_size)) if test_size else None,
        classes=tuple(f"class {index}" for index in range(classes)),
        channels=channels,
        image_size=image_size,
        mean=(round(mean, 4),) * channels,
        std=(round(std, 4),) * channels,
        origin="random prototypes plus noise, made from the seed, each split apart",
    )


def _draw(seed: int, channels: int, classes: int, image_size: int, stream: int, size: int) -> Content:
    """Return `size` samples. Integers throughout, so that the bits are the same on every machine."""
    grid = min(GRID, image_size)
    coarse = np.random.default_rng([seed, 0]).integers(0, LEVELS, (classes, channels, grid, grid), dtype=np.uint8)
    cell = np.arange(image_size) * grid // image_size
    prototypes = np.ascontiguousarray(coarse[:, :, cell][:, :, :, cell])
    generator = np.random.default_rng([seed, stream])
    labels = generator.permutation(np.arange(size) % classes)
    images = prototypes[labels]
    for start in range(0, size, 256):  # the noise of all at once would double the memory
        chunk = images[start : start + 256]
        chunk += generator.integers(0, LEVELS, chunk.shape, dtype=np.uint8)
    return torch.from_numpy(images), torch.from_numpy(labels), ""


SOURCES = {"synthetic": synthetic}
