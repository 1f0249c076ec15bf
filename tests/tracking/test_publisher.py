"""Publishing to a real store and a real server: once, complete, and with the right status."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.commands.publish import publish
from pipeline.run.folder import RunFolder
from pipeline.run.journal import KILLED, Journal
from pipeline.run.records import State
from pipeline.tracking.publisher import Publisher, follow
from pipeline.tracking.store import open_store
from tests.servers import MlflowServer, reserved_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _warnings_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("convoy"), "propagate", True)


def published(folder: RunFolder, uri: str, is_parent_alive: Callable[[], bool], after_death: float = 30.0) -> bool:
    return publish(folder, uri, is_parent_alive, after_death)[0]


def the_run(uri: str) -> Any:
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    return run


def history(uri: str, key: str) -> list[tuple[int, float]]:
    points = MlflowClient(tracking_uri=uri).get_metric_history(the_run(uri).info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def test_what_is_recorded_while_it_drains_arrives_in_order_and_once(
    store: str, folder: RunFolder, journal: Journal
) -> None:
    publisher = Publisher(folder, store)
    for step in range(5):
        journal.metrics({"train/loss": 1 / (step + 1)}, step)
        publisher.drain()
    assert history(store, "train/loss") == [(step, 1 / (step + 1)) for step in range(5)]
    assert the_run(store).info.status == "RUNNING"


def test_publishing_everything_again_changes_nothing(store: str, folder: RunFolder, journal: Journal) -> None:
    journal.append({"kind": "params", "values": {"optim.lr": 0.5, "steps_per_epoch": 10}})
    journal.append({"kind": "tags", "values": {"host": "here"}})
    for step in range(2500):
        journal.metrics({"train/loss": step / 2500}, step)
    journal.status("finished")
    assert published(folder, store, lambda: False)
    once = (the_run(store).info.run_id, history(store, "train/loss"))
    assert len(once[1]) == 2500
    (folder.path / "published.json").unlink()
    assert published(folder, store, lambda: False)
    assert (the_run(store).info.run_id, history(store, "train/loss")) == once
    assert the_run(store).info.status == "FINISHED"
    assert the_run(store).data.params["optim.lr"] == "0.5"


@pytest.mark.parametrize(
    ("states", "status"),
    [
        (("finished",), "FINISHED"),
        (("preempted",), "KILLED"),
        (("failed",), "FAILED"),
        ((), "FAILED"),  # killed without a word
        (("preempted", "running", "finished"), "FINISHED"),
    ],
)
def test_the_status_is_that_of_the_training(
    store: str, folder: RunFolder, journal: Journal, states: tuple[State, ...], status: str
) -> None:
    for state in states:
        journal.status(state)
    assert published(folder, store, lambda: False)
    assert the_run(store).info.status == status
    assert json.loads((folder.path / "status.json").read_text())["mlflow_run_id"] == the_run(store).info.run_id


def test_a_resumed_run_is_reopened(store: str, folder: RunFolder, journal: Journal) -> None:
    journal.status("preempted")
    assert published(folder, store, lambda: False)
    journal.status("running")
    Publisher(folder, store).drain()
    assert the_run(store).info.status == "RUNNING"


def test_a_point_the_server_refuses_is_named_and_takes_no_other_along(
    store: str, folder: RunFolder, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(20):
        journal.metrics({"train/loss": step}, step)
    # written past the journal's own cleaning of names
    journal.append({"kind": "metric", "key": "not=allowed", "value": 1.0, "step": 3, "timestamp_ms": 1})
    journal.status("finished")
    assert published(folder, store, lambda: False)
    assert len(history(store, "train/loss")) == 20
    assert "refuses not=allowed at step 3" in caplog.text


def test_a_param_the_server_refuses_is_named_and_holds_nothing_up(
    store: str, folder: RunFolder, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.append({"kind": "params", "values": {"optim.lr": 0.5, "run.seed": 1}})
    journal.append(
        {"kind": "params", "values": {"train.epochs": 2, "optim.lr": 0.7, "loss": "nll"}}
    )  # MLflow changes no param
    journal.append({"kind": "tags", "values": {"host": "here"}})
    journal.status("finished")
    assert published(folder, store, lambda: False)
    run = the_run(store)
    assert run.data.params == {"optim.lr": "0.5", "run.seed": "1", "train.epochs": "2", "loss": "nll"}
    assert run.data.tags["host"] == "here"
    assert run.info.status == "FINISHED"
    assert "refuses the params optim.lr: " in caplog.text


def test_a_store_that_cannot_be_reached_costs_one_line_and_nothing_is_lost(
    store: str, folder: RunFolder, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.metrics({"train/loss": 1.0}, 1)
    journal.status("finished")
    with reserved_port() as port:
        assert not published(folder, f"http://127.0.0.1:{port}", lambda: False, after_death=3.0)
    assert caplog.text.count("does not work now") == 1
    assert published(folder, store, lambda: False)
    assert history(store, "train/loss") == [(1, 1.0)]


def test_a_store_made_by_three_processes_at_once_is_sound(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    code = "import sys; from pipeline.tracking.store import open_store; open_store(sys.argv[1]).search_experiments()"
    processes = [subprocess.Popen([sys.executable, "-c", code, uri], cwd=ROOT) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert [experiment.name for experiment in open_store(uri).search_experiments()] == ["Default"]


def test_a_run_that_vanished_from_the_store_is_published_again(
    migrated: Path, store: str, tmp_path: Path, folder: RunFolder, journal: Journal
) -> None:
    journal.metrics({"train/loss": 1.0}, 1)
    journal.status("finished")
    assert published(folder, store, lambda: False)
    shutil.copy(migrated, tmp_path / "mlflow.db")
    assert published(folder, store, lambda: False)
    assert history(store, "train/loss") == [(1, 1.0)]
    assert the_run(store).info.status == "FINISHED"


def test_a_run_in_mlflows_bin_is_named_and_nothing_is_passed_over(
    store: str, folder: RunFolder, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    Publisher(folder, store).drain()
    run_id = the_run(store).info.run_id
    MlflowClient(tracking_uri=store).delete_run(run_id)
    journal.metrics({"train/loss": 1.0}, 1)
    journal.status("finished")
    assert not published(folder, store, lambda: False, after_death=1.0)
    assert f"mlflow runs restore --run-id {run_id}" in caplog.text
    MlflowClient(tracking_uri=store).restore_run(run_id)
    assert published(folder, store, lambda: False)
    assert history(store, "train/loss") == [(1, 1.0)]


def test_what_cannot_be_drawn_holds_up_nothing(
    store: str, folder: RunFolder, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.append({"kind": "evaluation", "path": "nowhere.npz", "step": 1, "class_names": ["a"]})
    journal.metrics({"train/loss": 1.0}, 1)
    journal.status("finished")
    assert published(folder, store, lambda: False)
    assert "a figure cannot be drawn" in caplog.text
    assert history(store, "train/loss") == [(1, 1.0)]
    assert the_run(store).info.status == "FINISHED"


def test_what_was_acknowledged_before_an_outage_is_not_sent_again(
    store: str, folder: RunFolder, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The offset is stored behind each batch, not behind all."""
    for step in range(2500):
        journal.metrics({"train/loss": step}, step)
    sent: list[int] = []
    log_batch = MlflowClient.log_batch

    def fail_at_the_third(client: MlflowClient, run_id: str, metrics: Any = (), **others: Any) -> None:
        if metrics:
            if len(sent) == 2:
                raise ConnectionError("away")
            sent.append(len(metrics))
        log_batch(client, run_id, metrics=metrics, **others)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", fail_at_the_third)
        with pytest.raises(ConnectionError):
            Publisher(folder, store).drain()
    assert sent == [1000, 1000]
    again = Publisher(folder, store)
    again.drain()
    assert again.counts["points"] == 500
    assert len(history(store, "train/loss")) == 2500


