"""Losses of samples with weighted classes, summed: a step divides by the global count and gets the exact mean."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from pipeline.data.inputs import Inputs


@dataclass(frozen=True)
class Loss:
    each: Callable[[Tensor, Tensor], Tensor]
    """(output [N, C], classes int64 [N]) -> the loss of each sample [N]."""
    expects: Literal["log_probabilities", "logits"]

    def __call__(self, output: Tensor, inputs: Inputs) -> Tensor:
        """Return the sum of `weights[k, n] * each(output, classes[k])[n]`, a scalar; 0 for no samples."""
        weighted = zip(inputs.weights, inputs.classes, strict=True)
        losses = [(weights * self.each(output, classes)).sum() for weights, classes in weighted]
        total: Tensor = reduce(operator.add, losses)
        return total


def _squared_error(output: Tensor, classes: Tensor) -> Tensor:
    """Return the squared error against one-hot targets, [N]: the mean over the classes, as torch.nn.MSELoss has it."""
    return F.mse_loss(output, F.one_hot(classes, output.shape[1]).to(output.dtype), reduction="none").mean(1)


LOSSES: Mapping[str, Loss] = {
    "nll": Loss(partial(F.nll_loss, reduction="none"), "log_probabilities"),
    "cross_entropy": Loss(partial(F.cross_entropy, reduction="none"), "logits"),
    "mse": Loss(_squared_error, "logits"),
}
