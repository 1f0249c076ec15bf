"""The keys: that every one is documented, survives being written, and says whether a resumed run may change it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import Field, ValidationError

from pipeline.config import FIELDS, CommandLine, Config, load_config, may_change, schema
from pipeline.config.schema import field_of

ROOT = Path(__file__).parents[2]
DEFAULT = ROOT / "configs" / "default.yaml"
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
MAY_CHANGE = {
    *("run.name", "run.dir", "run.resume", "run.max_attempts"),
    *("data.root", "data.download", "data.eval_batch_size", "data.placement", "data.workers"),
    *("optim.lr", "optim.weight_decay", "optim.schedule", "optim.warmup", "optim.step_epochs", "optim.step_gamma"),
    *("train.epochs", "train.backend", "train.accumulate", "train.clip_norm", "train.compile", "train.cuda_graph"),
    *("train.compress", "train.deterministic", "train.max_nonfinite", "train.hang_timeout", "train.log_every"),
    *("train.profile", "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep", "checkpoint.keep_best"),
    *("tracking.enabled", "tracking.uri", "tracking.experiment", "tracking.register", "tracking.system_every"),
    "tracking.close_timeout",
}
UNLESS_REPRODUCIBLE = {"train.device", "train.precision", "train.channels_last", "train.threads", "train.virtual_ranks"}


def resolve(*overrides: str) -> Config:
    return load_config(CommandLine(DEFAULT, overrides, dry_run=False))


def resolve_file(path: Path, text: str) -> Config:
    path.write_text(text, encoding="utf-8")
    return load_config(CommandLine(path, (), dry_run=False))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def label(arguments: list[str]) -> str:
    return " ".join(arguments)[:50]


def test_the_keys_that_a_resumed_run_may_change_are_these_and_no_other() -> None:
    assert {key for key in FIELDS if may_change(key, reproducible=True)} == MAY_CHANGE
    assert {key for key in FIELDS if may_change(key, reproducible=False)} == MAY_CHANGE | UNLESS_REPRODUCIBLE


def test_a_key_whose_mark_was_forgotten_may_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "FIELDS", {**FIELDS, "train.new": Field(1, description="new")})
    assert not may_change("train.new", reproducible=False)
    assert not may_change("train.unheard_of", reproducible=False)


@pytest.mark.parametrize("key", ["data.arguments.size", "data.augment.crop", "model.arguments.a.b"])
def test_an_argument_inherits_the_mark_of_its_open_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not may_change(key, reproducible=False)
    open_key = ".".join(key.split(".")[:2])
    assert field_of(key) is FIELDS[open_key]
    monkeypatch.setattr(schema, "FIELDS", {**FIELDS, open_key: schema.free({}, "")})
    assert may_change(key, reproducible=True)


@pytest.mark.parametrize("key", ["size", "data.size", "data.argumentssize", "data", "run.name.x", ""])
def test_what_no_field_declares_is_no_key(key: str) -> None:
    assert field_of(key) is None


def test_a_flat_config_has_a_key_for_each_argument() -> None:
    config = resolve("data.arguments.train_size=64", "model.arguments.a.b=1", "data.augment.flip=true")
    flat = config.flat()
    assert flat.keys() - FIELDS.keys() == {"data.arguments.train_size", "model.arguments.a.b", "data.augment.flip"}
    assert FIELDS.keys() - flat.keys() == {"data.arguments", "data.augment", "model.arguments"}
    assert (flat["data.arguments.train_size"], config.get("data.arguments.train_size")) == (64, 64)
    assert all(config.get(key) == value for key, value in flat.items())


def keys_of_default_yaml() -> list[tuple[str, str]]:
    """(dotted key, the rest of its line) of each line that holds a key and its value."""
    section, found = "", []
    for line in DEFAULT.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        indent, name, rest = re.fullmatch(r"( *)(\w+):(.*)", line).groups()  # type: ignore[union-attr]
        section = section if indent else ""
        if rest.strip():
            found.append((f"{section}{name}", rest.strip()))
        else:
            section = f"{name}."
    return found


def test_default_yaml_states_every_key_once() -> None:
    assert sorted(key for key, _ in keys_of_default_yaml()) == sorted(FIELDS)


@pytest.mark.parametrize(
    ("key", "rest"),
    keys_of_default_yaml(),
)
def test_default_yaml_states_the_default_with_a_comment(key: str, rest: str) -> None:
    value, hash_sign, comment = rest.partition(" #")
    assert resolve(f"{key}={value.strip()}").get(key) == Config().get(key) == FIELDS[key].default
    assert hash_sign
    assert comment.strip()


def test_default_yaml_loads_as_the_defaults() -> None:
    assert resolve() == Config()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_survives_being_written(path: Path, recipe: Path) -> None:
    config = load_config(CommandLine(path, (), dry_run=False))
    assert resolve_file(recipe, config.to_yaml()) == config


@pytest.mark.parametrize(
    "settings",
    [
        ["run.name=2026-11-21"],
        ["run.name=no", "run.dir=null", "tracking.experiment=~"],
        ["run.name=1e-3", "tracking.experiment=[a, b]: c # d"],
        ["tracking.experiment=Größe\t\n ", "run.dir= spaces "],
        ["optim.lr=1e-300", "optim.weight_decay=1e-05", "run.seed=9223372036854775807"],
        ["optim.lr=0.1234567890123456789", "tracking.close_timeout=1e22"],
        ["data.mean=[0.1,1e-9,3]", "data.std=[1e-3,2,0.30000000000000004]"],
        ["data.arguments.a=64", "data.arguments.b=007", "data.arguments.c=1e-3", "data.arguments.d=null"],
        ["model.arguments.a=1.0e-05", "model.arguments.b=[1, 2]", "model.arguments.c=", "model.arguments.d=~"],
        ["model.arguments={a: {b: [1, 2e3, x]}, c: '7', d: 2026-11-21, e: yes, f: true}", "data.augment={flip: true}"],
        ["tracking.uri=sqlite:////tmp/a b.db?x=#1", "train.threads=3", "data.download=false"],
    ],
    ids=label,
)
def test_a_resolved_config_survives_being_written(settings: list[str], recipe: Path) -> None:
    config = resolve(*settings)
    assert config != Config()
    assert resolve_file(recipe, config.to_yaml()) == config
    content = yaml.safe_load(config.to_yaml())  # as the run folder reads it
    assert content.pop("format") == schema.FORMAT
    assert Config.model_validate(content) == config


def test_a_written_config_begins_with_its_format() -> None:
    assert Config().to_yaml().startswith("format: 2\nrun:\n")


@pytest.mark.parametrize("key", FIELDS)
def test_a_config_is_frozen(key: str) -> None:
    config = Config()
    section, _, name = key.rpartition(".")
    owner = config.get(section) if section else config
    with pytest.raises(ValidationError, match="frozen"):
        setattr(owner, name, FIELDS[key].default)
