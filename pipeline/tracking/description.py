"""A run in a few lines of Markdown, which MLflow shows above its metrics."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.run.journal import iterate

Record = Mapping[str, Any]
RESUMED = re.compile(r"resume\.\d+\.(.+)")
"""The tag of a setting that an attempt changed."""
RECIPE = (
    "data.dataset",
    "model.name",
    "loss",
    "optim.name",
    "optim.lr",
    "optim.schedule",
    "data.global_batch_size",
    "train.epochs",
    "run.seed",
)


@dataclass
class Story:
    """What the journal tells of a run, as far as its description needs it."""

    name: str = ""
    command: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, list[str]] = field(default_factory=dict)
    """Setting -> its values in attempts that changed it."""
    tags: dict[str, str] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    """By step."""
    attempts: list[int] = field(default_factory=list)
    """When each began, in ms."""
    state: str = ""
    ended: int | None = None
    best_step: int | None = None

    @classmethod
    def of(cls, records: Iterable[Record]) -> Story:
        story = cls()
        for record in records:
            story.add(record)
        return story

    def add(self, record: Record) -> None:
        match record["kind"]:
            case "run":
                self.name, self.command = record["name"], record.get("command")
            case "params":
                self.params |= record["values"]
            case "tags":
                self.tags |= record["values"]
                for key, value in record["values"].items():
                    changed = RESUMED.fullmatch(key)
                    if changed and changed[1] in self.params:
                        self.changes.setdefault(changed[1], []).append(value)
            case "metric" if record["key"].startswith("eval/"):
                self.evaluations.setdefault(record["step"], {})[record["key"]] = record["value"]
            case "model":
                self.best_step = record.get("step")
            case "status":
                self._turn(record)

    def _turn(self, record: Record) -> None:
        self.state, moment = record["state"], record.get("timestamp_ms", 0)
        self.ended = None if self.state == "running" else moment
        if self.state == "running":
            self.attempts.append(moment)


def describe_run(journal: Path, folder: str) -> str:
    """Recipe, command, result and attempts. `folder` is where the run lies on its machine."""
    kinds, keys = ("run", "params", "tags", "model", "status"), ("eval/accuracy", "eval/loss")
    story = Story.of(record for record, _ in iterate(journal, kinds=kinds, keys=keys))
    parts = [_result(story), _recipe(story), _attempts(story), f"Run folder: `{folder}`"]
    if story.command:
        parts.insert(2, f"```\n{story.command}\n```")
    return "\n\n".join(part for part in parts if part)


def _result(story: Story) -> str:
    if not story.evaluations:
        return f"**{story.state or 'begun'}**, not evaluated yet"
    last = max(story.evaluations)
    best = story.best_step if story.best_step in story.evaluations else None
    lines = [f"**{story.state}**: {_evaluation(story, last)} at step {last:,}, the last evaluation"]
    if best is not None:
        lines.append(f"The logged model is of step {best:,}: {_evaluation(story, best)}")
    return "  \n".join(lines)


def _evaluation(story: Story, step: int) -> str:
    values = story.evaluations[step]
    accuracy, loss = values.get("eval/accuracy"), values.get("eval/loss")
    parts = [f"accuracy {accuracy:.2%}" if accuracy is not None else "", f"loss {loss:.4g}" if loss is not None else ""]
    return ", ".join(part for part in parts if part) or "no finite result"


def _recipe(story: Story) -> str:
    keys = [*RECIPE, *(key for key in story.changes if key not in RECIPE)]
    values = {key: [story.params[key], *story.changes.get(key, [])] for key in keys if key in story.params}
    return ", ".join(f"{key} " + ", then ".join(f"`{value}`" for value in each) for key, each in values.items())


def _attempts(story: Story) -> str:
    """A table where there was more than one; else when it began."""
    if len(story.attempts) < 2:
        return f"Begun {_moment(story.attempts[0])}" if story.attempts else ""
    rows = ["| attempt | begun | host | ranks | ended |", "| ---: | --- | --- | ---: | --- |"]
    for number, began in enumerate(story.attempts, 1):
        host, ranks, end = (story.tags.get(f"attempt.{number}.{what}", "") for what in ("host", "ranks", "end"))
        rows.append(f"| {number} | {_moment(began)} | {host} | {ranks} | {end} |")
    return "\n".join(rows)


def _moment(milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
