"""A run folder: its name, who may write in it, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pipeline.base.credentials import without_credentials
from pipeline.base.files import locked
from pipeline.base.launch import Launch
from pipeline.config import FIELDS, CommandLine, Config, load_config, may_change
from pipeline.config.arguments import show
from pipeline.run.folder import RunError, RunFolder, batch_run_name, choose_run, is_being_trained, training_lock
from pipeline.run.resume import changes, check_format, check_resumable, check_same_training

DEFAULT = Path(__file__).parents[2] / "configs" / "default.yaml"
FORK = multiprocessing.get_context("fork")


def config_of(*settings: str) -> Config:
    return load_config(CommandLine(DEFAULT, settings, dry_run=False))


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        ({"CONVOY_RUN_NAME": ""}, None),
        ({"CONVOY_RUN_NAME": "slurm-17_2"}, "slurm-17_2"),
        ({"SLURM_JOB_ID": "17"}, None),  # all that is started in an allocation has it
        ({"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}, None),
    ],
)
def test_the_name_that_a_batch_job_gives(environment: dict[str, str], name: str | None) -> None:
    assert batch_run_name(environment) == name


@pytest.mark.parametrize("name", ["../mine", "a b", ".", "x" * 200])
def test_a_name_of_a_batch_job_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(RunError, match=r"CONVOY_RUN_NAME=.* is no name of a run; unset it, or set run.name"):
        batch_run_name({"CONVOY_RUN_NAME": name})


def choose(tmp_path: Path, *settings: str, slurm: str | None = None, launch_id: str | None = None) -> RunFolder:
    environment = {"CONVOY_RUN_NAME": slurm} if slurm else {}
    return choose_run(
        config_of(f"run.dir={tmp_path / 'runs'}", *settings), "mnist", environment, Launch(run_id=launch_id)
    )


def test_the_name_set_goes_before_slurms(tmp_path: Path) -> None:
    assert choose(tmp_path, "run.name=mine", slurm="slurm-17").path == tmp_path / "runs" / "mine"
    assert choose(tmp_path, slurm="slurm-17").path == tmp_path / "runs" / "slurm-17"
    assert not (tmp_path / "runs").exists()  # a named folder is made only when it is taken


def test_a_relative_folder_of_runs_is_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose_run(config_of("run.name=mine"), "mnist", {}, Launch()).path == tmp_path / "runs" / "mine"


def test_a_default_name_is_config_name_and_time(tmp_path: Path) -> None:
    before = time.strftime("%Y%m%d-%H%M%S")
    folder = choose(tmp_path)
    after = time.strftime("%Y%m%d-%H%M%S")
    assert f"mnist-{before}" <= folder.name <= f"mnist-{after}"
    assert folder.path.is_dir()


def test_default_names_of_one_second_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20261121-221500")
    names = [choose(tmp_path).name for _ in range(3)]
    assert names == ["mnist-20261121-221500", "mnist-20261121-221500-2", "mnist-20261121-221500-3"]


def test_default_names_differ_among_trainings_started_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20261121-221500")
    config, names = config_of(f"run.dir={tmp_path}"), []

    def choose_one() -> None:
        names.append(choose_run(config, "mnist", {}, Launch()).name)

    threads = [threading.Thread(target=choose_one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 16


@pytest.mark.parametrize("state", ["running", "preempted", "failed"])
def test_the_same_launch_finds_its_unfinished_run(tmp_path: Path, state: str) -> None:
    first = choose(tmp_path, launch_id="launch-1")
    first.update_status(launch_id="launch-1", state=state)
    choose(tmp_path, launch_id="launch-2").update_status(launch_id="launch-2", state="running")
    assert choose(tmp_path, launch_id="launch-1").path == first.path


def test_the_same_launch_does_not_find_its_finished_run(tmp_path: Path) -> None:
    first = choose(tmp_path, launch_id="launch-1")
    first.update_status(launch_id="launch-1", state="finished")
    assert choose(tmp_path, launch_id="launch-1").path != first.path


def test_another_launch_or_none_is_a_new_run(tmp_path: Path) -> None:
    first = choose(tmp_path, launch_id="launch-1")
    first.update_status(launch_id="launch-1", state="running")
    unlaunched = choose(tmp_path)
    unlaunched.update_status(launch_id=None, state="running")
    found = [choose(tmp_path, launch_id="launch-2").path, choose(tmp_path).path]
    assert len({first.path, unlaunched.path, *found}) == 4


def test_a_name_goes_before_the_launch(tmp_path: Path) -> None:
    choose(tmp_path, launch_id="launch-1").update_status(launch_id="launch-1", state="running")
    assert choose(tmp_path, "run.name=mine", launch_id="launch-1").name == "mine"


def test_must_without_a_name_asks_which(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run\.resume = must.*run\.name"):
        choose(tmp_path, "run.resume=must", launch_id="launch-1")
    assert choose(tmp_path, "run.resume=must", slurm="slurm-17").name == "slurm-17"


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


def test_a_folder_without_status_has_none(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "nowhere").status() == {}


def test_a_status_keeps_what_is_not_changed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mine")
    folder.update_status(state="running", epoch=1)
    folder.update_status(epoch=2, mlflow_run_id="a")
    expected = {"state": "running", "epoch": 2, "mlflow_run_id": "a"}
    assert folder.status() == expected
    assert json.loads((tmp_path / "mine" / "status.json").read_text()) == expected
    assert sorted(path.name for path in folder.path.iterdir()) == [".status.lock", "status.json"]


def write_status(folder: RunFolder, prefix: str) -> None:
    for number in range(40):
        folder.update_status(**{f"{prefix}{number}": number})


def test_training_and_publisher_may_write_the_status_at_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mine")
    writers = [FORK.Process(target=write_status, args=(folder, prefix)) for prefix in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        folder.status()  # raises if it is ever half-written
    for writer in writers:
        writer.join()
    assert folder.status() == {f"{prefix}{number}": number for prefix in "ab" for number in range(40)}


def hold(folder: RunFolder, sender: Connection) -> None:
    with training_lock(folder):
        sender.send("held")
        time.sleep(60)


@contextmanager
def another_training(folder: RunFolder) -> Iterator[int]:
    """The pid of a process that holds the training lock, and is killed at the end."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=hold, args=(folder, sender))
    process.start()
    try:
        assert receiver.poll(30)
        assert receiver.recv() == "held"
        assert process.pid is not None
        yield process.pid
    finally:
        process.kill()
        process.join()


