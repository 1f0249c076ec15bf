"""Every evaluated sample is counted once, sums that have to be exact are, and the slowest rank is found by its work."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.base.timing import PHASES
from pipeline.data.inputs import Inputs
from pipeline.learning.metrics import (
    Evaluation,
    EvaluationMeter,
    Times,
    count_correct,
    find_straggler,
    mean_times,
    round_to_exact,
)
from pipeline.parallel.rank import Rank

CPU = torch.device("cpu")
ALONE = Rank(0, 0, 1, 1, CPU, "none", 1)


def evaluate(classes: list[int], predicted: list[int], loss: float = 0.0) -> Evaluation:
    """Return the evaluation of samples of three classes, with this loss for each."""
    meter = EvaluationMeter(3, CPU)
    for truth, guess in zip(classes, predicted, strict=True):
        meter.add(torch.tensor(loss), torch.tensor([truth]), torch.tensor([guess]))
    return meter.reduce(ALONE, len(classes))


def test_an_evaluation_counts_every_sample() -> None:
    meter = EvaluationMeter(3, CPU)
    meter.add(torch.tensor(3.0), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    meter.add(torch.tensor(1.0), torch.tensor([2]), torch.tensor([0]))
    evaluation = meter.reduce(ALONE, 4)
    assert evaluation.metrics == {"eval/loss": 1.0, "eval/accuracy": 0.5}
    assert (evaluation.count, evaluation.num_correct) == (4, 2)


def test_rows_of_the_confusion_matrix_are_the_truth_and_columns_the_prediction() -> None:
    confusion = evaluate(classes=[0, 0, 0, 2], predicted=[1, 1, 0, 1]).confusion
    assert confusion.tolist() == [[1, 2, 0], [0, 0, 0], [0, 1, 0]]
    assert confusion.dtype == torch.int64


def test_recall_is_by_truth_and_nan_for_a_class_without_samples() -> None:
    recall = evaluate(classes=[0, 0, 0, 0, 2], predicted=[0, 0, 0, 1, 1]).recall.tolist()
    assert recall[0] == 0.75
    assert math.isnan(recall[1])  # although it was predicted
    assert recall[2] == 0.0


@pytest.mark.parametrize("expected_count", [2, 4])
def test_a_sample_too_many_or_too_few_fails_the_evaluation(expected_count: int) -> None:
    meter = EvaluationMeter(3, CPU)
    meter.add(torch.tensor(0.0), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))
    with pytest.raises(AssertionError, match=f"evaluated 3 samples of {expected_count}"):
        meter.reduce(ALONE, expected_count)


def test_a_loss_that_is_not_a_number_does_not_spoil_the_counts() -> None:
    evaluation = evaluate([0, 1], [0, 0], loss=math.nan)
    assert math.isnan(evaluation.loss)
    assert evaluation.accuracy == 0.5


def test_correct_predictions_count_by_the_weights_of_the_classes() -> None:
    output = torch.eye(3)[[0, 1, 2, 0]]  # predicts 0, 1, 2, 0
    first, second = torch.tensor([0, 0, 2, 0]), torch.tensor([1, 1, 1, 1])
    one = Inputs(output, first[None], torch.tensor([[1.0, 1.0, 1.0, 0.0]]))  # the last is padding
    two = Inputs(output, torch.stack((first, second)), torch.tensor([[0.75] * 4, [0.25] * 4]))
    assert count_correct(output, one).item() == 2.0
    assert count_correct(output, two).item() == 3 * 0.75 + 0.25


def test_rounded_sums_are_the_same_in_any_order_of_addition() -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 1000
    rounded = round_to_exact(values)
    assert rounded.dtype == torch.float64
    torch.testing.assert_close(rounded, values.double(), rtol=0, atol=2**-27)
    orders = [torch.randperm(1000, generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(5)]
    third = values.double() / 3  # whose sums do depend on the order
    assert len({sum(rounded[order].tolist()) for order in orders}) == 1
    assert len({sum(third[order].tolist()) for order in orders}) > 1


def row(**milliseconds: float) -> list[float]:
    return [milliseconds.get(phase, 0.0) for phase in PHASES]


def times(*rows: list[float]) -> Times:
    return np.array(rows)


def test_means_are_over_the_ranks_and_leave_out_phases_that_did_not_occur() -> None:
    rows = row(data=1, forward=4), row(data=3, forward=2)
    assert mean_times(times(*rows)) == {"time/data_ms": 2, "time/forward_ms": 3}


def test_the_straggler_is_the_rank_with_most_work_of_its_own_and_not_the_one_that_waits() -> None:
    waiting, slow = row(data=1, forward=4, communication=9), row(data=6, forward=5, communication=1)
    found = find_straggler(times(waiting, slow, waiting))
    assert found is not None
    assert (found.rank, found.phase) == (1, "data")
    assert found.imbalance == pytest.approx(11 / 7 - 1)
    assert found.metrics == {"time/slowest_rank": 1.0, "time/imbalance": found.imbalance}


def test_there_is_no_straggler_where_a_rank_is_alone_or_waiting_is_not_seen() -> None:
    assert find_straggler(times(row(data=1))) is None
    assert find_straggler(times(row(data=1, graph=4), row(data=2, graph=9))) is None
