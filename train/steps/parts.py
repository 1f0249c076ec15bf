"""The interface of a training step, and the parts that every way of executing one has."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.base.seeding import stream_seed
from pipeline.base.timing import PhaseTimer
from pipeline.data.inputs import Inputs, Prepare
from pipeline.data.order import Batch
from pipeline.learning.losses import Loss
from pipeline.learning.metrics import count_correct
from pipeline.learning.update import Precision, Update
from pipeline.parallel.rank import Rank
from pipeline.parallel.replicas import Replicas


class Step:
    """One optimizer step on this rank's share of a global batch."""

    def __init__(self, parts: "StepParts"):
        self.parts = parts

    def prepare(self) -> None:
        """Collective. Called once, when weights and optimizer are as the first step will find them."""

    def __call__(self, batch: Batch, step: int) -> Tensor:
        """Collective. Train optimizer step `step`, counted from 0, and return float64 [2] on the device.

        That is the summed loss and the number of correct predictions of this rank's share.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class StepParts:
    replicas: Replicas
    prepare: Prepare
    loss: Loss
    update: Update
    precision: Precision
    rank: Rank
    timer: PhaseTimer
    seed: int

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return the summed loss of these samples, differentiable, and [2]: that loss and the correct predictions."""
        with self.precision.autocast():
            output = self.replicas.model(inputs.images)
            loss = self.loss(output, inputs)
        return loss, torch.stack((loss.detach(), count_correct(output, inputs)))

    def zero_sums(self) -> Tensor:
        return torch.zeros(2, dtype=torch.float64, device=self.rank.device)

    def seed_step(self, step: int) -> None:
        """Seed dropout for this step of this rank."""
        seed_device(self.rank.device, stream_seed(self.seed, "step", step, self.rank.rank))


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the generator that dropout draws from on `device`, and no other.

    `torch.manual_seed` seeds those of all devices, at a cost of its own in each step.
    """
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
