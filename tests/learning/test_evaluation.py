"""An evaluation is over all samples, each counted once, on any number of ranks; predictions are in their order."""

from __future__ import annotations

from itertools import chain, repeat

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.inputs import Prepare
from pipeline.data.loaders import Gather, ResidentLoader
from pipeline.data.order import Blocks
from pipeline.learning.evaluation import Evaluator, Predictions
from pipeline.learning.losses import LOSSES
from pipeline.learning.metrics import Evaluation
from pipeline.learning.update import Precision
from pipeline.models.normalize import Normalize
from pipeline.parallel.rank import Rank
from tests.ranks import run_ranks


def build(rank: Rank, num_samples: int, loss: str) -> tuple[Evaluator, Tensor, Tensor]:
    """Return an evaluator in blocks of 4, and the output and the labels of all samples."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num_samples, 1, 3, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(5, (num_samples,), generator=generator)
    torch.manual_seed(1)
    last = nn.LogSoftmax(1) if loss == "nll" else nn.Identity()
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(9, 5), last).double()
    order = Blocks(num_samples, block_size=4, world_size=rank.world_size, rank=rank.rank)
    normalize = Normalize([0.5], [0.25], torch.float64)
    loader = ResidentLoader(order, Prepare(Gather(pixels, labels), nn.Identity(), normalize))
    evaluator = Evaluator(model, loader, LOSSES[loss], Precision("fp64", rank.device), rank, num_classes=5)
    with torch.no_grad():
        output = model.eval()(normalize(pixels))
    model.train()  # as a training leaves it
    return evaluator, output, labels


def _evaluate(rank: Rank, num_samples: int, loss: str) -> tuple[Evaluation, Tensor, Tensor]:
    evaluator, output, labels = build(rank, num_samples, loss)
    evaluation = evaluator.evaluate()
    assert evaluation is not None
    return evaluation, output, labels


@pytest.mark.parametrize(("world_size", "num_samples"), [(1, 23), (3, 23), (3, 5)])  # 5: one rank has no samples
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_accuracy_are_those_of_all_samples_in_one_batch(loss: str, world_size: int, num_samples: int) -> None:
    for evaluation, output, labels in run_ranks(world_size, _evaluate, num_samples, loss):
        expected = {
            "nll": F.nll_loss(output, labels),
            "cross_entropy": F.cross_entropy(output, labels),
            "mse": F.mse_loss(output, F.one_hot(labels, 5).double()),
        }[loss]
        assert evaluation.loss == pytest.approx(expected.item(), abs=2**-26)  # sums are rounded to be exact
        assert evaluation.accuracy == (output.argmax(1) == labels).sum().item() / num_samples
        assert evaluation.count == num_samples
        confusion = torch.zeros(5, 5, dtype=torch.int64)
        for truth, guess in zip(labels, output.argmax(1), strict=True):
            confusion[truth, guess] += 1
        assert torch.equal(evaluation.confusion, confusion)


def _predict(rank: Rank, num_samples: int) -> tuple[Predictions, Predictions | None, Tensor, Tensor]:
    evaluator, output, labels = build(rank, num_samples, "cross_entropy")
    evaluator.evaluate()
    evaluator.evaluate()  # the predictions are those of the last one alone
    return evaluator.predictions(), evaluator.first_predictions(3) if rank.is_main else None, output, labels


@pytest.mark.parametrize(("world_size", "num_samples"), [(1, 23), (3, 23), (3, 5)])
def test_predictions_are_in_the_order_of_the_dataset(world_size: int, num_samples: int) -> None:
    for found, first, output, labels in run_ranks(world_size, _predict, num_samples):
        confidence, predicted = output.softmax(1).max(1)
        assert torch.equal(found.labels, labels)
        assert torch.equal(found.predicted, predicted)
        torch.testing.assert_close(found.confidence, confidence.float())
        if first is not None:
            assert torch.equal(first.predicted, predicted[:3])
            assert torch.equal(first.confidence, found.confidence[:3])


def _interrupt(rank: Rank) -> list[float | None]:
    evaluator, _, _ = build(rank, 23, "nll")
    answers = chain([False, True], repeat(False))
    evaluations = [evaluator.evaluate(lambda: next(answers)) for _ in range(2)]
    evaluations.append(build(rank, 23, "nll")[0].evaluate())
    return [None if evaluation is None else evaluation.loss for evaluation in evaluations]


def test_after_an_interrupted_evaluation_the_next_one_begins_anew() -> None:
    ((interrupted, again, whole),) = run_ranks(1, _interrupt)
    assert interrupted is None
    assert again == whole
