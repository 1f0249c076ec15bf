"""Steps operation by operation: as torch's manual has it, for all cases; and by virtual ranks, to be reproducible."""

from contextlib import nullcontext

from torch import Tensor

from pipeline.base.seeding import stream_seed
from pipeline.data.order import Batch
from pipeline.learning.metrics import round_to_exact
from pipeline.parallel.replicas import OrderedReplicas
from train.steps.parts import Step, StepParts, seed_device


class EagerStep(Step):
    """Computes the exact mean gradient over the global batch: losses are summed, and divided by the global count."""

    def __call__(self, batch: Batch, step: int) -> Tensor:
        parts = self.parts
        parts.seed_step(step)
        parts.update.set_step(step)
        sums = parts.zero_sums()
        last = len(batch.micro_batches) - 1
        for index, micro_batch in enumerate(batch.micro_batches):
            inputs = parts.prepare(micro_batch)
            parts.timer.lap("data")
            if index < last and len(inputs.images) == 0:
                continue  # only the last is needed by the other ranks, as the one that synchronises
            with nullcontext() if index == last else parts.replicas.accumulate():
                loss, part = parts.forward(inputs)
                parts.timer.lap("forward")
                parts.precision.backward(loss * (1 / batch.global_count))
                sums += part
            if index == last:
                parts.replicas.reduce()
            # where there is something to reduce, the lap for `backward` was taken when that began
            parts.timer.lap("communication" if index == last and parts.rank.world_size > 1 else "backward")
        parts.update()
        parts.timer.lap("update")
        return sums


class OrderedStep(Step):
    """Computes the gradient of each virtual rank apart, and sums them in their order.

    So the result does not depend on the number of ranks, to the last bit: a virtual rank has the same samples, the same
    shape and the same random numbers whichever rank computes it, and loss and correct predictions are rounded so that
    their sums are the same in any order.
    """

    def __init__(self, parts: StepParts, replicas: OrderedReplicas):
        """The micro-batches of a batch are the virtual ranks of this rank."""
        super().__init__(parts)
        self._replicas = replicas

    def __call__(self, batch: Batch, step: int) -> Tensor:
        parts = self.parts
        parts.update.set_step(step)
        sums = parts.zero_sums()
        for virtual, micro_batch in zip(self._replicas.own, batch.micro_batches, strict=True):
            inputs = parts.prepare(micro_batch)
            parts.timer.lap("data")
            if len(inputs.images) > 0:
                seed_device(parts.rank.device, stream_seed(parts.seed, "shard", step, virtual))
                loss, part = parts.forward(inputs)
                parts.timer.lap("forward")
                parts.precision.backward(loss * (1 / batch.global_count))
                sums += round_to_exact(part)
            self._replicas.store(virtual)
            parts.timer.lap("backward")
        self._replicas.reduce()
        parts.timer.lap("communication")
        parts.update()
        parts.timer.lap("update")
        return sums
