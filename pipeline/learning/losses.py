"""Losses as sums over samples, so that dividing by the global count gives the exact mean over any split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Loss:
    """`each(output [N, C], labels [N])` is the loss of each sample [N]; `per_sample(C)` what each counts for."""

    each: Callable[[Tensor, Tensor], Tensor]
    inputs: tuple[Literal["log_probabilities", "scores"], ...]
    per_sample: Callable[[int], int] = lambda num_classes: 1

    def total(self, output: Tensor, labels: Tensor) -> Tensor:
        """The sum over the samples, a scalar; 0 for none."""
        return self.each(output, labels).sum()


def _nll(output: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(output, labels, reduction="none")


def _cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output, labels, reduction="none")


def _squared_error(output: Tensor, labels: Tensor) -> Tensor:
    """Against one-hot targets, summed over the classes."""
    return F.mse_loss(output, F.one_hot(labels, output.shape[1]).to(output.dtype), reduction="none").sum(1)


LOSSES: Mapping[str, Loss] = {
    "nll": Loss(_nll, ("log_probabilities",)),
    "cross_entropy": Loss(_cross_entropy, ("scores",)),
    # the mean over samples and classes, as torch.nn.MSELoss has it
    "mse": Loss(_squared_error, ("scores",), lambda num_classes: num_classes),
}


def losses_for(output: str) -> list[str]:
    """Names of the losses that fit a network's output."""
    return [name for name, loss in LOSSES.items() if output in loss.inputs]
