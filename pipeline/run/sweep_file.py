"""A sweep: one training for each point of a grid, or for points drawn at random; and the folder that holds its runs.

`runs/<sweep>/sweep.json` makes a folder of run folders one sweep: in MLflow its runs are children of one.
"""

from __future__ import annotations

import difflib
import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.config import FIELDS

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
