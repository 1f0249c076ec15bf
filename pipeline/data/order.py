"""Which rank computes which sample when: a function of (seed, epoch, position), never of the number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import Dataset, DistributedSampler

from pipeline.base.seeding import stream_seed
from pipeline.parallel.rank import share


@dataclass(frozen=True)
class Batch:
    """The part of one rank in one optimizer step."""

    start: int
    """Position in the epoch of the step's first sample, over all ranks."""
    global_count: int
    """Samples of the step over all ranks, what its summed losses are divided by; smaller at the end of an epoch."""
    micro_batches: tuple[Any, ...]
    """By an Order: int64 indices into the dataset, some may be empty. By a Loader: what its `prepare` takes."""

    @property
    def end(self) -> int:
        return self.start + self.global_count


class Order(DistributedSampler[int]):
    """A DistributedSampler without padding or dropping, that can begin at any sample of an epoch.

    The order of an epoch is drawn once for all ranks and cut into global batches; each global batch is cut into one
    contiguous share per rank. So the same global batches are seen by any number of ranks, and resuming in the middle
    of an epoch, on another number of ranks too, is arithmetic. The torch class pads the shares of an epoch to equal
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
        virtual_ranks: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ):
        """With `virtual_ranks` each global batch is cut into so many micro-batches, whatever the number of ranks, and
        each rank has some of them. Without, a rank's share is cut into `accumulate` micro-batches.
        """
        super().__init__(cast(Dataset[int], range(num_samples)), world_size, rank, shuffle=shuffle, seed=seed)
        self.num_samples = self.total_size = num_samples  # of all ranks: nothing is padded
        self.global_batch_size = global_batch_size
        self.accumulate = accumulate
        self.virtual_ranks = virtual_ranks

    @property
    def full_share(self) -> int:
        """Return the most samples that any rank has in a step. A shorter batch can have the larger share."""
        return int(-(-min(self.global_batch_size, self.num_samples) // self.num_replicas))

    def permutation(self, epoch: int) -> torch.Tensor:
        """Return the order of the samples in `epoch`, over all ranks, int64 [num_samples]."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", epoch))
        return torch.randperm(self.num_samples, generator=generator)

    def steps(self, epoch: int, samples_seen: int = 0, device: torch.device | None = None) -> Iterator[Batch]:
        """Yield this rank's part of every step of `epoch` behind its first `samples_seen` samples (over all ranks).

        The number of steps is the same on every rank. The indices are views of one tensor on `device` (the CPU).
        """
        order = self.permutation(epoch).to(device)
        for start in range(samples_seen, self.num_samples, self.global_batch_size):
            global_batch = order[start : start + self.global_batch_size]
            yield Batch(start, len(global_batch), self._cut(global_batch))

    def _cut(self, global_batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the micro-batches of this rank."""
        if self.virtual_ranks is None:
            mine = global_batch[share(len(global_batch), self.rank, self.num_replicas)]
            return tuple(mine[share(len(mine), i, self.accumulate)] for i in range(self.accumulate))
        own = share(self.virtual_ranks, self.rank, self.num_replicas)
        return tuple(global_batch[share(len(global_batch), i, self.virtual_ranks)] for i in range(own.start, own.stop))

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's samples of the epoch of `set_epoch`."""
        for step in self.steps(self.epoch):
            for micro_batch in step.micro_batches:
                yield from micro_batch.tolist()

    def __len__(self) -> int:
        """Return the number of this rank's samples in an epoch."""
        return sum(len(micro_batch) for step in self.steps(self.epoch) for micro_batch in step.micro_batches)


class Blocks(Order):
    """The samples in the order of the dataset, in blocks that are the same on any number of ranks: what is computed of
    a block does not depend on their number. The ranks take turns."""

    def __init__(self, num_samples: int, *, block_size: int, world_size: int, rank: int):
        super().__init__(
            num_samples, global_batch_size=block_size * world_size, world_size=world_size, rank=rank, shuffle=False
        )
        self._block_size = block_size

    def _cut(self, global_batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (global_batch[self.rank * self._block_size : (self.rank + 1) * self._block_size],)
