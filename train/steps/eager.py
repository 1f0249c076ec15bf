"""A step as torch's manual has it, operation by operation, for all cases."""

from contextlib import nullcontext

from torch import Tensor

from pipeline.data.inputs import Batch
from train.steps.parts import StepParts


class EagerStep:
    """Computes the exact mean gradient over the global batch: losses are summed, and divided by the global count."""

    def __init__(self, parts: StepParts):
        self._parts = parts

    def prepare(self) -> None:
        pass

    def __call__(self, batch: Batch, step: int) -> Tensor:
        parts = self._parts
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
