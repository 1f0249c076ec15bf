"""Problems that no single key shows: all of them at once, and none that only follows from another."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from pipeline.base.launch import Launch
from pipeline.checks import find_problems
from pipeline.config import CommandLine, Config, ConfigError, load_config

ROOT = Path(__file__).parents[2]
DEFAULT = ROOT / "configs" / "default.yaml"
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
ALONE = Launch()
OWN = """
import torch
from torch import nn
from pipeline.data.samples import Dataset, PixelSamples

def splits(root, seed, num_train: int = 12):
    def draw(size):
        raise AssertionError("pixels were read")
    train, validation = PixelSamples(num_train, lambda: draw(num_train)), PixelSamples(4, lambda: draw(4))
    return Dataset(
        name="own", train=train, validation=validation, test=None, classes=("cat", "dog"), channels=3, image_size=16,
        mean=(0.5,) * 3, std=(0.25,) * 3, origin="made for a test",
    )

def nothing(root, seed):
    return None

def absent(root, seed):
    raise FileNotFoundError(f"there is no folder {root}/pets")

def untyped(root, seed, size=3):
    return [0] * (size + 1)

def seedless(root):
    return None

def net(channels, image_size, num_classes, width: int = 4):
    if image_size % 8:
        raise ValueError("images of a multiple of 8 pixels are accepted")
    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.BatchNorm2d(width))

def rates(channels, image_size, num_classes, rate=0.1):
    return nn.Sequential(*(nn.Dropout(r.item()) for r in torch.linspace(0, rate, 3)))
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A current folder with a dataset and models of one's own, on a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_pets.py").write_text(OWN)
    yield
    sys.modules.pop("own_pets", None)


def resolve(*settings: str, path: Path = DEFAULT) -> Config:
    return load_config(CommandLine(path, settings, dry_run=False))


def problems_of(*settings: str, launch: Launch | None = ALONE) -> list[str]:
    """The messages with which a config is refused; empty if it is not."""
    try:
        load_config(CommandLine(DEFAULT, settings, dry_run=False), [partial(find_problems, launch=launch)])
    except ConfigError as error:
        return [problem.message for problem in error.problems]
    return []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_recipe_has_a_problem(path: Path) -> None:
    assert list(find_problems(resolve(path=path), Launch())) == []


def test_no_point_of_a_sweep_that_is_shipped_has_a_problem() -> None:
    settings = ("model.arguments.dropout=0.32", "optim.name=sgd", "optim.lr=0.0012", "data.global_batch_size=64")
    assert list(find_problems(resolve(*settings, path=ROOT / "configs" / "mnist.yaml"))) == []


def test_a_wrong_dataset_name_does_not_hide_a_wrong_learning_rate() -> None:
    assert [message.partition(" = ")[0] for message in problems_of("data.dataset=imagenet", "optim.lr=0")] == [
        "optim.lr",
        "data.dataset",
    ]


def test_problems_of_all_sections_are_named_at_once() -> None:
    found = problems_of(
        "run.name=a/b",
        "data.random_crop=3",
        "data.dataset=synthetic",
        "data.arguments.train_size=0",
        "data.augment.crop=100",
        "data.mean=0.5",
        "model.name=vgg",
        "optim.momentum=0.9",
        "optim.lr=0",
        "train.backend=nccl",
        "tracking.uri=ftp://host",
    )
    expected = {
        "run.name = a/b: accepted",
        "data.random_crop = 3: is now data.augment.crop",
        "data.arguments.train_size = 0: accepted",
        "data.augment.crop = 100: accepted: a whole number >= 0 and <= 64",
        "data.mean and data.std: set both",
        "model.name = vgg: ",
        "optim.momentum = 0.9: adadelta has none",
        "optim.lr = 0: accepted",
        "train.backend = nccl: needs a GPU",
        "tracking.uri = ftp://host: accepted",
    }
    assert len(found) == len(expected)
    assert {start for start in expected for message in found if message.startswith(start)} == expected


