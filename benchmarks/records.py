"""What recording and publishing cost by how much was recorded before."""

from __future__ import annotations

import logging
import tempfile
import time
import tracemalloc
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from pipeline.run.folder import RunFolder
from pipeline.run.journal import Journal, now_ms

if TYPE_CHECKING:  # it imports mlflow, which the other measurements do without
    from pipeline.tracking.publisher import Publisher

KEYS = ("train/loss", "train/accuracy", "train/lr", "perf/images_per_second")
NUM_CALLS = 1000
NUM_MORE = 100


def measure_journal(num_lines: int) -> dict[str, Any]:
    """Return the seconds of a call of `metrics` behind `num_lines` lines; seconds and bytes that opening takes."""
    with tempfile.TemporaryDirectory(prefix="convoy-growth-") as folder:
        path = Path(folder) / "journal.jsonl"
        journal = Journal(path)
        fill(journal, num_lines // len(KEYS))
        journal.close()
        num_bytes = path.stat().st_size
        started = time.perf_counter()
        journal = Journal(path)
        open_seconds = time.perf_counter() - started
        calls = time_calls(journal, num_lines // len(KEYS))
        journal.close()
        return {
            "lines": num_lines,
            "bytes": num_bytes,
            "call_seconds": median(calls),
            "slow_call_seconds": quantiles(calls, n=100)[-1],
            "open_seconds": open_seconds,
            "open_bytes": opening_bytes(path),
        }


def fill(journal: Journal, num_steps: int, first_step: int = 0) -> None:
    for step in range(first_step, first_step + num_steps):
        journal.metrics(values_at(step), step)


def values_at(step: int) -> dict[str, float]:
    return {key: 1 / (index + step + 3) for index, key in enumerate(KEYS)}


def time_calls(journal: Journal, first_step: int) -> list[float]:
    seconds = []
    for step in range(first_step, first_step + NUM_CALLS):
        values = values_at(step)
        started = time.perf_counter()
        journal.metrics(values, step)
        seconds.append(time.perf_counter() - started)
    return seconds


def opening_bytes(path: Path) -> int:
    """Return the most bytes that opening takes; measured apart from the time, which tracing would change."""
    tracemalloc.start()
    Journal(path).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure_publisher(num_points: int) -> dict[str, Any]:
    """Return the seconds to publish so many points into an SQLite store, and `NUM_MORE` recorded afterwards.

    Imports mlflow.
    """
    from pipeline.tracking.publisher import Publisher

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="convoy-growth-") as name:
        folder = RunFolder(Path(name) / "runs" / "growth")
        folder.path.mkdir(parents=True)
        folder.config.write_text("{}\n")  # which the publisher logs
        journal = Journal(folder.journal)
        begin(journal)
        publisher = Publisher(folder, f"sqlite:///{name}/mlflow.db")
        publisher.drain()  # creates the store and the run
        num_steps = num_points // len(KEYS)
        fill(journal, num_steps)
        seconds = time_drain(publisher)
        fill(journal, NUM_MORE // len(KEYS), first_step=num_steps)
        more_seconds = time_drain(publisher)
        journal.close()
    return {"points": num_points, "seconds": seconds, "more_seconds": more_seconds}


def begin(journal: Journal) -> None:
    """Record what a publisher needs before it can publish metrics."""
    journal.append(
        {
            "kind": "run",
            "run_id": "growth",
            "name": "growth",
            "experiment": "growth",
            "tracking_uri": "unused",
            "timestamp_ms": now_ms(),
        }
    )
    journal.status("running")


def time_drain(publisher: Publisher) -> float:
    """Return the seconds that publishing what is not published yet takes."""
    started = time.perf_counter()
    publisher.drain()
    return time.perf_counter() - started
