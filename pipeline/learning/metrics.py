"""Metrics of all ranks: sums and counts, reduced when they are read, and who keeps whom waiting. No mean of means."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.base.timing import PHASES
from pipeline.data.inputs import Inputs
from pipeline.parallel.rank import Rank

Times = NDArray[np.float64]


def count_correct(output: Tensor, inputs: Inputs) -> Tensor:
    """Return the weight of the classes that have the highest output, summed over the samples: a scalar."""
    return ((output.detach().argmax(1) == inputs.classes) * inputs.weights).sum()


def round_to_exact(sums: Tensor) -> Tensor:
    """Return `sums` as float64 multiples of 2^-26, whose sums up to 2^27 are the same in any order of addition."""
    return (sums.to(torch.float64) * 2**26).round() / 2**26


@dataclass(frozen=True)
class Evaluation:
    """The result over all samples of a split, each counted once."""

    loss: float
    accuracy: float
    count: int
    confusion: Tensor
    """int64 [classes, classes] on the CPU: rows are the truth, columns the prediction."""

    @property
    def metrics(self) -> dict[str, float]:
        return {"eval/loss": self.loss, "eval/accuracy": self.accuracy}

    @property
    def num_correct(self) -> int:
        return int(self.confusion.diagonal().sum())

    @property
    def recall(self) -> Tensor:
        """float64 [classes]: the share of each class that was recognised; NaN for a class without samples."""
        return self.confusion.diagonal().double() / self.confusion.sum(1)


class EvaluationMeter:
    """Sums the loss and counts the confusion matrix of the samples that this rank evaluates."""

    def __init__(self, num_classes: int, device: torch.device):
        self._loss = torch.zeros(1, dtype=torch.float64, device=device)
        self._confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
        self._num_classes = num_classes

    def add(self, loss_sum: Tensor, classes: Tensor, predicted: Tensor) -> None:
        """Count samples with these classes and predictions, int64 [N] each."""
        cells = classes * self._num_classes + predicted
        self._confusion.index_add_(0, cells, torch.ones_like(cells))
        self._loss += round_to_exact(loss_sum)

    def reduce(self, rank: Rank, expected_count: int) -> Evaluation:
        """Collective. Return the evaluation over all ranks. Asserts that `expected_count` samples were counted."""
        # float64 holds counts exactly up to 2**53, so that one reduction carries loss and counts
        sums = rank.reduce_sum(torch.cat((self._loss, self._confusion.double()))).cpu()
        confusion = sums[1:].round().long().view(self._num_classes, self._num_classes)
        count = int(confusion.sum())
        assert count == expected_count, f"evaluated {count} samples of {expected_count}"
        correct = int(confusion.diagonal().sum())
        return Evaluation(float(sums[0]) / count, correct / count, count, confusion)


@dataclass(frozen=True)
class Straggler:
    """The rank that keeps the others waiting."""

    rank: int
    imbalance: float
    """Its own time over the mean of all ranks, minus 1."""
    phase: str
    """In which it is furthest behind the mean."""

    @property
    def metrics(self) -> dict[str, float]:
        return {"time/slowest_rank": float(self.rank), "time/imbalance": self.imbalance}


def mean_times(times: Times) -> dict[str, float]:
    """Return `time/<phase>_ms` -> milliseconds per optimizer step, mean over the ranks; `times` [ranks, PHASES].

    Phases that did not occur are left out.
    """
    return {f"time/{phase}_ms": mean for phase, mean in zip(PHASES, times.mean(0).tolist(), strict=True) if mean > 0}


def find_straggler(times: Times) -> Straggler | None:
    """Return the rank that spends most time before it meets the others: in `communication` they wait for it.

    None if it is alone, or if that cannot be told: in a step replayed as one, waiting is not seen apart.
    """
    if len(times) < 2 or times[:, PHASES.index("graph")].any():
        return None
    own = times.copy()
    own[:, PHASES.index("communication")] = 0
    totals = own.sum(1)
    slowest, mean = int(totals.argmax()), float(totals.mean())
    phase = PHASES[int((own[slowest] - own.mean(0)).argmax())]
    return Straggler(slowest, float(totals[slowest]) / mean - 1 if mean > 0 else 0.0, phase)
