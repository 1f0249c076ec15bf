"""A sweep: one training for each point of a grid, or for points drawn at random; and the folder that holds its runs.

`runs/<sweep>/sweep.json` makes a folder of run folders one sweep: in MLflow its runs are children of one.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
import re
import subprocess
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.config import FIELDS
from pipeline.run_folder import locked

FOLDER_FILE = "sweep.json"
EXAMPLES = "configs/sweeps/"
Texts = Annotated[list[str], Field(min_length=1)]
Range = tuple[float, float]


class SweepError(ValueError):
    """The file of a sweep is wrong; the message says where, and what is accepted."""


class Choice(BaseModel):
    """Where the value of a key is drawn from; exactly one of these."""

    model_config = ConfigDict(extra="forbid")
    choice: Texts | None = None
    uniform: Range | None = None
    log_uniform: Range | None = None
    integer: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _check(self) -> Choice:
        given = [value for _, value in self if value is not None]
        if len(given) != 1:
            raise ValueError("accepted: one of choice, uniform, log_uniform, integer")
        ends = self.uniform or self.log_uniform or self.integer
        if ends and ends[0] >= ends[1]:
            raise ValueError(f"accepted: [lowest, highest], given {list(ends)}")
        if self.log_uniform and self.log_uniform[0] <= 0:
            raise ValueError("log_uniform: accepted: numbers > 0")
        return self

    def draw(self, rng: random.Random) -> str:
        """Numbers have three digits, so that a name can show them."""
        if self.choice:
            return rng.choice(self.choice)
        if self.integer:
            return str(rng.randint(*self.integer))
        if self.uniform:
            return _three_digits(rng.uniform(*self.uniform))
        assert self.log_uniform is not None
        return _three_digits(math.exp(rng.uniform(*map(math.log, self.log_uniform))))


def _three_digits(number: float) -> str:
    """Without an exponent, unless it is very small or large."""
    return f"{float(f'{number:.3g}'):.12g}"


class RandomSearch(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: int = Field(ge=1)
    seed: int = 0
    keys: dict[str, Choice] = Field(min_length=1)

    def points(self) -> list[dict[str, str]]:
        """Each drawn from (seed, index): with a larger `number` the first ones stay."""
        found = []
        for index in range(self.number):
            rng = random.Random(f"{self.seed} {index}")
            found.append({key: choice.draw(rng) for key, choice in self.keys.items()})
        return found


class SweepFile(BaseModel):
    """What may stand in the file."""

    model_config = ConfigDict(extra="forbid")
    config: str
    """Relative to the file of the sweep."""
    settings: list[str] = []
    """key=value, of all runs."""
    grid: dict[str, Texts] | None = None
    random: RandomSearch | None = None

    @model_validator(mode="after")
    def _check(self) -> SweepFile:
        if (self.grid is None) == (self.random is None):
            raise ValueError("accepted: one of grid and random")
        for key in self.keys():
            if key in ("run.name", "run.dir"):
                raise ValueError(f"{key}: cannot be swept; each run is named by its values")
            if key not in FIELDS:
                close = difflib.get_close_matches(key, FIELDS, 1)
                raise ValueError(f"{key}: unknown key{f'; did you mean {close[0]}?' if close else ''}")
        return self

    def keys(self) -> list[str]:
        return list(self.grid or (self.random.keys if self.random else ()))

    def points(self) -> list[dict[str, str]]:
        if self.random:
            return self.random.points()
        assert self.grid is not None
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass(frozen=True)
class Element:
    """One training of a sweep."""

    name: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    name: str
    config: Path
    text: str
    settings: tuple[str, ...]
    """Of all its runs, besides those of its file."""
    elements: tuple[Element, ...]


def read_sweep(path: Path, settings: Sequence[str] = ()) -> Sweep:
    """With `settings` of all its runs besides. Raises SweepError."""
    try:
        text = path.read_text(encoding="utf-8")
        # all scalars as text: the config reads them by the type of their key
        content = SweepFile.model_validate(yaml.load(text, Loader=yaml.BaseLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SweepError(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        raise SweepError(f"{path}:\n{_describe(error)}") from error
    points = content.points()
    check_settings(path, points, (*content.settings, *settings))
    elements = [
        Element(_name(point), (*content.settings, *settings, *(f"{key}={value}" for key, value in point.items())))
        for point in points
    ]
    names = [element.name for element in elements]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SweepError(
            f"{path}: {', '.join(twice)} would be there twice; accepted: points that differ in their names"
        )
    return Sweep(path.stem, path.parent / content.config, text, tuple(settings), tuple(elements))


def check_settings(path: Path, points: Sequence[dict[str, str]], settings: Sequence[str]) -> None:
    """Raises SweepError for one that would make points the same, or give them one name."""
    keys = [setting.partition("=")[0] for setting in settings]
    if wrong := sorted({key for key in keys if key in points[0] or key == "run.name"}):
        raise SweepError(f"{path}: {', '.join(wrong)} cannot be set for all runs, which differ in it")


def _describe(error: ValidationError) -> str:
    lines = []
    for details in error.errors():
        where = ".".join(str(part) for part in details["loc"])
        says = details["msg"].removeprefix("Value error, ")
        if details["type"] == "extra_forbidden":
            says = f"unknown; docs/slurm.md and {EXAMPLES} show what a sweep has"
        lines.append(f"  {where + ': ' if where else ''}{says}")
    return "\n".join(lines)


def _name(point: dict[str, str]) -> str:
    """By its values alone: a point keeps its name, and so its run, whatever else is added to the sweep."""
    last = [key.removesuffix(".name").rpartition(".")[2] for key in point]
    parts = (
        f"{name if last.count(name) == 1 else key}-{value}"
        for name, (key, value) in zip(last, point.items(), strict=True)
    )
    return "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part.replace("+", "")) for part in parts)


def open_folder(folder: Path, sweep: Sweep, job: str | None = None) -> list[str]:
    """Make it the folder of the sweep, if it is not yet, and remember `job`, an array that trains it.

    Returns the names of its runs by number: one that has a number keeps it, whatever becomes of the file, so that
    tasks of an array that wait remain what they were. Raises SweepError if that cannot be.
    """
    if (folder / "journal.jsonl").exists():
        raise SweepError(f"{folder} is the folder of a run: rename the file of the sweep, whose name the folder has")
    try:
        with locked(folder / ".sweep.lock"):
            known = of_folder(folder) or {"run_id": uuid.uuid4().hex, "timestamp_ms": time.time_ns() // 1_000_000}
            names, numbered = [element.name for element in sweep.elements], number(folder, sweep)
            jobs = [*known.get("jobs", []), *([job] if job else [])]
            known |= {"settings": list(sweep.settings)}
            content = {"name": sweep.name, "names": names, "numbered": numbered, "jobs": jobs, "text": sweep.text}
            temporary = folder / ".writing-sweep.json"
            temporary.write_text(json.dumps(known | content, indent=1) + "\n")
            temporary.replace(folder / FOLDER_FILE)
    except OSError as error:
        raise SweepError(f"{folder} cannot be the folder of the sweep: {error}") from error
    return numbered


def settle_settings(folder: Path, given: Sequence[str]) -> list[str]:
    """Those that it was submitted with, if none are given; its runs are to be alike. Raises SweepError for others."""
    known: list[str] = (of_folder(folder) or {}).get("settings", list(given))
    if given and sorted(given) != sorted(known):
        raise SweepError(
            f"{folder} was trained with {' '.join(known) or 'no settings besides its file'}, not with "
            f"{' '.join(given)}: leave them out to go on as before, or copy the file of the sweep to another name"
        )
    return known


def number(folder: Path, sweep: Sweep) -> list[str]:
    """The names of all runs the sweep ever had, those of its file among them, by number."""
    numbered: list[str] = (of_folder(folder) or {}).get("numbered", [])
    return [*numbered, *(element.name for element in sweep.elements if element.name not in numbered)]


def queued(folder: Path) -> set[int]:
    """Numbers of the runs that wait or train in arrays that were submitted from here; none where there is no Slurm."""
    jobs = (of_folder(folder) or {}).get("jobs", [])
    if not jobs:
        return set()
    command = ["squeue", "--me", "--noheader", "--array", "--format=%F %K"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return set()
    pairs = (line.split() for line in done.stdout.splitlines())
    return {int(task) for job, task in pairs if job in jobs and task.isdecimal()}


def of_folder(folder: Path) -> dict[str, Any] | None:
    """What makes it the folder of a sweep: run_id, name, timestamp_ms, text of the file, settings besides, names of its
    runs, numbered (names of all it ever had), jobs. None if it is none."""
    try:
        loaded: dict[str, Any] = json.loads((folder / FOLDER_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return loaded


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run folders; for that of a sweep, those of its runs."""
    return [run for path in paths for run in (_runs_of(path) if of_folder(path) else [path])]


def find_all_runs(folder: Path) -> list[Path]:
    """In a folder of run folders and sweeps."""
    sweeps = [path.parent for path in folder.glob(f"*/{FOLDER_FILE}")]
    return sorted(_runs_of(folder) + find_runs(sweeps))


def _runs_of(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/journal.jsonl"))
