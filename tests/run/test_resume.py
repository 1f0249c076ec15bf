"""Which runs may go on: what a resume may change, which folders it refuses, and what was lost in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.base.launch import Launch
from pipeline.config import FIELDS, CommandLine, Config, load_config, may_change
from pipeline.config.arguments import show
from pipeline.run.folder import RunError, RunFolder
from pipeline.run.resume import changes, check_format, check_resumable, check_same_training

DEFAULT = Path(__file__).parents[2] / "configs" / "default.yaml"


def config_of(*settings: str) -> Config:
    return load_config(CommandLine(DEFAULT, settings, dry_run=False))


def begun(tmp_path: Path, *settings: str) -> RunFolder:
    """A folder in which a run was started with these settings."""
    folder = RunFolder(tmp_path / "runs" / "mine")
    folder.path.mkdir(parents=True)
    folder.journal.write_text('{"v":1,"kind":"run","run_id":"a"}\n')
    folder.config.write_text(config_of(*settings).to_yaml())
    return folder


@pytest.mark.parametrize(
    ("resume", "exists", "has_checkpoint", "refusal"),
    [
        ("auto", False, False, None),
        ("auto", True, False, None),
        ("auto", True, True, None),
        ("never", False, False, None),
        ("never", True, False, r"run\.resume = never: .*mine holds a run already"),
        ("never", True, True, r"run\.resume = never: .*mine holds a run already"),
        ("must", False, False, r"run\.resume = must: there is no usable checkpoint in .*mine/checkpoints"),
        ("must", True, False, r"run\.resume = must: there is no usable checkpoint in .*mine/checkpoints"),
        ("must", True, True, None),
    ],
)
def test_resume_allows_or_refuses(
    tmp_path: Path, resume: str, exists: bool, has_checkpoint: bool, refusal: str | None
) -> None:
    folder = begun(tmp_path) if exists else RunFolder(tmp_path / "runs" / "mine")
    config = config_of(f"run.resume={resume}")
    if refusal is None:
        check_resumable(folder, config, Launch(), has_checkpoint=has_checkpoint)
    else:
        with pytest.raises(RunError, match=refusal):
            check_resumable(folder, config, Launch(), has_checkpoint=has_checkpoint)


ANOTHER = {
    "run.seed": "7",
    "data.dataset": "synthetic",
    "data.arguments.size": "20",
    "data.image_size": "32",
    "data.mean": "0.25",
    "data.std": "0.25",
    "data.augment.flip": "true",
    "data.global_batch_size": "64",
    "model.name": "net_conv10_20",
    "model.arguments.dropout": "0.5",
    "loss": "mse",
    "optim.name": "adam",
    "optim.momentum": "0.9",
    "optim.nesterov": "true",
    "train.reproducible": "true",
    "checkpoint.metric": "eval/loss",
}


def test_every_key_that_a_resumed_run_may_not_change_is_tried_below() -> None:
    tried = {key if key in FIELDS else key.rpartition(".")[0] for key in ANOTHER}
    assert tried == {key for key in FIELDS if not may_change(key, reproducible=False)}


@pytest.mark.parametrize(("key", "value"), ANOTHER.items())
def test_another_training_in_the_same_folder_is_refused(tmp_path: Path, key: str, value: str) -> None:
    both = ("data.mean=0.5", "data.std=0.5") if key in ("data.mean", "data.std") else ()
    before, now = config_of(*both), config_of(*both, f"{key}={value}")
    folder = begun(tmp_path, *both)
    with pytest.raises(RunError) as caught:
        check_resumable(folder, now, Launch(), has_checkpoint=True)
    message = str(caught.value)
    was, is_now = (show(config.flat().get(key, "not set")) for config in (before, now))
    assert "run mine is another training" in message
    assert f": {key} was {was}, is {is_now}. Choose another run.name" in message
    assert str(folder.config) in message
    with pytest.raises(RunError, match=rf"of another training: {key} was ") as caught:
        check_same_training(folder, now, json.loads(json.dumps(before.flat())), "same", "same")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.arguments.dropout=0.3",), "model.arguments.dropout was 0.5, is 0.3"),
        (("model.arguments={}",), "model.arguments.dropout was 0.5, is not set"),
        (("model.arguments.dropout2d=0.1",), "model.arguments.dropout2d was not set, is 0.1"),
    ],
)
def test_arguments_are_compared_one_by_one(tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    begin = "model.arguments.dropout=0.5"
    folder, before, now = begun(tmp_path, begin), config_of(begin), config_of(begin, *settings)
    checks: list[Callable[[], None]] = [
        lambda: check_resumable(folder, now, Launch(), has_checkpoint=True),
        lambda: check_same_training(folder, now, before.flat(), "same", "same"),
    ]
    for check in checks:
        with pytest.raises(RunError) as caught:
            check()
        assert f"another training: {message}. Choose another" in str(caught.value)
    check_resumable(folder, config_of("model.arguments.dropout=0.5"), Launch(), has_checkpoint=True)


@pytest.mark.parametrize("setting", ["train.threads=1", "train.precision=bf16", "train.virtual_ranks=4"])
def test_what_changes_the_last_bits_only_may_change_unless_the_run_is_reproducible(
    tmp_path: Path, setting: str
) -> None:
    check_resumable(begun(tmp_path / "usual"), config_of(setting), Launch(), has_checkpoint=True)
    folder = begun(tmp_path / "reproducible", "train.reproducible=true")
    with pytest.raises(RunError, match=setting.partition("=")[0]):
        check_resumable(folder, config_of("train.reproducible=true", setting), Launch(), has_checkpoint=True)


def test_a_checkpoint_of_a_version_with_other_keys_is_compared_by_the_keys_that_both_know(tmp_path: Path) -> None:
    config, folder = config_of(), RunFolder(tmp_path / "mine")
    saved = {key: value for key, value in config.flat().items() if key != "data.image_size"} | {"data.shape": 3}
    check_same_training(folder, config, saved, "same", "same")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {name: mine}\ndata: {synthetic_train_size: 5}\n", "an earlier version of Convoy (format 1)"),
        ("format: 1\nrun: {name: mine}\n", "an earlier version of Convoy (format 1)"),
        ("format: 3\nrun: {name: mine}\n", "a later version of Convoy (format 3)"),
    ],
)
@pytest.mark.parametrize("settings", [(), ("run.seed=7",), ("run.resume=must",), ("run.resume=never",)])
def test_a_run_of_another_version_is_refused_before_anything_else_is_said(
    tmp_path: Path, text: str, message: str, settings: tuple[str, ...]
) -> None:
    folder = begun(tmp_path)
    folder.config.write_text(text)
    expected = (
        f"run mine was begun by {message}, this one writes format 2: finish it with that version, or choose another "
        "run.name"
    )
    checks: list[Callable[[], None]] = [
        lambda: check_format(folder),
        lambda: check_resumable(folder, config_of(*settings), Launch(), has_checkpoint=False),
    ]
    for check in checks:
        with pytest.raises(RunError) as caught:
            check()
        assert str(caught.value) == expected


def test_a_run_of_this_version_and_a_new_one_have_the_right_format(tmp_path: Path) -> None:
    check_format(RunFolder(tmp_path / "nowhere"))
    check_format(begun(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "just a text", "run: {", "- run", "[]", "- ab", "format: 2\nrun: {seed: much}", "format: 2\nx: 1"]
)
def test_a_damaged_config_of_a_run_is_named(tmp_path: Path, text: str) -> None:
    folder = begun(tmp_path)
    folder.config.write_text(text)
    with pytest.raises(RunError, match=r"mine/config\.yaml is not a config of this version, mend it or choose another"):
        check_resumable(folder, config_of(), Launch(), has_checkpoint=True)


def test_keys_of_other_versions_in_the_config_of_a_run_are_passed_over(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.config.write_text("format: 2\ndata: {shape: 3}\n" + "train: {log_every: 7}\n")
    assert changes(folder, config_of()) == [("train.log_every", 7, 10)]


def test_all_that_makes_it_another_training_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run\.seed was 0, is 1; data\.global_batch_size was 32, is 64\."):
        check_resumable(
            begun(tmp_path),
            config_of("run.seed=1", "data.global_batch_size=64", "optim.lr=2"),
            Launch(),
            has_checkpoint=True,
        )


@pytest.mark.parametrize(
    "setting",
    [
        "train.epochs=40",
        "optim.lr=0.1",
        "optim.weight_decay=0.1",
        "train.accumulate=2",
        "train.threads=1",
        "train.log_every=5",
        "data.eval_batch_size=7",
        "data.placement=workers",
        "checkpoint.keep=9",
        "tracking.uri=http://elsewhere:5000",
    ],
)
def test_what_does_not_make_it_another_training_may_change(tmp_path: Path, setting: str) -> None:
    folder, config = begun(tmp_path), config_of(setting)
    check_resumable(folder, config, Launch(), has_checkpoint=True)
    assert [key for key, _, _ in changes(folder, config)] == [setting.partition("=")[0]]


def test_changes_hold_the_values_before_and_now(tmp_path: Path) -> None:
    folder = begun(tmp_path, "optim.lr=1e-5", "data.mean=0.1", "data.std=0.3")
    now = config_of("optim.lr=0.5", "data.mean=0.1", "data.std=0.3", "train.clip_norm=1")
    assert changes(folder, now) == [("optim.lr", 1e-5, 0.5), ("train.clip_norm", None, 1.0)]
    assert changes(folder, config_of("optim.lr=1e-5", "data.mean=0.1", "data.std=0.3")) == []


def test_a_run_killed_between_its_journal_and_its_config_goes_on(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.config.unlink()
    check_resumable(folder, config_of(), Launch(), has_checkpoint=False)


def finished(tmp_path: Path, *settings: str) -> RunFolder:
    folder = begun(tmp_path, *settings)
    folder.update_status(state="finished", epoch=20, global_step=900)
    return folder


def test_a_finished_run_is_not_taken_for_one_with_another_optimizer_setting(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    with pytest.raises(
        RunError, match=r"finished, and was trained with other settings: optim\.lr was 1\.0, is 0\.1\. Ch"
    ):
        check_resumable(folder, config_of("optim.lr=0.1"), Launch(), has_checkpoint=True)
    for settings in (("train.threads=1", "train.log_every=5"), ("optim.lr=0.1", "train.epochs=30")):
        check_resumable(folder, config_of(*settings), Launch(), has_checkpoint=True)


def test_checkpoints_that_are_gone_are_not_a_new_beginning(tmp_path: Path) -> None:
    folder = begun(tmp_path / "one")
    check_resumable(folder, config_of(), Launch(), has_checkpoint=False)  # killed before its first checkpoint
    folder.update_status(state="failed", global_step=45)
    with pytest.raises(RunError, match=r"the checkpoints of run mine, which was saved at step 45, are gone from .*put"):
        check_resumable(folder, config_of(), Launch(), has_checkpoint=False)
    check_resumable(finished(tmp_path), config_of(), Launch(), has_checkpoint=False)  # it needs none
