"""Sums and counts on the device, reduced over the ranks when they are read: no metric is a mean of means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.parallel.rank import PendingSum, Rank


@dataclass(frozen=True)
class Record:
    """Of all ranks, over the steps since the record before."""

    metrics: dict[str, float]
    common: list[float]
    """What is the same on every rank."""
    rows: list[list[float]]
    """What each rank added of its own, by rank."""


class PendingRecord:
    """A record on its way over the ranks to the host."""

    def __init__(self, pending: PendingSum, count: int, world_size: int, num_common: int):
        self._pending = pending
        self._num_common = num_common
        self._count = max(1, count)
        self._world_size = world_size

    def result(self) -> Record:
        """Waits until it is there."""
        loss, correct, *rest = self._pending.values()
        common, flat = rest[: self._num_common], rest[self._num_common :]
        width = len(flat) // self._world_size
        rows = [flat[i * width : (i + 1) * width] for i in range(self._world_size)]
        return Record({"train/loss": loss / self._count, "train/accuracy": correct / self._count}, common, rows)


class TrainMeter:
    """Loss and accuracy since the last record. Adding does not wait for the device."""

    def __init__(self, device: torch.device):
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, sums: Tensor, count: int) -> None:
        """`sums`, float64 [loss, correct], are of this rank; `count` is of all ranks, known without asking them."""
        self._sums += sums
        self._count += count

    def reduce(self, rank: Rank, row: Sequence[float] = (), common: Tensor | None = None) -> PendingRecord:
        """Collective: every rank must call. Begin a record over all ranks, and reset.

        A row of numbers of each rank rides along, so that it costs no collective of its own; and `common`, float64 [N]
        on the device, which is the same on all ranks, so that the host does not wait for it.
        """
        own = torch.zeros(rank.world_size, len(row), dtype=torch.float64)
        own[rank.rank] = torch.tensor(row, dtype=torch.float64)
        common = self._sums.new_zeros(0) if common is None else common * rank.is_main
        rows = own.flatten().to(self._sums.device, non_blocking=True)
        pending = rank.reduce_sum_later(torch.cat((self._sums, common, rows)))
        record = PendingRecord(pending, self._count, rank.world_size, len(common))
        self._sums.zero_()
        self._count = 0
        return record

    def state(self, rank: Rank) -> dict[str, Any]:
        """Collective: every rank must call. What a checkpoint keeps of a record that is not complete yet.

        The sums of each rank apart: added up in another order they would differ in the last bit.
        """
        return {"sums": rank.gather(self._sums.tolist()), "count": self._count}

    def load_state(self, state: dict[str, Any], rank: Rank) -> None:
        """On another number of ranks the first takes the sum of all."""
        sums = torch.tensor(state["sums"], dtype=torch.float64).view(-1, 2)
        if len(sums) == rank.world_size:
            self._sums.copy_(sums[rank.rank])
        else:
            self._sums.copy_(sums.sum(0) if rank.is_main else torch.zeros(2, dtype=torch.float64))
        self._count = int(state["count"])


def exact(sums: Tensor) -> Tensor:
    """float64: rounded to multiples of 2^-26, whose sums are the same in any order, up to 130 million in all."""
    return (sums.to(torch.float64) * 2**26).round() / 2**26


@dataclass(frozen=True)
class Evaluation:
    """Over all samples of the evaluation set, each counted once."""

    loss: float
    accuracy: float
    count: int
    confusion: Tensor
    """int64 [classes, classes] on the CPU: rows are the truth, columns the prediction."""

    @property
    def num_correct(self) -> int:
        return int(self.confusion.diagonal().sum())

    @property
    def recall(self) -> Tensor:
        """float64 [classes]: the share of each class that was recognised; NaN for a class without samples."""
        return self.confusion.diagonal().double() / self.confusion.sum(1)


class EvaluationMeter:
    """Loss and confusion matrix of the samples this rank evaluates."""

    def __init__(self, num_classes: int, device: torch.device):
        self._loss = torch.zeros(1, dtype=torch.float64, device=device)
        self._confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
        self._num_classes = num_classes

    def add(self, loss_sum: Tensor, labels: Tensor, predicted: Tensor) -> None:
        cells = labels * self._num_classes + predicted
        self._confusion.index_add_(0, cells, torch.ones_like(cells))
        self._loss += exact(loss_sum)

    def reduce(self, rank: Rank, expected_count: int, per_sample: int = 1) -> Evaluation:
        """Collective: every rank must call, once. Asserts that `expected_count` samples were counted.

        `per_sample` is what the loss divides by besides the samples (the classes, for a mean over both).
        """
        # float64 holds counts exactly up to 2**53, so that one reduction carries loss and counts
        sums = rank.reduce_sum(torch.cat((self._loss, self._confusion.double()))).cpu()
        confusion = sums[1:].round().long().view(self._num_classes, self._num_classes)
        count = int(confusion.sum())
        assert count == expected_count, f"evaluated {count} samples of {expected_count}"
        correct = int(confusion.diagonal().sum())
        return Evaluation(float(sums[0]) / (count * per_sample), correct / count, count, confusion)
