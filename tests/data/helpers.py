"""Datasets for tests: loaded as a training on one rank loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.config.schema import DataConfig
from pipeline.data.build import list_dataset, load_dataset
from pipeline.data.samples import Dataset, PixelSamples, Samples
from pipeline.parallel.rank import Rank

CPU = torch.device("cpu")
ALONE = Rank(0, 0, 1, 1, CPU, "none", 1)


ABSENT = Path("/dev/null/absent")


def listed(dataset: str = "digits", *, seed: int = 0, root: Path = ABSENT, **settings: Any) -> Dataset:
    return list_dataset(DataConfig(dataset=dataset, root=str(root), **settings), seed)


def loaded(dataset: Dataset, *, download: bool = False) -> Dataset:
    return load_dataset(DataConfig(download=download), dataset, ALONE)


def pixels(samples: Samples) -> torch.Tensor:
    assert isinstance(samples, PixelSamples)
    return samples.pixels


def tensors(dataset: Dataset) -> list[torch.Tensor]:
    return [tensor for samples in dataset.splits.values() for tensor in (pixels(samples), samples.labels)]


def are_equal(first: Dataset, second: Dataset) -> bool:
    """Return whether all that is known of them is the same, and every sample."""
    nothing: dict[str, Any] = {"train": None, "validation": None, "test": None, "files": None}
    known = [{**vars(dataset), **nothing} for dataset in (first, second)]
    pairs = zip(tensors(first), tensors(second), strict=True)
    same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    return same and known[0] == known[1] and list(first.splits) == list(second.splits)