def test_samples_of_every_node_are_published_too(store: str, folder: RunFolder, journal: Journal) -> None:
    for host in ("node-1", "node-2"):
        samples = Journal(folder.path / "system" / f"{host}.jsonl")
        samples.metrics({f"system/{host}/cpu": 50.0}, 0)
        samples.close()
    publisher = Publisher(folder, store)
    publisher.drain()
    publisher.drain()
    assert publisher.counts["points"] == 2
    assert [history(store, f"system/{host}/cpu") for host in ("node-1", "node-2")] == [[(0, 50.0)], [(0, 50.0)]]


def test_the_end_of_a_training_that_was_killed_is_when_it_recorded_its_last(
    store: str, folder: RunFolder, journal: Journal
) -> None:
    journal.metrics({"train/loss": 1.0}, 1)
    last = json.loads(folder.journal.read_text().splitlines()[-1])["timestamp_ms"]
    time.sleep(0.05)
    assert published(folder, store, lambda: False)
    run = the_run(store)
    assert (run.info.status, run.info.end_time) == ("FAILED", last)
    assert run.data.tags["attempt.1.end"] == KILLED


def test_the_run_says_what_it_is_above_its_metrics(store: str, folder: RunFolder, journal: Journal) -> None:
    journal.append({"kind": "params", "values": {"model.name": "convnet", "optim.lr": 0.5, "steps_per_epoch": 10}})
    journal.metrics({"eval/accuracy": 0.9876, "eval/loss": 0.05}, 10)
    journal.status("finished")
    assert published(folder, store, lambda: False)
    note = the_run(store).data.tags["mlflow.note.content"]
    assert "**finished**: accuracy 98.76%, loss 0.05 at step 10" in note
    assert "model.name `convnet`, optim.lr `0.5`" in note


