"""Which rank keeps the others waiting, from the phase times of all ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.base.timing import PHASES

logger = logging.getLogger("convoy")


@dataclass(frozen=True)
class Straggler:
    """The rank that keeps the others waiting."""

    rank: int
    imbalance: float
    """Its own time over the mean of all ranks, minus 1."""
    phase: str
    """In which it is furthest behind the mean."""

    @property
    def metrics(self) -> dict[str, float]:
        return {"time/slowest_rank": float(self.rank), "time/imbalance": self.imbalance}


def mean_times(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """`time/<phase>_ms` -> milliseconds per optimizer step, mean over the ranks; `rows` are by rank and PHASES.

    Phases that did not occur are left out.
    """
    means = {f"time/{phase}_ms": sum(row[i] for row in rows) / len(rows) for i, phase in enumerate(PHASES)}
    return {name: mean for name, mean in means.items() if mean > 0}


def find_straggler(rows: Sequence[Sequence[float]]) -> Straggler | None:
    """The rank that spends most time before it meets the others: in `communication` they wait for it.

    None if it is alone, or if that cannot be told: in a step replayed as one, waiting is not seen apart.
    """
    if len(rows) < 2 or any(row[PHASES.index("graph")] > 0 for row in rows):
        return None
    own = [i for i, phase in enumerate(PHASES) if phase != "communication"]
    totals = [sum(row[i] for i in own) for row in rows]
    slowest = max(range(len(rows)), key=totals.__getitem__)
    behind = {i: rows[slowest][i] - sum(row[i] for row in rows) / len(rows) for i in own}
    mean = sum(totals) / len(totals)
    phase = PHASES[max(own, key=behind.__getitem__)]
    return Straggler(slowest, totals[slowest] / mean - 1 if mean > 0 else 0.0, phase)
