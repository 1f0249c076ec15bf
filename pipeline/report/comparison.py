"""Runs to compare, and where MLflow shows them, read from their folders: without a server, torch or mlflow."""

import json
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import quote

from pipeline.base.credentials import without_credentials
from pipeline.base.files import read_json
from pipeline.run.folder import RunError, RunFolder, is_being_trained
from pipeline.run.journal import NONFINITE, read_journal
from pipeline.run.records import DatasetRecord, EvaluationRecord, Record

Curve = Sequence[tuple[int, float]]
"""(optimizer step, value) by step."""

LOCAL_SERVER = "http://127.0.0.1:5000"
"""Where a bare `mlflow server` answers."""
TRAINING = "workflowType=machine_learning"
"""Without it MLflow shows its pages for language models."""


class Accuracy(NamedTuple):
    share: float
    total: int
    """Validation images; 0 if unknown."""

    @property
    def correct(self) -> int:
        return round(self.share * self.total)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the share (Wilson, J. Am. Stat. Assoc. 22, 1927); p +- 2 SE fails near 100%."""
        from scipy.stats import binomtest  # takes a second to import, which the other commands need not wait for

        low, high = binomtest(self.correct, self.total).proportion_ci(method="wilson")
        return float(low), float(high)


@dataclass(frozen=True)
class Attempt:
    """A training from its start to its end."""

    started_ms: int
    seconds: float
    """Until its last record."""
    state: str
    """The state at its end; `killed` if it recorded no end, `running` if it may still be at work."""
    last_step: int | None
    """Optimizer steps since the beginning of the run; None if nothing was recorded."""
    tags: Mapping[str, str]
    changed: Mapping[str, str]
    """Settings that had other values before."""


@dataclass(frozen=True)
class Run:
    folder: RunFolder
    name: str
    state: str
    """running, finished, preempted, failed, or unknown."""
    is_alive: bool
    """Whether a training holds the folder now, as far as this machine can see."""
    params: Mapping[str, str]
    """Those of the last attempt; `tags` likewise."""
    tags: Mapping[str, str]
    attempts: Sequence[Attempt]
    dataset: DatasetRecord | None
    evaluation: EvaluationRecord | None
    """The last one, whose file the figures are drawn from."""
    curves: Mapping[str, Curve]
    num_nonfinite: Mapping[str, int]
    """Metric name -> values that were NaN or infinite."""

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
    def seconds(self) -> float:
        """All attempts, each from its first record to its last."""
        return sum(attempt.seconds for attempt in self.attempts)

    @cached_property
    def images_per_second(self) -> float | None:
        """Median over the records."""
        values = [value for _, value in self.curve("perf/images_per_second")]
        return median(values) if values else None

    @property
    def accuracy(self) -> Accuracy | None:
        """The last validation accuracy."""
        share = self.last("eval/accuracy")
        return None if share is None else Accuracy(share, self.dataset["num_eval"] if self.dataset else 0)

    @property
    def best_accuracy(self) -> float | None:
        return max((value for _, value in self.curve("eval/accuracy")), default=None)

    @cached_property
    def phase_ms(self) -> dict[str, float]:
        """Phase -> milliseconds per optimizer step, mean over the records."""
        phases = {m[1]: c for key, c in self.curves.items() if (m := re.fullmatch(r"time/(\w+)_ms", key))}
        num_records = max(map(len, phases.values()), default=0)
        return {phase: sum(value for _, value in curve) / num_records for phase, curve in phases.items()}

    def tag_history(self, tag: str) -> list[str]:
        """Return the values of a tag over the attempts, without repetitions in a row."""
        return [value for value, _ in groupby(a.tags[tag] for a in self.attempts if tag in a.tags)]


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Return the runs of these folders, each once, with unique names. Raises RunError naming all that is unreadable."""
    runs, errors = [], []
    for path in dict.fromkeys(path.resolve() for path in paths):
        try:
            runs.append(read_run(RunFolder(path)))
        except RunError as error:
            errors.append(str(error))
    if errors:
        raise RunError("\n".join(errors))
    return _with_unique_names(runs)


def read_run(folder: RunFolder) -> Run:
    """Return the run as recorded so far; writes nothing. Raises RunError if there is no journal that can be read."""
    if not folder.journal.is_file():
        raise RunError(f"{folder.path}: no run folder (it has no journal.jsonl)")
    try:
        records, _ = read_journal(folder.journal)
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.path} cannot be read: {error}") from error
    params = {key: _format(v) for r in records if r["kind"] == "params" for key, v in r["values"].items()}
    attempts = _read_attempts(records, params)
    curves, num_nonfinite = _read_metrics(records)
    state = attempts[-1].state if attempts else "unknown"
    if state in ("running", "unknown"):  # a training that was killed recorded no end; the publisher may have noticed
        state = str(folder.status().get("state", state))
    return Run(
        folder=folder,
        name=folder.name,
        state=state,
        # asking would create a lock file, and a report changes no run folder
        is_alive=folder.lock.exists() and is_being_trained(folder),
        params=params | {key: value for attempt in attempts for key, value in attempt.changed.items()},
        tags={key: value for attempt in attempts for key, value in attempt.tags.items()},
        attempts=attempts,
        dataset=next((record for record in reversed(records) if record["kind"] == "dataset"), None),
        evaluation=next((record for record in reversed(records) if record["kind"] == "evaluation"), None),
        curves=curves,
        num_nonfinite=num_nonfinite,
    )


