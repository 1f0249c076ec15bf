"""One pass over a split in blocks without padding: every sample is counted once."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.base.timing import build_timer
from pipeline.config.schema import DataConfig
from pipeline.data.build import build_eval_loader
from pipeline.data.loaders import Loader
from pipeline.data.samples import Dataset, Samples
from pipeline.learning.losses import Loss
from pipeline.learning.metrics import Evaluation, EvaluationMeter
from pipeline.learning.update import Precision
from pipeline.parallel.rank import Rank


@dataclass(frozen=True)
class Predictions:
    """Predictions for samples in the order of the dataset, on the CPU, [N] each."""

    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    """The share that softmax gives to the predicted class."""


@dataclass
class Evaluator:
    """Evaluates the unwrapped model: DDP's forward would synchronise, and ranks have unequal numbers of blocks."""

    model: nn.Module
    loader: Loader
    loss: Loss
    precision: Precision
    rank: Rank
    num_classes: int
    _own: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Labels, predictions and confidences of each block of this rank in the last evaluation."""

    @torch.inference_mode()
    def evaluate(self, is_interrupted: Callable[[], bool] = lambda: False) -> Evaluation | None:
        """Collective. Return the evaluation over all ranks, which takes one reduction.

        `is_interrupted` is asked after each batch and gives the same answer on every rank; None if it said yes.
        """
        meter = EvaluationMeter(self.num_classes, self.rank.device)
        self.model.eval()
        self._own = []
        for batch in self.loader.batches(0):
            for micro_batch in batch.micro_batches:
                inputs = self.loader.prepare(micro_batch)
                if len(inputs.images) == 0:
                    continue
                with self.precision.autocast():
                    output = self.model(inputs.images)
                    loss = self.loss(output, inputs)
                confidence, predicted = output.float().softmax(1).max(1)
                meter.add(loss, inputs.classes[0], predicted)
                self._own.append((inputs.classes[0], predicted, confidence))
            if is_interrupted():
                return None
        return meter.reduce(self.rank, self.loader.order.total_size)

    def first_predictions(self, count: int) -> Predictions:
        """Return the predictions for this rank's first `count` samples; on rank 0 they are the first of the dataset."""
        return Predictions(*(column[:count].cpu() for column in self._own[0]))

    def predictions(self) -> Predictions:
        """Collective. Return the predictions of the last evaluation for all samples."""
        own = [torch.cat(column).cpu().numpy() for column in zip(*self._own, strict=True)]
        steps = self.loader.order.steps(0)
        indices = torch.cat([each for step in steps for each in step.micro_batches]).numpy()
        parts = [part for part in self.rank.gather([indices, *own]) if len(part[0])]
        order, *columns = (torch.cat([torch.from_numpy(part[i]) for part in parts]) for i in range(4))
        back = order.argsort()
        return Predictions(*(column[back] for column in columns))


def build_evaluator(
    config: DataConfig,
    model: nn.Module,
    loss: Loss,
    precision: Precision,
    rank: Rank,
    dataset: Dataset,
    placement: str,
    samples: Samples,
) -> Evaluator:
    """Return what evaluates `model` on `samples`, a split of the dataset. `placement` is `device` or `workers`."""
    timer = build_timer(rank.device)  # an evaluation belongs to no step
    dtype = precision.weights_dtype
    loader = build_eval_loader(config, dataset, samples, rank, placement=placement, dtype=dtype, timer=timer)
    return Evaluator(model, loader, loss, precision, rank, len(dataset.classes))
