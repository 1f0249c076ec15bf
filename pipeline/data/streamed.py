"""A dataset that stays in host memory: DataLoader workers gather batches ahead."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.base.signals import SIGNALS
from pipeline.base.timing import PhaseTimer
from pipeline.data.augment import Augment
from pipeline.data.inputs import Batch
from pipeline.data.order import GlobalOrderSampler, StepIndices
from pipeline.models.normalize import Normalize


@dataclass(frozen=True)
class _Pixels(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Indexed by a tensor of indices: a whole micro-batch at a time, no Python work per sample. Gives them back too."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.images[indices], self.labels[indices], indices


@dataclass(frozen=True)
class _MicroBatches:
    """The indices of what remains of the epoch, asked for anew by the same workers at each epoch."""

    sampler: GlobalOrderSampler

    def __iter__(self) -> Iterator[Tensor]:
        return (indices for step in self.sampler.steps() for indices in step.micro_batches)


class StreamedLoader:
    """The dataset stays in host memory; DataLoader workers gather batches ahead, which are then copied over.

    On a GPU a batch is copied from pinned memory on a stream of its own, while the one before is computed.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        sampler: GlobalOrderSampler,
        normalize: Normalize,
        num_workers: int,
        timer: PhaseTimer,
        augment: Augment | None = None,
    ):
        self.sampler = sampler
        self._augment = augment
        self._normalize = normalize
        self._timer = timer
        self._device = normalize.scale.device
        on_gpu = self._device.type == "cuda"
        self._copying = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._loader = DataLoader(
            _Pixels(images, labels),
            sampler=_MicroBatches(sampler),
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=_leave_signals_to_the_rank,
            pin_memory=on_gpu,
            persistent_workers=num_workers > 0,
        )

    def __iter__(self) -> Iterator[Batch]:
        if self._augment is not None:
            self._augment.set_epoch(self.sampler.epoch)
        # held back until the workers, which inherit this, have learnt to ignore them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            fetched = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        coming: tuple[Batch, torch.cuda.Event | None] | None = None
        for step in self.sampler.steps():
            ready, coming = coming, self._fetch(step, fetched)
            if ready is not None:
                yield self._take(*ready)
        if coming is not None:
            yield self._take(*coming)

    def inputs(self, micro_batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        pixels, labels, indices = micro_batch
        if self._augment is not None:
            pixels = self._augment(pixels, indices)
        return self._normalize(pixels), labels

    def _fetch(
        self, step: StepIndices, fetched: Iterator[tuple[Tensor, Tensor, Tensor]]
    ) -> tuple[Batch, torch.cuda.Event | None]:
        """The batch, and what tells when its copy has arrived on a GPU."""
        pixels = tuple(islice(fetched, len(step.micro_batches)))
        if self._copying is None:
            return Batch(step.start, step.global_count, pixels), None
        self._timer.lap("data")
        with torch.cuda.stream(self._copying):
            moved = tuple(tuple(t.to(self._device, non_blocking=True) for t in tensors) for tensors in pixels)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return Batch(step.start, step.global_count, moved), arrived

    def _take(self, batch: Batch, arrived: torch.cuda.Event | None) -> Batch:
        if arrived is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(arrived)
            self._timer.lap("host_to_device")  # as far as computing has to wait for the copy
            for tensor in (tensor for tensors in batch.micro_batches for tensor in tensors):
                tensor.record_stream(computing)  # or its memory would be given to the next copy too early
        return batch


def _leave_signals_to_the_rank(worker: int) -> None:
    """A launcher signals the whole process group; a worker must not die of a request to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