def test_the_description_says_which_settings_a_resumed_run_changed(
    store: str, folder: RunFolder, journal: Journal
) -> None:
    journal.append({"kind": "params", "values": {"optim.lr": 1.0, "train.log_every": 10, "run.seed": 0}})
    journal.append({"kind": "tags", "values": {"attempt.2.optim.lr": "0.5", "attempt.2.host": "there"}})
    journal.append({"kind": "tags", "values": {"attempt.3.optim.lr": "0.1", "attempt.3.train.log_every": "5"}})
    journal.status("finished")
    assert published(folder, store, lambda: False)
    note = the_run(store).data.tags["mlflow.note.content"]
    assert "optim.lr `1.0`, then `0.5`, then `0.1`, run.seed `0`, train.log_every `10`, then `5`" in note


def test_a_publisher_left_behind_does_not_end_the_run_of_the_next_attempt(
    store: str, folder: RunFolder, journal: Journal
) -> None:
    """The first attempt's publisher is still at work when the run is resumed and says that it is running."""
    journal.status("preempted")
    old = Publisher(folder, store)
    journal.status("running")
    assert follow(old, is_parent_alive=lambda: False, is_being_trained=lambda: True)
    assert the_run(store).info.status == "RUNNING"
    journal.metrics({"train/loss": 1.0}, 1)
    deadline = time.monotonic() + 1.5  # of its own training: it is not to end before that
    assert follow(Publisher(folder, store), lambda: time.monotonic() < deadline, lambda: True)
    assert time.monotonic() >= deadline
    assert history(store, "train/loss") == [(1, 1.0)]


def test_a_publisher_whose_training_died_before_it_began_ends_by_itself(
    store: str, folder: RunFolder, journal: Journal
) -> None:
    """PID 1 stands for whoever inherits the orphans: it is nobody's training."""
    command = [sys.executable, "-m", "pipeline", "publish", str(folder.path), "--follow", "1"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "MLFLOW_TRACKING_URI": store}, timeout=90)
    assert done.returncode == 0
    assert the_run(store).info.status == "FAILED"


def test_a_server_that_dies_and_comes_back_misses_nothing(
    migrated: Path, tmp_path: Path, folder: RunFolder, journal: Journal
) -> None:
    """Over HTTP: metrics every few ms while the server is killed and started again on the same port."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    with closing(MlflowServer(tmp_path)) as server:
        alive = threading.Event()
        alive.set()
        publisher = Publisher(folder, server.url)
        done: list[bool] = []
        thread = threading.Thread(target=lambda: done.append(follow(publisher, alive.is_set, after_death=30.0)))
        server.start()
        thread.start()
        _record(journal, range(100))
        _wait_until(lambda: len(history(server.url, "train/loss")) > 0)
        server.kill()
        _record(journal, range(100, 200))
        server.start()
        _record(journal, range(200, 300))
        journal.status("finished")
        thread.join(60)
        assert done == [True]
        assert history(server.url, "train/loss") == [(step, float(step)) for step in range(300)]
        assert the_run(server.url).info.status == "FINISHED"


def _record(journal: Journal, steps: range) -> None:
    for step in steps:
        journal.metrics({"train/loss": step}, step)
        time.sleep(0.005)


def _wait_until(condition: Any, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_publisher_gives_up_a_silent_server_soon_after_the_training_is_gone(
    folder: RunFolder, journal: Journal
) -> None:
    journal.metrics({"train/loss": 1.0}, 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert not published(folder, uri, lambda: False, after_death=2.0)
        assert time.monotonic() - started < 30
