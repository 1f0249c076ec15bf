"""Times and traces of a real training: they say what happened, and cost nothing where they were not asked for."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.learning.evaluation import Evaluator
from pipeline.learning.metrics import Evaluation
from pipeline.parallel.rank import Rank
from tests.ranks import run_ranks
from tests.train.helpers import config_of, make_trainer
from tests.train.test_resume import run

SLOW = 1.0
"""Seconds, far more than what a step does besides its phases."""


def test_an_evaluation_belongs_to_no_step() -> None:
    other, evaluations, rates = run_ranks(1, _other_times_around_a_slow_evaluation)[0]
    assert len(evaluations) == 2
    assert min(evaluations) >= SLOW
    assert max(other) < SLOW * 1e3 / 2  # milliseconds
    assert len(other) == len(rates) == 8


def _other_times_around_a_slow_evaluation(rank: Rank) -> tuple[list[float], list[float], list[float]]:
    settings = ("train.epochs=2", "train.log_every=1", "optim.schedule=constant")
    trainer, recorder = make_trainer(rank, config_of(*settings), 128)
    evaluate = trainer.evaluator.evaluate

    def slowly(is_interrupted: Callable[[], bool] = lambda: False) -> Evaluation | None:
        time.sleep(SLOW)
        return evaluate(is_interrupted)

    trainer.evaluator.evaluate = slowly  # type: ignore[method-assign]
    assert isinstance(trainer.evaluator, Evaluator)
    trainer.fit()
    names = ("time/other_ms", "time/evaluation_seconds", "perf/images_per_second")
    other, evaluations, rates = (recorder.history(name) for name in names)
    return other, evaluations, rates


@pytest.mark.parametrize(("num_steps", "case"), [(3, "whole"), (1000, "cut short by the end of the training")])
def test_a_trace_has_the_steps_that_were_asked_for(tmp_path: Path, num_steps: int, case: str) -> None:
    run(tmp_path, f"train.profile={num_steps}", "train.epochs=1", world_size=1)
    records = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    (artifact,) = [record for record in records if record["kind"] == "artifact"]
    with gzip.open(tmp_path / "run" / artifact["path"], "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    steps = [event for event in events if event.get("name") == "Optimizer.step#Adam.step"]
    assert len(steps) == (3 if num_steps == 3 else 8)  # 13 steps, of which 5 are skipped


def test_a_training_too_short_for_a_trace_leaves_none(tmp_path: Path) -> None:
    run(tmp_path, "train.profile=3", "train.epochs=1", "data.global_batch_size=128", world_size=1)
    assert not (tmp_path / "run" / "profile").exists()
