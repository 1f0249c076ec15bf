"""Which rank computes which sample when: a function of (seed, epoch, position), never of the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch.utils.data import Dataset, DistributedSampler

from pipeline.base.seeding import stream_seed
from pipeline.parallel.rank import share


@dataclass(frozen=True)
class StepIndices:
    """One optimizer step as seen by one rank."""

    start: int
    """Position in the epoch of the step's first sample, over all ranks."""
    global_count: int
    """Samples of the step over all ranks; smaller than the global batch size at the end of an epoch."""
    micro_batches: tuple[torch.Tensor, ...]
    """int64 indices into the dataset of this rank, one tensor per accumulation step; some may be empty."""


class GlobalOrderSampler(DistributedSampler[int]):
    """A DistributedSampler without padding or dropping, that can begin at any sample of an epoch.

    The order of an epoch is drawn once for all ranks and cut into global batches; each global batch is cut into one
    contiguous share per rank. So the same global batches are seen by any number of ranks, and resuming in the middle
    of an epoch, on another number of ranks too, is arithmetic. The torch class pads the shards to equal
    length, interleaves them, and so repeats samples and ties the order to the world size.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        shards: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ):
        """With `shards` each global batch is cut into so many, whatever the number of ranks; a rank's are its
        micro-batches. Without, a rank's share is cut into `accumulate` of them.
        """
        super().__init__(cast(Dataset[int], range(num_samples)), world_size, rank, shuffle=shuffle, seed=seed)
        self.total_size = num_samples
        self.global_batch_size = global_batch_size
        self.accumulate = accumulate
        self.shards = shards
        self.samples_seen = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.total_size // self.global_batch_size)

    @property
    def full_share(self) -> int:
        """The most samples that any rank has in a step; the share of a shorter batch can be the larger one."""
        return int(-(-min(self.global_batch_size, self.total_size) // self.num_replicas))

    def set_position(self, epoch: int, samples_seen: int = 0) -> None:
        """Begin the next iteration in `epoch` behind its first `samples_seen` samples (over all ranks)."""
        if not 0 <= samples_seen <= self.total_size:
            raise ValueError(f"samples_seen = {samples_seen}: accepted: 0 to {self.total_size}, the samples there are")
        self.set_epoch(epoch)
        self.samples_seen = samples_seen

    def order(self) -> torch.Tensor:
        """int64 [samples]: the epoch's order over all ranks."""
        if not self.shuffle:
            return torch.arange(self.total_size)
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", self.epoch))
        return torch.randperm(self.total_size, generator=generator)

    def steps(self, device: torch.device | None = None) -> Iterator[StepIndices]:
        """This rank's part of every remaining step of the epoch; the same number of steps on every rank.

        The indices are views of one tensor on `device` (default: the CPU).
        """
        order = self.order().to(device)
        for start in range(self.samples_seen, self.total_size, self.global_batch_size):
            global_batch = order[start : start + self.global_batch_size]
            yield StepIndices(start, len(global_batch), self._cut(global_batch))

    def _cut(self, global_batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The micro-batches of this rank."""
        if self.shards is None:
            mine = global_batch[share(len(global_batch), self.rank, self.num_replicas)]
            return tuple(mine[share(len(mine), i, self.accumulate)] for i in range(self.accumulate))
        own = share(self.shards, self.rank, self.num_replicas)
        return tuple(global_batch[share(len(global_batch), i, self.shards)] for i in range(own.start, own.stop))

    def __iter__(self) -> Iterator[int]:
        for step in self.steps():
            for micro_batch in step.micro_batches:
                yield from micro_batch.tolist()

    def __len__(self) -> int:
        """Samples of this rank in what remains of the epoch."""
        return sum(len(micro_batch) for step in self.steps() for micro_batch in step.micro_batches)


class BlockSampler(GlobalOrderSampler):
    """In the order of the dataset, in blocks that are the same on any number of ranks: what is computed of one does
    not depend on their number. The ranks take turns."""

    def __init__(self, num_samples: int, *, block_size: int, world_size: int, rank: int):
        super().__init__(
            num_samples, global_batch_size=block_size * world_size, world_size=world_size, rank=rank, shuffle=False
        )
        self._block_size = block_size

    def _cut(self, global_batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (global_batch[self.rank * self._block_size : (self.rank + 1) * self._block_size],)
