"""Sweeps: a file of points of a grid, or drawn at random; and a folder, `sweep.json` beside the run folders of them."""

import itertools
import json
import math
import random
import re
import subprocess
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import AfterValidator, BaseModel, Field, PositiveFloat, ValidationError, model_validator

from pipeline.base.files import locked, write_atomically
from pipeline.config.reading import describe_unknown
from pipeline.config.schema import field_of
from pipeline.run.journal import now_ms
from pipeline.run.records import SweepInfo

FOLDER_FILE = "sweep.json"


class SweepError(ValueError):
    """The file or the folder of a sweep is wrong; the message says where, and what is accepted."""


def _check_order(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] >= ends[1]:
        raise ValueError(f"accepted: [lowest, highest], given {list(ends)}")
    return ends


Texts = Annotated[list[str], Field(min_length=1)]
Ordered = AfterValidator(_check_order)


class Choice(BaseModel, extra="forbid"):
    """The distribution that the value of a key is drawn from: exactly one of these."""

    choice: Texts | None = None
    uniform: Annotated[tuple[float, float], Ordered] | None = None
    log_uniform: Annotated[tuple[PositiveFloat, PositiveFloat], Ordered] | None = None
    integer: Annotated[tuple[int, int], Ordered] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("accepted: one of choice, uniform, log_uniform, integer")
        return self

    def draw(self, rng: random.Random) -> str:
        """Return a value as text. Numbers have three digits, so that a name can show them."""
        if self.choice:
            return rng.choice(self.choice)
        if self.integer:
            return str(rng.randint(*self.integer))
        if self.log_uniform:
            number = math.exp(rng.uniform(*map(math.log, self.log_uniform)))
        else:
            assert self.uniform is not None
            number = rng.uniform(*self.uniform)
        return f"{float(f'{number:.3g}'):.12g}"  # without an exponent, unless it is very small or large


class RandomSearch(BaseModel, extra="forbid"):
    number: int = Field(ge=1)
    seed: int = 0
    keys: dict[str, Choice] = Field(min_length=1)

    def points(self) -> list[dict[str, str]]:
        """Return points, each drawn from (seed, index): with a larger `number` the first ones stay."""
        generators = [random.Random(f"{self.seed} {index}") for index in range(self.number)]
        return [{key: choice.draw(rng) for key, choice in self.keys.items()} for rng in generators]


class SweepFile(BaseModel, extra="forbid"):
    config: str  # relative to the file of the sweep
    settings: list[str] = []  # key=value, of all runs
    grid: dict[str, Texts] | None = None
    random: RandomSearch | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.grid is None) == (self.random is None):
            raise ValueError("accepted: one of grid and random")
        for key in self.keys():
            if key in ("run.name", "run.dir"):
                raise ValueError(f"{key}: cannot be swept; each run is named by its values")
            if field_of(key) is None:
                raise ValueError(f"{key}: {describe_unknown(key)}")
        return self

    def keys(self) -> Iterable[str]:
        return self.random.keys if self.random else self.grid or ()

    def points(self) -> list[dict[str, str]]:
        if self.random:
            return self.random.points()
        assert self.grid is not None
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass(frozen=True)
class Sweep:
    name: str
    config: Path
    text: str  # of its file
    settings: tuple[str, ...]  # key=value of all its runs, besides those in its file
    runs: Mapping[str, tuple[str, ...]]  # name of a run -> all its settings


