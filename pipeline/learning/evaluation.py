"""One pass over the evaluation set in shards without padding, every sample counted once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.data.inputs import Loader
from pipeline.learning.losses import Loss
from pipeline.learning.metrics import Evaluation, EvaluationMeter
from pipeline.learning.precision import Precision
from pipeline.parallel.rank import Rank


@dataclass(frozen=True)
class Predictions:
    """Of evaluation samples in the order of the dataset, on the CPU."""

    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    """The share that softmax gives to the predicted class."""


class Interrupted(Exception):
    """By a request to stop."""


class Evaluator:
    """Runs the unwrapped network: DDP's forward would synchronise buffers, and shards differ in length."""

    def __init__(
        self, network: nn.Module, loader: Loader, loss: Loss, precision: Precision, rank: Rank, num_classes: int
    ):
        self._network = network
        self._loader = loader
        self._loss = loss
        self._precision = precision
        self._rank = rank
        self._num_classes = num_classes
        self._shard: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.inference_mode()
    def evaluate(self, is_interrupted: Callable[[], bool] = lambda: False) -> Evaluation:
        """Collective: every rank must call. Ends with one reduction.

        Raises Interrupted if `is_interrupted`, which is asked after each batch and says the same on every rank.
        """
        meter = EvaluationMeter(self._num_classes, self._rank.device)
        self._network.eval()
        self._shard = []
        for batch in self._loader:
            for micro_batch in batch.micro_batches:
                images, labels = self._loader.inputs(micro_batch)
                if len(labels) == 0:
                    continue
                with self._precision.autocast():
                    output = self._network(images)
                    loss = self._loss.total(output, labels)
                confidence, predicted = output.float().softmax(1).max(1)
                meter.add(loss, labels, predicted)
                self._shard.append((labels, predicted, confidence))
            if is_interrupted():
                raise Interrupted
        num_samples = self._loader.sampler.total_size
        return meter.reduce(self._rank, num_samples, self._loss.per_sample(self._num_classes))

    def first_predictions(self, count: int) -> Predictions:
        """What the last evaluation predicted for the first samples of this rank's first batch, `count` at most.

        Of rank 0 these are the first of the dataset.
        """
        return Predictions(*(column[:count].cpu() for column in self._shard[0]))

    def predictions(self) -> Predictions:
        """Collective: every rank must call. What the last evaluation predicted for all samples."""
        shard = [torch.cat(column).cpu().numpy() for column in zip(*self._shard, strict=True)]
        sampler = self._loader.sampler
        indices = torch.cat([i for step in sampler.steps() for i in step.micro_batches]).numpy()
        shards = [part for part in self._rank.gather([indices, *shard]) if len(part[0])]
        order, *columns = (torch.cat([torch.from_numpy(part[i]) for part in shards]) for i in range(4))
        back = order.argsort()
        return Predictions(*(column[back] for column in columns))
