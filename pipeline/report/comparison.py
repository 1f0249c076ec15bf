"""Runs as their folders have them, read to be compared: files alone, without a server, torch or mlflow."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from pipeline.base.credentials import without_credentials
from pipeline.run.folder import RunError, RunFolder
from pipeline.run.journal import NONFINITE, read_journal
from pipeline.run.locks import is_being_trained

Record = dict[str, Any]
Curve = Sequence[tuple[int, float]]
"""(optimizer step, value) by step."""

Z95 = 1.959964
"""Standard deviations of a normal distribution that hold 95% of it."""


class Proportion(NamedTuple):
    """`hits` of `total` samples, or only a share where the total is not known (0)."""

    share: float
    total: int

    @property
    def hits(self) -> int:
        return round(self.share * self.total)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval (J. Am. Stat. Assoc. 22, 1927): unlike p +- 2 SE it holds near 100% too."""
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.hits / self.total
        centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Attempt:
    """From one start of a training to its end."""

    started_ms: int
    ended_ms: int
    """Of its last record."""
    state: str
    """As it ended; `killed` if it ended without a word, `running` if it may still be at work."""
    last_step: int | None
    """Optimizer steps since the beginning of the run; None if nothing was recorded."""
    tags: Mapping[str, str]
    changed: Mapping[str, str]
    """Settings that were other before."""

    @property
    def seconds(self) -> float:
        return (self.ended_ms - self.started_ms) / 1000


@dataclass(frozen=True)
class Published:
    """Where a run is in MLflow."""

    uri: str
    experiment_id: str
    run_id: str


