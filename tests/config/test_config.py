"""The config: what is refused and how, precedence and types, and that the recipes are what they say."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from pipeline.base.launch import Launch
from pipeline.config import FIELDS, CommandLine, Config, ConfigError, load_config, parse_command_line
from pipeline.run.folder import RunFolder
from train.checks import find_contradictions
from train.main import ROOT, main

DEFAULT = ROOT / "configs" / "default.yaml"
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torch's, under captured stderr


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder on a machine without GPUs; files for the test go beside it."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    logger = logging.getLogger("convoy")
    before = logger.handlers, logger.level, logger.propagate
    yield folder
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def resolve(*overrides: str) -> Config:
    return load_config(CommandLine(DEFAULT, overrides, dry_run=False))


def resolve_file(path: Path, text: str, *overrides: str) -> Config:
    path.write_text(text, encoding="utf-8")
    return load_config(CommandLine(path, overrides, dry_run=False))


# What is wrong, and what the one error about it has to say: key and value, what is accepted, or the nearest key.
WRONG_COMMAND_LINES = [
    # types and ranges
    (["train.epochs=0"], ["train.epochs = 0", "a whole number >= 1"]),
    (["train.epochs=-3"], ["train.epochs = -3", "a whole number >= 1"]),
    (["train.epochs="], ["train.epochs = ", "a whole number >= 1"]),
    (["train.epochs=null"], ["train.epochs = null", "a whole number >= 1"]),
    (["train.epochs=ten"], ["train.epochs = ten", "a whole number >= 1"]),
    (["train.epochs=2.5"], ["train.epochs = 2.5", "a whole number >= 1"]),
    (["train.epochs=true"], ["train.epochs = true", "a whole number >= 1"]),
    (["train.epochs=inf"], ["train.epochs = inf", "a whole number >= 1"]),
    (["train.log_every=0"], ["train.log_every = 0", "a whole number >= 1"]),
    (["train.threads=0"], ["train.threads = 0", ">= 1 and <= 1024", "or null"]),
    (["train.threads=1025"], ["train.threads = 1025", ">= 1 and <= 1024", "or null"]),
    (["train.clip_norm=0"], ["train.clip_norm = 0", "a number > 0", "or null"]),
    (["train.hang_timeout=0.5"], ["train.hang_timeout = 0.5", "a number >= 1"]),
    (["train.accumulate=0"], ["train.accumulate = 0", "a whole number >= 1"]),
    (["data.global_batch_size=0"], ["data.global_batch_size = 0", "a whole number >= 1"]),
    (["data.eval_batch_size=1.5"], ["data.eval_batch_size = 1.5", "a whole number >= 1"]),
    (["data.workers=-1"], ["data.workers = -1", ">= 0 and <= 256"]),
    (["data.image_size=3"], ["data.image_size = 3", ">= 4 and <= 1024", "or null"]),
    (["data.synthetic_classes=1"], ["data.synthetic_classes = 1", ">= 2"]),
    (["data.download=maybe"], ["data.download = maybe", "true or false"]),
    (["run.seed=-1"], ["run.seed = -1", "a whole number >= 0"]),
    (["run.seed=9223372036854775808"], ["run.seed = 9223372036854775808", "a whole number >= 0"]),
    (["run.dir="], ["run.dir = ", "text"]),
    (["checkpoint.keep=0"], ["checkpoint.keep = 0", "a whole number >= 1"]),
    (["checkpoint.keep_best=-1"], ["checkpoint.keep_best = -1", "a whole number >= 0"]),
    (["checkpoint.every_steps=0"], ["checkpoint.every_steps = 0", "a whole number >= 1", "or null"]),
    (["tracking.close_timeout=-1"], ["tracking.close_timeout = -1", "a number >= 0"]),
    (["tracking.enabled=2"], ["tracking.enabled = 2", "true or false"]),
    (["tracking.experiment="], ["tracking.experiment = ", "text"]),
    (["tracking.experiment=" + "x" * 251], ["tracking.experiment = xxx", "text"]),
    (["model.dropout=1"], ["model.dropout = 1", ">= 0 and < 1", "or null"]),
    (["model.dropout2d=-0.1"], ["model.dropout2d = -0.1", ">= 0 and < 1", "or null"]),
    (["optim.momentum=1"], ["optim.momentum = 1", ">= 0 and < 1"]),
    (["optim.weight_decay=-1e-4"], ["optim.weight_decay = -1e-4", "a number >= 0"]),
    (["optim.step_gamma=1.1"], ["optim.step_gamma = 1.1", "> 0 and <= 1"]),
    (["optim.warmup=1.5"], ["optim.warmup = 1.5", "a whole number >= 0"]),
    (["optim.lr=0"], ["optim.lr = 0", "a number > 0"]),
    (["optim.lr=0,1"], ["optim.lr = 0,1", "a number > 0"]),
    (["optim.lr=fast"], ["optim.lr = fast", "a number > 0"]),
    (["optim.lr=nan"], ["optim.lr = nan", "a number > 0"]),
    (["optim.lr=inf"], ["optim.lr = inf", "a number > 0"]),
    (["optim.lr=-inf"], ["optim.lr = -inf", "a number > 0"]),
    (["optim.lr=1e400"], ["optim.lr = 1e400", "a number > 0"]),
    # choices
    (["run.resume=yes"], ["run.resume = yes", "auto | never | must"]),
    (["data.dataset=MNIST"], ["data.dataset = MNIST", "digits | mnist | fashion_mnist | kmnist | cifar10 | synthetic"]),
    (["data.placement=gpu"], ["data.placement = gpu", "auto | device | workers"]),
    (["model.name=resnet18"], ["model.name = resnet18", "convnet | lenet_3x3 | lenet_5x5 | net_conv10_20"]),
    (["loss=hinge"], ["loss = hinge", "nll | cross_entropy | mse"]),
    (["loss=null"], ["loss = null", "nll | cross_entropy | mse"]),
    (["optim.name=Adam"], ["optim.name = Adam", "sgd | adam | adamw | rmsprop | adadelta"]),
    (["optim.schedule=linear"], ["optim.schedule = linear", "constant | step | cosine | one_cycle"]),
    (["train.device=gpu"], ["train.device = gpu", "auto | cpu | cuda"]),
    (["train.backend=mpi"], ["train.backend = mpi", "auto | gloo | nccl"]),
    (["train.precision=fp8"], ["train.precision = fp8", "auto | fp32 | bf16 | fp16 | fp64"]),
    (["checkpoint.metric=eval/f1"], ["checkpoint.metric = eval/f1", "eval/accuracy | eval/loss"]),
    # lists
    (["data.mean=0.5,0.5"], ["data.mean = 0.5,0.5", "a list of numbers"]),
    (["data.mean=[a]"], ["data.mean = [a]", "a list of numbers"]),
    (["data.mean=[0.5"], ["data.mean = [0.5", "a list of numbers"]),
    (["data.std=[nan]"], ["data.std = [nan]", "a list of numbers"]),
    (["data.std=[inf]"], ["data.std = [inf]", "a list of numbers"]),
    (["data.mean=[[0.5]]"], ["data.mean = [[0.5]]", "a list of numbers"]),
    (["data.mean=[0.5]]"], ["data.mean = [0.5]]", "a list of numbers"]),
    (["data.mean=[[0.5]"], ["data.mean = [[0.5]", "a list of numbers"]),
    (["data.mean=[}]"], ["data.mean = [}]", "a list of numbers"]),
    # names of runs
    (["run.name=a/b"], ["run.name = a/b", "letters, digits, '.', '_' and '-'"]),
    (["run.name=/tmp/a"], ["run.name = /tmp/a", "letters, digits"]),
    (["run.name=.."], ["run.name = ..", "not beginning with"]),
    (["run.name=."], ["run.name = .", "not beginning with"]),
    (["run.name=.hidden"], ["run.name = .hidden", "not beginning with"]),
    (["run.name=-a"], ["run.name = -a", "not beginning with"]),
    (["run.name=a b"], ["run.name = a b", "letters, digits"]),
    (["run.name=größe"], ["run.name = größe", "letters, digits"]),
    (["run.name=a\n"], ["run.name = a", "letters, digits"]),
    (["run.name=" + "a" * 129], ["run.name = aaa", "at most 128"]),
    # keys and options that do not exist
    (["train.epoch=3"], ["train.epoch = 3", "did you mean train.epochs?"]),
    (["train.epochss=3"], ["train.epochss = 3", "did you mean train.epochs?"]),
    (["epochs=3"], ["epochs = 3", "did you mean train.epochs?"]),
    (["lr=3"], ["lr = 3", "did you mean optim.lr?"]),
    (["optimizer.lr=3"], ["optimizer.lr = 3", "did you mean optim.lr?"]),
    (["optim.learningrate=3"], ["optim.learningrate = 3", "unknown key"]),
    (["model.nmae=convnet"], ["model.nmae = convnet", "did you mean model.name?"]),
    (["data.globalbatchsize=8"], ["data.globalbatchsize = 8", "did you mean data.global_batch_size?"]),
    (["data.image-size=32"], ["data.image-size = 32", "did you mean data.image_size?"]),
    (["TRAIN.EPOCHS=3"], ["TRAIN.EPOCHS = 3", "unknown key"]),
    (["losses=nll"], ["losses = nll", "did you mean loss?"]),
    (["run.name.x=3"], ["run.name.x = 3", "did you mean run.name?"]),
    (["=3"], ["unknown key"]),
    (["train.epochs"], ["train.epochs: is not key=value", "did you mean train.epochs=<value>?"]),
    (["configs/mnist.yaml"], ["configs/mnist.yaml: is not key=value", "did you mean --config configs/mnist.yaml?"]),
    (["mnist"], ["mnist: is not key=value"]),
    (["optim=sgd"], ["optim=sgd", "is a section", "optim.name, optim.lr, optim.momentum"]),
    (["--epochs", "--dry-run"], ["--epochs", "[--config PATH] [--dry-run] [key=value ...]"]),
    (["--conf=x"], ["--conf=x", "[--config PATH]"]),
    (["-x"], ["-x", "[--config PATH]"]),
    (["--config"], ["--config", "[--config PATH]"]),
    (["--dry-run=yes"], ["--dry-run", "'yes'", "[--config PATH]"]),
    # tracking.uri
    (
        ["tracking.uri=http://user:secret@host"],
        ["tracking.uri", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"],
    ),
    (["tracking.uri=https://token@host"], ["tracking.uri", "MLFLOW_TRACKING_USERNAME"]),
    (["tracking.uri=postgresql://u:secret@host/db"], ["tracking.uri", "MLFLOW_TRACKING_URI"]),
    (["tracking.uri=ftp://host"], ["tracking.uri = ftp://host", "http, https, sqlite"]),
    (["tracking.uri=file:///tmp/mlruns"], ["tracking.uri = file:///tmp/mlruns", "http, https, sqlite"]),
    (["tracking.uri=./mlruns"], ["tracking.uri = ./mlruns", "http, https, sqlite"]),
    (["tracking.uri=localhost:5000"], ["tracking.uri = localhost:5000", "http, https, sqlite"]),
    pytest.param(
        ["tracking.uri=http://[::1"],
        ["tracking.uri = http://[::1"],
    ),
    # contradictions
    (["loss=mse"], ["loss = mse", "model.name=convnet", "use loss=nll"]),
    (["model.name=lenet_5x5"], ["loss = nll", "model.name=lenet_5x5", "use loss=cross_entropy or loss=mse"]),
    (["optim.nesterov=true"], ["optim.nesterov = true", "optim.name=sgd and optim.momentum > 0"]),
    (["optim.nesterov=true", "optim.name=sgd"], ["optim.nesterov = true", "optim.momentum=0"]),
    (["optim.momentum=0.9", "optim.name=adam"], ["optim.momentum = 0.9", "adam has none", "sgd and rmsprop"]),
    (["train.accumulate=33"], ["train.accumulate = 33", "the 32 samples of data.global_batch_size"]),
    (["data.mean=[0.5]"], ["data.mean and data.std", "set both, or neither"]),
    (["data.std=0.5"], ["data.mean and data.std", "set both, or neither"]),
    (["data.mean=0.5", "data.std=0"], ["data.std = [0.0]", "numbers > 0"]),
    (["data.mean=0.5", "data.std=-1"], ["data.std = [-1.0]", "numbers > 0"]),
    (["model.dropout=0.1", "model.name=net_conv10_20"], ["model.dropout = 0.1", "net_conv10_20 has none", "null"]),
    (
        ["model.dropout2d=0.1", "model.name=lenet_3x3", "loss=mse"],
        ["model.dropout2d = 0.1", "lenet_3x3 has none", "null"],
    ),
    (["data.image_size=5"], ["data.image_size = 5", "too small for convnet", ">= 6"]),
    (["data.image_size=15", "model.name=net_conv10_20"], ["data.image_size = 15", "too small", ">= 16"]),
    (["optim.warmup=900"], ["optim.warmup = 900", "< 900"]),  # 20 epochs of ceil(1437 / 32) = 45 steps
    (["optim.warmup=45", "train.epochs=1"], ["optim.warmup = 45", "< 45"]),
    (["train.backend=nccl", "train.device=cpu"], ["train.backend = nccl", "GPUs only", "gloo"]),
    (["train.backend=nccl"], ["train.backend = nccl", "torch sees none"]),
    (["train.precision=fp16", "train.device=cpu"], ["train.precision = fp16", "needs a GPU", "bf16 or fp32"]),
    (["train.precision=fp16"], ["train.precision = fp16", "torch sees none"]),
    (["train.device=cuda"], ["train.device = cuda", "torch sees no GPU", "train.device=cpu or auto"]),
]
WRONG_FILES = [
    ("train: {epochs: 0}", ["train.epochs = 0", "a whole number >= 1"]),
    ("train: {epochs: }", ["train.epochs = ", "a whole number >= 1"]),
    ("train:\n  epochs: 3 4\n", ["train.epochs = 3 4", "a whole number >= 1"]),
    ("optim: {lr: .nan}", ["optim.lr = .nan", "a number > 0"]),
    ("optim: {lr: [1]}", ['optim.lr = ["1"]', "a number > 0"]),
    ("optim: {lr: {value: 1}}", ['optim.lr = {"value": "1"}', "a number > 0"]),
    ("data: {mean: {red: 1}, std: 1}", ['data.mean = {"red": "1"}', "a list of numbers"]),
    ("data: {mean: [0.5], std: [[1]]}", ['data.std = [["1"]]', "a list of numbers"]),
    ("run: {name: ../escape}", ["run.name = ../escape", "letters, digits"]),
    ("run: {name: [a]}", ['run.name = ["a"]', "letters, digits"]),
    ("loss: [nll]", ['loss = ["nll"]', "nll | cross_entropy | mse"]),
    ("loss: {name: nll}", ['loss = {"name": "nll"}', "nll | cross_entropy | mse"]),
    ("loss:", ["loss = ", "nll | cross_entropy | mse"]),
    ("train: 3", ["train = 3", "is a section", "train.epochs, train.device"]),
    ("optim: sgd", ["optim = sgd", "is a section", "optim.name, optim.lr"]),
    ("run: [a, b]", ["run = ['a', 'b']", "is a section", "run.name, run.dir, run.seed, run.resume"]),
    ("train: {epoch: 3}", ["train.epoch = 3", "did you mean train.epochs?"]),
    ("trian: {epochs: 3}", ["trian = ", "did you mean train.epochs?"]),
    ("epochs: 3", ["epochs = 3", "did you mean train.epochs?"]),
    ("optim: {1: 2}", ["optim.1 = 2", "unknown key"]),
    ("just a text", ["holds no sections", "run, data, model, optim, train, checkpoint, tracking, loss"]),
    ("- train", ["holds no sections", "run, data, model"]),
    ("train: {epochs: 3", ["line 1"]),
    ("train:\n\tepochs: 3", ["line 2"]),
    ("train: {epochs: 3}\n---\noptim: {lr: 1}", ["single document", "line 2"]),
    ("? [a, b]\n: c", ["unhashable key", "line 1"]),
    ("optim: {lr: &a [*a]}", ["recursive", "line 1"]),
    ("train:\n  epochs: 3\n  epochs: 4\n", ["key 'epochs' stands twice", "line 2"]),
    ("train: {epochs: 3}\noptim: {lr: 1}\ntrain: {accumulate: 2}\n", ["key 'train' stands twice"]),
]


def label(arguments: list[str]) -> str:
    return " ".join(arguments)[:50]


def assert_refused(
    arguments: list[str], parts: list[str], cwd: Path, capsys: pytest.CaptureFixture[str], num_errors: int = 1
) -> None:
    code = main(arguments)
    output = capsys.readouterr()
    assert code == 2
    counted = "1 error" if num_errors == 1 else f"{num_errors} errors"
    assert f": the configuration has {counted}; nothing was started.\n  " in output.err
    assert [part for part in parts if part not in output.err] == []
    assert "Traceback" not in output.err
    assert output.out == ""
    assert list(cwd.iterdir()) == []


@pytest.mark.parametrize(("arguments", "parts"), WRONG_COMMAND_LINES, ids=lambda v: label(v))
def test_a_wrong_command_line_ends_with_code_2_and_names_the_key(
    arguments: list[str], parts: list[str], cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(arguments, parts, cwd, capsys)


@pytest.mark.parametrize(("text", "parts"), WRONG_FILES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_wrong_file_ends_with_code_2_and_names_the_key(
    text: str, parts: list[str], recipe: Path, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(text)
    assert_refused(["--config", str(recipe)], parts, cwd, capsys)


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, recipe: Path, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.yaml"
    assert_refused(["--config", str(missing)], [f"--config {missing}", "No such file"], cwd, capsys)
    assert_refused(["--config", str(tmp_path)], [f"--config {tmp_path}", "directory"], cwd, capsys)
    recipe.write_bytes(b"run: {name: \xff}")
    assert_refused(["--config", str(recipe)], [f"--config {recipe}", "cannot be read"], cwd, capsys)


def test_a_password_in_the_uri_is_not_shown(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tracking.uri=http://user:hunter2@host"]) == 2
    assert "hunter2" not in capsys.readouterr().err


@pytest.mark.parametrize("key", ["data.mean", "data.std"])
def test_an_empty_list_is_refused(key: str, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data.mean=0.5", "data.std=0.5", f"{key}=[]"]
    assert_refused([*arguments, "--dry-run"], [f"{key} = []"], cwd, capsys)


def test_a_key_in_its_section_and_dotted_besides_stands_twice(
    recipe: Path, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text("optim: {lr: 0.1}\noptim.lr: 0.2\n")
    assert_refused(["--config", str(recipe), "--dry-run"], ["optim.lr", "twice"], cwd, capsys)


def test_all_errors_are_reported_at_once(recipe: Path, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text("checkpoint: 3\ndata: {worker: 1, workers: many}\n")
    arguments = ["--config", str(recipe), "train.epochs=0", "optim.momentum=0.5", "optim.lrr=1", "mnist", "loss=mse"]
    parts = [
        "checkpoint = 3: is a section",
        "data.worker = 1: unknown key; did you mean data.workers?",
        "data.workers = many: accepted",
        "train.epochs = 0: accepted",
        "optim.momentum = 0.5: adadelta has none",
        "optim.lrr = 1: unknown key; did you mean optim.lr?",
        "mnist: is not key=value",
        "loss = mse: does not fit",
    ]
    assert_refused(arguments, parts, cwd, capsys, num_errors=len(parts))


def test_a_broken_file_does_not_hide_the_errors_of_the_command_line(
    recipe: Path, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text("run: {")
    arguments = ["--config", str(recipe), "train.epochs=0"]
    assert_refused(arguments, [f"--config {recipe}", "train.epochs = 0"], cwd, capsys, num_errors=2)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["optim.name=lion", "optim.momentum=0.9"], "optim.name"),  # adadelta, the default, has no momentum
        (["optim.momentum=lots", "optim.name=sgd", "optim.nesterov=true"], "optim.momentum"),
        (["loss=hinge", "model.name=lenet_3x3"], "loss"),
        (["model.name=vgg", "loss=mse"], "model.name"),
        (["model.name=vgg", "loss=mse", "data.image_size=5"], "model.name"),
        (["data.dataset=imagenet", "data.mean=[0.5,0.5,0.5]", "data.std=[1,1,1]"], "data.dataset"),
        (["data.mean=[x]", "data.std=1"], "data.mean"),
        (["train.epochs=none", "optim.warmup=100000"], "train.epochs"),
        (["data.global_batch_size=big", "train.accumulate=64"], "data.global_batch_size"),
        (["train.device=tpu", "train.precision=fp16"], "train.device"),
        (["train.device=tpu", "train.backend=nccl"], "train.device"),
    ],
    ids=lambda v: label(v) if isinstance(v, list) else v,
)
def test_a_wrong_value_is_not_also_reported_as_a_contradiction(
    arguments: list[str], key: str, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(arguments, [f"\n  {key} = "], cwd, capsys)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(recipe: Path) -> None:
    text = "train: {epochs: 3, log_every: 7}\nloss: mse\nmodel: {name: lenet_3x3}\n"
    config = resolve_file(recipe, text, "train.epochs=5", "loss=cross_entropy")
    assert (config.train.epochs, config.loss) == (5, "cross_entropy")
    assert (config.train.log_every, config.model.name) == (7, "lenet_3x3")
    changed = {key for key, value in config.flat().items() if value != Config().get(key)}
    assert changed == {"train.epochs", "train.log_every", "loss", "model.name"}


def test_an_override_of_one_key_leaves_the_rest_of_its_section_as_in_the_file(recipe: Path) -> None:
    config = resolve_file(recipe, "optim: {name: sgd, lr: 0.1, momentum: 0.9}", "optim.lr=0.2")
    assert (config.optim.name, config.optim.lr, config.optim.momentum) == ("sgd", 0.2, 0.9)


def test_null_on_the_command_line_takes_back_what_the_file_set(recipe: Path) -> None:
    assert resolve_file(recipe, "train: {clip_norm: 1}", "train.clip_norm=null").train.clip_norm is None


@pytest.mark.parametrize("text", ["", "# only a comment\n", "run:\n", "run: null\ntrain: ~\n", "{}", "run: {}"])
def test_a_file_that_sets_nothing_gives_the_defaults(text: str, recipe: Path) -> None:
    assert resolve_file(recipe, text) == Config()


READINGS: list[tuple[str, str, Any]] = [
    ("run.name", "2026-11-21", "2026-11-21"),
    ("run.name", "no", "no"),
    ("run.name", "007", "007"),
    ("run.name", "1e-3", "1e-3"),
    ("run.name", "null", None),
    ("run.name", "", None),
    ("run.name", "~", None),
    ("tracking.experiment", "1e-3", "1e-3"),
    ("tracking.experiment", "yes", "yes"),
    ("tracking.uri", "null", None),
    ("optim.lr", "1e-3", 0.001),
    ("optim.lr", "1E-3", 0.001),
    ("optim.lr", "2", 2.0),
    ("optim.lr", ".5", 0.5),
    ("train.epochs", "012", 12),
    ("train.clip_norm", "null", None),
    ("train.clip_norm", "1", 1.0),
    ("train.threads", "", None),
    ("data.image_size", "32", 32),
    ("data.image_size", "null", None),
    ("data.download", "false", False),
    ("data.download", "no", False),
    ("data.mean", "0.5", (0.5,)),
    ("data.mean", "[0.5]", (0.5,)),
    ("data.mean", "[0.5, 1e-3,2]", (0.5, 0.001, 2.0)),
    ("data.mean", "null", None),
    ("checkpoint.every_steps", "null", None),
]


@pytest.mark.parametrize(("key", "text", "expected"), READINGS)
def test_a_value_is_read_by_the_type_of_its_key(key: str, text: str, expected: object, recipe: Path) -> None:
    both = ("data.std=1",) if key == "data.mean" and expected else ()
    section, name = key.split(".")
    from_command_line = resolve(f"{key}={text}", *both).get(key)
    from_file = resolve_file(recipe, f"{section}:\n  {name}: {text}\n", *both).get(key)
    assert (from_command_line, type(from_command_line)) == (expected, type(expected))
    assert (from_file, type(from_file)) == (expected, type(expected))


def test_a_value_may_contain_an_equals_sign() -> None:
    assert resolve("tracking.uri=https://host/?a=b").tracking.uri == "https://host/?a=b"


def test_options_may_stand_between_the_settings(recipe: Path) -> None:
    command = parse_command_line(["optim.lr=1", "--dry-run", "loss=nll", "--config", str(recipe)], DEFAULT)
    assert command == CommandLine(recipe, ("optim.lr=1", "loss=nll"), dry_run=True)


def test_without_config_the_default_file_is_read() -> None:
    assert parse_command_line([], DEFAULT) == CommandLine(DEFAULT, (), dry_run=False)


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
def test_every_recipe_loads_without_a_problem_and_survives_being_written(path: Path, recipe: Path) -> None:
    config = load_config(CommandLine(path, (), dry_run=False))
    assert list(find_contradictions(config, Launch())) == []
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
        ["tracking.uri=sqlite:////tmp/a b.db?x=#1", "train.threads=3", "data.download=false"],
    ],
    ids=label,
)
def test_a_resolved_config_survives_being_written(settings: list[str], recipe: Path) -> None:
    config = resolve(*settings)
    assert config != Config()
    assert resolve_file(recipe, config.to_yaml()) == config
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config  # as the run folder reads it


@pytest.mark.parametrize("key", FIELDS)
def test_a_config_is_frozen(key: str) -> None:
    config = Config()
    section, _, name = key.rpartition(".")
    owner = config.get(section) if section else config
    with pytest.raises(ValidationError, match="frozen"):
        setattr(owner, name, FIELDS[key].default)


def test_a_config_error_carries_the_keys_that_take_part() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("optim.nesterov=true")
    assert [problem.keys for problem in caught.value.problems] == [("optim.nesterov", "optim.name", "optim.momentum")]


def layer_table(text: str) -> list[tuple[str, str, str, int]]:
    rows = re.findall(r"^  (\w+) +(\w+) +([\dx]+) +([\d,]+)$", text, re.MULTILINE)
    return [(name, kind, shape, int(count.replace(",", ""))) for name, kind, shape, count in rows]


def test_a_dry_run_prints_the_plan_and_creates_nothing(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith(Config().to_yaml())
    assert layer_table(output.out) == [
        ("conv1", "Conv2d", "16x26x26", 160),
        ("relu1", "ReLU", "16x26x26", 0),
        ("conv2", "Conv2d", "32x24x24", 4640),
        ("pool", "MaxPool2d", "32x12x12", 0),
        ("relu2", "ReLU", "32x12x12", 0),
        ("dropout2d", "Dropout2d", "32x12x12", 0),
        ("flatten", "Flatten", "4608", 0),
        ("fc1", "Linear", "64", 294_976),
        ("relu3", "ReLU", "64", 0),
        ("dropout", "Dropout", "64", 0),
        ("fc2", "Linear", "10", 650),
        ("log_softmax", "LogSoftmax", "10", 0),
    ]
    assert re.search(r"total +300,426$", output.out, re.MULTILINE)
    assert "1,437 training and 360 evaluation images of 1x28x28 in 10 classes" in output.out
    assert "steps: 45 an epoch of 32 images each, 900 in all" in output.out
    assert "ranks: 1, each on cpu in fp32" in output.out
    assert f"run folder: {cwd}/runs/default-<date>-<time>" in output.out
    assert list(cwd.iterdir()) == []


def test_a_dry_run_follows_the_settings(
    cwd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(ROOT / "configs" / "mnist_lenet_5x5.yaml")
    settings = ["run.dir=elsewhere", "data.global_batch_size=7", "train.epochs=2", "train.precision=bf16"]
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert main(["--config", recipe, "--dry-run", *settings]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out.split("network:")[0])["data"]["global_batch_size"] == 7
    assert "network: lenet_5x5" in out
    assert ("conv1", "Conv2d", "6x28x28", 156) in layer_table(out)
    assert re.search(r"total +61,706$", out, re.MULTILINE)
    assert "60,000 training and 10,000 evaluation images of 1x32x32" in out
    assert "steps: 8,572 an epoch of 7 images each, 17,144 in all" in out
    assert "on cpu in bf16" in out
    assert f"run folder: {cwd}/elsewhere/slurm-17\nrun: new\n" in out
    assert "not in data yet, will be downloaded" in out
    assert main(["--dry-run", "run.name=mine"]) == 0
    assert f"run folder: {cwd}/runs/mine\n" in capsys.readouterr().out
    assert list(cwd.iterdir()) == []


def test_a_dry_run_refuses_what_a_training_would(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data that is not there, another training's folder, nothing to resume; it writes nothing."""
    assert main(["--dry-run", "data.dataset=kmnist", "data.download=false"]) == 1
    assert "lacks train-images-idx3-ubyte" in capsys.readouterr().err
    assert main(["--dry-run", "run.name=mine", "run.resume=must"]) == 1
    assert "no usable checkpoint" in capsys.readouterr().err
    assert list(cwd.iterdir()) == []
    folder = RunFolder(cwd / "runs" / "mine")
    folder.path.mkdir(parents=True)
    folder.config.write_text(resolve("run.seed=1").to_yaml())
    folder.journal.touch()
    assert main(["--dry-run", "run.name=mine"]) == 1
    assert "run.seed was 1, is 0" in capsys.readouterr().err
    assert main(["--dry-run", "run.name=mine", "run.seed=1"]) == 0
    assert "run: new, continues behind step 0" in capsys.readouterr().out
    folder.update_status(state="running", epoch=3)
    assert main(["--dry-run", "run.name=mine", "run.seed=1", "optim.lr=0.5"]) == 0
    out = capsys.readouterr().out
    assert "run: killed, continues behind step 0" in out
    assert "from here on with optim.lr=0.5, which was 1.0" in out
    folder.update_status(state="finished", epoch=20)
    assert main(["--dry-run", "run.name=mine", "run.seed=1"]) == 0
    assert "run: finished, and left as it is" in capsys.readouterr().out


def test_a_dry_run_finds_what_is_wrong(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(["--dry-run", "train.epochs=0"], ["train.epochs = 0"], cwd, capsys)
