"""A network on all ranks, trained by the mean of their gradients; which way these meet is chosen here, by rule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.base.timing import PhaseTimer
from pipeline.parallel.ddp import wrap
from pipeline.parallel.node_sum import open_node_average
from pipeline.parallel.ordered import Shards, open_shards
from pipeline.parallel.rank import Rank


@dataclass(frozen=True)
class Replicas:
    """A network that has the same weights on every rank, and is trained by the mean of their gradients."""

    model: nn.Module
    """What a batch goes through."""
    average: Callable[[], None] = lambda: None
    """Collective: every rank must call, behind the last `backward()` of a step. Then the gradients are the means."""
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Around forward and backward of those before, whose gradients are only added up."""
    gradients: str = "of one rank"
    """How they are averaged, for the record."""
    meet_in_backward: bool = False
    """A rank waits for the others within `backward()`."""


def replicate_by_shards(network: nn.Module, rank: Rank, num_shards: int, *, timeout: float) -> tuple[Replicas, Shards]:
    """Collective: every rank must call. As `replicate`, for steps that sum the gradients of shards in their order."""
    if rank.world_size > 1:
        network.load_state_dict(rank.from_main(network.state_dict))
    shards, gradients = open_shards(rank, network, num_shards, timeout)
    return Replicas(network, gradients=gradients), shards


def replicate(
    network: nn.Module,
    rank: Rank,
    timer: PhaseTimer,
    images: Tensor,
    *,
    timeout: float,
    shared_memory: bool = True,
    accumulate: int = 1,
    compress: bool = False,
    capture_stream: torch.cuda.Stream | None = None,
) -> Replicas:
    """Collective: every rank must call. Give all ranks the weights of rank 0, and choose by rule how gradients meet.

    Between CPU ranks of one node, through memory that they share (if `shared_memory`); else by DistributedDataParallel,
    which hides the communication behind the backward pass. `images` is a batch to try DDP with, `compress` sends
    gradients as bfloat16 (NCCL only). With `capture_stream` a step can be captured there in a CUDA graph. `timer` gets
    a lap at the end of the backward pass's own work: what comes behind is communication that nothing hides.
    """
    if rank.backend == "none":
        return Replicas(network)
    node = open_node_average(rank, network, timer, timeout) if shared_memory else None
    if node is not None:
        network.load_state_dict(rank.from_main(network.state_dict))
        return Replicas(network, node.average, gradients="shared memory")
    model, gradients = wrap(network, rank, timer, images, accumulate, compress, capture_stream)
    return Replicas(model, no_sync=model.no_sync, gradients=gradients, meet_in_backward=True)
