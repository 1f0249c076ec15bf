"""What more ranks would give, from measured all-reduces and a measured step: latency and bandwidth of a ring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.harness import BenchmarkError, markdown_table

MIN_DEVICES = 2
ASSUMPTION = (
    "Assumed: every link is like those measured here, within one node, so that beyond its devices this is an "
    "extrapolation; the all-reduce is a ring; nothing of it is hidden behind the backward pass; and the rest of a step "
    "takes as long as on one rank."
)


@dataclass(frozen=True)
class Timing:
    """An all-reduce as it was measured."""

    ranks: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class Ring:
    """2 (n - 1) messages follow one another, and 2 (n - 1) / n of the bytes pass each link."""

    latency: float
    """Seconds of a message."""
    bandwidth: float
    """Bytes per second of a link."""

    def seconds(self, ranks: int, num_bytes: float) -> float:
        num_messages, share = ring_terms(ranks)
        return num_messages * self.latency + share * num_bytes / self.bandwidth

    def worst_miss(self, timings: Sequence[Timing]) -> float:
        """Return the largest deviation from what was measured, as a share of it."""
        return max(abs(self.seconds(t.ranks, t.num_bytes) / t.seconds - 1) for t in timings)


def ring_terms(ranks: int) -> tuple[float, float]:
    """Return how many messages follow one another, and the share of the bytes that passes each link."""
    return 2 * (ranks - 1), 2 * (ranks - 1) / ranks


def fit_ring(timings: Sequence[Timing]) -> Ring:
    """Fit a ring by least squares of relative errors: those in seconds would leave the latency to chance beside 64 MiB.

    Raises BenchmarkError if the times do not grow with size and messages, as those of a ring do.
    """
    rows = []
    for timing in timings:
        num_messages, share = ring_terms(timing.ranks)
        rows.append([num_messages / timing.seconds, share * timing.num_bytes / timing.seconds])
    terms = torch.tensor(rows, dtype=torch.float64)
    scale = terms.norm(dim=0)  # the two differ by many orders of magnitude
    fitted = torch.linalg.lstsq(terms / scale, torch.ones(len(rows), 1, dtype=torch.float64)).solution[:, 0] / scale
    latency, seconds_per_byte = fitted.tolist()
    if not (latency > 0 and seconds_per_byte > 0):
        raise BenchmarkError(f"no ring: the fit has a latency of {latency:.3g} s and {seconds_per_byte:.3g} s per byte")
    return Ring(latency, 1 / seconds_per_byte)


def why_no_prediction(device: str, num_devices: int, num_nodes: int) -> str | None:
    """Return the reason; None if there is a prediction to be made."""
    if device != "cuda":
        return "No prediction for more ranks: what CPU ranks of one machine exchange says nothing of GPUs or networks."
    if num_nodes > 1:
        return "No prediction for more ranks: it needs links that are all alike, and those between nodes are others."
    if num_devices < MIN_DEVICES:
        return "No prediction for more ranks: there is a single GPU here, whose communication cannot be measured."
    return None


def tabulate_prediction(
    ring: Ring, *, ranks: Sequence[int], num_bytes: int, step_seconds: float, measured: dict[int, float]
) -> str:
    """Return a table of weak scaling: each rank has the same work, a step of which takes `step_seconds` alone.

    `measured` maps ranks to the efficiency that was measured.
    """
    rows = []
    for number in ranks:
        communication = ring.seconds(number, num_bytes)
        efficiency = step_seconds / (step_seconds + communication)
        seen = f"{measured[number]:.1%}" if number in measured else ""
        times = [f"{1e6 * communication:,.0f}", f"{1e3 * (step_seconds + communication):.3f}"]
        rows.append([str(number), *times, f"{efficiency:.1%}", seen])
    return markdown_table(["ranks", "all-reduce, us", "step, ms", "efficiency predicted", "measured"], rows)
