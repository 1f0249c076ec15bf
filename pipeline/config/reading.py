"""From defaults, a YAML file and ``key=value`` to a checked config, or to one error that lists all that is wrong.

YAML scalars are kept as text and read by the declared type of their key, so that ``run.name=2026-11-21`` stays a name
and ``1e-3`` is a number wherever it is written.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipeline.config.schema import FIELDS, SECTIONS, Config, Problem, find_contradictions


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


def parse_command_line(argv: Sequence[str], default_config: Path) -> CommandLine:
    """Split main.py's arguments; raises ConfigError for options that do not exist."""
    parser = _Parser(
        prog="train/main.py",
        description="Train an image classifier on one process, or on as many as torchrun starts.",
        epilog="configs/default.yaml lists every key with a comment.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=default_config, metavar="PATH", help="YAML file")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    arguments = parser.parse_intermixed_args(argv)
    return CommandLine(arguments.config, tuple(arguments.overrides), arguments.dry_run)


OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "batch_size": "data.global_batch_size",
    "num_workers": "data.workers",
}
"""What other programs call it, where the spelling alone would not tell."""

Check = Callable[[Config], Iterable[Problem]]


def load_config(command: CommandLine, checks: Sequence[Check] = ()) -> Config:
    """Read, merge and check a config. Raises ConfigError with all problems at once.

    `checks` find what contradicts what. They see a config in which a wrong value was replaced by its default, and
    what they say about such a key is left out, so that one mistake is reported once.
    """
    problems: list[Problem] = []
    texts = _read_yaml(command.config_path, problems) | _read_overrides(command.overrides, problems)
    values = {key: _interpret(text, FIELDS[key]) for key, text in texts.items()}
    try:
        config = Config.model_validate(_nest(values))
    except ValidationError as error:
        wrong = {_field_of(details["loc"]) for details in error.errors()}
        problems += [_describe_wrong_value(key, texts[key]) for key in texts if key in wrong]
        config = Config.model_validate(_nest({k: v for k, v in values.items() if k not in wrong}))
    known_wrong = {key for problem in problems for key in problem.keys}
    for check in (find_contradictions, *checks):
        problems += [p for p in check(config) if not known_wrong.intersection(p.keys)]
    if problems:
        raise ConfigError(problems)
    return config


