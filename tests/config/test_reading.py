"""Reading a config: what is refused and how, precedence and types."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.base.launch import Launch
from pipeline.checks import find_problems
from pipeline.config import CommandLine, Config, ConfigError, load_config, parse_command_line

DEFAULT = Path(__file__).parents[2] / "configs" / "default.yaml"


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder on a machine without GPUs; files for the test go beside it."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return folder


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
    (["data.dataset=synthetic", "data.arguments.classes=1"], ["data.arguments.classes = 1", ">= 2"]),
    (["data.download=maybe"], ["data.download = maybe", "true or false"]),
    (["run.seed=-1"], ["run.seed = -1", "a whole number >= 0"]),
    (["run.seed=9223372036854775808"], ["run.seed = 9223372036854775808", "a whole number >= 0"]),
    (["run.dir="], ["run.dir = ", "text"]),
    (["checkpoint.keep=0"], ["checkpoint.keep = 0", "a whole number >= 1"]),
    (["checkpoint.keep_best=-1"], ["checkpoint.keep_best = -1", "a whole number >= 0"]),
    (["checkpoint.every_steps=0"], ["checkpoint.every_steps = 0", "a whole number >= 1", "or null"]),
    (["tracking.close_timeout=-1"], ["tracking.close_timeout = -1", "a number >= 0"]),
    (["tracking.enabled=2"], ["tracking.enabled = 2", "true or false"]),
    (["tracking.experiment=" + "x" * 251], ["tracking.experiment = xxx", "text"]),
    (["model.arguments.dropout=1"], ["model.arguments.dropout = 1", "a number >= 0 and < 1"]),
    (["model.arguments.dropout2d=-0.1"], ["model.arguments.dropout2d = -0.1", "a number >= 0 and < 1"]),
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
    (["data.dataset=MNIST"], ["data.dataset = MNIST", "accepted: digits, mnist, fashion_mnist, kmnist, cifar10"]),
    (["data.placement=gpu"], ["data.placement = gpu", "auto | device | workers"]),
    (["model.name=resnet18"], ["model.name = resnet18", "accepted: convnet, lenet_3x3, lenet_5x5, net_conv10_20"]),
    (["loss=hinge"], ["loss = hinge", "nll | cross_entropy | mse"]),
    (["loss=null"], ["loss = null", "nll | cross_entropy | mse"]),
    (["optim.name=Adam"], ["optim.name = Adam", "sgd | adam | adamw | rmsprop | adadelta"]),
    (["optim.schedule=linear"], ["optim.schedule = linear", "constant | step | cosine | one_cycle"]),
    (["train.device=gpu"], ["train.device = gpu", "auto | cpu | cuda"]),
    (["train.backend=mpi"], ["train.backend = mpi", "auto | gloo | nccl"]),
    (["train.precision=fp8"], ["train.precision = fp8", "auto | fp32 | bf16 | fp16 | fp64"]),
    (["checkpoint.metric=eval/f1"], ["checkpoint.metric = eval/f1", "eval/accuracy | eval/loss"]),
    # lists
    (["data.mean=0.5,0.5"], ["data.mean = 0.5,0.5", "a list in brackets, each a number"]),
    (["data.mean=[a]"], ["data.mean = [a]", "a list in brackets, each a number"]),
    (["data.mean=[0.5"], ["data.mean = [0.5", "a list in brackets, each a number"]),
    (["data.std=[nan]"], ["data.std = [nan]", "a list in brackets, each a number"]),
    (["data.std=[inf]"], ["data.std = [inf]", "a list in brackets, each a number"]),
    (["data.mean=[[0.5]]"], ["data.mean = [[0.5]]", "a list in brackets, each a number"]),
    (["data.mean=[0.5]]"], ["data.mean = [0.5]]", "a list in brackets, each a number"]),
    (["data.mean=[[0.5]"], ["data.mean = [[0.5]", "a list in brackets, each a number"]),
    (["data.mean=[}]"], ["data.mean = [}]", "a list in brackets, each a number"]),
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
    (["optim=sgd"], ["optim = sgd", "is a section", "optim.name, optim.lr, optim.momentum"]),
    (["--epochs", "--dry-run"], ["--epochs", "[--config PATH] [--dry-run] [key=value ...]"]),
    (["--conf=x"], ["--conf=x", "[--config PATH]"]),
    (["-x"], ["-x", "[--config PATH]"]),
    (["--config"], ["--config", "[--config PATH]"]),
    (["--dry-run=yes"], ["--dry-run", "'yes'", "[--config PATH]"]),
    # keys of earlier versions
    (["data.synthetic_train_size=5"], ["data.synthetic_train_size = 5: is now data.arguments.train_size"]),
    (["data.synthetic_eval_size=5"], ["data.synthetic_eval_size = 5: is now data.arguments.validation_size"]),
    (["data.synthetic_channels=3"], ["data.synthetic_channels = 3: is now data.arguments.channels"]),
    (["data.synthetic_classes=3"], ["data.synthetic_classes = 3: is now data.arguments.classes"]),
    (["data.random_crop=4"], ["data.random_crop = 4: is now data.augment.crop"]),
    (["data.random_flip=true"], ["data.random_flip = true: is now data.augment.flip"]),
    (["model.dropout=0.1"], ["model.dropout = 0.1: is now model.arguments.dropout"]),
    (["model.dropout2d=0.1"], ["model.dropout2d = 0.1: is now model.arguments.dropout2d"]),
    (["train.virtual_shards=4"], ["train.virtual_shards = 4: is now train.virtual_ranks"]),
    # all arguments at once
    (["data.arguments=5"], ["data.arguments = 5", "names and their values"]),
    (["data.arguments=5", "data.arguments.size=20"], ["data.arguments = 5", "names and their values"]),
    (["model.arguments=[0.5]"], ['model.arguments = ["0.5"]', "names and their values"]),
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
    (["tracking.uri=sqlite://mlflow.db"], ["tracking.uri = sqlite://mlflow.db", "names no file", "sqlite:///relative"]),
    (["tracking.uri=http://"], ["tracking.uri = http://: names no host", "http://host:port"]),
    (["tracking.uri= http://host "], ["tracking.uri =  http://host : accepted: a URI without blanks"]),
    (["run.dir=~nobody-here/runs"], ["run.dir = ~nobody-here/runs"]),
    pytest.param(
        ["tracking.uri=http://[::1"],
        ["tracking.uri = http://[::1"],
    ),
    # settings that do not fit each other, the data, the model or the machine
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
    (
        ["model.arguments.dropout=0.1", "model.name=net_conv10_20"],
        ["model.arguments.dropout = 0.1", "net_conv10_20 takes dropout2d"],
    ),
    (
        ["model.arguments.dropout2d=0.1", "model.name=lenet_3x3", "loss=mse"],
        ["model.arguments.dropout2d = 0.1", "lenet_3x3 takes no arguments"],
    ),
    (["data.image_size=5"], ["data.image_size = 5", "model.name=convnet", "too small", "6 and more"]),
    (
        ["data.image_size=15", "model.name=net_conv10_20", "model.arguments.dropout2d=0.1"],
        ["data.image_size = 15", "model.name=net_conv10_20", "model.arguments.dropout2d=0.1", "16 and more"],
    ),
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
    ("data: {mean: {red: 1}, std: 1}", ['data.mean = {"red": "1"}', "a list in brackets, each a number"]),
    ("data: {mean: [0.5], std: [[1]]}", ['data.std = [["1"]]', "a list in brackets, each a number"]),
    ("run: {name: ../escape}", ["run.name = ../escape", "letters, digits"]),
    ("run: {name: [a]}", ['run.name = ["a"]', "letters, digits"]),
    ("loss: [nll]", ['loss = ["nll"]', "nll | cross_entropy | mse"]),
    ("loss: {name: nll}", ['loss = {"name": "nll"}', "nll | cross_entropy | mse"]),
    ("loss:", ["loss = ", "nll | cross_entropy | mse"]),
    ("train: 3", ["train = 3", "is a section", "train.epochs, train.device"]),
    ("optim: sgd", ["optim = sgd", "is a section", "optim.name, optim.lr"]),
    ("run: [a, b]", ['run = ["a", "b"]', "is a section", "run.name, run.dir, run.seed, run.resume"]),
    ("train: {epoch: 3}", ["train.epoch = 3", "did you mean train.epochs?"]),
    ("trian: {epochs: 3}", ["trian = ", "did you mean train.epochs?"]),
    ("epochs: 3", ["epochs = 3", "did you mean train.epochs?"]),
    ("optim: {1: 2}", ["optim.1 = 2", "unknown key"]),
    ("just a text", ["holds no sections", "run, data, model, optim, train, checkpoint, tracking, loss"]),
    ("- train", ["holds no sections", "run, data, model"]),
    ("data: {dataset: [synthetic], arguments: {train_size: 5}}", ['data.dataset = ["synthetic"]', "accepted: text"]),
    ("model: {name: [lenet_3x3], arguments: {width: 5}}", ['model.name = ["lenet_3x3"]', "accepted: text"]),
    ("model: {arguments: 3}", ["model.arguments = 3", "names and their values"]),
    ("model: {dropout: 0.1}", ["model.dropout = 0.1: is now model.arguments.dropout"]),
    ("train: {epochs: 3", ["line 1"]),
    ("train:\n\tepochs: 3", ["line 2"]),
    ("train: {epochs: 3}\n---\noptim: {lr: 1}", ["single document", "line 2"]),
    ("? [a, b]\n: c", ["unhashable key", "line 1"]),
    ("optim: {lr: &a [*a]}", ["recursive", "line 1"]),
    ("train:\n  epochs: 3\n  epochs: 4\n", ["key 'epochs' stands twice", "line 2"]),
    ("train: {epochs: 3}\noptim: {lr: 1}\ntrain: {accumulate: 2}\n", ["key 'train' stands twice"]),
    ("data: {arguments: {size: 8, size: 9}}", ["key 'size' stands twice"]),
    ("format: 1", ["format = 1: accepted: 2"]),
    ("format: 3", ["format = 3: accepted: 2"]),
    ("format:", ["format = ", "accepted: 2"]),
    ("format: {a: 2}", ["format = ", "accepted: 2"]),
]


def label(arguments: list[str]) -> str:
    return " ".join(arguments)[:50]


def assert_refused(arguments: list[str], parts: list[str], num_errors: int = 1) -> None:
    """The config is refused as the program would refuse it, with all `parts` in the message."""
    with pytest.raises(ConfigError) as caught:
        load_config(parse_command_line(arguments), [partial(find_problems, launch=Launch())])
    message = str(caught.value)
    counted = "1 error" if num_errors == 1 else f"{num_errors} errors"
    assert message.startswith(f"the configuration has {counted}; nothing was started.\n  ")
    assert len(caught.value.problems) == num_errors
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(("arguments", "parts"), WRONG_COMMAND_LINES, ids=lambda v: label(v))
def test_a_wrong_command_line_is_refused_with_the_key(arguments: list[str], parts: list[str]) -> None:
    assert_refused(arguments, parts)


@pytest.mark.parametrize(("text", "parts"), WRONG_FILES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_wrong_file_is_refused_with_the_key(text: str, parts: list[str], recipe: Path) -> None:
    recipe.write_text(text)
    assert_refused(["--config", str(recipe)], parts)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, recipe: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert_refused(["--config", str(missing)], [f"--config {missing}", "No such file"])
    assert_refused(["--config", str(tmp_path)], [f"--config {tmp_path}", "directory"])
    recipe.write_bytes(b"run: {name: \xff}")
    assert_refused(["--config", str(recipe)], [f"--config {recipe}", "cannot be read"])


def test_a_password_in_the_uri_is_not_shown() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri") as caught:
        load_config(CommandLine(DEFAULT, ("tracking.uri=http://user:hunter2@host",), False), [find_problems])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["data.mean", "data.std"])
def test_an_empty_list_is_refused(key: str) -> None:
    arguments = ["data.mean=0.5", "data.std=0.5", f"{key}=[]"]
    assert_refused([*arguments, "--dry-run"], [f"{key} = []"])


def test_a_key_in_its_section_and_dotted_besides_stands_twice(recipe: Path) -> None:
    recipe.write_text("optim: {lr: 0.1}\noptim.lr: 0.2\n")
    assert_refused(["--config", str(recipe), "--dry-run"], ["optim.lr", "twice"])


def test_all_errors_are_reported_at_once(recipe: Path) -> None:
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
    assert_refused(arguments, parts, num_errors=len(parts))


def test_a_broken_file_does_not_hide_the_errors_of_the_command_line(recipe: Path) -> None:
    recipe.write_text("run: {")
    arguments = ["--config", str(recipe), "train.epochs=0"]
    assert_refused(arguments, [f"--config {recipe}", "train.epochs = 0"], num_errors=2)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["optim.name=lion", "optim.momentum=0.9"], "optim.name"),  # adadelta, the default, has no momentum
        (["optim.momentum=lots", "optim.name=sgd", "optim.nesterov=true"], "optim.momentum"),
        (["loss=hinge", "model.name=lenet_3x3"], "loss"),
        (["model.name=vgg", "loss=mse"], "model.name"),
        (["model.name=vgg", "loss=mse", "data.image_size=5"], "model.name"),
        (["data.dataset=imagenet", "data.mean=[0.5,0.5,0.5]", "data.std=[1,1,1]"], "data.dataset"),
        (["data.dataset=imagenet", "data.arguments.size=5", "optim.warmup=100000"], "data.dataset"),
        (["data.arguments.size=big", "data.image_size=5", "optim.warmup=100000"], "data.arguments.size"),
        (["data.arguments=5", "data.image_size=5", "data.mean=[1,1]", "data.std=[1,1]"], "data.arguments"),
        (["data.synthetic_channels=3", "data.mean=[1,1,1]", "data.std=[1,1,1]"], "data.synthetic_channels"),
        (["model.arguments.dropout=x", "data.image_size=5"], "model.arguments.dropout"),
        (["data.mean=[x]", "data.std=1"], "data.mean"),
        (["train.epochs=none", "optim.warmup=100000"], "train.epochs"),
        (["data.global_batch_size=big", "train.accumulate=64"], "data.global_batch_size"),
        (["train.device=tpu", "train.precision=fp16"], "train.device"),
        (["train.device=tpu", "train.backend=nccl"], "train.device"),
    ],
    ids=lambda v: label(v) if isinstance(v, list) else v,
)
def test_a_wrong_value_is_not_reported_a_second_time_by_a_check(arguments: list[str], key: str) -> None:
    assert_refused(arguments, [f"\n  {key} = "])


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


def test_arguments_of_the_command_line_join_those_of_the_file(recipe: Path) -> None:
    text = "data: {arguments: {size: 20}}\nmodel: {arguments: {dropout: 0.5, dropout2d: 0.1}}\n"
    config = resolve_file(recipe, text, "model.arguments.dropout=0", "data.augment.flip=true")
    assert config.data.arguments == {"size": 20}
    assert config.model.arguments == {"dropout": 0, "dropout2d": 0.1}
    assert config.data.augment == {"flip": True}


@pytest.mark.parametrize("all_at_once", ["{}", "null", ""])
def test_all_arguments_of_the_file_can_be_taken_back(all_at_once: str, recipe: Path) -> None:
    text = "model: {arguments: {dropout: 0.5}}"
    assert resolve_file(recipe, text, f"model.arguments={all_at_once}").model.arguments == {}
    later = resolve_file(recipe, text, f"model.arguments={all_at_once}", "model.arguments.dropout2d=0.2")
    assert later.model.arguments == {"dropout2d": 0.2}
    whole = resolve_file(recipe, text, "model.arguments={dropout2d: 0.2}", "model.arguments.dropout=0.3")
    assert whole.model.arguments == {"dropout2d": 0.2, "dropout": 0.3}


@pytest.mark.parametrize("text", ["model: {arguments: }", "model: {arguments: {}}", "model.arguments.dropout: 0.5"])
def test_arguments_may_be_empty_or_dotted_in_a_file(text: str, recipe: Path) -> None:
    expected = {"dropout": 0.5} if "dropout" in text else {}
    assert resolve_file(recipe, text).model.arguments == expected


def test_an_argument_in_its_place_and_dotted_besides_stands_twice(recipe: Path) -> None:
    recipe.write_text("model: {arguments: {dropout: 0.1}}\nmodel.arguments.dropout: 0.2\n")
    assert_refused(["--config", str(recipe)], ["model.arguments.dropout: stands twice"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64", 64),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        # not as YAML itself would write it: kept until the type of the argument is known
        ("1e-3", "1e-3"),
        ("007", "007"),
        ("yes", "yes"),
        ("2026-11-21", "2026-11-21"),
        ("2026-13-45", "2026-13-45"),
        ("[3, 5]", "[3, 5]"),
        ("&a [*a]", "&a [*a]"),
        ("a: b", "a: b"),
        ("", ""),
    ],
)
def test_an_argument_is_kept_without_loss(text: str, expected: object) -> None:
    value = resolve(f"model.arguments.x={text}").model.arguments["x"]
    assert (value, type(value)) == (expected, type(expected))


def test_a_file_may_state_the_format_it_is_of(recipe: Path) -> None:
    assert resolve_file(recipe, "format: 2\ntrain: {epochs: 3}").train.epochs == 3


def test_the_format_is_no_key_of_the_command_line() -> None:
    assert_refused(["format=2"], ["format = 2: unknown key"])


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
    command = parse_command_line(["optim.lr=1", "--dry-run", "loss=nll", "--config", str(recipe)])
    assert command == CommandLine(recipe, ("optim.lr=1", "loss=nll"), dry_run=True)


def test_without_config_the_default_file_is_read() -> None:
    assert parse_command_line([]) == CommandLine(DEFAULT, (), dry_run=False)


def test_a_config_error_carries_the_keys_that_take_part() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CommandLine(DEFAULT, ("optim.nesterov=true",), dry_run=False), [find_problems])
    assert [problem.keys for problem in caught.value.problems] == [("optim.nesterov", "optim.name", "optim.momentum")]


def test_a_folder_called_like_a_recipe_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("default", "mnist"):
        (tmp_path / name).mkdir()
    assert parse_command_line([]).config_path == DEFAULT
    assert parse_command_line(["--config", "mnist"]).config_path == DEFAULT.with_name("mnist.yaml")
