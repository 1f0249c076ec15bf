"""A split that stays in host memory: DataLoader workers gather batches ahead."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.base.signals import SIGNALS
from pipeline.base.timing import PhaseTimer
from pipeline.data.augment import Gathered
from pipeline.data.inputs import Batch, Prepare
from pipeline.data.order import Order
from pipeline.data.resident import Gather


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
        coming: tuple[Batch, torch.cuda.Event | None] | None = None
        for step in steps:
            ready, coming = coming, self._fetch(step, fetched)
            if ready is not None:
                yield self._take(*ready)
        if coming is not None:
            yield self._take(*coming)

    def _fetch(self, step: Batch, fetched: Iterator[Gathered]) -> tuple[Batch, torch.cuda.Event | None]:
        """Return the batch, and the event of its arrival on a GPU."""
        parts = tuple(islice(fetched, len(step.micro_batches)))
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


def _leave_signals_to_the_rank(worker: int) -> None:
    """Ignore requests to stop: a launcher signals the whole process group, and a worker must not die of it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