def test_a_wrong_model_does_not_hide_what_is_wrong_with_the_data() -> None:
    found = problems_of("model.name=vgg", "optim.warmup=900", "data.mean=[1,1]", "data.std=[1,1]")
    starts = ["data.mean = [1.0, 1.0]", "data.std = [1.0, 1.0]", "optim.warmup = 900", "model.name = vgg"]
    assert [message.startswith(start) for message, start in zip(found, starts, strict=True)] == [True] * 4


def test_wrong_data_do_not_hide_what_is_wrong_with_the_model() -> None:
    found = problems_of("data.arguments.size=big", "model.arguments.drop=1", "loss=mse")
    starts = ["data.arguments.size = big", "loss = mse: does not fit", "model.arguments.drop = 1: unknown"]
    assert [message.startswith(start) for message, start in zip(found, starts, strict=True)] == [True] * 3


def test_the_arguments_of_another_dataset_are_refused() -> None:
    (message,) = problems_of("data.arguments.train_size=64")
    assert message == "data.arguments.train_size = 64: unknown; digits takes size"


def test_ones_own_dataset_and_model_are_checked_without_reading_pixels() -> None:
    own = ("data.dataset=own_pets:splits", "model.name=own_pets:net", "loss=cross_entropy")
    assert problems_of(*own) == []
    assert problems_of(*own, "loss=nll") == []  # what it gives is not known
    found = problems_of(*own, "data.arguments.num_train=many", "model.arguments.widht=8")
    assert found == [
        "data.arguments.num_train = many: accepted: a whole number",
        "model.arguments.widht = 8: unknown; own_pets:net takes width; did you mean model.arguments.width?",
    ]
    assert "< 20" in problems_of(*own, "optim.warmup=20")[0]  # 20 epochs of a step
    assert "3 number(s), one per channel of own" in problems_of(*own, "data.mean=0", "data.std=1")[0]


def test_a_model_that_does_not_fit_the_images_is_named_with_its_own_reason_and_all_that_decides() -> None:
    settings = ("data.dataset=own_pets:splits", "model.name=own_pets:net", "data.image_size=20")
    with pytest.raises(ConfigError) as caught:
        load_config(CommandLine(DEFAULT, (*settings, "model.arguments.width=2"), False), [find_problems])
    (problem,) = caught.value.problems
    assert problem.message == (
        "data.image_size = 20: model.name=own_pets:net cannot be built with model.arguments.width=2: images of a "
        "multiple of 8 pixels are accepted"
    )
    assert {"data.image_size", "model.name", "model.arguments"} <= set(problem.keys)


def test_a_model_that_reads_a_tensor_while_it_is_built_is_accepted() -> None:
    """Meta tensors hold no values: `.item()` of one raises, though nothing is wrong with the model."""
    assert problems_of("model.name=own_pets:rates") == []
    (message,) = problems_of("model.name=own_pets:rates", "model.arguments.rate=high")
    assert message.startswith("model.name=own_pets:rates cannot be built with model.arguments.rate=high (TypeError: ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("own_pets:split", "cannot be imported (AttributeError: module 'own_pets' has no attribute 'split')"),
        ("own_cats:splits", "cannot be imported (ModuleNotFoundError: No module named 'own_cats')"),
        ("own_pets:", "is not of the form package.module:function"),
        ("own_pets:nothing", "returned NoneType"),
        ("own_pets:absent", "there is no folder data/pets"),
    ],
)
def test_a_dataset_that_cannot_be_listed_is_named_with_the_reason(name: str, reason: str) -> None:
    (message,) = problems_of(f"data.dataset={name}", "optim.warmup=100000", "data.image_size=5")
    assert message.startswith(f"data.dataset = {name}: {reason}")


def test_a_source_that_fails_on_an_argument_hides_no_other_problem() -> None:
    found = problems_of("data.dataset=own_pets:untyped", "data.arguments.size=big", "model.name=vgg")
    assert [message.partition(": ")[0] for message in found] == [
        "data.dataset = own_pets:untyped",
        "model.name = vgg",
    ]


def test_a_dataset_that_takes_no_seed_is_refused() -> None:
    assert problems_of("data.dataset=own_pets:seedless") == [
        "own_pets:seedless takes no seed: it is called with root, seed and data.arguments"
    ]