@dataclass(frozen=True)
class Run:
    folder: RunFolder
    name: str
    state: str
    """running, finished, preempted, failed, or unknown."""
    is_alive: bool
    """Whether a training holds the folder now, as far as this machine can see."""
    params: Mapping[str, str]
    """As the last attempt had them."""
    attempts: Sequence[Attempt]
    tags: Mapping[str, str]
    """As the last attempt had them."""
    dataset: Record
    """name, digest, num_train, num_eval; empty if none is recorded."""
    evaluation: Record | None
    """The last `evaluation` record, whose file the figures are drawn from."""
    curves: Mapping[str, Curve]
    num_nonfinite: Mapping[str, int]
    """Metric name -> values that were NaN or infinite."""
    published: Sequence[Published]

    def curve(self, key: str) -> Curve:
        return self.curves.get(key, ())

    def last(self, key: str) -> float | None:
        return self.curve(key)[-1][1] if self.curve(key) else None

    @cached_property
    def steps_per_epoch(self) -> int | None:
        value = self.params.get("steps_per_epoch", "")
        return int(value) if value.isdecimal() and int(value) > 0 else None

    @cached_property
    def num_steps(self) -> int:
        """Optimizer steps as far as recorded."""
        keys = ("train/loss", "eval/accuracy", "eval/loss", "perf/epoch_seconds")
        return max((self.curve(key)[-1][0] for key in keys if self.curve(key)), default=0)

    @property
    def num_epochs(self) -> float | None:
        return self.num_steps / self.steps_per_epoch if self.steps_per_epoch else None

    @property
    def seconds(self) -> float:
        """Of all attempts, from the first record to the last of each."""
        return sum(attempt.seconds for attempt in self.attempts)

    @cached_property
    def images_per_second(self) -> float | None:
        """Median over the records."""
        values = [value for _, value in self.curve("perf/images_per_second")]
        return median(values) if values else None

    @property
    def accuracy(self) -> Proportion | None:
        """Of the last evaluation."""
        value = self.last("eval/accuracy")
        return None if value is None else Proportion(value, int(self.dataset.get("num_eval", 0)))

    @property
    def best_accuracy(self) -> Proportion | None:
        values = [value for _, value in self.curve("eval/accuracy")]
        return Proportion(max(values), int(self.dataset.get("num_eval", 0))) if values else None

    @cached_property
    def phase_ms(self) -> dict[str, float]:
        """Phase -> milliseconds per optimizer step, mean over the records, in the order of a step."""
        phases = {m[1]: c for key, c in self.curves.items() if (m := re.fullmatch(r"time/(\w+)_ms", key))}
        num_records = max(map(len, phases.values()), default=0)
        return {phase: sum(value for _, value in curve) / num_records for phase, curve in phases.items()}

    def over_attempts(self, tag: str) -> list[str]:
        """The values that a tag had, without repetitions in a row."""
        values = [attempt.tags[tag] for attempt in self.attempts if tag in attempt.tags]
        return [value for i, value in enumerate(values) if i == 0 or value != values[i - 1]]


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs of these folders, each once, with names of their own. Raises RunError naming all that cannot be read."""
    runs, errors = [], []
    for path in dict.fromkeys(path.resolve() for path in paths):
        try:
            runs.append(read_run(RunFolder(path)))
        except RunError as error:
            errors.append(str(error))
    if errors:
        raise RunError("\n".join(errors))
    return _name_apart(runs)


def read_run(folder: RunFolder) -> Run:
    """Raises RunError if there is no journal, or one that cannot be read. Writes nothing."""
    if not folder.journal.is_file():
        raise RunError(f"{folder.path}: no run folder (it has no journal.jsonl)")
    try:
        records, _ = read_journal(folder.journal)
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.path} cannot be read: {error}") from error
    by_kind: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_kind[record["kind"]].append(record)
    curves, num_nonfinite = _read_metrics(by_kind["metric"])
    params = {key: shown(value) for record in by_kind["params"] for key, value in record["values"].items()}
    attempts = _read_attempts(records, by_kind["tags"], params)
    for attempt in attempts:
        params |= attempt.changed
    status = folder.status()
    journal_state = attempts[-1].state if attempts else "unknown"
    return Run(
        folder=folder,
        name=folder.name,
        state=str(status.get("state", journal_state)) if journal_state in ("running", "unknown") else journal_state,
        is_alive=_is_alive(folder),
        params=params,
        attempts=attempts,
        tags=dict(item for attempt in attempts for item in attempt.tags.items()),
        dataset=by_kind["dataset"][-1] if by_kind["dataset"] else {},
        evaluation=by_kind["evaluation"][-1] if by_kind["evaluation"] else None,
        curves=curves,
        num_nonfinite=num_nonfinite,
        published=_read_published(folder, status),
    )


def differing_params(runs: Sequence[Run]) -> list[str]:
    """Settings that are not the same in all runs. The name is what a run is called by here, and no difference."""
    keys = dict.fromkeys(key for run in runs for key in run.params)
    return [key for key in keys if key != "run.name" and len({run.params.get(key) for run in runs}) > 1]


def shown(value: Any) -> str:
    """A setting as a user would type it: null, true and numbers as in YAML."""
    if isinstance(value, str):  # a tag of a resumed attempt holds the words of Python
        return {"None": "null", "True": "true", "False": "false"}.get(value, value)
    return json.dumps(value)


def _read_metrics(records: Sequence[Record]) -> tuple[dict[str, Curve], dict[str, int]]:
    """Curves by step, of a step recorded twice the last value; and how many values were not finite."""
    points: dict[str, dict[int, float]] = defaultdict(dict)
    num_nonfinite: dict[str, int] = defaultdict(int)
    for record in records:
        key = record["key"]
        if key.endswith(NONFINITE):
            num_nonfinite[key.removesuffix(NONFINITE)] += 1
        elif math.isfinite(record["value"]):
            points[key][record["step"]] = float(record["value"])
        else:
            num_nonfinite[key] += 1
    return {key: sorted(values.items()) for key, values in points.items()}, dict(num_nonfinite)


def _read_attempts(records: Sequence[Record], tags: Sequence[Record], params: Mapping[str, str]) -> list[Attempt]:
    by_attempt = _tags_by_attempt(tags)
    parts: list[list[Record]] = []
    for record in records:
        if record["kind"] == "status" and record["state"] == "running":
            parts.append([])
        if parts:
            parts[-1].append(record)
    attempts = []
    for number, part in enumerate(parts):
        states = [record["state"] for record in part if record["kind"] == "status"]
        times = [record["timestamp_ms"] for record in part if "timestamp_ms" in record] or [0]
        steps = [record["step"] for record in part if record["kind"] == "metric"]
        killed = states[-1] == "running" and number < len(parts) - 1
        values = by_attempt.get(number, {})
        changed = {key: shown(value) for key, value in values.items() if number and key in params}
        circumstances = {key: value for key, value in values.items() if key not in changed}
        state, last_step = "killed" if killed else states[-1], max(steps, default=None)
        attempts.append(Attempt(times[0], max(times), state, last_step, circumstances, changed))
    return attempts


def _tags_by_attempt(records: Sequence[Record]) -> dict[int, dict[str, str]]:
    """By attempts from 0 on.

    `attempt.<n>.*` counts from 1 and has a reason as `end`; what was found stands as it is for the first attempt, and
    behind `resume.<n>.` for the later ones.
    """
    by_attempt: dict[int, dict[str, str]] = defaultdict(dict)
    for record in records:
        for key, value in record["values"].items():
            numbered = re.fullmatch(r"(resume|attempt)\.(\d+)\.(.+)", key)
            number = int(numbered[2]) - (numbered[1] == "attempt") if numbered else 0
            by_attempt[number][numbered[3] if numbered else key] = str(value)
    return by_attempt


def _is_alive(folder: RunFolder) -> bool:
    """Without a lock file nobody trains; asking would create it, and a report leaves run folders as they are."""
    return (folder.path / ".training.lock").exists() and is_being_trained(folder)


def _read_published(folder: RunFolder, status: Mapping[str, Any]) -> list[Published]:
    """Each store once: published.json has them all, status.json the run's own even if that file is lost."""
    try:
        stores = json.loads((folder.path / "published.json").read_bytes())
    except (OSError, ValueError):
        stores = {}
    own = {key: status.get(key) for key in ("mlflow_run_id", "mlflow_experiment_id")}
    stores = {status.get("tracking_uri"): own} | stores if isinstance(stores, dict) else {}
    return [
        Published(without_credentials(uri), str(entry["mlflow_experiment_id"]), str(entry["mlflow_run_id"]))
        for uri, entry in stores.items()
        if uri and isinstance(entry, dict) and entry.get("mlflow_run_id") and entry.get("mlflow_experiment_id")
    ]


def _name_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name are called by as much of their paths as tells them apart."""
    named = []
    for run in runs:
        others = [other.folder.path.parts for other in runs if other is not run]
        parts, length = run.folder.path.parts, 1
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        named.append(replace(run, name="/".join(parts[-length:])))
    return named
