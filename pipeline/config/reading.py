"""From defaults, a YAML file and `key=value` to a checked config, or to one error that lists all that is wrong.

All values are read as text, and the schema reads that by the type of the key: `run.name=2026-11-21` stays a name.
"""

import argparse
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from pipeline.config.arguments import NULLS, Problem, describe_accepted, read_text, show
from pipeline.config.schema import FIELDS, FORMAT, OPEN_KEYS, SECTIONS, Config, field_of

PACKAGE = Path(__file__).resolve().parents[1]
RECIPES = next(path for path in (PACKAGE / "recipes", PACKAGE.parent / "configs") if path.is_dir())
"""The recipes: configs/ in a checkout, its copy in an installed package."""
OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "batch_size": "data.global_batch_size",
    "num_workers": "data.workers",
}
"""Name in other programs -> key, where the spelling alone would not tell."""
OLD_KEYS = {
    "data.synthetic_train_size": "data.arguments.train_size",
    "data.synthetic_eval_size": "data.arguments.validation_size",
    "data.synthetic_channels": "data.arguments.channels",
    "data.synthetic_classes": "data.arguments.classes",
    "data.random_crop": "data.augment.crop",
    "data.random_flip": "data.augment.flip",
    "model.dropout": "model.arguments.dropout",
    "model.dropout2d": "model.arguments.dropout2d",
    "train.virtual_shards": "train.virtual_ranks",
}
"""Key of format 1 -> key of today."""


