"""What the interleaved rounds of several programs amount to: the best variant of each, ratios, a table, a guard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.harness import BenchmarkError, Spread, markdown_table, pairwise_ratios

Run = Mapping[str, Any]
"""images_per_second, epoch_seconds, threads, wall_seconds, cpu_by_others, and accuracy where the program evaluates."""
MIN_GUARD_PAIRS = 5


@dataclass(frozen=True)
class Variant:
    """A program, with the number of its DataLoader workers where it has any to choose."""

    program: str
    workers: int | None = None

    @property
    def label(self) -> str:
        return self.program if self.workers is None else f"{self.program}, {self.workers} worker(s)"


@dataclass(frozen=True)
class Comparison:
    """All runs of each variant in the order of the rounds, and what counts: the speed, or the time of the command."""

    runs: Mapping[Variant, Sequence[Run]]
    by_wall: bool = False

    def speeds(self, variant: Variant) -> list[float]:
        """Return images per second, or commands per second: more is better."""
        if self.by_wall:
            return [1 / run["wall_seconds"] for run in self.runs[variant]]
        return [run["images_per_second"] for run in self.runs[variant]]

    def best(self, program: str) -> Variant:
        """Return the variant that stands for the program: that of the highest median."""
        variants = [variant for variant in self.runs if variant.program == program]
        return max(variants, key=lambda variant: Spread.of(self.speeds(variant)).median)

    def programs(self) -> list[str]:
        return list(dict.fromkeys(variant.program for variant in self.runs))

    def ratios(self, program: str) -> list[float]:
        """Return how many times as fast Convoy was as the best variant of `program`, round by round.

        What is measured only once, like the floor, is compared with each round.
        """
        convoy, other = self.speeds(self.best("convoy")), self.speeds(self.best(program))
        return pairwise_ratios(convoy, other * len(convoy) if len(other) == 1 else other)

    def cpu_by_others(self) -> Spread:
        """Return how much was disturbed: the share of the cores that was busy for others, over all runs."""
        return Spread.of([run["cpu_by_others"] for runs in self.runs.values() for run in runs])

    def check(self) -> None:
        """Raise BenchmarkError if the programs did not compute on equally many threads."""
        threads = {variant.label: run["threads"] for variant, runs in self.runs.items() for run in runs}
        counted = {label: number for label, number in threads.items() if number is not None}
        if len(set(counted.values())) > 1:
            raise BenchmarkError(f"the programs had different numbers of threads per rank: {counted}")

    def table(self) -> str:
        header = ["program", "images/s", "s/epoch", "command to exit, s", "accuracy, %", "Convoy is x times as fast"]
        return markdown_table(header, [self._row(variant) for variant in self.runs])

    def _row(self, variant: Variant) -> list[str]:
        runs = self.runs[variant]
        # of the programs without evaluation, the time of the command means nothing
        evaluates = all("accuracy" in run for run in runs)
        return [
            variant.label,
            _spread(runs, lambda run: run["images_per_second"], ",.0f"),
            _spread(runs, lambda run: mean(run["epoch_seconds"][1:] or run["epoch_seconds"]), ".3g"),
            _spread(runs, lambda run: run["wall_seconds"], ".1f") if evaluates else "",
            _spread(runs, lambda run: 100 * run["accuracy"], ".2f") if evaluates else "",
            self._format_ratio(variant),
        ]

    def _format_ratio(self, variant: Variant) -> str:
        if "convoy" not in self.programs() or variant.program == "convoy" or variant != self.best(variant.program):
            return ""
        return Spread.of(self.ratios(variant.program)).format(".3f")

    def summary(self) -> dict[str, Any]:
        """Return what the JSON file holds."""
        others = [name for name in self.programs() if name != "convoy"] if "convoy" in self.programs() else []
        return {
            "counts": "seconds from command to exit" if self.by_wall else "images per second",
            "runs": {variant.label: list(runs) for variant, runs in self.runs.items()},
            "best": {name: self.best(name).label for name in self.programs()},
            "convoy_times_as_fast": {name: self.ratios(name) for name in others},
        }


def _spread(runs: Sequence[Run], figure: Callable[[Run], float], form: str) -> str:
    return Spread.of([figure(run) for run in runs]).format(form)


def guard_failure(ratios: Sequence[float], minimum: float) -> str | None:
    """Return what to say if the median of the ratios is below `minimum`; None if all is well."""
    if len(ratios) < MIN_GUARD_PAIRS:
        raise ValueError(f"{len(ratios)} pairs: a guard needs at least {MIN_GUARD_PAIRS}")
    spread = Spread.of(ratios)
    if spread.median >= minimum:
        return None
    return (
        f"too slow: Convoy is {spread.format('.3f')} times as fast as the plain DDP script over {spread.count} pairs, "
        f"and the median has to be {minimum:g} at least"
    )
