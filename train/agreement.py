"""What the ranks decide together at the boundary of a step: to stop, or to save."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.parallel.rank import PendingSum, Rank

VOTE_EVERY = 0.5
"""Seconds, about: what a request waits for at most."""


@dataclass(frozen=True)
class Decision:
    """The same on every rank."""

    stop: bool = False
    save: bool = False


class Ballot:
    """Asks all ranks about twice a second, at the same step, and reads the answer a step later.

    No step waits for it: the sum over the ranks is on its way while the next step is computed. How many steps lie
    between two votes is found from the time that steps took on all ranks, which is part of the sum, so that every rank
    comes to the same number without asking again.
    """

    def __init__(self, rank: Rank, now: Callable[[], float] = time.perf_counter):
        self._rank = rank
        self._now = now
        self._pending: PendingSum | None = None
        self._num_steps = 0
        """Since the last vote."""
        self._until_vote = 1
        self._began = now()

    def begin(self) -> None:
        """Collective: every rank must call. Steps follow of which nobody knows how long they take."""
        self._num_steps, self._until_vote, self._began = 0, 1, self._now()

    def after_step(self, *, stop: bool, save: bool = False) -> Decision:
        """Collective: every rank must call. What this rank asks for counts in the next vote; what was decided."""
        decision = Decision() if self._pending is None else self._count()
        self._num_steps += 1
        if self._num_steps >= self._until_vote:
            self._vote(stop=stop, save=save and not decision.save)
        return decision

    def _vote(self, *, stop: bool, save: bool) -> None:
        now = self._now()
        a_step = (now - self._began) / self._num_steps
        self._num_steps, self._began = 0, now
        votes = torch.tensor([float(stop), float(save), a_step], dtype=torch.float64)
        self._pending = self._rank.reduce_sum_later(votes.to(self._rank.device, non_blocking=True))

    def _count(self) -> Decision:
        assert self._pending is not None
        stops, saves, seconds = self._pending.values()
        self._pending = None
        a_step = seconds / self._rank.world_size
        # at most twice as many as before: the first steps may be quicker than all others, or only be queued
        self._until_vote = min(2 * self._until_vote, max(1, int(VOTE_EVERY / a_step) if a_step > 0 else 1))
        return Decision(stops > 0, saves > 0)
