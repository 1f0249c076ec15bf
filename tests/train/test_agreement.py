"""All ranks decide the same at the same step, and are asked by time, not by step."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.parallel.rank import Rank
from tests.faults.trainings import SMALL
from tests.ranks import run_ranks
from tests.train.helpers import config_of, make_trainer
from train.agreement import VOTE_EVERY, Agreement, Decision

STEP = 0.01
"""Seconds a step takes on the clock of these tests."""


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


ALONE = Rank(0, 0, 1, 1, torch.device("cpu"), "none", 1)


def decisions_of(rank: Rank, num_steps: int, asked: dict[int, tuple[int, str]], pace: float = STEP) -> list[Decision]:
    """Return the decision behind each step, where rank r asks for `what` from step s on: asked[r] = (s, what)."""
    clock = Clock()
    agreement, decisions = Agreement(rank, clock), []
    at, what = asked.get(rank.rank, (num_steps, ""))
    for step in range(num_steps):
        clock.seconds += pace
        wants = step >= at
        decisions.append(agreement.after_step(stop=wants and what == "stop", save=wants and what == "save"))
    return decisions


def test_what_one_rank_asks_for_all_ranks_decide_at_the_same_step() -> None:
    for what in ("stop", "save"):
        results = run_ranks(3, decisions_of, 300, {1: (90, what)})
        assert all(result == results[0] for result in results)
        first = next(step for step, decision in enumerate(results[0]) if decision != Decision())
        assert results[0][first] == Decision(stop=what == "stop", save=what == "save")
        assert 90 < first <= 90 + VOTE_EVERY / STEP + 1


def test_ranks_of_different_speed_are_asked_at_the_same_steps() -> None:
    """The one with the slow clock would ask earlier, which would hang or mix up the answers."""
    results = run_ranks(2, _at_its_own_pace)
    assert results[0] == results[1]


def _at_its_own_pace(rank: Rank) -> list[Decision]:
    return decisions_of(rank, 400, {0: (250, "stop")}, pace=STEP * (1 + rank.rank))


def test_ranks_are_asked_about_twice_a_second() -> None:
    clock, num_votes = Clock(), 0
    agreement = Agreement(ALONE, clock)
    for _ in range(1000):
        clock.seconds += STEP
        before = agreement._pending
        agreement.after_step(stop=False)
        num_votes += agreement._pending is not None and agreement._pending is not before
    ramp = 7  # 1, 2, 4 ... 32 steps
    assert 1000 * STEP / VOTE_EVERY <= num_votes <= 1000 * STEP / VOTE_EVERY * 1.1 + ramp


def test_in_slow_steps_ranks_are_asked_each_time() -> None:
    assert next(step for step, d in enumerate(decisions_of(ALONE, 10, {0: (4, "stop")}, pace=2.0)) if d.stop) == 5


def test_after_a_restart_the_pace_of_the_steps_before_does_not_count() -> None:
    clock = Clock()
    agreement = Agreement(ALONE, clock)
    for _ in range(200):
        clock.seconds += STEP
        agreement.after_step(stop=False)
    agreement.restart()
    for number in range(20):
        clock.seconds += 0.1
        if agreement.after_step(stop=number >= 8).stop:
            break
    assert number <= 8 + 0.5 / 0.1 + 1


def test_a_save_that_was_decided_is_not_asked_for_again_in_the_same_step() -> None:
    """The request stands until the checkpoint is written, behind the step that reads the vote."""
    clock = Clock()
    agreement = Agreement(ALONE, clock)
    wants, saves = True, 0
    for _ in range(10):
        clock.seconds += 2.0
        if agreement.after_step(stop=False, save=wants).save:
            saves, wants = saves + 1, False
    assert saves == 1


def _stopped_evaluation(rank: Rank) -> Any:
    trainer, _ = make_trainer(rank, config_of(*SMALL))
    for _ in range(1000):  # so quick that votes are far apart
        trainer.agreement.after_step(stop=False)
    trainer.stop.ask("the test")
    return trainer.run_evaluation(trainer.evaluator)


def test_an_evaluation_whose_batches_take_longer_than_steps_hears_a_request_at_once() -> None:
    assert run_ranks(1, _stopped_evaluation) == [None]