def differing_params(runs: Sequence[Run]) -> list[str]:
    """Return the settings that are not the same in all runs, but for their names."""
    keys = dict.fromkeys(key for run in runs for key in run.params)
    return [key for key in keys if key != "run.name" and len({run.params.get(key) for run in runs}) > 1]


def _format(value: Any) -> str:
    """Return a setting as a user would type it: null, true and numbers as in YAML."""
    if isinstance(value, str):  # a tag of a resumed attempt holds Python's words
        return {"None": "null", "True": "true", "False": "false"}.get(value, value)
    return json.dumps(value)


def _read_metrics(records: Sequence[Record]) -> tuple[dict[str, Curve], dict[str, int]]:
    """Return curves by step, of a step recorded twice the last value; and how many values were not finite."""
    points: dict[str, dict[int, float]] = defaultdict(dict)
    num_nonfinite: dict[str, int] = defaultdict(int)
    for record in [record for record in records if record["kind"] == "metric"]:
        key, value = record["key"], record["value"]
        if key.endswith(NONFINITE) or not math.isfinite(value):
            num_nonfinite[key.removesuffix(NONFINITE)] += 1
        else:
            points[key][record["step"]] = float(value)
    return {key: sorted(values.items()) for key, values in points.items()}, dict(num_nonfinite)


def _read_attempts(records: Sequence[Record], params: Mapping[str, str]) -> list[Attempt]:
    tags = _tags_by_attempt(records)
    starts = [i for i, record in enumerate(records) if record["kind"] == "status" and record["state"] == "running"]
    attempts = []
    for number, (start, end) in enumerate(pairwise([*starts, len(records)]), start=1):
        part = records[start:end]
        state: str = [record["state"] for record in part if record["kind"] == "status"][-1]
        if state == "running" and end < len(records):
            state = "killed"
        times = [r["timestamp_ms"] for r in part if r["kind"] == "status" or r["kind"] == "metric"]
        steps = [record["step"] for record in part if record["kind"] == "metric"]
        changed = {key: _format(value) for key, value in tags[number].items() if number > 1 and key in params}
        others = {key: value for key, value in tags[number].items() if key not in changed}
        seconds = (max(times) - times[0]) / 1000
        attempts.append(Attempt(times[0], seconds, state, max(steps, default=None), others, changed))
    return attempts


def _tags_by_attempt(records: Sequence[Record]) -> dict[int, dict[str, str]]:
    """Return the tags of each attempt, from 1 on; those without a number are of the first."""
    by_attempt: dict[int, dict[str, str]] = defaultdict(dict)
    for record in records:
        for key, value in record["values"].items() if record["kind"] == "tags" else ():
            numbered = re.fullmatch(r"attempt\.(\d+)\.(.+)", key)
            number, name = (int(numbered[1]), numbered[2]) if numbered else (1, key)
            by_attempt[number][name] = str(value)
    return by_attempt


def _with_unique_names(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, those of one name called by as much of their paths as tells them apart."""
    named = []
    for run in runs:
        others = [other.folder.path.parts for other in runs if other is not run]
        parts, length = run.folder.path.parts, 1
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        named.append(replace(run, name="/".join(parts[-length:])))
    return named


class Store(NamedTuple):
    """An MLflow store that has some of the runs."""

    uri: str
    num_runs: int
    server_command: str | None
    """Command to run first; None if the store is a server itself."""
    pages: list[tuple[str, str]]
    """(what is seen there, address)"""


def find_stores(runs: Sequence[Run]) -> list[Store]:
    """Return the stores that have any of the runs."""
    by_uri: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for run in runs:
        for uri, ids in _read_published(run.folder):
            by_uri[uri].append(ids)
    stores = []
    for uri, published in by_uri.items():
        is_server = uri.startswith(("http://", "https://"))
        command = None if is_server else f"mlflow server --backend-store-uri {shlex.quote(uri)}"
        pages = _pages(uri.rstrip("/") if is_server else LOCAL_SERVER, published)
        stores.append(Store(uri, len(published), command, pages))
    return stores


def _read_published(folder: RunFolder) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield each store once, with the ids of experiment and run: published.json has them all, status.json the run's
    own even if that file is lost."""
    status = folder.status()
    stores = {status.get("tracking_uri"): status} | read_json(folder.path / "published.json")
    for uri, entry in stores.items():
        if uri and isinstance(entry, dict) and entry.get("mlflow_run_id") and entry.get("mlflow_experiment_id"):
            yield without_credentials(uri), (str(entry["mlflow_experiment_id"]), str(entry["mlflow_run_id"]))


def _pages(server: str, published: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    experiments = list(dict.fromkeys(experiment for experiment, _ in published))
    runs = [run for _, run in published]
    places = [f"{server}/#/experiments/{quote(experiment, '')}/runs" for experiment in experiments]
    if len(runs) > 1:
        selection = f"runs={quote(json.dumps(runs), '')}&experiments={quote(json.dumps(experiments), '')}"
        first = "settings and results side by side", f"{server}/#/compare-runs?{selection}&{TRAINING}"
    else:
        first = "the run", f"{places[0]}/{quote(runs[0], '')}?{TRAINING}"
    charts = "curves of its experiment, overlaid"
    return [first, *((charts, f"{place}?{TRAINING}&compareRunsMode=CHART") for place in places)]
