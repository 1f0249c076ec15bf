"""One model on all ranks, whose gradients are summed: by nobody, or by DistributedDataParallel over gloo or NCCL."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.base.timing import PhaseTimer
from pipeline.parallel.rank import Rank


class Replicas:
    """A model with the same weights on every rank. The gradients of a step become their SUM over the ranks.

    A step divides by the global count, and by nothing else. This class is a model that is alone.
    """

    waits_in_backward = False
    """Whether a rank waits for the others within `backward()`."""

    def __init__(self, model: nn.Module, description: str = "of one rank"):
        """`model` is what a batch goes through; `description` says how gradients are summed, for the record."""
        self.model = model
        self.description = description

    def accumulate(self) -> AbstractContextManager[Any]:
        """Return the context for all but the last micro-batch of a step: their gradients are only added up."""
        return nullcontext()

    def reduce(self) -> None:
        """Collective. Sum the gradients over the ranks, behind the last `backward()` of a step."""


class DDPReplicas(Replicas):
    """A model in DistributedDataParallel, with a hook that sums where DDP itself would take the mean."""

    waits_in_backward = True

    def __init__(
        self,
        model: nn.Module,
        rank: Rank,
        timer: PhaseTimer,
        images: Tensor,
        accumulate: int,
        compress: bool,
        capture_stream: torch.cuda.Stream | None,
    ):
        """Collective.

        DDP puts all gradients into one bucket for its first step, and regroups them by the order in which they became
        ready for all others. From three ranks on, the place in a bucket decides the order of summation, and so the last
        bits: a resumed training would differ in its first step. Two passes for nothing, on `images`, get that over.

        To be captured on a stream, all of DDP has to be made there.
        """
        with on_stream(capture_stream):
            wrapped = DistributedDataParallel(
                model,
                device_ids=[rank.device] if rank.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                static_graph=accumulate == 1,  # with no_sync it dies in an assertion
            )
            _register_hook(wrapped, timer, compress=compress, timed=capture_stream is None)
            wrapped.eval()  # batch statistics stay as they are
            for _ in range(2):  # the regrouping is done when the second begins
                wrapped(images).sum().backward()
                wrapped.zero_grad(set_to_none=True)
            wrapped.train()  # type: ignore[no-untyped-call]
        super().__init__(wrapped, f"{rank.backend}, as bfloat16" if compress else rank.backend)
        self._wrapped = wrapped

    def accumulate(self) -> AbstractContextManager[Any]:
        """Return DDP's no_sync, which has to cover the forward pass too: DDP decides there whether to reduce."""
        return self._wrapped.no_sync()


def _register_hook(model: DistributedDataParallel, timer: PhaseTimer, *, compress: bool, timed: bool) -> None:
    """Have DDP sum each bucket, sent as bfloat16 if `compress`; with a lap of `timer` at the last one if `timed`."""

    # without annotations: DDP compares them with classes, which postponed ones are not
    def hook(_, bucket):  # type: ignore[no-untyped-def]
        if bucket.is_last() and timed:
            timer.lap("backward")
        gradients = bucket.buffer()
        sent = gradients.bfloat16() if compress else gradients
        reduced = dist.all_reduce(sent, async_op=True).get_future()
        return reduced.then(lambda done: gradients.copy_(done.value()[0]) if compress else done.value()[0])

    model.register_comm_hook(None, hook)


def new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Queue the work inside on `stream`, behind what was queued before and before what comes after; None: as it is."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
