"""The decisions that all ranks take together at the boundary of a step: to stop, or to save."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.parallel.rank import PendingSum, Rank

VOTE_EVERY = 0.5
"""Seconds between two votes, about: the longest that a request waits."""


@dataclass(frozen=True)
class Decision:
    """The outcome of a vote, the same on every rank."""

    stop: bool = False
    save: bool = False


class Agreement:
    """Asks all ranks about twice a second, at the same step, and reads the answer a step later.

    No step waits for it: the sum over the ranks is on its way while the next step is computed. How many steps lie
    between two votes follows from the time that steps took on all ranks, which is part of the sum, so that every rank
    comes to the same number without asking again.
    """

    def __init__(self, rank: Rank, now: Callable[[], float] = time.perf_counter):
        self._rank = rank
        self._now = now
        self._pending: PendingSum | None = None
        self.restart()

    def restart(self) -> None:
        """Collective. Vote every step until step times are known."""
        self._steps_since_vote, self._steps_between_votes, self._voted_at = 0, 1, self._now()

    def after_step(self, *, stop: bool, save: bool = False) -> Decision:
        """Collective. Return the outcome of the last vote, once; this rank's wishes count in the next one."""
        decision = Decision() if self._pending is None else self._read_vote()
        self._steps_since_vote += 1
        if self._steps_since_vote >= self._steps_between_votes:
            self._vote(stop=stop, save=save and not decision.save)
        return decision

    def _vote(self, *, stop: bool, save: bool) -> None:
        now = self._now()
        seconds_per_step = (now - self._voted_at) / self._steps_since_vote
        self._steps_since_vote, self._voted_at = 0, now
        votes = torch.tensor([float(stop), float(save), seconds_per_step], dtype=torch.float64)
        self._pending = self._rank.reduce_sum_later(votes.to(self._rank.device, non_blocking=True))

    def _read_vote(self) -> Decision:
        assert self._pending is not None
        stops, saves, seconds = self._pending.values()
        self._pending = None
        seconds_per_step = seconds / self._rank.world_size
        fitting = int(VOTE_EVERY / seconds_per_step) if seconds_per_step > 0 else 1
        # at most twice as many as before: the first steps may be quicker than all others, or only be queued
        self._steps_between_votes = min(2 * self._steps_between_votes, max(1, fitting))
        return Decision(stops > 0, saves > 0)
