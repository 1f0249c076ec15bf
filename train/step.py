"""How one optimizer step is executed. The loop knows only `step(batch, ...) -> StepResult`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from pipeline.data.loading import Batch
from pipeline.distributed import Rank
from pipeline.losses import Loss
from pipeline.precision import Precision
from pipeline.seeding import stream_seed


@dataclass(frozen=True)
class StepResult:
    """Of this rank's share of the step; scalars that stay on the device until a record is due."""

    loss_sum: Tensor
    num_correct: Tensor


class Step(Protocol):
    """One optimizer step. Collective: every rank must call, with its share of the same global batch."""

    def __call__(self, batch: Batch, *, lr: float, global_step: int) -> StepResult: ...


class EagerStep:
    """Operation by operation, with DistributedDataParallel's overlapped all-reduce.

    The gradient is the exact mean over the global batch: losses are summed, and divided by what the sum over all
    ranks and micro-batches amounts to. DDP divides by the number of ranks besides, which is undone beforehand.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        precision: Precision,
        rank: Rank,
        *,
        seed: int,
        clip_norm: float | None = None,
    ):
        self._model = model
        self._loss = loss
        self._optimizer = optimizer
        self._precision = precision
        self._rank = rank
        self._seed = seed
        self._clip_norm = clip_norm
        self._parameters: Sequence[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, batch: Batch, *, lr: float, global_step: int) -> StepResult:
        seed_device(self._rank.device, stream_seed(self._seed, "step", global_step, self._rank.rank))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), dtype=self._precision.weights_dtype, device=self._rank.device)
        num_correct = torch.zeros((), dtype=torch.int64, device=self._rank.device)
        last = len(batch.micro_batches) - 1
        for index, (images, labels) in enumerate(batch.micro_batches):
            if index < last and len(labels) == 0:
                continue  # only the last is needed by the other ranks, as the one that synchronises
            # no_sync has to cover the forward pass too: DDP decides there whether backward will reduce
            with nullcontext() if index == last else self._without_sync():
                with self._precision.autocast():
                    output = self._model(images)
                    loss = self._loss.total(output, labels)
                denominator = batch.global_count * self._loss.per_sample(output.shape[1])
                self._precision.backward(loss * (self._rank.world_size / denominator))
            loss_sum += loss.detach()
            num_correct += (output.detach().argmax(1) == labels).sum()
        self._precision.update(self._optimizer, self._parameters, self._clip_norm)
        return StepResult(loss_sum, num_correct)

    def _without_sync(self) -> AbstractContextManager[Any]:
        if isinstance(self._model, DistributedDataParallel):
            return self._model.no_sync()
        return nullcontext()


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the generator that dropout draws from on `device`, and no other.

    `torch.manual_seed` seeds those of all devices, at a cost of its own in each step.
    """
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