def test_more_ranks_than_virtual_ranks_are_refused() -> None:
    settings = ("train.reproducible=true", "train.virtual_ranks=2")
    (message,) = problems_of(*settings, launch=Launch(0, 0, 3, 3))
    assert message.startswith("train.virtual_ranks = 2: fewer than the 3 ranks")
    assert problems_of(*settings, launch=Launch(0, 0, 2, 2)) == []


def test_models_with_batch_statistics_are_refused_in_reproducible_mode_only() -> None:
    own = ("data.dataset=own_pets:splits", "model.name=own_pets:net")
    assert problems_of(*own) == []
    (message,) = problems_of(*own, "train.reproducible=true")
    assert message.startswith("train.reproducible = true: own_pets:net has batch statistics")


@pytest.mark.parametrize(
    ("setting", "start"),
    [
        ("train.accumulate=2", "train.accumulate = 2: a reproducible step computes one virtual rank at a time"),
        ("train.compile=true", "train.compile = true: its result depends on which virtual ranks"),
        ("train.precision=fp16", "train.precision = fp16: its result depends on which virtual ranks"),
    ],
)
def test_what_would_break_reproducibility_is_refused(setting: str, start: str) -> None:
    (message,) = problems_of("train.reproducible=true", setting, launch=None)
    assert message.startswith(start)


@pytest.mark.parametrize(
    "settings",
    [("train.device=cuda",), ("train.precision=fp16",), ("train.backend=nccl",), ("train.compress=bf16",)],
)
def test_a_config_for_another_machine_is_not_refused_for_what_this_one_lacks(settings: tuple[str, ...]) -> None:
    assert len(problems_of(*settings)) == 1
    assert problems_of(*settings, launch=None) == []


def test_checking_leaves_no_trace(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    before = {path.name for path in tmp_path.iterdir()}
    assert list(find_problems(resolve("data.dataset=mnist", "data.root=nowhere"), Launch())) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("127.0.0.1:5999", "accepted: a URI that starts with http, https"),
        ("localhost", "accepted: a URI that starts with http, https"),
        ("file:///tmp/mlruns", "accepted: a URI that starts with http, https"),
        ("http://127.0.0.1:5999 ", "accepted: a URI without blanks around it"),
        ("sqlite://mlflow.db", "names no file; accepted: sqlite:///relative/path.db"),
        ("https:///x", "names no host; accepted: https://host:port"),
    ],
)
def test_the_address_in_the_environment_is_checked_as_the_setting_is(
    monkeypatch: pytest.MonkeyPatch, uri: str, reason: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (problem,) = find_problems(load_config(CommandLine(DEFAULT, (), dry_run=False)))
    assert problem.message.startswith(f"MLFLOW_TRACKING_URI = {uri}: {reason}")
    for settings in (("tracking.enabled=false",), ("tracking.uri=http://host:5000",)):
        assert list(find_problems(load_config(CommandLine(DEFAULT, settings, dry_run=False)))) == []


@pytest.mark.parametrize("uri", ["http://user:secret@host:5000", "databricks", "postgresql://u:p@host/db", ""])
def test_an_address_that_may_work_is_taken(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert list(find_problems(load_config(CommandLine(DEFAULT, (), dry_run=False)))) == []


def test_a_home_folder_is_expanded_in_paths_as_a_shell_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(CommandLine(DEFAULT, ("run.dir=~/runs", "data.root=~/data"), dry_run=False))
    assert (config.run.dir, config.data.root) == ("/home/me/runs", "/home/me/data")


@pytest.mark.parametrize(
    ("uri", "store"),
    [("azureml://x/y", ""), ("arn:aws:sagemaker:eu:1:x/y", ""), ("file:///tmp/runs", "true"), ("./runs", "true")],
)
def test_an_address_of_a_plugin_or_an_allowed_file_store_is_taken(
    monkeypatch: pytest.MonkeyPatch, uri: str, store: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", store)
    assert list(find_problems(load_config(CommandLine(DEFAULT, (), dry_run=False)))) == []
