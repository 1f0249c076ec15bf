"""The publisher when a part of MLflow fails, a run is deleted under its hands, or a machine has failed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.commands.publish import publish
from pipeline.run.folder import RunFolder
from pipeline.run.journal import Journal
from pipeline.run.published import Progress
from pipeline.tracking.publisher import Publisher
from tests.base.disk import record_disk
from tests.servers import mlflow_server
from tests.tracking.test_publisher import history, the_run

PASSWORD = "correct-horse"


def test_a_run_deleted_while_it_is_published_misses_nothing_when_it_is_restored(
    store: str, folder: RunFolder, journal: Journal
) -> None:
    publisher, client = Publisher(folder, store), MlflowClient(store)
    journal.metrics({"train/loss": 1.0}, 1)
    publisher.drain()
    run_id = the_run(store).info.run_id
    client.delete_run(run_id)
    journal.append({"kind": "tags", "values": {"host": "here"}})
    journal.metrics({"train/loss": 2.0}, 2)
    for _ in range(2):
        with pytest.raises((RuntimeError, MlflowException), match=r"active|restore"):
            publisher.drain()
    client.restore_run(run_id)
    publisher.drain()
    assert history(store, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert the_run(store).data.tags["host"] == "here"


def test_files_that_cannot_be_stored_hold_up_nothing_else(
    store: str, folder: RunFolder, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.path / "profile").mkdir()
    (folder.path / "profile" / "trace").write_text("a file")
    journal.append({"kind": "artifact", "path": "profile/trace"})
    journal.metrics({"train/loss": 1.0}, 1)
    journal.status("finished")

    def fail(*_: Any) -> None:
        raise PermissionError("/mnt/artifacts")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_artifact", fail)
        publisher = Publisher(folder, store)
        with pytest.raises(PermissionError):
            publisher.drain()
    assert history(store, "train/loss") == [(1, 1.0)]
    assert the_run(store).info.status == "FINISHED"
    publisher.drain()
    files = {file.path for file in MlflowClient(store).list_artifacts(the_run(store).info.run_id)}
    assert files == {"config.yaml", "figures", "profile"}


def test_the_death_of_a_training_is_shown_before_what_is_left(
    store: str, folder: RunFolder, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = Publisher(folder, store)
    publisher.drain()
    journal.metrics({"train/loss": 1.0}, 1)

    def hang_up(*_: Any, **__: Any) -> None:
        raise ConnectionError("a backlog that takes too long")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_batch", hang_up)
        with pytest.raises(ConnectionError):
            publisher.drain(lambda: False)
    assert the_run(store).info.status == "FAILED"
    assert folder.status()["state"] == "failed"
    publisher.drain(lambda: False)
    assert history(store, "train/loss") == [(1, 1.0)]
    assert the_run(store).info.status == "FAILED"


def test_a_journal_that_a_failed_machine_made_shorter_is_published_from_its_beginning(
    store: str, folder: RunFolder, journal: Journal
) -> None:
    journal.metrics({"train/loss": 1.0}, 1)
    Publisher(folder, store).drain()
    published = json.loads((folder.path / "published.json").read_text())
    published[store]["offsets"]["journal.jsonl"] += 10_000
    (folder.path / "published.json").write_text(json.dumps(published))
    journal.metrics({"train/loss": 2.0}, 2)
    journal.status("finished")
    assert publish(folder, store, lambda: False)[0]
    assert history(store, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert the_run(store).info.status == "FINISHED"


def test_how_far_it_is_published_is_on_the_disk_before_it_replaces_an_earlier_state(
    folder: RunFolder, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress(folder, "http://server")
    events = record_disk(monkeypatch)
    progress.advance(folder.journal, folder.journal.stat().st_size)
    size = (folder.path / "published.json").stat().st_size
    temporary = ".writing-published.json"
    assert events == [("fsync", temporary, size), ("rename", temporary, "published.json"), ("fsync", "run", 0)]


def test_what_an_earlier_version_published_is_not_published_again(folder: RunFolder, journal: Journal) -> None:
    offsets = {"journal.jsonl": folder.journal.stat().st_size}
    before = {"mlflow_run_id": "m", "offsets": offsets, "shown": "failed", "described": "failed", "killed": 1}
    (folder.path / "published.json").write_text(json.dumps({"http://server": before}))
    progress = Progress(folder, "http://server")
    assert progress.is_complete()
    assert (progress.get("mlflow_state"), progress.get("killed_attempt")) == ("failed", 1)


def test_a_password_in_the_address_of_the_server_is_written_nowhere(
    migrated: Path, tmp_path: Path, folder: RunFolder, journal: Journal, capfd: pytest.CaptureFixture[str]
) -> None:
    journal.metrics({"train/loss": 1.0}, 1)
    journal.status("finished")
    shutil.copy(migrated, tmp_path / "mlflow.db")
    with mlflow_server(tmp_path) as url:
        assert publish(folder, url.replace("//", f"//alice:{PASSWORD}@"), lambda: False)[0]
        assert history(url, "train/loss") == [(1, 1.0)]
    written = [path for path in folder.path.rglob("*") if path.is_file() and PASSWORD in path.read_text("latin1")]
    assert written == []
    assert PASSWORD not in "".join(capfd.readouterr())
