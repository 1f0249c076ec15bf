"""How one optimizer step is executed. The loop knows only `step(batch, ...) -> sums of loss and hits`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.base.seeding import stream_seed
from pipeline.base.timing import PhaseTimer
from pipeline.data.inputs import Batch
from pipeline.learning.losses import Loss
from pipeline.learning.optim import set_lr
from pipeline.learning.precision import Precision
from pipeline.parallel.rank import Rank
from pipeline.parallel.replicas import Replicas


@dataclass(frozen=True)
class StepParts:
    """What any way of executing a step needs."""

    replicas: Replicas
    inputs: Callable[[Any], tuple[Tensor, Tensor]]
    """The loader's: micro-batch -> images and labels."""
    loss: Loss
    optimizer: Optimizer
    precision: Precision
    rank: Rank
    timer: PhaseTimer
    seed: int
    clip_norm: float | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.replicas.model.parameters() if p.requires_grad]

    def compute_gradient(self, images: Tensor, labels: Tensor, global_count: int, scale: float = 1.0) -> Tensor:
        """Adds to the gradients `scale` times what these samples are of the mean over the global batch.

        Sums of loss and hits, as the step returns them, of these samples.
        """
        with self.precision.autocast():
            output = self.replicas.model(images)
            loss = self.loss.total(output, labels)
        sums = torch.stack((loss.detach(), count_hits(output, labels).sum()))
        self.timer.lap("forward")
        denominator = global_count * self.loss.per_sample(output.shape[1])
        self.precision.backward(loss * (scale / denominator))
        return sums


class Step(Protocol):
    """One optimizer step. Collective: every rank must call, with its share of the same global batch."""

    def prepare(self) -> None:
        """Collective: every rank must call. Once, when weights and optimizer are as the first step will find them."""

    def __call__(self, batch: Batch, *, lr: float, global_step: int) -> Tensor:
        """float64 [2]: sum of the losses and number of hits over this rank's share, on the device."""


class EagerStep:
    """Operation by operation.

    The gradient is the exact mean over the global batch: losses are summed, and divided by what the sum over all
    ranks and micro-batches amounts to. Replicas divide by the number of ranks besides, which is undone beforehand.
    """

    def __init__(self, parts: StepParts):
        self._parts = parts
        self._parameters: Sequence[nn.Parameter] = parts.parameters

    def prepare(self) -> None:
        pass

    def __call__(self, batch: Batch, *, lr: float, global_step: int) -> Tensor:
        parts = self._parts
        seed_device(parts.rank.device, stream_seed(parts.seed, "step", global_step, parts.rank.rank))
        set_lr(parts.optimizer, lr)
        sums = torch.zeros(2, dtype=torch.float64, device=parts.rank.device)
        last = len(batch.micro_batches) - 1
        for index, micro_batch in enumerate(batch.micro_batches):
            images, labels = parts.inputs(micro_batch)
            parts.timer.lap("data")
            if index < last and len(labels) == 0:
                continue  # only the last is needed by the other ranks, as the one that synchronises
            # no_sync has to cover the forward pass too: DDP decides there whether backward will reduce
            with nullcontext() if index == last else parts.replicas.no_sync():
                sums += parts.compute_gradient(images, labels, batch.global_count, scale=parts.rank.world_size)
            if index == last:
                parts.replicas.average()
            # where there is something to average, the lap for `backward` was taken when that began
            parts.timer.lap("communication" if index == last and parts.rank.world_size > 1 else "backward")
        parts.precision.update(parts.optimizer, self._parameters, parts.clip_norm)
        parts.timer.lap("update")
        return sums


def count_hits(output: Tensor, labels: Tensor) -> Tensor:
    """bool [N]: whether the class with the highest score is the right one."""
    return output.detach().argmax(1) == labels


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the generator that dropout draws from on `device`, and no other.

    `torch.manual_seed` seeds those of all devices, at a cost of its own in each step.
    """
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
