"""Sums and counts: records over all samples since the last, and every evaluation sample counted once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.learning.metrics import Evaluation, EvaluationMeter, Record, TrainMeter
from pipeline.parallel.rank import Rank
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def rank_of(rank: int, world_size: int) -> Rank:
    return Rank(rank, rank, world_size, world_size, CPU, "none", 1)


ALONE = rank_of(0, 1)


def add(meter: TrainMeter, loss: float, correct: int, count: int) -> None:
    meter.add(torch.tensor([loss, correct], dtype=torch.float64), count)


def test_a_record_is_the_mean_over_samples_not_over_batches() -> None:
    meter = TrainMeter(CPU)
    add(meter, 8.0, 3, 4)
    add(meter, 1.0, 0, 1)
    assert meter.reduce(ALONE).result().metrics == {"train/loss": 9 / 5, "train/accuracy": 3 / 5}


def test_a_record_starts_anew_behind_the_last() -> None:
    meter = TrainMeter(CPU)
    add(meter, 8.0, 3, 4)
    meter.reduce(ALONE)
    add(meter, 1.0, 1, 2)
    assert meter.reduce(ALONE).result().metrics == {"train/loss": 0.5, "train/accuracy": 0.5}


def test_a_record_of_nothing_is_zero() -> None:
    nothing = Record({"train/loss": 0.0, "train/accuracy": 0.0}, common=[], rows=[[]])
    assert TrainMeter(CPU).reduce(ALONE).result() == nothing


def test_rows_of_all_ranks_and_what_they_have_in_common_arrive_with_the_record() -> None:
    records = run_ranks(3, _record_of_rank)
    metrics = {"train/loss": 1.0, "train/accuracy": 0.0}
    assert records[0] == Record(metrics, [7.0, 8.0], [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]])
    assert all(record == records[0] for record in records)


def _record_of_rank(rank: Rank) -> Record:
    meter = TrainMeter(CPU)
    add(meter, float(rank.rank), 0, 3)
    record = meter.reduce(rank, [float(rank.rank), 0.5], torch.tensor([7.0, 8.0], dtype=torch.float64))
    add(meter, 100.0, 9, 9)  # of the next record, while this one is under way
    return record.result()


def test_sums_are_kept_in_float64() -> None:
    meter = TrainMeter(CPU)
    add(meter, 2.0**24, 0, 1)
    add(meter, 1.0, 0, 1)  # float32 would lose it
    assert meter.reduce(ALONE).result().metrics["train/loss"] == (2**24 + 1) / 2


def test_a_record_in_progress_survives_a_checkpoint_bit_by_bit() -> None:
    whole, before, after = TrainMeter(CPU), TrainMeter(CPU), TrainMeter(CPU)
    for loss in (0.1, 0.7):
        add(whole, loss, 1, 3)
        add(before, loss, 1, 3)
    after.load_state(before.state(ALONE), ALONE)
    for meter in (whole, after):
        add(meter, 0.3, 2, 3)
    assert after.reduce(ALONE).result() == whole.reduce(ALONE).result()


def test_loading_replaces_what_was_counted() -> None:
    saved, meter = TrainMeter(CPU), TrainMeter(CPU)
    add(saved, 1.0, 1, 2)
    add(meter, 100.0, 50, 60)
    meter.load_state(saved.state(ALONE), ALONE)
    assert meter.reduce(ALONE).result().metrics == {"train/loss": 0.5, "train/accuracy": 0.5}


STATE_OF_3: dict[str, Any] = {"sums": [[1.0, 1.0], [2.0, 3.0], [4.0, 5.0]], "count": 14}


def test_the_same_number_of_ranks_takes_each_its_own_sums() -> None:
    for index, sums in enumerate(STATE_OF_3["sums"]):
        meter = TrainMeter(CPU)
        meter.load_state(STATE_OF_3, rank_of(index, 3))
        assert meter.state(ALONE) == {"sums": [sums], "count": 14}


def test_on_another_number_of_ranks_the_sum_of_all_is_counted_once() -> None:
    states = []
    for index in range(2):
        meter = TrainMeter(CPU)
        meter.load_state(STATE_OF_3, rank_of(index, 2))
        states.append(meter.state(ALONE))
    assert states == [{"sums": [[7.0, 9.0]], "count": 14}, {"sums": [[0.0, 0.0]], "count": 14}]


def test_a_single_rank_goes_on_with_the_record_of_three() -> None:
    meter = TrainMeter(CPU)
    meter.load_state(STATE_OF_3, ALONE)
    add(meter, 1.0, 3, 2)
    assert meter.reduce(ALONE).result().metrics == {"train/loss": 8 / 16, "train/accuracy": 12 / 16}


def evaluate(
    labels: list[int], predicted: list[int], loss: float = 0.0, num_classes: int = 3, per_sample: int = 1
) -> Evaluation:
    meter = EvaluationMeter(num_classes, CPU)
    for label, guess in zip(labels, predicted, strict=True):
        meter.add(torch.tensor(loss), torch.tensor([label]), torch.tensor([guess]))
    return meter.reduce(ALONE, len(labels), per_sample)


def test_an_evaluation_counts_every_sample() -> None:
    meter = EvaluationMeter(3, CPU)
    meter.add(torch.tensor(3.0), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    meter.add(torch.tensor(1.0), torch.tensor([2]), torch.tensor([0]))
    evaluation = meter.reduce(ALONE, 4)
    assert (evaluation.loss, evaluation.accuracy, evaluation.count) == (1.0, 0.5, 4)
    assert evaluation.num_correct == 2


def test_rows_of_the_confusion_matrix_are_the_truth_and_columns_the_prediction() -> None:
    confusion = evaluate(labels=[0, 0, 0, 2], predicted=[1, 1, 0, 1]).confusion
    assert confusion.tolist() == [[1, 2, 0], [0, 0, 0], [0, 1, 0]]
    assert confusion.dtype == torch.int64


def test_recall_is_by_truth_and_nan_for_a_class_without_samples() -> None:
    recall = evaluate(labels=[0, 0, 0, 0, 2], predicted=[0, 0, 0, 1, 1]).recall.tolist()
    assert recall[0] == 0.75
    assert math.isnan(recall[1])  # although it was predicted
    assert recall[2] == 0.0


def test_the_loss_is_divided_by_what_a_sample_counts_for() -> None:
    assert evaluate([0, 1], [0, 1], loss=6.0, per_sample=3).loss == 2.0


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
