"""Gradients averaged by DistributedDataParallel, over gloo or NCCL, while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from pipeline.base.timing import PhaseTimer
from pipeline.parallel.rank import Rank


def wrap(
    network: nn.Module,
    rank: Rank,
    timer: PhaseTimer,
    images: Tensor,
    accumulate: int,
    compress: bool,
    capture_stream: torch.cuda.Stream | None,
) -> tuple[DistributedDataParallel, str]:
    """DDP puts all gradients into one bucket for its first step, and regroups them by the order in which they became
    ready for all others. From three ranks on, the place in a bucket decides the order of summation, and so the last
    bits: a resumed training would differ in its first step. Two passes for nothing, on `images`, get that over.

    To be captured on a stream, all of DDP has to be made there.
    """
    with joined(capture_stream):
        model = DistributedDataParallel(
            network,
            device_ids=[rank.device] if rank.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            static_graph=accumulate == 1,  # with no_sync it dies in an assertion
        )
        gradients = _choose_hook(model, rank, timer, compress=compress, timed=capture_stream is None)
        model.eval()  # batch statistics stay as they are
        for _ in range(2):  # the regrouping is done when the second begins
            model(images).sum().backward()
            model.zero_grad(set_to_none=True)
        model.train()  # type: ignore[no-untyped-call]
    return model, gradients


def new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def joined(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work inside is queued on `stream`, behind what was queued before and before what comes after; None: as it is."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def _choose_hook(model: DistributedDataParallel, rank: Rank, timer: PhaseTimer, *, compress: bool, timed: bool) -> str:
    """How DDP averages gradients, by its name; with a lap of `timer` at the last bucket if `timed`."""
    average = _average_as_bfloat16 if compress else _average_by_process_group

    # without annotations: DDP compares them with classes, which postponed ones are not
    def hook(state, bucket):  # type: ignore[no-untyped-def]
        if bucket.is_last() and timed:
            timer.lap("backward")
        return average(state, bucket)

    if timed or compress:  # without a hook DDP does the other by itself
        model.register_comm_hook(None, hook)
    return f"{rank.backend}, as bfloat16" if compress else rank.backend


def _average_by_process_group(_: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    mine = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(mine, async_op=True).get_future().then(lambda future: future.value()[0])


def _average_as_bfloat16(_: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    # Imported here because it brings all of torch's hooks, which other runs need not wait for.
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    group = dist.group.WORLD
    assert group is not None
    return bf16_compress_hook(group, bucket)
