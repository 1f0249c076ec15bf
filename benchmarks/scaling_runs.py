"""What the runs of benchmarks/scaling.py say: speed, efficiency, and the split of a step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.harness import BenchmarkError, Spread, markdown_table, pairwise_ratios
from benchmarks.programs.same_training import Training

RATE = "perf/images_per_second"
PARTS = {
    "data": ("data", "host_to_device"),
    "compute": ("forward", "backward", "update", "graph"),
    "communication": ("communication",),
    "other": ("other",),
}
"""Of a step, as sums of the phases in the journal."""

Run = Mapping[str, Any]
"""images_per_second; milliseconds per step by part; how gradients travel."""


@dataclass(frozen=True)
class Case:
    mode: str
    ranks: int
    training: Training
    """Its batch is that of a rank."""

    @property
    def global_batch(self) -> int:
        return self.training.batch * self.ranks


Runs = Mapping[Case, Sequence[Run]]
"""In the order of the rounds."""


def read_run(records: Iterable[Mapping[str, Any]], global_batch: int) -> Run:
    """Return what the records of a run amount to but the first. Raises BenchmarkError if there are no others."""
    by_step: dict[int, dict[str, float]] = {}
    tags: dict[str, str] = {}
    for record in records:
        if record["kind"] == "metric":
            by_step.setdefault(record["step"], {})[record["key"]] = record["value"]
        elif record["kind"] == "tags":
            tags |= record["values"]
    steps = sorted(step for step, values in by_step.items() if RATE in values)
    if len(steps) < 2:
        raise BenchmarkError(f"{len(steps)} record(s) of the speed in the journal: at least 2 are needed")
    seconds, milliseconds = 0.0, dict.fromkeys(PARTS, 0.0)
    for before, step in itertools.pairwise(steps):
        values, count = by_step[step], step - before
        seconds += count * global_batch / values[RATE]
        for part, phases in PARTS.items():
            milliseconds[part] += count * sum(values.get(f"time/{phase}_ms", 0.0) for phase in phases)
    counted = steps[-1] - steps[0]
    return {
        "images_per_second": counted * global_batch / seconds,
        "milliseconds": {part: total / counted for part, total in milliseconds.items()},
        "gradients": tags.get("gradients", ""),
    }


def rates(runs: Sequence[Run]) -> list[float]:
    return [run["images_per_second"] for run in runs]


def find_efficiencies(runs: Runs) -> dict[str, dict[int, Spread]]:
    """Return the speed per rank over that of the fewest ranks, round by round, by mode and ranks."""
    fewest = min(case.ranks for case in runs)
    references = {case.mode: rates(of) for case, of in runs.items() if case.ranks == fewest}
    found: dict[str, dict[int, Spread]] = {}
    for case, of in runs.items():
        linear = [case.ranks / fewest * rate for rate in references[case.mode]]
        found.setdefault(case.mode, {})[case.ranks] = Spread.of(pairwise_ratios(rates(of), linear))
    return found


def find_splits(runs: Runs) -> dict[str, dict[int, dict[str, float]]]:
    """Return milliseconds per step, by mode, ranks and part: medians over the rounds."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for case, of in runs.items():
        parts = {part: median(run["milliseconds"][part] for run in of) for part in PARTS}
        found.setdefault(case.mode, {})[case.ranks] = parts
    return found


def tabulate(mode: str, runs: Runs, *, cores: int | None, ranks_per_node: int | None = None) -> str:
    """Return a table of one mode. `cores` are those of CPU ranks that may come to share them, else None;
    `ranks_per_node` is None on this machine."""
    efficiencies, splits = find_efficiencies(runs)[mode], find_splits(runs)[mode]
    rows = []
    for case, of in runs.items():
        if case.mode != mode:
            continue
        parts = [f"{value:.2f}" for value in splits[case.ranks].values()]
        rows.append(
            [
                name_ranks(case.ranks, cores, ranks_per_node),
                f"{case.global_batch:,}",
                Spread.of(rates(of)).format(),
                efficiencies[case.ranks].format(".0%"),
                *parts,
            ]
        )
    return markdown_table(["ranks", "global batch", "images/s", "efficiency", *(f"{p}, ms" for p in PARTS)], rows)


def name_ranks(ranks: int, cores: int | None, ranks_per_node: int | None) -> str:
    if ranks_per_node is not None:
        return f"{ranks} on {ranks // ranks_per_node} node{'s' if ranks > ranks_per_node else ''}"
    return f"{ranks} (sharing {cores} cores)" if cores is not None and ranks > cores else str(ranks)
