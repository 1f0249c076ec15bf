"""From indices to normalised batches on the device: resident (held as uint8 there) or streamed by workers."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pipeline.data.sampler import GlobalOrderSampler, StepIndices
from pipeline.preemption import SIGNALS


@dataclass(frozen=True)
class Batch:
    """What one rank computes in one optimizer step."""

    start: int
    """Position in the epoch of the step's first sample, over all ranks."""
    global_count: int
    """Samples of the step over all ranks: what the summed losses are divided by."""
    micro_batches: tuple[tuple[Tensor, Tensor], ...]
    """Normalised images [N, C, H, W] and int64 labels [N], on the device; N may be 0."""

    @property
    def end(self) -> int:
        return self.start + self.global_count


class Loader(Protocol):
    """Yields the remaining batches of the position its sampler was set to."""

    sampler: GlobalOrderSampler

    def __iter__(self) -> Iterator[Batch]: ...


class Normalize(nn.Module):
    """uint8 (or float) pixels in 0..255 -> (pixel / 255 - mean) / std in `dtype`, channel by channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Iterable[float], std: Iterable[float], dtype: torch.dtype = torch.float32):
        super().__init__()
        mean_, std_ = (torch.tensor(list(v), dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
        self.register_buffer("scale", (1 / (255 * std_)).to(dtype))
        self.register_buffer("shift", (-mean_ / std_).to(dtype))

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.scale.dtype) * self.scale + self.shift


@dataclass(frozen=True)
class _Pixels(Dataset[tuple[Tensor, Tensor]]):
    """Indexed by a tensor of indices: a whole micro-batch at a time, no Python work per sample."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


class ResidentLoader:
    """The dataset lies as uint8 on the device; a batch is one gather and one normalisation there."""

    def __init__(self, images: Tensor, labels: Tensor, sampler: GlobalOrderSampler, normalize: Normalize):
        device = normalize.scale.device
        self.sampler = sampler
        self._pixels = _Pixels(images.to(device), labels.to(device))
        self._normalize = normalize

    def __iter__(self) -> Iterator[Batch]:
        device = self._pixels.images.device
        for step in self.sampler.steps():
            pixels = (self._pixels[indices.to(device)] for indices in step.micro_batches)
            yield _batch(step, ((self._normalize(images), labels) for images, labels in pixels))


class StreamedLoader:
    """The dataset stays in host memory; DataLoader workers gather batches ahead, which are then copied over."""

    def __init__(
        self, images: Tensor, labels: Tensor, sampler: GlobalOrderSampler, normalize: Normalize, num_workers: int
    ):
        self.sampler = sampler
        self._pixels = _Pixels(images, labels)
        self._normalize = normalize
        self._num_workers = num_workers

    def __iter__(self) -> Iterator[Batch]:
        device = self._normalize.scale.device
        steps = list(self.sampler.steps())
        loader = DataLoader(
            self._pixels,
            sampler=[indices for step in steps for indices in step.micro_batches],
            batch_size=None,
            num_workers=self._num_workers,
            worker_init_fn=_leave_signals_to_the_rank,
            pin_memory=device.type == "cuda",
        )
        # held back until the workers, which inherit this, have learnt to ignore them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            fetched = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for step in steps:
            pixels = islice(fetched, len(step.micro_batches))
            moved = ((i.to(device, non_blocking=True), n.to(device, non_blocking=True)) for i, n in pixels)
            yield _batch(step, ((self._normalize(images), labels) for images, labels in moved))


def _leave_signals_to_the_rank(worker: int) -> None:
    """A launcher signals the whole process group; a worker must not die of a request to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _batch(step: StepIndices, micro_batches: Iterable[tuple[Tensor, Tensor]]) -> Batch:
    return Batch(step.start, step.global_count, tuple(micro_batches))


def choose_placement(placement: str, num_bytes: int, device: torch.device) -> str:
    """`device` or `workers`. auto: on the device if the uint8 data fill at most half of what is free there.

    On CPU the data are in the memory of the device already.
    """
    if placement != "auto":
        return placement
    if device.type == "cpu":
        return "device"
    free, _ = torch.cuda.mem_get_info(device)
    return "device" if num_bytes <= free // 2 else "workers"
