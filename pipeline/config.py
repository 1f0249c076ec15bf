"""Every setting of a run: its type, unit, default and check.

Precedence is defaults < YAML file < ``key=value`` on the command line. YAML scalars are kept as text and read by
the declared type of their key, so that ``run.name=2026-11-21`` stays a name and ``1e-3`` is a number wherever
it is written.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class RunConfig(Section):
    name: str | None = Field(
        None,
        pattern=f"^{NAME_PATTERN.pattern}$",
        description="folder of the run; null: Slurm's job id, else config name and time (always a new run)",
    )
    dir: str = Field("runs", min_length=1, description="folder in which run folders are made")
    seed: int = Field(0, ge=0, lt=2**63, description="fixes initial weights, order of samples and dropout")
    resume: Literal["auto", "never", "must"] = Field(
        "auto",
        description="auto: continue the named run's last checkpoint if there is one; never: refuse an existing "
        "folder; must: fail without a checkpoint",
    )


class DataConfig(Section):
    dataset: Literal["digits", "mnist", "fashion_mnist", "kmnist", "cifar10", "synthetic"] = Field(
        "digits", description="digits needs no download; synthetic is for benchmarks and tests"
    )
    root: str = Field("data", min_length=1, description="folder that holds the datasets, in torchvision's layout")
    download: bool = Field(True, description="fetch the dataset if it is not in data.root")
    image_size: int | None = Field(
        None, ge=4, le=1024, description="side in pixels to which images are resized; null: the dataset's own"
    )
    mean: tuple[float, ...] | None = Field(
        None, description="per channel, of pixels in [0, 1], subtracted; null: the dataset's own"
    )
    std: tuple[float, ...] | None = Field(
        None, description="per channel, of pixels in [0, 1], divided by; null: the dataset's own"
    )
    global_batch_size: int = Field(
        32, ge=1, description="samples per optimizer step, over all ranks and accumulation steps"
    )
    eval_batch_size: int = Field(
        500, ge=1, description="samples per rank in one evaluation forward pass; does not change the result"
    )
    placement: Literal["auto", "device", "workers"] = Field(
        "auto", description="device: uint8 images held on the rank's device; workers: streamed by DataLoader"
    )
    workers: int = Field(2, ge=0, le=256, description="DataLoader processes per rank, with placement=workers")
    synthetic_train_size: int = Field(4096, ge=1, description="training images of the synthetic dataset")
    synthetic_eval_size: int = Field(1024, ge=1, description="evaluation images of the synthetic dataset")
    synthetic_channels: int = Field(1, ge=1, le=64, description="channels of the synthetic images")
    synthetic_classes: int = Field(10, ge=2, le=10000, description="classes of the synthetic dataset")


class ModelConfig(Section):
    name: Literal["convnet", "lenet_3x3", "lenet_5x5", "net_conv10_20"] = Field(
        "convnet", description="the network; input channels, size and classes follow from the dataset"
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="probability of dropping a hidden unit; null: the network's own"
    )
    dropout2d: float | None = Field(
        None, ge=0, lt=1, description="probability of dropping a feature map; null: the network's own"
    )


class OptimConfig(Section):
    name: Literal["sgd", "adam", "adamw", "rmsprop", "adadelta"] = Field("adadelta", description="the optimizer")
    lr: float = Field(1.0, gt=0, description="highest learning rate; the schedule scales it")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd and rmsprop")
    nesterov: bool = Field(False, description="Nesterov's form of momentum, with sgd")
    weight_decay: float = Field(0.0, ge=0, description="decoupled with adamw, else added to the gradient")
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = Field(
        "cosine", description="learning rate over the optimizer steps"
    )
    warmup: int = Field(0, ge=0, description="optimizer steps of linear rise; with one_cycle 0 means 30% of all steps")
    step_epochs: int = Field(1, ge=1, description="epochs between two falls of schedule=step")
    step_gamma: float = Field(0.7, gt=0, le=1, description="factor of each fall of schedule=step")


class TrainConfig(Section):
    epochs: int = Field(20, ge=1, description="passes over the training data")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU per rank where torch sees one")
    backend: Literal["auto", "gloo", "nccl"] = Field("auto", description="auto: nccl on GPUs, gloo on CPUs")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = Field(
        "auto", description="auto: bf16 on GPUs that have it, else fp32; fp16 scales the loss; fp64 for checks"
    )
    accumulate: int = Field(1, ge=1, description="micro-batches per optimizer step; the global batch stays as set")
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm; null: no clipping")
    channels_last: bool = Field(True, description="memory format of images and weights")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads per rank; null: cores of the node / ranks of the node"
    )
    hang_timeout: float = Field(300.0, ge=1, description="seconds after which a collective that stands still fails")
    log_every: int = Field(10, ge=1, description="optimizer steps between two records of train/* and perf/*")


class CheckpointConfig(Section):
    every_steps: int | None = Field(
        None, ge=1, description="optimizer steps between checkpoints; null: at the end of each epoch only"
    )
    keep: int = Field(2, ge=1, description="most recent checkpoints kept")
    keep_best: int = Field(1, ge=0, description="best checkpoints kept besides")
    metric: Literal["eval/accuracy", "eval/loss"] = Field(
        "eval/accuracy", description="what makes a checkpoint, and model/best.pt, the best"
    )


class TrackingConfig(Section):
    enabled: bool = Field(True, description="false: only the journal is written; `sync` can publish it later")
    uri: str | None = Field(
        None, min_length=1, description="MLflow server or store; null: MLFLOW_TRACKING_URI, else ./mlflow.db"
    )
    experiment: str = Field("convoy", min_length=1, max_length=250, description="MLflow experiment of the run")
    close_timeout: float = Field(
        120.0, ge=0, description="seconds the command waits at its end for the rest to be published"
    )


class Config(Section):
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: Literal["nll", "cross_entropy", "mse"] = Field(
        "nll", description="nll takes log-probabilities; cross_entropy and mse (against one-hot) take scores"
    )
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value, in the order of declaration."""
        return {key: self.get(key) for key in FIELDS}

    def get(self, key: str) -> Any:
        value: Any = self
        for part in key.split("."):
            value = getattr(value, part)
        return value

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _collect_fields(section: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    fields: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            fields |= _collect_fields(field.annotation, f"{prefix}{name}.")
        else:
            fields[prefix + name] = field
    return fields


FIELDS: Mapping[str, FieldInfo] = _collect_fields(Config)
SECTIONS = tuple(dict.fromkeys(key.partition(".")[0] for key in FIELDS if "." in key))


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config; `keys` are all the settings that take part in it."""

    keys: tuple[str, ...]
    message: str


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


def find_contradictions(config: Config) -> Iterable[Problem]:
    """What no single key shows; what needs knowledge of datasets or networks is checked where that is known."""
    optim, data, train = config.optim, config.data, config.train
    if optim.nesterov and (optim.name != "sgd" or optim.momentum == 0):
        yield Problem(
            ("optim.nesterov", "optim.name", "optim.momentum"),
            f"optim.nesterov = true: needs optim.name=sgd and optim.momentum > 0, not optim.name={optim.name} with "
            f"optim.momentum={optim.momentum:g}",
        )
    if optim.momentum > 0 and optim.name not in ("sgd", "rmsprop"):
        yield Problem(
            ("optim.momentum", "optim.name"),
            f"optim.momentum = {optim.momentum:g}: {optim.name} has none; accepted with sgd and rmsprop, else 0",
        )
    if train.accumulate > data.global_batch_size:
        yield Problem(
            ("train.accumulate", "data.global_batch_size"),
            f"train.accumulate = {train.accumulate}: more micro-batches than the {data.global_batch_size} samples of "
            "data.global_batch_size",
        )
    if (data.mean is None) != (data.std is None):
        yield Problem(("data.mean", "data.std"), "data.mean and data.std: set both, or neither (the dataset's own)")
    if data.std is not None and min(data.std, default=1.0) <= 0:
        yield Problem(("data.std",), f"data.std = {list(data.std)}: accepted: numbers > 0")
    if train.backend == "nccl" and train.device == "cpu":
        yield Problem(("train.backend", "train.device"), "train.backend = nccl: works on GPUs only; use gloo")
    if train.precision == "fp16" and train.device == "cpu":
        yield Problem(("train.precision", "train.device"), "train.precision = fp16: needs a GPU; use bf16 or fp32")
    yield from _check_uri(config.tracking.uri)


def _check_uri(uri: str | None) -> Iterable[Problem]:
    schemes = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
    if uri is None:
        return
    parts = urlsplit(uri)
    if parts.password or parts.username:
        yield Problem(
            ("tracking.uri",),
            "tracking.uri: holds a user name or password, which would be written into the run folder; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or all of MLFLOW_TRACKING_URI) instead",
        )
    elif parts.scheme.partition("+")[0] not in schemes:
        yield Problem(("tracking.uri",), f"tracking.uri = {uri}: accepted: a URI that starts with {', '.join(schemes)}")


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
    return _only_known(texts, problems)


def _read_overrides(overrides: Sequence[str], problems: list[Problem]) -> dict[str, Any]:
    texts: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(Problem((key,), f"{override}: is not key=value{_nearest(key)}"))
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


def _keys_of(section: str) -> str:
    return ", ".join(key for key in FIELDS if key.startswith(f"{section}."))


def _nearest(key: str) -> str:
    """`; did you mean ...?` by the whole dotted key, else by its last part (`epochs` -> `train.epochs`)."""
    last_parts = {known.rpartition(".")[2]: known for known in reversed(list(FIELDS))}
    section, _, last = key.rpartition(".")
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
        listed = yaml.load(text, Loader=yaml.BaseLoader) if text.startswith("[") and text.endswith("]") else text
        return listed if isinstance(listed, list) else [text]
    return text


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
    if any(getattr(constraint, "pattern", None) for constraint in field.metadata):
        words.append("of letters, digits, '.', '_' and '-', at most 128, beginning with a letter or digit")
    null = ", or null" if NoneType in _options(field) else ""
    return " ".join(words) + null


def _describe_type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "a list of numbers such as [0.5] or [0.5,0.5,0.5]"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
