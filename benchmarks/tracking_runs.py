"""What the runs of benchmarks/tracking.py say: shares of the loop, longest calls, and what is over its limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import Spread, markdown_table

SHARE_LIMIT = 0.02
FORCED_WRITE = "sync"
"""Of the journal to the disk, which each checkpoint begins with: a part of saving. How long it lasts is the disk's to
say, so that it counts in the share of the loop, and is shown, but has no limit as a call."""
CALL_LIMIT = 0.020
"""Seconds, for every call of every training."""
NUM_KILLS = 3
CONDITIONS: dict[str, str] = {
    "healthy": "healthy",
    "killed": f"killed and started again {NUM_KILLS} times",
    "refused": "refuses connections",
    "silent": "accepts them and never answers",
    "500": "answers 500",
    "slow": "answers after 5 s",
    "down": "down from the start",
    "dead": "dead at the end",
}

Run = Mapping[str, Any]
"""condition, loop_seconds, steps, calls (of each kind: calls, seconds, longest_seconds), points, differences."""


def share_of(run: Run) -> float:
    """Return the share of the loop's time that recording takes."""
    return float(sum(each["seconds"] for each in run["calls"].values()) / run["loop_seconds"])


def longest_of(run: Run) -> float:
    """Return the seconds of the longest call, forced writes left out."""
    return float(max(each["longest_seconds"] for kind, each in run["calls"].items() if kind != FORCED_WRITE))


def longest_forced_write_of(run: Run) -> float:
    """Return the seconds of the longest forced write; 0 if there was none."""
    return float(run["calls"].get(FORCED_WRITE, {"longest_seconds": 0.0})["longest_seconds"])


def describe(run: Run) -> str:
    arrived = "all there, once" if not run["differences"] else "; ".join(run["differences"])
    return (
        f"{run['condition']}: {share_of(run):.2%} of {run['loop_seconds']:.1f} s, longest call "
        f"{1000 * longest_of(run):.1f} ms, {run['points']:,} points: {arrived}"
    )


def find_excesses(runs: Sequence[Run]) -> list[str]:
    """Return a line for each median share and each longest call over its limit, and for all that MLflow has otherwise.

    A training that stalls once is stalled, whatever the others do.
    """
    lines = [f"{run['condition']}: {line}" for run in runs for line in run["differences"]]
    for condition, group in by_condition(runs).items():
        share, longest = Spread.of(list(map(share_of, group))), max(map(longest_of, group))
        if share.median > SHARE_LIMIT:
            lines.append(f"too much: {condition} takes {share.format('.2%')} of the loop, limit {SHARE_LIMIT:.0%}")
        if longest > CALL_LIMIT:
            lines.append(f"too long: {condition} has a call of {longest:.3f} s, limit {CALL_LIMIT:.3f}")
    return lines


def by_condition(runs: Sequence[Run]) -> dict[str, list[Run]]:
    present = [condition for condition in CONDITIONS if any(run["condition"] == condition for run in runs)]
    return {condition: [run for run in runs if run["condition"] == condition] for condition in present}


def tabulate(runs: Sequence[Run]) -> str:
    header = ["the server", "share of the loop", "longest call, ms", "longest forced write, ms", "us a step"]
    header += ["points", "in MLflow after sync"]
    rows = []
    for condition, group in by_condition(runs).items():
        shares = [share_of(run) for run in group]
        microseconds = [1e6 * share_of(run) * run["loop_seconds"] / run["steps"] for run in group]
        wrong = sum(bool(run["differences"]) for run in group)
        rows.append(
            [
                CONDITIONS[condition],
                Spread.of(shares).format(".2%"),
                Spread.of([1000 * longest_of(run) for run in group]).format(".1f"),
                Spread.of([1000 * longest_forced_write_of(run) for run in group]).format(".1f"),
                Spread.of(microseconds).format(",.0f"),
                Spread.of([run["points"] for run in group]).format(",.0f"),
                f"not as recorded: {wrong} of {len(group)}" if wrong else "all, once",
            ]
        )
    return markdown_table(header, rows)
