"""A run folder: its name, who may write in it, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pipeline.base.launch import Launch
from pipeline.config import CommandLine, Config, load_config
from pipeline.run.folder import RunError, RunFolder, batch_run_name, choose_run, is_being_trained, training_lock

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


def test_the_files_of_a_run_are_where_the_contract_says(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mine")
    places = (folder.config, folder.journal, folder.checkpoints, folder.figures, folder.model)
    names = ["config.yaml", "journal.jsonl", "checkpoints", "figures", "model"]
    assert [str(place.relative_to(tmp_path / "mine")) for place in places] == names
    assert folder.name == "mine"
