"""What the program does with a config: refuse it with exit code 2, or say what a training would be (`--dry-run`)."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.config import CommandLine, Config, load_config
from pipeline.run.folder import RunFolder
from train.main import ROOT, main

DEFAULT = ROOT / "configs" / "default.yaml"
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torch's, under captured stderr


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder on a machine without GPUs."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    logger = logging.getLogger("convoy")
    before = logger.handlers, logger.level, logger.propagate
    yield folder
    logger.handlers, logger.level, logger.propagate = before


def resolve(*overrides: str) -> Config:
    return load_config(CommandLine(DEFAULT, overrides, dry_run=False))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train.epochs=0"], ["1 error;", "train.epochs = 0: accepted: a whole number >= 1"]),
        (["--dry-run", "train.epochs=0"], ["1 error;", "train.epochs = 0"]),
        (["data.dataset=imagenet", "optim.lr=0"], ["2 errors;", "data.dataset = imagenet", "optim.lr = 0"]),
        (["data.arguments.sise=20"], ["1 error;", "did you mean data.arguments.size?"]),
        (["--epochs"], ["1 error;", "[--config PATH] [--dry-run] [key=value ...]"]),
        (["--config", "missing.yaml"], ["1 error;", "--config missing.yaml: cannot be read"]),
    ],
)
def test_a_wrong_config_ends_with_code_2_before_anything_exists(
    arguments: list[str], parts: list[str], cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert [part for part in parts if part not in output.err] == []
    assert "Traceback" not in output.err
    assert output.out == ""
    assert list(cwd.iterdir()) == []


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
    assert "1,437 training and 360 validation images of 1x28x28 in 10 classes" in output.out
    assert "steps: 45 an epoch of 32 images each, 900 in all" in output.out
    assert "ranks: 1, each on cpu in fp32" in output.out
    assert f"run folder: {cwd}/runs/default-<date>-<time>" in output.out
    assert list(cwd.iterdir()) == []


def test_a_dry_run_follows_the_settings(
    cwd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(ROOT / "configs" / "mnist_lenet_5x5.yaml")
    settings = ["run.dir=elsewhere", "data.global_batch_size=7", "train.epochs=2", "train.precision=bf16"]
    monkeypatch.setenv("CONVOY_RUN_NAME", "slurm-17")
    assert main(["--config", recipe, "--dry-run", *settings]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out.split("model: ")[0])["data"]["global_batch_size"] == 7
    assert "model: lenet_5x5" in out
    assert ("conv1", "Conv2d", "6x28x28", 156) in layer_table(out)
    assert re.search(r"total +61,706$", out, re.MULTILINE)
    assert "60,000 training and 10,000 validation images of 1x32x32" in out
    assert "steps: 8,572 an epoch of 7 images each, 17,144 in all" in out
    assert "on cpu in bf16" in out
    assert f"run: new\nrun folder: {cwd}/elsewhere/slurm-17\n" in out
    assert json.loads(out.splitlines()[-1]) == {"run_folder": f"{cwd}/elsewhere/slurm-17"}
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


def test_a_dry_run_refuses_a_run_of_an_earlier_version(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(cwd / "runs" / "mine")
    folder.path.mkdir(parents=True)
    folder.config.write_text("run: {name: mine}\ndata: {synthetic_train_size: 64}\n")
    folder.journal.touch()
    assert main(["--dry-run", "run.name=mine", "run.seed=7"]) == 1
    assert "run mine was begun by an earlier version of Convoy (format 1)" in capsys.readouterr().err
