"""Records of runs that no training made."""

from __future__ import annotations

from pipeline.run.journal import now_ms
from pipeline.run.records import RunRecord


def run_record(name: str, *, run_id: str = "", experiment: str = "test", uri: str = "unused") -> RunRecord:
    """Return the first record of a journal."""
    return {
        "kind": "run",
        "run_id": run_id or name,
        "name": name,
        "experiment": experiment,
        "tracking_uri": uri,
        "timestamp_ms": now_ms(),
    }
