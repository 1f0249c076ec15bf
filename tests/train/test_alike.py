"""Ranks that differ in settings, code, packages or data are refused before anything is written."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.data.build import list_dataset, load_dataset
from pipeline.data.samples import PixelSamples
from pipeline.parallel.rank import Rank
from tests.faults.trainings import settings_of, train_as_rank
from tests.ranks import RankFailed, run_ranks
from tests.train.helpers import config_of
from train.attempt import alike

OWN = f"{__name__}:linear"


def linear(channels: int, image_size: int, num_classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * image_size**2, num_classes))


def _train(rank: Rank, folder: Path, odd: int, setting: str) -> None:
    train_as_rank(rank, settings_of(folder, *((setting,) if rank.rank == odd else ())))


@pytest.mark.parametrize(
    ("odd", "setting", "message"),
    [
        (1, "optim.lr=0.001", "optim.lr is 0.001, not 0.01"),
        (2, "run.seed=5", "run.seed is 5, not 0"),
        (1, "data.global_batch_size=17", "data.global_batch_size is 17, not 16"),
        (2, "model.arguments.dropout=0.5", "model.arguments.dropout is 0.5, not unset"),
    ],
)
def test_ranks_with_other_settings_are_refused(tmp_path: Path, odd: int, setting: str, message: str) -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(3, _train, tmp_path, odd, setting)
    assert f"rank {odd} on " in str(caught.value)
    assert f": {message}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_each_node_may_have_for_itself_may_differ(tmp_path: Path) -> None:
    run_ranks(2, _train, tmp_path, 1, f"data.root={tmp_path / 'local'}")


def _differ(rank: Rank, name: str, *settings: str) -> None:
    if rank.is_main:
        return alike.check_alike(rank, config_of(*settings))
    if name == "sources":
        alike.ROOT = alike.ROOT / "tests" / "data"
    elif name == "Python":
        alike.platform.python_version = lambda: "3.11.0"  # type: ignore[attr-defined]
    elif name == "torch":
        alike.torch = SimpleNamespace(__version__="2.13.0")  # type: ignore[assignment,attr-defined]
    elif name == "own file":
        digest = alike._digest
        alike._digest = lambda *paths: digest(*paths) if len(paths) > 1 else "another"
    return alike.check_alike(rank, config_of(*settings))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sources", "the digest of Convoy's code is "),
        ("Python", "Python is 3.11.0, not "),
        ("torch", "torch is 2.13.0, not "),
        ("own file", "the digest of test_alike.py (model.name) is another, not "),
    ],
)
def test_ranks_with_other_code_or_packages_are_refused(name: str, message: str) -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(2, _differ, name, f"model.name={OWN}")
    assert f"differs from rank 0 on {alike.socket.gethostname()}: {message}" in str(caught.value)  # type: ignore[attr-defined]
    assert run_ranks(2, _differ, "nothing", f"model.name={OWN}") == [None, None]


def _load(rank: Rank, odd: int) -> str:
    config = config_of("data.dataset=digits")
    listed = list_dataset(config.data, 0)
    if rank.rank == odd:
        train = listed.train
        listed = replace(listed, train=PixelSamples.of(train.read(0)[None].repeat(9, 1, 1, 1), train.labels[:9]))
    return load_dataset(config.data, listed, rank).digest


def test_nodes_with_other_data_are_refused() -> None:
    assert len(set(run_ranks(2, _load, -1, num_local=1))) == 1
    with pytest.raises(RankFailed, match=r"data.dataset=digits is not the same on \S+ \(\w{16}\) as on \S+ \(\w{16}\)"):
        run_ranks(2, _load, 1, num_local=1)


@pytest.mark.parametrize("key", ["data.dataset", "model.name"])
def test_the_file_of_a_source_or_model_of_ones_own_is_compared(key: str) -> None:
    assert f"the digest of test_alike.py ({key})" in alike.describe_program(config_of(f"{key}={OWN}"))


@pytest.mark.parametrize("package", ["train", "pipeline"])
def test_all_of_convoys_code_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    (tmp_path / package / "room").mkdir(parents=True)
    monkeypatch.setattr(alike, "ROOT", tmp_path)
    before = alike.describe_program(config_of())
    (tmp_path / package / "room" / "part.py").write_text("1\n")
    assert alike.describe_program(config_of()) != before


partial_linear = partial(linear)


def test_a_model_that_is_any_callable_and_hidden_files_beside_the_code_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = f"model.name={__name__}:partial_linear"
    assert "the digest of test_alike.py (model.name)" in alike.describe_program(config_of(key))
    (tmp_path / "train").mkdir()
    monkeypatch.setattr(alike, "ROOT", tmp_path)
    before = alike.describe_program(config_of())
    (tmp_path / "train" / ".#build.py").symlink_to("nowhere")  # an unsaved buffer of an editor
    assert alike.describe_program(config_of()) == before
