"""What was recorded and what a store has of it, in one form that can be compared."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

History = dict[str, list[tuple[int, float, int]]]
"""Of each key (step, value, timestamp in ms), sorted."""


def recorded_history(run: Path) -> History:
    """All metrics of the journal in the run folder `run`, and of what was sampled on its nodes."""
    history: History = {}
    for path in (run / "journal.jsonl", *sorted((run / "system").glob("*.jsonl"))):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "metric":
                point = (record["step"], record["value"], record["timestamp_ms"])
                history.setdefault(record["key"], []).append(point)
    return {key: sorted(points) for key, points in history.items()}


def stored_history(client: MlflowClient, mlflow_run_id: str) -> History:
    """All points of all metrics that the store has of a run."""
    keys = client.get_run(mlflow_run_id).data.metrics
    histories = {key: client.get_metric_history(mlflow_run_id, key) for key in keys}
    return {key: sorted((p.step, p.value, p.timestamp) for p in points) for key, points in histories.items()}


def find_runs(client: MlflowClient, run: Path) -> list[Any]:
    """The MLflow runs that were made of the run folder `run`, which has its first record: one, if all is well."""
    with (run / "journal.jsonl").open() as journal:
        run_id = json.loads(journal.readline())["run_id"]
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`convoy.run_id` = '{run_id}'"))


def differences(recorded: History, stored: History) -> list[str]:
    """A line for each key of which the store has not exactly what was recorded, or has a step twice."""
    lines = []
    for key in sorted(recorded.keys() | stored.keys()):
        ours, theirs = recorded.get(key, []), stored.get(key, [])
        if ours != theirs:
            missing, surplus = Counter(ours) - Counter(theirs), Counter(theirs) - Counter(ours)
            lines.append(
                f"{key}: {len(ours)} recorded, {len(theirs)} stored; missing {sorted(missing.elements())[:5]}, "
                f"surplus {sorted(surplus.elements())[:5]}"
            )
        twice = [step for step, count in Counter(step for step, _, _ in theirs).items() if count > 1]
        if twice:
            lines.append(f"{key}: more than one point at the steps {twice[:5]}")
    return lines