class _TextLoader(yaml.BaseLoader):
    """Scalars stay text; a key that stands twice is an error instead of a silent last-one-wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} stands twice (line {node.start_mark.line + 1} and after)")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, problems: list[Problem]) -> dict[str, Any]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_TextLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error) if isinstance(error, yaml.YAMLError) else f"cannot be read ({error})"
        problems.append(Problem((), f"--config {path}: {reason}"))
        return {}
    if loaded in (None, ""):
        return {}
    if not isinstance(loaded, dict):
        problems.append(Problem((), f"--config {path}: holds no sections; accepted: {', '.join(SECTIONS)}, loss"))
        return {}
    texts: dict[str, Any] = {}
    for name, value in loaded.items():
        if name in SECTIONS and isinstance(value, dict):
            texts |= {f"{name}.{key}": text for key, text in value.items()}
        elif name in SECTIONS and value in (None, "", "null", "~"):
            continue
        elif name in SECTIONS:
            problems.append(Problem((name,), f"{name} = {value}: is a section; accepted: {_keys_of(name)}"))
        else:
            texts[str(name)] = value
    twice = [name for name in loaded if name in FIELDS and "." in name and _is_in_section(name, loaded)]
    problems += [Problem((name,), f"{name}: stands twice, in its section and by itself") for name in twice]
    return _only_known(texts, problems)


def _is_in_section(key: str, loaded: Mapping[str, Any]) -> bool:
    section, _, name = key.partition(".")
    content = loaded.get(section)
    return isinstance(content, dict) and name in content


def _read_overrides(overrides: Sequence[str], problems: list[Problem]) -> dict[str, Any]:
    texts: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(Problem((key,), f"{override}: is not key=value{_suggest_form(override)}"))
        elif key in SECTIONS:
            problems.append(Problem((key,), f"{override}: {key} is a section; accepted: {_keys_of(key)}"))
        else:
            texts[key] = text
    return _only_known(texts, problems)


def _only_known(texts: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    for key in texts.keys() - FIELDS.keys():
        problems.append(Problem((key,), f"{key} = {texts[key]}: unknown key{_nearest(key)}"))
    problems.sort(key=lambda problem: problem.keys)
    return {key: text for key, text in texts.items() if key in FIELDS}


def _suggest_form(argument: str) -> str:
    if argument.endswith((".yaml", ".yml")):
        return f"; did you mean --config {argument}?"
    return f"; did you mean {argument}=<value>?" if argument in FIELDS else _nearest(argument)


def _keys_of(section: str) -> str:
    return ", ".join(key for key in FIELDS if key.startswith(f"{section}."))


def _nearest(key: str) -> str:
    """`; did you mean ...?` by the whole dotted key, else by its last part (`epochs` -> `train.epochs`)."""
    last_parts = {known.rpartition(".")[2]: known for known in reversed(list(FIELDS))}
    section, _, last = key.rpartition(".")
    if last in OTHER_NAMES:
        return f"; did you mean {OTHER_NAMES[last]}?"
    by_last = difflib.get_close_matches(last, last_parts, n=1, cutoff=0.7)
    in_section = [known for known in FIELDS if known.startswith(f"{section}.")]
    near = difflib.get_close_matches(key, in_section, n=1, cutoff=0.7) or [last_parts[m] for m in by_last]
    near = near or difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.0)
    return f"; did you mean {near[0]}?"


def _options(field: FieldInfo) -> tuple[Any, ...]:
    """The members of a union type, or the type alone."""
    annotation = field.annotation
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _interpret(text: Any, field: FieldInfo) -> Any:
    """Text as YAML or the command line gave it -> what pydantic reads by the key's declared type."""
    options = _options(field)
    if NoneType in options and text in (None, "", "null", "~"):
        return None
    if any(get_origin(option) is tuple for option in options) and isinstance(text, str):
        return _read_list(text)
    return text


def _read_list(text: str) -> list[Any]:
    """`[0.5, 0.4]` as YAML has it; anything else is a list of one, which the type then accepts or refuses."""
    try:
        listed = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        return [text]
    return listed if isinstance(listed, list) else [text]


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[key] = value
    return nested


def _field_of(location: tuple[int | str, ...]) -> str:
    """pydantic's location also names list positions and union members; the key is its longest known start."""
    dotted = ".".join(str(part) for part in location[:2])
    return dotted if dotted in FIELDS else str(location[0])


def _describe_wrong_value(key: str, text: Any) -> Problem:
    shown = text if isinstance(text, str) else json.dumps(text)
    return Problem((key,), f"{key} = {shown}: accepted: {describe_accepted(FIELDS[key])}")


def describe_accepted(field: FieldInfo) -> str:
    """What a key takes, in words: choices, or type and bounds."""
    words = [_describe_type(option) for option in _options(field) if option is not NoneType]
    bounds = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [
        f"{sign} {getattr(constraint, name):g}"
        for constraint in field.metadata
        for name, sign in bounds.items()
        if hasattr(constraint, name)
    ]
    words += [" and ".join(limits)] if limits else []
    longest = [constraint.max_length for constraint in field.metadata if hasattr(constraint, "max_length")]
    words += [f"of 1 to {longest[0]} characters"] if longest else []
    if any(getattr(constraint, "pattern", None) for constraint in field.metadata):
        words.append("of letters, digits, '.', '_' and '-', at most 128, not beginning with '.' or '-'")
    null = ", or null" if NoneType in _options(field) else ""
    return " ".join(words) + null


def _describe_type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "a list of numbers such as [0.5] or [0.5,0.5,0.5]"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
