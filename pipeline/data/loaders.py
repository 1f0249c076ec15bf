"""Loaders: a split that lies on the device, or in host memory with workers that gather batches ahead."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.base.signals import SIGNALS
from pipeline.base.timing import PhaseTimer
from pipeline.data.augment import Gathered
from pipeline.data.inputs import Prepare
from pipeline.data.order import Batch, Order
from pipeline.data.samples import DataError

NO_SHARED_MEMORY = ("shared memory", "Bus error")
"""Words in torch's messages where a worker finds no room for a batch."""


class Gather(nn.Module, Dataset[Gathered]):
    """Gathers samples by their indices: a whole micro-batch at a time, no Python work per sample."""

    pixels: Tensor
    labels: Tensor

    def __init__(self, pixels: Tensor, labels: Tensor):
        super().__init__()
        self.register_buffer("pixels", pixels, persistent=False)
        self.register_buffer("labels", labels, persistent=False)

    def forward(self, indices: Tensor) -> Gathered:
        # on CPU five times as fast as indexing with a tensor
        return self.pixels.index_select(0, indices), self.labels.index_select(0, indices), indices

    def __getitem__(self, indices: Tensor) -> Gathered:
        """Return a micro-batch, in shared memory in a worker: without room the thread that sends it would lose it."""
        pixels, labels, indices = self.forward(indices)
        if get_worker_info() is not None:
            pixels.share_memory_()  # type: ignore[no-untyped-call]
            labels.share_memory_()  # type: ignore[no-untyped-call]
        return pixels, labels, indices


@dataclass
class ResidentLoader:
    """Yields micro-batches of indices into a split that lies on the device; `prepare` begins with Gather."""

    order: Order
    prepare: Prepare

    def batches(self, epoch: int, samples_seen: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of `epoch` behind its first `samples_seen` samples (over all ranks)."""
        self.prepare.set_epoch(epoch)
        # one copy an epoch: a copy a step would be a launch and a synchronisation each
        yield from self.order.steps(epoch, samples_seen, self.prepare.device)


class StreamedLoader:
    """Yields micro-batches that DataLoader workers gathered ahead from host memory, copied to the device.

    On a GPU a batch is copied from pinned memory on a stream of its own, while the one before is computed.
    """

    def __init__(self, gather: Gather, order: Order, prepare: Prepare, workers: int, timer: PhaseTimer):
        self.order = order
        self.prepare = prepare
        self._device = prepare.device
        self._timer = timer
        self._indices: list[Tensor] = []  # of each micro-batch of an epoch; persistent workers see those of the next
        on_gpu = self._device.type == "cuda"
        self._copying = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._loader = DataLoader(
            gather,
            sampler=self._indices,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_leave_signals_to_the_rank,
            pin_memory=on_gpu,
            persistent_workers=workers > 0,
        )

    def batches(self, epoch: int, samples_seen: int = 0) -> Iterator[Batch]:
        self.prepare.set_epoch(epoch)
        steps = list(self.order.steps(epoch, samples_seen))
        self._indices[:] = [indices for step in steps for indices in step.micro_batches]
        # held back until the workers, which inherit this, have learnt to ignore them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            fetched = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        fetches = (self._fetch(step, fetched) for step in steps)
        coming = next(fetches, None)
        while coming:
            ready, coming = coming, next(fetches, None)
            yield self._take(*ready)

    def _fetch(self, step: Batch, fetched: Iterator[Gathered]) -> tuple[Batch, torch.cuda.Event | None]:
        """Return the batch, and the event of its arrival on a GPU."""
        try:
            parts = tuple(islice(fetched, len(step.micro_batches)))
        except RuntimeError as error:
            if not any(sign in str(error) for sign in NO_SHARED_MEMORY):
                raise
            way_out = "give it more (docker run --shm-size), or set data.workers=0"
            raise DataError(f"/dev/shm has no room for the batches of the loader's workers: {way_out}") from error
        if self._copying is None:
            return replace(step, micro_batches=parts), None
        self._timer.lap("data")
        with torch.cuda.stream(self._copying):
            moved = tuple(tuple(t.to(self._device, non_blocking=True) for t in tensors) for tensors in parts)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return replace(step, micro_batches=moved), arrived

    def _take(self, batch: Batch, arrived: torch.cuda.Event | None) -> Batch:
        if arrived is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(arrived)
            self._timer.lap("host_to_device")  # as far as computing has to wait for the copy
            for tensor in (tensor for tensors in batch.micro_batches for tensor in tensors):
                tensor.record_stream(computing)  # or its memory would be given to the next copy too early
        return batch


Loader = ResidentLoader | StreamedLoader


def _leave_signals_to_the_rank(worker: int) -> None:
    """Ignore requests to stop: a launcher signals the whole process group, and a worker must not die of it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