class ConfigError(ValueError):
    """The config is wrong; the message lists every problem, one a line."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        lines = "".join(f"\n  {problem.message}" for problem in problems)
        super().__init__(f"the configuration has {count}; nothing was started.{lines}")


@dataclass(frozen=True)
class CommandLine:
    config_path: Path
    overrides: tuple[str, ...]
    dry_run: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([Problem((), f"{message}; accepted: [--config PATH] [--dry-run] [key=value ...]")])


def find_config(name: str) -> Path:
    """Return the path of a YAML file; a name that is no file may be that of a recipe, such as `mnist`."""
    recipe = RECIPES / f"{name}.yaml"
    return recipe if recipe.is_file() and not Path(name).is_file() else Path(name)


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Return main.py's arguments, split; raises ConfigError for options that do not exist."""
    parser = _Parser(
        prog="train/main.py",
        description="Train an image classifier on one process, or on as many as torchrun starts.",
        epilog="configs/default.yaml lists every key with a comment.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=find_config, default="default", metavar="PATH", help="YAML file, or a recipe")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    arguments = parser.parse_intermixed_args(argv)
    return CommandLine(arguments.config, tuple(arguments.overrides), arguments.dry_run)


def load_config(command: CommandLine, checks: Iterable[Callable[[Config], Iterable[Problem]]] = ()) -> Config:
    """Return the config, read, merged and checked. Raises ConfigError with all problems at once.

    `checks` find what no single key shows. They see a config in which a wrong value was replaced by its default, and
    what they say about such a key is left out, so that one mistake is reported once.
    """
    problems: list[Problem] = []
    texts = _read_yaml(command.config_path, problems)
    for override in command.overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(Problem((key,), f"{override}: is not key=value; {_suggest_form(override)}"))
        elif key in OPEN_KEYS:  # all arguments at once: `model.arguments={}` takes back those of the file
            texts = {known: value for known, value in texts.items() if not known.startswith(f"{key}.")}
            texts |= _flatten({key: read_text(text, FIELDS[key].annotation)})
        else:
            texts[key] = text
    config = _validate(texts, problems)
    known_wrong = {key for problem in problems for key in problem.keys}
    for check in checks:
        problems += [problem for problem in check(config) if not known_wrong.intersection(problem.keys)]
    if problems:
        raise ConfigError(problems)
    return config


class _TextLoader(yaml.BaseLoader):
    """Scalars stay text; a key that stands twice is an error instead of a silent last-one-wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if twice := _find_twice([key.value for key, _ in node.value]):
            raise yaml.YAMLError(f"key {twice[0]!r} stands twice (line {node.start_mark.line + 1} and after)")
        return super().construct_mapping(node, deep)


def _find_twice(keys: list[str]) -> list[str]:
    return [key for position, key in enumerate(keys) if key in keys[:position]]


def _read_yaml(path: Path, problems: list[Problem]) -> dict[str, Any]:
    """Return the dotted keys of a file with their values in texts."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_TextLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        known = f"; recipes: {', '.join(sorted(recipe.stem for recipe in RECIPES.glob('*.yaml')))}"
        reason = str(error) if isinstance(error, yaml.YAMLError) else f"cannot be read ({error}){known}"
        problems.append(Problem((), f"--config {path}: {reason}"))
        return {}
    if not isinstance(loaded, dict):
        problems.append(Problem((), f"--config {path}: holds no sections; accepted: {', '.join(SECTIONS)}, loss"))
        return {}
    if (version := loaded.pop("format", str(FORMAT))) != str(FORMAT):
        reason = f"accepted: {FORMAT}, whose keys are those of configs/default.yaml"
        problems.append(Problem((), f"--config {path}: format = {show(version)}: {reason}"))
    entries = list(_flatten(loaded))
    twice = _find_twice([key for key, _ in entries])
    problems += [Problem((key,), f"{key}: stands twice, in its section and by itself") for key in twice]
    return dict(entries)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys in sections and open keys, and the keys outside of them, with their values."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key in (*SECTIONS, *OPEN_KEYS) and isinstance(value, dict):
            yield from _flatten(value, f"{key}.")
        elif key not in SECTIONS or value not in NULLS:
            yield key, value


def _validate(texts: dict[str, Any], problems: list[Problem]) -> Config:
    """Return the config without unknown keys and with the default for each wrong value, which become problems."""
    for key in sorted(key for key in texts if field_of(key) is None):
        meant = ".".join(OLD_KEYS.get(key, key).split(".")[:2])
        problems.append(Problem((key, meant), f"{key} = {show(texts.pop(key))}: {describe_unknown(key)}"))
    try:
        return Config.model_validate(_nest(texts))
    except ValidationError as error:
        places = [".".join(str(part) for part in details["loc"][:2]) for details in error.errors()]
    # pydantic also names places in lists and members of unions
    for key in dict.fromkeys(place if place in FIELDS else place.partition(".")[0] for place in places):
        accepted = describe_accepted(FIELDS[key].rebuild_annotation())
        problems.append(Problem((key,), f"{key} = {show(texts.pop(key))}: accepted: {accepted}"))
    return Config.model_validate(_nest(texts))


def _nest(texts: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, text in texts.items():
        owner, (*parents, name) = nested, key.split(".", 2)
        for parent in parents:
            owner = owner.setdefault(parent, {})
        if isinstance(owner, dict):  # else it belongs to an open key that is wrong itself
            owner[name] = text
    return nested


def _suggest_form(argument: str) -> str:
    if argument.endswith((".yaml", ".yml")):
        return f"did you mean --config {argument}?"
    return f"did you mean {argument}=<value>?" if argument in FIELDS else _nearest(argument)


def describe_unknown(key: str) -> str:
    """Return what a message on an unknown key ends with: its new name, the keys of its section, or the nearest key."""
    if key in SECTIONS:
        return f"is a section; accepted: {', '.join(known for known in FIELDS if known.startswith(f'{key}.'))}"
    return f"is now {OLD_KEYS[key]}" if key in OLD_KEYS else f"unknown key; {_nearest(key)}"


def _nearest(key: str) -> str:
    """Return `did you mean ...?` by the whole dotted key, else by its last part (`epochs` -> `train.epochs`)."""
    last = key.rpartition(".")[2]
    by_last = {known.rpartition(".")[2]: known for known in reversed(list(FIELDS))} | OTHER_NAMES
    near = [OTHER_NAMES[last]] if last in OTHER_NAMES else difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.8)
    near = near or [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]
    return f"did you mean {(near or difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.0))[0]}?"