def test_a_folder_in_training_is_refused_and_its_holder_named_until_that_is_dead(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with another_training(folder) as pid:
        expected = f"run {tmp_path.name} is being trained right now by process {pid} on {socket.gethostname()}: wait"
        for _ in range(2):  # being refused does not change who holds it
            with pytest.raises(RunError) as caught, training_lock(folder):
                pass
            assert str(caught.value).startswith(expected)
    with training_lock(folder):  # the kernel gives it back after a kill -9
        pass


def test_a_training_can_wait_until_the_one_before_it_has_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with another_training(folder) as pid:
        threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
        with training_lock(folder, patience=60.0):
            assert str(os.getpid()) in (tmp_path / ".training.lock").read_text()


def test_the_lock_names_its_latest_holder_only(tmp_path: Path) -> None:
    (tmp_path / ".training.lock").write_text("process 1234567890 on a host with a very long name" * 3)
    with training_lock(RunFolder(tmp_path)):
        text = (tmp_path / ".training.lock").read_text()
        assert text == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_forked_worker_does_not_keep_the_lock_of_its_dead_training(tmp_path: Path) -> None:
    """As a DataLoader worker would, which lives on for seconds after a kill -9 of its rank."""
    folder = RunFolder(tmp_path)
    receiver, sender = os.pipe()
    training = os.fork()
    if training == 0:
        with training_lock(folder):
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            os.write(sender, worker.to_bytes(8, "little"))
            time.sleep(60)
    worker = int.from_bytes(os.read(receiver, 8), "little")
    try:
        assert is_being_trained(folder)
        os.kill(training, signal.SIGKILL)
        os.waitpid(training, 0)
        assert not is_being_trained(folder)
        with training_lock(folder):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_the_training_lock_is_free_again_after_it_was_used(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(ZeroDivisionError), training_lock(folder):
        raise ZeroDivisionError
    with training_lock(folder):
        pass


def test_a_waiting_lock_waits(tmp_path: Path) -> None:
    path = tmp_path / "made" / "lock"
    order: list[str] = []
    entered = threading.Event()

    def second() -> None:
        entered.set()
        with locked(path):
            order.append("second")

    with locked(path):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://host:5000/path", "http://host:5000/path"),
        ("http://user:secret@host:5000/path", "http://host:5000/path"),
        ("https://token@host", "https://host"),
        ("postgresql://u:p@ss@host/db?x=a@b", "postgresql://host/db?x=a@b"),
        ("postgresql://user:p/s?s@host/db", "postgresql://host/db"),
        ("http://host:5000/path@2", "http://host:5000/path@2"),
        ("postgresql:///db?user=u&password=geheim", "postgresql:///db?user=u&password=***"),
        ("sqlite:////tmp/a@b.db", "sqlite:////tmp/a@b.db"),
    ],
)
def test_a_uri_is_shown_without_its_credentials(uri: str, shown: str) -> None:
    assert without_credentials(uri) == shown


def test_what_is_called_a_secret_is_not_shown() -> None:
    text = "GET http://host/?token=abc&x=1 failed; DB_PASSWORD='p q' api_key=k/1 monkey=banana"
    shown = "GET http://host/?token=***&x=1 failed; DB_PASSWORD=*** api_key=*** monkey=banana"
    assert without_credentials(text) == shown


def test_the_value_of_a_secret_in_the_environment_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "alice in chains")
    assert without_credentials("401 for alice in chains with correct horse") == "401 for alice in chains with ***"


def test_the_files_of_a_run_are_where_the_contract_says(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mine")
    places = (folder.config, folder.journal, folder.checkpoints, folder.figures, folder.model)
    names = ["config.yaml", "journal.jsonl", "checkpoints", "figures", "model"]
    assert [str(place.relative_to(tmp_path / "mine")) for place in places] == names
    assert folder.name == "mine"


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
