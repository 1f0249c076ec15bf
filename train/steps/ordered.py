"""A step whose result does not depend on the number of ranks, to the last bit."""

from torch import Tensor

from pipeline.base.seeding import stream_seed
from pipeline.data.inputs import Batch
from pipeline.learning.metrics import round_to_exact
from pipeline.parallel.ordered import OrderedReplicas
from train.steps.parts import StepParts, seed_device


class OrderedStep:
    """Computes the gradient of each virtual rank apart, and sums them in their order.

    A virtual rank has the same samples, the same shape and the same random numbers whichever rank computes it. Loss and
    correct predictions are rounded so that their sums are the same in any order.
    """

    def __init__(self, parts: StepParts, replicas: OrderedReplicas):
        """The micro-batches of a batch are the virtual ranks of this rank."""
        self._parts = parts
        self._replicas = replicas

    def prepare(self) -> None:
        pass

    def __call__(self, batch: Batch, step: int) -> Tensor:
        parts = self._parts
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
