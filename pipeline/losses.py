"""Losses as sums over samples, so that dividing by the global count gives the exact mean over any split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Loss:
    """`total(output [N, C], labels [N])` is the sum over the samples; `per_sample(C)` what each counts for."""

    total: Callable[[Tensor, Tensor], Tensor]
    inputs: tuple[Literal["log_probabilities", "scores"], ...]
    per_sample: Callable[[int], int] = lambda num_classes: 1


def _sum_nll(output: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(output, labels, reduction="sum")


def _sum_cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output, labels, reduction="sum")


def _sum_squared_error(output: Tensor, labels: Tensor) -> Tensor:
    """Against one-hot targets, over samples and classes."""
    return F.mse_loss(output, F.one_hot(labels, output.shape[1]).to(output.dtype), reduction="sum")


LOSSES: Mapping[str, Loss] = {
    "nll": Loss(_sum_nll, ("log_probabilities",)),
    "cross_entropy": Loss(_sum_cross_entropy, ("scores",)),
    # the mean over samples and classes, as torch.nn.MSELoss has it
    "mse": Loss(_sum_squared_error, ("scores",), lambda num_classes: num_classes),
}


def losses_for(output: str) -> list[str]:
    """Names of the losses that fit a network's output."""
    return [name for name, loss in LOSSES.items() if output in loss.inputs]