def read_sweep(path: Path, settings: Sequence[str] = ()) -> Sweep:
    """Return the sweep in a file, with `settings` of all its runs besides those in the file. Raises SweepError."""
    try:
        text = path.read_text(encoding="utf-8")
        # all scalars as text: the config reads them by the type of their key
        content = SweepFile.model_validate(yaml.load(text, Loader=yaml.BaseLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SweepError(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        raise SweepError(f"{path}:\n{_describe(error)}") from error
    shared = (*content.settings, *settings)
    keys = {setting.partition("=")[0] for setting in shared}
    if wrong := sorted(keys & {*content.keys(), "run.name"}):
        raise SweepError(f"{path}: {', '.join(wrong)} cannot be set for all runs, which differ in it")
    points = content.points()
    names = [_name(point) for point in points]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SweepError(f"{path}: {', '.join(twice)} would be there twice; accepted: points that differ in names")
    own = [[f"{key}={value}" for key, value in point.items()] for point in points]
    runs = {name: (*shared, *settings) for name, settings in zip(names, own, strict=True)}
    return Sweep(path.stem, path.parent / content.config, text, tuple(settings), runs)


def _describe(error: ValidationError) -> str:
    lines = []
    for details in error.errors():
        where = ".".join(str(part) for part in details["loc"])
        says = details["msg"].removeprefix("Value error, ")
        if details["type"] == "extra_forbidden":
            says = "unknown; docs/slurm.md and configs/sweeps/ show what a sweep has"
        lines.append(f"  {where + ': ' if where else ''}{says}")
    return "\n".join(lines)


def _name(point: dict[str, str]) -> str:
    """Return the name of a run by its values alone: it keeps its name whatever else is added to the sweep."""
    last = [key.removesuffix(".name").rpartition(".")[2] for key in point]
    parts = (
        f"{name if last.count(name) == 1 else key}-{value}"
        for name, (key, value) in zip(last, point.items(), strict=True)
    )
    return "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part.replace("+", "")) for part in parts)


def read_sweep_folder(folder: Path) -> SweepInfo | None:
    """Return what makes `folder` the folder of a sweep; None if it is none."""
    try:
        info: SweepInfo = json.loads((folder / FOLDER_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return info


def open_sweep_folder(folder: Path, sweep: Sweep, job: str | None = None) -> list[str]:
    """Make `folder` the folder of the sweep, if it is not yet, and remember `job`, an array that trains it.

    Returns the names of its runs by number. Raises SweepError if that cannot be.
    """
    if (folder / "journal.jsonl").exists():
        raise SweepError(f"{folder} is the folder of a run: rename the file of the sweep, whose name the folder has")
    try:
        with locked(folder / ".sweep.lock"):
            known = read_sweep_folder(folder)
            info = SweepInfo(
                run_id=known["run_id"] if known else uuid.uuid4().hex,
                timestamp_ms=known["timestamp_ms"] if known else now_ms(),
                name=sweep.name,
                settings=list(sweep.settings),
                names=list(sweep.runs),
                numbered=number_runs(folder, sweep),
                jobs=[*(known["jobs"] if known else ()), *([job] if job else ())],
                text=sweep.text,
            )
            write_atomically(folder / FOLDER_FILE, json.dumps(info, indent=1) + "\n")
    except OSError as error:
        raise SweepError(f"{folder} cannot be the folder of the sweep: {error}") from error
    return info["numbered"]


def number_runs(folder: Path, sweep: Sweep) -> list[str]:
    """Return the names of all runs that the sweep ever had, those of its file among them, by number.

    A run keeps its number, whatever becomes of the file, so that tasks of an array that wait remain what they were.
    """
    known = read_sweep_folder(folder)
    return list(dict.fromkeys([*(known["numbered"] if known else ()), *sweep.runs]))


def first_settings(folder: Path, given: Sequence[str]) -> list[str]:
    """Return the settings that the sweep was first submitted with, or `given` if it was not yet.

    Raises SweepError if others are given: all runs of a sweep are to be alike.
    """
    info = read_sweep_folder(folder)
    first = info["settings"] if info else list(given)
    if given and sorted(given) != sorted(first):
        raise SweepError(
            f"{folder} was trained with {' '.join(first) or 'no settings besides its file'}, not with "
            f"{' '.join(given)}: leave them out to go on as before, or copy the file of the sweep to another name"
        )
    return first


def queued_numbers(folder: Path) -> set[int]:
    """Return the numbers of the runs that wait or train in arrays submitted from here; none without Slurm."""
    info = read_sweep_folder(folder)
    if info is None or not info["jobs"]:
        return set()
    command = ["squeue", "--me", "--noheader", "--array", "--format=%F %K"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return set()
    pairs = (line.split() for line in done.stdout.splitlines())
    return {int(task) for job, task in pairs if job in info["jobs"] and task.isdecimal()}


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Return these run folders, and those in folders of sweeps."""
    return [run for path in paths for run in (find_all_runs(path) if read_sweep_folder(path) else [path])]


def find_all_runs(folder: Path) -> list[Path]:
    """Return the run folders in a folder of run folders and sweeps."""
    runs = [path.parent for path in folder.glob("*/journal.jsonl")]
    return sorted(runs + find_runs(path.parent for path in folder.glob(f"*/{FOLDER_FILE}")))
