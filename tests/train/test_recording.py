"""Records are over all samples since the last one, on all ranks; they survive checkpoints, and too many skipped steps
end the training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from torch import nn

from pipeline.base.timing import PHASES, PhaseTimer, PhaseTimes
from pipeline.config.schema import OptimConfig, TrainConfig
from pipeline.learning.evaluation import Evaluator
from pipeline.learning.metrics import Evaluation, Straggler
from pipeline.learning.optim import Schedule, build_optimizer
from pipeline.learning.update import NonFiniteError, Precision, Update
from pipeline.parallel.rank import Rank, RemoteError
from pipeline.run.checkpoint import Position
from tests.ranks import run_ranks
from train.display import Display
from train.output import RunOutput
from train.recording import NUM_SNAPSHOTS, Recording

CPU = torch.device("cpu")


def rank_of(rank: int, world_size: int) -> Rank:
    return Rank(rank, rank, world_size, world_size, CPU, "none", 1)


ALONE = rank_of(0, 1)


class Timer(PhaseTimer):
    """Each reading is of 2 seconds, with `milliseconds` for the data."""

    def __init__(self, milliseconds: float):
        super().__init__()
        self._milliseconds = milliseconds

    def read(self) -> PhaseTimes:
        return PhaseTimes(2.0, (self._milliseconds, *[0.0] * (len(PHASES) - 1)))


class Output(RunOutput):
    def __init__(self) -> None:
        self.points: dict[int, dict[str, float]] = {}
        self.snapshots: list[int] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.points.setdefault(step, {}).update(values)

    def predictions(self, evaluator: Evaluator, step: int) -> None:
        self.snapshots.append(step)


class Shown(Display):
    def __init__(self) -> None:
        self.records: list[tuple[int, float, Straggler | None]] = []

    def record(self, step: int, metrics: Mapping[str, float], straggler: Straggler | None) -> None:
        self.records.append((step, metrics["train/loss"], straggler))


class Recorded:
    """A recording and all that it is connected with."""

    def __init__(self, rank: Rank = ALONE, milliseconds: float = 0.0, **settings: Any):
        config = OptimConfig(name="sgd", lr=0.5, schedule="constant")
        self.weight = nn.Parameter(torch.zeros(1))
        optimizer = build_optimizer(config, [{"params": [self.weight]}])
        self.update = Update(optimizer, Schedule(config, 10, 100), Precision("fp32", CPU))
        self.update.set_step(0)
        self.output, self.shown = Output(), Shown()
        train = TrainConfig(**settings)
        self.recording = Recording(train, rank, Timer(milliseconds), self.update, self.output, self.shown)

    def add(self, loss: float, correct: int, count: int) -> None:
        self.recording.add(torch.tensor([loss, correct], dtype=torch.float64), count)

    def skip(self, count: int) -> None:
        for _ in range(count):
            self.weight.grad = torch.tensor([math.nan])
            self.update()

    def record(self, step: int = 1) -> dict[str, float]:
        """Return the metrics of the record at `step`."""
        self.recording.begin(step)
        self.recording.finish()
        return self.output.points[step]


def test_a_record_is_the_mean_over_samples_not_over_batches() -> None:
    run = Recorded()
    run.add(8.0, 3, 4)
    run.add(1.0, 0, 1)
    metrics = {"train/loss": 9 / 5, "train/accuracy": 3 / 5, "train/lr": 0.5, "perf/images_per_second": 5 / 2}
    assert run.record(7) == metrics
    assert run.shown.records == [(7, 9 / 5, None)]


def test_a_record_is_of_the_steps_before_it_began_and_behind_the_last() -> None:
    run = Recorded()
    run.add(8.0, 3, 4)
    run.recording.begin(1)
    run.add(1.0, 1, 2)  # while the first is under way
    run.update.scale_lr(0.1)
    run.recording.finish()
    run.recording.finish()  # there is nothing more to write
    first, second = run.output.points[1], run.record(2)
    assert (first["train/loss"], first["train/accuracy"], first["train/lr"]) == (2.0, 0.75, 0.5)
    assert (second["train/loss"], second["train/accuracy"], second["train/lr"]) == (0.5, 0.5, 0.05)
    assert (first["perf/images_per_second"], second["perf/images_per_second"]) == (2.0, 1.0)
    assert len(run.shown.records) == 2


def test_a_record_of_nothing_is_zero() -> None:
    metrics = Recorded().record()
    assert (metrics["train/loss"], metrics["train/accuracy"]) == (0.0, 0.0)


def test_sums_are_kept_in_float64() -> None:
    run = Recorded()
    run.add(2.0**24, 0, 1)
    run.add(1.0, 0, 1)  # float32 would lose it
    assert run.record()["train/loss"] == (2**24 + 1) / 2


def _record_of_rank(rank: Rank) -> tuple[dict[str, float], Straggler | None]:
    run = Recorded(rank, milliseconds=float(1 + rank.rank))
    run.add(float(rank.rank), rank.rank, 6)
    run.skip(2)
    return run.record(3), run.shown.records[0][2]


def test_sums_and_times_of_all_ranks_arrive_on_each_and_what_is_the_same_on_all_counts_once() -> None:
    for metrics, straggler in run_ranks(3, _record_of_rank):
        assert metrics == {
            "train/loss": 3 / 6,
            "train/accuracy": 3 / 6,
            "train/lr": 0.5,
            "perf/images_per_second": 3.0,
            "time/data_ms": 2.0,
            "time/slowest_rank": 2.0,
            "time/imbalance": 0.5,
            "train/skipped_steps": 2.0,
        }
        assert straggler == Straggler(2, 0.5, "data")


def _give_up(rank: Rank) -> tuple[str, str, list[float]]:
    run = Recorded(rank, max_nonfinite=3)
    run.skip(2)
    run.record(1)
    run.skip(1)  # the third in a row
    run.recording.begin(2)
    with pytest.raises((NonFiniteError, RemoteError)) as error:
        run.recording.finish()
    return type(error.value).__name__, str(error.value), [m["train/skipped_steps"] for m in run.output.points.values()]


def test_too_many_skipped_steps_in_a_row_end_the_training_with_the_cause_on_rank_0() -> None:
    (first, message, skipped), (second, _, _) = run_ranks(2, _give_up)
    assert (first, second) == ("NonFiniteError", "RemoteError")
    assert "the gradients of 3 steps in a row, up to step 2, were not finite (train.max_nonfinite = 3)" in message
    assert skipped == [2.0, 3.0]  # the record is written all the same


def test_a_record_in_progress_survives_a_checkpoint_bit_by_bit() -> None:
    whole, before, after = Recorded(), Recorded(), Recorded()
    for loss in (0.1, 0.7):
        whole.add(loss, 1, 3)
        before.add(loss, 1, 3)
    after.add(100.0, 50, 60)  # is replaced
    after.recording.load_state(before.recording.state())
    for run in (whole, after):
        run.add(0.3, 2, 3)
    expected, found = whole.record(), after.record()
    assert [found[key] for key in ("train/loss", "train/accuracy")] == [
        expected[key] for key in ("train/loss", "train/accuracy")
    ]


def test_images_per_second_are_of_this_attempt_alone() -> None:
    run = Recorded()
    run.recording.load_state({"sums": [[1.0, 1.0]], "count": 1000})
    run.add(1.0, 0, 10)
    metrics = run.record()
    assert metrics["train/loss"] == 2 / 1010
    assert metrics["perf/images_per_second"] == 5.0


STATE_OF_3: dict[str, Any] = {"sums": [[1.0, 1.0], [2.0, 3.0], [4.0, 5.0]], "count": 14}


def _load_and_state(rank: Rank) -> dict[str, Any]:
    run = Recorded(rank)
    run.recording.load_state(STATE_OF_3)
    return run.recording.state()


def test_the_same_number_of_ranks_takes_each_its_own_sums() -> None:
    assert run_ranks(3, _load_and_state) == [STATE_OF_3] * 3


def test_on_another_number_of_ranks_the_sum_of_all_is_counted_once() -> None:
    assert run_ranks(2, _load_and_state) == [{"sums": [[7.0, 9.0], [0.0, 0.0]], "count": 14}] * 2


def test_a_single_rank_continues_the_record_of_three() -> None:
    run = Recorded()
    run.recording.load_state(STATE_OF_3)
    run.add(1.0, 3, 2)
    metrics = run.record()
    assert (metrics["train/loss"], metrics["train/accuracy"]) == (8 / 16, 12 / 16)


@pytest.mark.parametrize(("num_epochs", "expected"), [(3, [1, 2, 3]), (33, [*range(2, 33, 2), 33])])
def test_evaluations_are_recorded_and_snapshots_of_predictions_evenly_and_at_the_end(
    num_epochs: int, expected: list[int]
) -> None:
    run = Recorded(epochs=num_epochs)
    evaluation = Evaluation(0.25, 0.5, 4, torch.tensor([[1, 1], [1, 1]]))
    for epoch in range(num_epochs):
        position = Position(epoch, 0, epoch + 1)
        run.recording.evaluated(position, cast(Evaluator, None), evaluation, 1.5)
    assert run.output.snapshots == expected
    assert len(expected) <= NUM_SNAPSHOTS
    assert run.output.points[1] == {"eval/loss": 0.25, "eval/accuracy": 0.5, "time/evaluation_seconds": 1.5}
    assert len(run.output.points) == num_epochs
