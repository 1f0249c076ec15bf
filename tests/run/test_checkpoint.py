"""Checkpoints: bit-exact, complete or passed over, chosen and pruned as documented, and never code."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.schema import CheckpointConfig
from pipeline.run.checkpoint import (
    Best,
    CheckpointError,
    Checkpoints,
    Position,
    RunIdentity,
    TrainingState,
    is_better,
    load_checkpoint,
)
from pipeline.run.folder import RunFolder
from tests.base.disk import record_disk

FILES = ("model.pt", "training.pt", "position.json", "manifest.json")


def state_at(step: int, **changes: Any) -> TrainingState:
    contents: dict[str, Any] = {
        "position": Position(epoch=2, samples_seen=96, global_step=step),
        "best": Best(0.75, 3),
        "identity": RunIdentity("0123abc", {"optim.lr": 0.1, "data.mean": [0.5]}, "d1", {"name": "convnet"}),
        "model": {"weight": torch.full((2, 3), float(step)), "count": torch.tensor(step)},
        "update": {
            "optimizer": {"state": {0: {"step": torch.tensor(4.0), "exp_avg": torch.ones(2)}}},
            "scaler": {"scale": 65536.0, "_growth_tracker": 3},
            "skipped": 2.0,
        },
        "recording": {"sums": [[0.1, 3.0]], "count": 5},
    }
    return TrainingState(**(contents | changes))


def checkpoints_in(folder: Path, keep: int = 100, keep_best: int = 0, metric: Any = "eval/accuracy") -> Checkpoints:
    return Checkpoints(CheckpointConfig(keep=keep, keep_best=keep_best, metric=metric), RunFolder(folder.parent))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the program has warned of; an earlier test's logging may have cut it off from the root logger."""
    monkeypatch.setattr(logging.getLogger("convoy"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def assert_same(left: Any, right: Any) -> None:
    """Same types, keys and values; tensors and floats bit by bit, so that NaN equals itself and 0 is not -0."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.reshape(-1).view(torch.uint8).tolist() == right.reshape(-1).view(torch.uint8).tolist()
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, float):
        assert left.hex() == right.hex()
    else:
        assert left == right


def assert_same_state(left: TrainingState | None, right: TrainingState | None) -> None:
    assert left is not None
    assert right is not None
    for field in fields(TrainingState):
        assert_same(getattr(left, field.name), getattr(right, field.name))


def test_a_round_trip_is_bit_exact(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    awkward = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-45, 1 / 3])
    model = {
        "float32": torch.randn(3, 4, 5, generator=generator),
        "awkward": awkward,
        "float64": torch.randn(7, generator=generator, dtype=torch.float64),
        "bfloat16": torch.randn(7, generator=generator).bfloat16(),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "scalar": torch.tensor(math.pi, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "strided": torch.randn(2, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last),
    }
    recording = {"sums": [[0.1 + 0.2, math.nan], [-0.0, 1e-320]], "count": 2**60}
    state = state_at(2**40, model=model, recording=recording, best=Best(0.1 + 0.2, 7))
    path = checkpoints_in(folder).save(state, 0.3)
    assert_same_state(load_checkpoint(path), state)
    assert load_checkpoint(path).model["strided"].stride() == model["strided"].stride()


def test_an_optimizer_continues_with_the_same_bits(folder: Path) -> None:
    def steps(optimizer: torch.optim.Optimizer, weights: torch.Tensor, count: int) -> None:
        for number in range(count):
            weights.grad = torch.full((3,), 0.1 * (number + 1))
            optimizer.step()

    weights = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=0.1)
    steps(optimizer, weights, 3)
    update = {"optimizer": optimizer.state_dict()}
    path = checkpoints_in(folder).save(state_at(3, model={"weights": weights.detach().clone()}, update=update))
    steps(optimizer, weights, 2)

    loaded = load_checkpoint(path)
    resumed = loaded.model["weights"].requires_grad_()
    optimizer_resumed = torch.optim.AdamW([resumed], lr=0.1)
    optimizer_resumed.load_state_dict(loaded.update["optimizer"])
    steps(optimizer_resumed, resumed, 2)
    assert_same(resumed.detach(), weights.detach())
    assert_same(optimizer_resumed.state_dict(), optimizer.state_dict())


def test_a_state_without_a_best_comes_back_without_one(folder: Path) -> None:
    checkpoints_in(folder).save(state_at(1, best=None))
    loaded = checkpoints_in(folder).load_latest()
    assert loaded is not None
    assert loaded.best is None


def test_a_checkpoint_is_a_folder_of_the_documented_files(folder: Path) -> None:
    path = checkpoints_in(folder).save(state_at(450), 0.9)
    assert path == folder / "step-00000450"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert list(folder.iterdir()) == [path]
    position = json.loads((path / "position.json").read_text())
    assert position == {
        "epoch": 2,
        "samples_seen": 96,
        "global_step": 450,
        "best": {"value": 0.75, "global_step": 3},
        "identity": {
            "run_id": "0123abc",
            "config": {"optim.lr": 0.1, "data.mean": [0.5]},
            "dataset_digest": "d1",
            "model": {"name": "convnet"},
        },
        "value": 0.9,
    }
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 3
    assert manifest["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name in FILES[:3]
        for data in [(path / name).read_bytes()]
    }


def test_the_weights_alone_load_with_weights_only(folder: Path) -> None:
    state = state_at(1)
    path = checkpoints_in(folder).save(state)
    assert_same(torch.load(path / "model.pt", weights_only=True), state.model)


def refuse(path: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert [part for part in (str(path), *parts) if part not in str(caught.value)] == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_found(folder: Path, name: str, share: float) -> None:
    path = checkpoints_in(folder).save(state_at(1))
    size = (path / name).stat().st_size
    os.truncate(path / name, int(size * share))
    refuse(path, "manifest" if name == "manifest.json" else name)


@pytest.mark.parametrize("name", FILES[:3])
def test_a_byte_too_many_is_found(folder: Path, name: str) -> None:
    path = checkpoints_in(folder).save(state_at(1))
    with (path / name).open("ab") as file:
        file.write(b"\0")
    refuse(path, name)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_a_flipped_bit_is_found(folder: Path, name: str, share: float) -> None:
    path = checkpoints_in(folder).save(state_at(1))
    flip(path / name, int(share * ((path / name).stat().st_size * 8 - 1)))
    refuse(path, name)


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(folder: Path) -> None:
    path = checkpoints_in(folder).save(state_at(1))
    manifest = path / "manifest.json"
    good = manifest.read_bytes()
    for bit in range(0, len(good) * 8, 13):  # 13: each place in a byte has its turn
        flip(manifest, bit)
        refuse(path)
        manifest.write_bytes(good)
    assert_same_state(load_checkpoint(path), state_at(1))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(folder: Path, name: str) -> None:
    path = checkpoints_in(folder).save(state_at(1))
    (path / name).unlink()
    refuse(path, "manifest" if name == "manifest.json" else name)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 300,
        b"not json",
        b"\xff\xfe",
        b"{}",
        b'{"format": 1}',
        b'{"files": {}}',
        b"[]",
        b"null",
        b"17",
        b'"format files"',
        b'{"format": 1, "files": []}',
        b'{"format": 1, "files": null}',
    ],
)
def test_a_garbled_manifest_is_found(folder: Path, content: bytes) -> None:
    path = checkpoints_in(folder).save(state_at(1))
    (path / "manifest.json").write_bytes(content)
    refuse(path, "manifest")


@pytest.mark.parametrize("version", [0, 1, 2, "3", None])
def test_another_format_is_named(folder: Path, version: object) -> None:
    path = checkpoints_in(folder).save(state_at(1))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": version}))
    refuse(path, f"format {version}", "reads format 3")


def test_no_folder_is_a_checkpoint_error_too(folder: Path) -> None:
    refuse(folder / "step-00000007")


def test_without_checkpoints_there_is_nothing_to_load(folder: Path, warnings: Callable[[], list[str]]) -> None:
    assert checkpoints_in(folder).load_latest() is None
    folder.mkdir()
    assert checkpoints_in(folder).load_latest() is None
    assert warnings() == []


def test_the_latest_is_loaded(folder: Path, warnings: Callable[[], list[str]]) -> None:
    checkpoints = checkpoints_in(folder)
    for step in (5, 6, 7):
        checkpoints.save(state_at(step))
    assert_same_state(checkpoints.load_latest(), state_at(7))
    assert warnings() == []


def test_steps_are_ordered_as_numbers(folder: Path) -> None:
    checkpoints = checkpoints_in(folder)
    for step in (99_999_999, 100_000_000):
        checkpoints.save(state_at(step))
    assert [path.name for path in checkpoints.all()] == ["step-100000000", "step-99999999"]


def test_damaged_checkpoints_are_named_in_warnings_and_the_one_before_is_loaded(
    folder: Path, warnings: Callable[[], list[str]]
) -> None:
    checkpoints = checkpoints_in(folder)
    paths = [checkpoints.save(state_at(step)) for step in (1, 2, 3)]
    os.truncate(paths[2] / "model.pt", 100)
    (paths[1] / "manifest.json").unlink()
    assert_same_state(checkpoints.load_latest(), state_at(1))
    messages = warnings()
    assert len(messages) == 2
    assert str(paths[2]) in messages[0]
    assert str(paths[1]) in messages[1]
    flip(paths[0] / "training.pt", 77)
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        checkpoints.load_latest()
    assert all(path.is_dir() for path in paths)


@pytest.mark.parametrize("content", [b"{}", b"[]"])
def test_a_garbled_manifest_falls_back_too(folder: Path, content: bytes, warnings: Callable[[], list[str]]) -> None:
    checkpoints = checkpoints_in(folder)
    checkpoints.save(state_at(1))
    (checkpoints.save(state_at(2)) / "manifest.json").write_bytes(content)
    assert_same_state(checkpoints.load_latest(), state_at(1))


def test_what_a_killed_save_left_is_ignored_and_swept_by_the_next(folder: Path) -> None:
    checkpoints = checkpoints_in(folder)
    whole = checkpoints.save(state_at(1))
    leftover = folder / ".writing-step-00000009"
    shutil.copytree(whole, leftover)  # even a complete one: it was never given its name
    assert checkpoints.all() == [whole]
    assert_same_state(checkpoints.load_latest(), state_at(1))
    checkpoints.save(state_at(2))
    assert not leftover.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]


def test_other_folders_are_left_alone(folder: Path) -> None:
    checkpoints = checkpoints_in(folder, keep=1)
    for name in ("step-1", "step-00000001.bak", "notes"):
        (folder / name).mkdir(parents=True)
    checkpoints.save(state_at(5))
    checkpoints.save(state_at(6))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["notes", "step-00000001.bak", "step-00000006", "step-1"]


def kept_steps(folder: Path, values: list[float | None], **policy: Any) -> list[int]:
    """Which of the steps 1, 2, ... remain after each was saved with its value."""
    checkpoints = checkpoints_in(folder, **policy)
    for step, value in enumerate(values, start=1):
        checkpoints.save(state_at(step), value)
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoints.all())


@pytest.mark.parametrize(
    ("values", "policy", "expected"),
    [
        ([None] * 5, {"keep": 2}, [4, 5]),
        ([None] * 5, {"keep": 9}, [1, 2, 3, 4, 5]),
        ([0.5, 0.9, 0.6, 0.7, 0.8], {"keep": 2}, [4, 5]),
        ([0.5, 0.9, 0.6, 0.7, 0.8], {"keep": 2, "keep_best": 1}, [2, 4, 5]),
        ([0.5, 0.9, 0.6, 0.7, 0.8], {"keep": 1, "keep_best": 3}, [2, 4, 5]),
        ([0.5, 0.9, 0.6, 0.7, 0.8], {"keep": 1, "keep_best": 2, "metric": "eval/loss"}, [1, 3, 5]),
        ([0.5, 0.1, 0.6, 0.7], {"keep": 1, "keep_best": 1, "metric": "eval/loss"}, [2, 4]),
        ([0.5, 0.6, 0.7, 0.9], {"keep": 1, "keep_best": 1}, [4]),  # the best may be among the recent
        ([0.9, 0.5, 0.7, 0.6], {"keep": 3, "keep_best": 1}, [1, 2, 3, 4]),
        ([0.2, None, None, None], {"keep": 1, "keep_best": 1}, [1, 4]),
        ([0.0, None, None, None], {"keep": 1, "keep_best": 1}, [1, 4]),
        ([9.0, None, None, None], {"keep": 1, "keep_best": 1, "metric": "eval/loss"}, [1, 4]),
        ([None, 0.2, None, 0.1, None], {"keep": 1, "keep_best": 2}, [2, 4, 5]),
    ],
)
def test_the_recent_and_the_best_are_kept(
    folder: Path, values: list[float | None], policy: dict[str, Any], expected: list[int]
) -> None:
    assert kept_steps(folder, values, **policy) == expected


@pytest.mark.parametrize(
    ("metric", "value", "than", "expected"),
    [
        ("eval/accuracy", 0.6, 0.5, True),
        ("eval/accuracy", 0.5, 0.6, False),
        ("eval/accuracy", 0.5, 0.5, False),
        ("eval/loss", 0.5, 0.6, True),
        ("eval/loss", 0.6, 0.5, False),
        ("eval/loss", math.nan, 0.5, False),
        ("eval/loss", 0.5, math.nan, True),
        ("eval/accuracy", math.nan, math.nan, False),
    ],
)
def test_a_higher_accuracy_and_a_lower_loss_are_better_and_nan_is_better_than_nothing(
    metric: str, value: float, than: float, expected: bool
) -> None:
    assert is_better(metric, value, than) is expected


@pytest.mark.parametrize("values", [[0.5, math.nan, math.nan, 0.6], [0.5, 0.6, math.nan, 0.7]])
def test_a_checkpoint_whose_value_is_not_a_number_is_never_the_best(folder: Path, values: list[float | None]) -> None:
    assert kept_steps(folder, values, keep=1, keep_best=1, metric="eval/loss") == [1, 4]


def test_a_checkpoint_written_after_a_fall_back_outlives_the_damaged_later_one(folder: Path) -> None:
    checkpoints = checkpoints_in(folder, keep=1)
    checkpoints.save(state_at(10))
    shutil.copytree(folder / "step-00000010", folder / "step-00000020")
    os.truncate(folder / "step-00000020" / "model.pt", 10)
    assert_same_state(checkpoints.load_latest(), state_at(10))
    checkpoints.save(state_at(15))
    assert_same_state(checkpoints.load_latest(), state_at(15))


def test_saving_over_a_step_replaces_it(folder: Path) -> None:
    checkpoints = checkpoints_in(folder)
    checkpoints.save(state_at(1), 0.1)
    again = state_at(1, identity=RunIdentity("second"), model={"other": torch.ones(5)})
    path = checkpoints.save(again, 0.2)
    assert list(folder.iterdir()) == [path]
    assert_same_state(load_checkpoint(path), again)
    assert json.loads((path / "position.json").read_text())["value"] == 0.2


@pytest.mark.parametrize("again", [False, True])
def test_all_of_a_checkpoint_is_on_the_disk_before_it_gets_its_name(
    folder: Path, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure a renamed folder may hold empty files otherwise."""
    if again:
        checkpoints_in(folder).save(state_at(5))
    events = record_disk(monkeypatch)
    path = checkpoints_in(folder).save(state_at(5))
    files = {("fsync", name, (path / name).stat().st_size) for name in FILES}
    assert set(events[:4]) == files
    assert events[4:] == [
        ("fsync", f".writing-{path.name}", 0),
        *([("rename", path.name, f"{path.name}.old")] if again else []),
        ("rename", f".writing-{path.name}", path.name),
        ("fsync", folder.name, 0),
    ]


class Killed(BaseException):
    """In place of SIGKILL: nothing in the code catches it, so nothing more happens on the disk."""


def kill_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die before the `number`-th operation that changes the disk or forces it."""
    count = 0

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise Killed
            return operation(*arguments, **options)

        return run

    for owner, name in ((os, "fsync"), (Path, "mkdir"), (Path, "rename"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


@pytest.mark.parametrize(
    ("before", "keep"),
    [
        pytest.param([1], 1, id="next-step"),
        pytest.param([1, 2], 2, id="same-step-again"),
        pytest.param([2], 1, id="same-step-again-keep-1"),
    ],
)
def test_killed_at_any_point_of_a_save_there_is_a_checkpoint_to_go_on_from(
    folder: Path, before: list[int], keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [state_at(step) for step in before]
    new = state_at(2, identity=RunIdentity("new"))
    for number in range(1, 50):
        shutil.rmtree(folder, ignore_errors=True)
        for state in old:
            checkpoints_in(folder, keep).save(state)
        with monkeypatch.context() as patch:
            kill_at(number, patch)
            try:
                checkpoints_in(folder, keep).save(new)
            except Killed:
                died = True
            else:
                died = False
        loaded = checkpoints_in(folder, keep).load_latest()
        assert loaded is not None, f"killed at operation {number}"
        assert (loaded.position.global_step, loaded.identity.run_id) in {
            (state.position.global_step, state.identity.run_id) for state in (*old, new)
        }
        if not died:
            assert loaded.identity.run_id == "new"
            assert number > 5  # the test did kill at operations
            return
    pytest.fail("the save did not come to its end")


class Exploit:
    """Unpickled as it stands, it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["model.pt", "training.pt"])
def test_code_in_a_checkpoint_is_refused_and_not_executed(folder: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "executed"
    checkpoints = checkpoints_in(folder)
    checkpoints.save(state_at(1))
    path = checkpoints.save(state_at(2))
    torch.save({"weight": Exploit(marker)}, path / name)
    data = (path / name).read_bytes()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    refuse(path, name)
    assert_same_state(checkpoints.load_latest(), state_at(1))
    assert not marker.exists()
    torch.load(path / name, weights_only=False)  # the exploit is one
    assert marker.exists()
