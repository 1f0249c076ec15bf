"""A step whose result does not depend on the number of ranks, to the last bit."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.base.seeding import stream_seed
from pipeline.data.inputs import Batch
from pipeline.learning.metrics import exact
from pipeline.learning.optim import set_lr
from pipeline.parallel.ordered import Shards
from train.steps.eager import StepParts, seed_device


class ShardStep:
    """Computes the gradient of each shard of the global batch apart, and sums them in their order.

    A shard has the same samples, the same shape and the same random numbers whichever rank has it; loss and hits are
    rounded so that their sums are the same in any order.
    """

    def __init__(self, parts: StepParts, shards: Shards):
        """The micro-batches of a batch are the shards of this rank."""
        self._parts = parts
        self._parameters = parts.parameters
        self._shards = shards

    def prepare(self) -> None:
        pass

    def __call__(self, batch: Batch, *, lr: float, global_step: int) -> Tensor:
        parts = self._parts
        set_lr(parts.optimizer, lr)
        sums = torch.zeros(2, dtype=torch.float64, device=parts.rank.device)
        for shard, micro_batch in zip(self._shards.own, batch.micro_batches, strict=True):
            images, labels = parts.inputs(micro_batch)
            parts.timer.lap("data")
            if len(labels) > 0:
                seed_device(parts.rank.device, stream_seed(parts.seed, "shard", global_step, shard))
                sums += exact(parts.compute_gradient(images, labels, batch.global_count))
            self._shards.store(shard)
            parts.timer.lap("backward")
        self._shards.sum()
        parts.timer.lap("communication")
        parts.precision.update(parts.optimizer, self._parameters, parts.clip_norm)
        parts.timer.lap("update")
        return sums
