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
from pipeline.config import Config
from pipeline.run.folder import RunFolder
from pipeline.run.journal import Journal
from pipeline.run.published import Progress
from pipeline.tracking.publisher import Publisher
from pipeline.tracking.store import open_store
from pipeline.tracking.uploads import TAG_LENGTH
from tests.base.disk import record_disk
from tests.records import run_record
from tests.servers import mlflow_server
from tests.tracking.test_publisher import history, the_run
from train.attempt.begin import tracking_uri

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


@pytest.mark.parametrize(
    "damage",
    [
        "[]",
        "null",
        "{",
        '{"STORE": []}',
        '{"STORE": "all"}',
        '{"STORE": {"offsets": [1]}}',
        '{"STORE": {"offsets": {"journal.jsonl": -5}}}',
        '{"STORE": {"offsets": {"journal.jsonl": "a"}}}',
        '{"STORE": {"offsets": {"../../secret": 7}}}',
        '{"STORE": {"files_left": [["/etc/passwd", 0]]}}',
        '{"STORE": {"files_left": [7]}}',
        '{"STORE": {"mlflow_run_id": 7}}',
    ],
)
def test_damaged_progress_is_as_none_and_all_is_published(
    store: str, folder: RunFolder, journal: Journal, damage: str
) -> None:
    journal.metrics({"train/loss": 1.0}, 1)
    journal.status("finished")
    (folder.path / "published.json").write_text(damage.replace("STORE", store))
    assert publish(folder, store, lambda: False)[0]
    assert history(store, "train/loss") == [(1, 1.0)]
    assert the_run(store).info.status == "FINISHED"


@pytest.mark.parametrize("line", [b"\0\0\0", b"{}", b'{"v":2,"kind":"metric","key":"system/a","value":"x"}'])
def test_a_damaged_line_of_system_metrics_holds_up_nothing(
    store: str, folder: RunFolder, journal: Journal, line: bytes
) -> None:
    system = Journal(folder.path / "system" / "node.jsonl")
    system.metrics({"system/node/cpu": 1.0}, 1)
    with (folder.path / "system" / "node.jsonl").open("ab") as file:
        file.write(line + b"\n")
    system.metrics({"system/node/cpu": 2.0}, 2)
    journal.append({"kind": "artifact", "path": "config.yaml"})
    journal.status("finished")
    succeeded, counts = publish(folder, store, lambda: False)
    assert succeeded
    assert counts["files"] >= 1
    assert history(store, "system/node/cpu") == [(1, 1.0), (2, 2.0)]


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


def test_a_description_that_a_person_wrote_stays(store: str, folder: RunFolder, journal: Journal) -> None:
    journal.status("finished")
    assert publish(folder, store, lambda: False)[0]
    client, run_id = MlflowClient(tracking_uri=store), the_run(store).info.run_id
    own = the_run(store).data.tags["mlflow.note.content"]
    journal.status("running")
    journal.metrics({"eval/accuracy": 0.5}, 5)
    journal.status("finished")
    (folder.path / "published.json").unlink()
    assert publish(folder, store, lambda: False)[0]
    renewed = the_run(store).data.tags["mlflow.note.content"]
    assert renewed != own
    client.set_tag(run_id, "mlflow.note.content", "my own words")
    journal.status("running")
    journal.metrics({"eval/accuracy": 0.75}, 6)
    journal.status("finished")
    assert publish(folder, store, lambda: False)[0]
    assert the_run(store).data.tags["mlflow.note.content"] == "my own words"


def test_a_file_that_is_a_link_out_of_the_run_folder_is_not_uploaded(
    store: str, folder: RunFolder, journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.txt").write_text("secret")
    (folder.path / "link.txt").symlink_to(tmp_path / "secret" / "key.txt")
    (folder.path / "linked").symlink_to(tmp_path / "secret")
    folder.config.unlink()
    folder.config.symlink_to(tmp_path / "secret" / "key.txt")
    for path in ("link.txt", "linked/key.txt"):
        journal.append({"kind": "artifact", "path": path})
    journal.status("finished")
    assert publish(folder, store, lambda: False)[0]
    assert caplog.text.count("is a link out of the run folder: not logged") == 3
    uploaded = [path for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()]
    assert not any(b"secret" in path.read_bytes() for path in uploaded)


@pytest.mark.parametrize("name", ["pct%41", "what?", "a#b ö"])
def test_a_folder_with_any_name_can_hold_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    cwd = tmp_path / name
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    uri = tracking_uri(Config())
    open_store(uri)
    folder = RunFolder(cwd / "runs" / "run")
    folder.path.mkdir(parents=True)
    folder.config.write_text("run: {}\n")
    journal = Journal(folder.journal)
    journal.append(run_record("run"))
    journal.status("running")
    journal.metrics({"train/loss": 1.0}, 1)
    journal.status("finished")
    assert publish(folder, uri, lambda: False)[0]
    # MLflow makes an empty folder whose name it has not decoded; all files are here
    assert all(path.is_relative_to(cwd) for path in tmp_path.rglob("*") if path.is_file())
    assert {path.name for path in cwd.iterdir()} >= {"mlflow.db", "mlartifacts"}
    assert history(uri, "train/loss") == [(1, 1.0)]


def test_a_server_that_goes_away_while_the_description_is_written_gets_it_later(
    store: str, folder: RunFolder, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.status("finished")
    assert publish(folder, store, lambda: False)[0]
    journal.status("running")
    journal.metrics({"eval/accuracy": 0.5}, 5)
    journal.status("finished")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        fail_from_here = lambda *_: patch.setattr(MlflowClient, "log_batch", fail)  # noqa: E731
        patch.setattr("pipeline.tracking.uploads._log_figures", fail_from_here)
        with pytest.raises(ConnectionError):
            Publisher(folder, store).drain()
    assert publish(folder, store, lambda: False)[0]
    assert "50.00%" in the_run(store).data.tags["mlflow.note.content"]


def test_a_description_too_long_for_mlflow_is_renewed_too(store: str, folder: RunFolder, journal: Journal) -> None:
    journal.append({"kind": "params", "values": {"data.dataset": "x" * TAG_LENGTH}})
    notes = []
    for step in (1, 2):
        journal.metrics({"eval/accuracy": 0.25 * step}, step)
        journal.status("finished")
        assert publish(folder, store, lambda: False)[0]
        notes.append(the_run(store).data.tags["mlflow.note.content"].partition(" at")[0])
        journal.status("running")
    assert notes == ["**finished**: accuracy 25.00%", "**finished**: accuracy 50.00%"]


def test_a_training_that_resumes_the_run_while_a_death_is_shown_keeps_its_state(
    store: str, folder: RunFolder, journal: Journal
) -> None:
    folder.update_status(state="running")
    answers = iter([False])
    Publisher(folder, store).drain(lambda: next(answers, True))
    assert folder.status()["state"] == "running"


def test_a_record_that_is_damaged_before_its_file_was_published_holds_up_nothing(
    store: str, folder: RunFolder, journal: Journal
) -> None:
    journal.status("finished")
    begin = folder.journal.stat().st_size
    journal.append({"kind": "artifact", "path": "config.yaml"})
    progress = Progress(folder, store)
    progress.advance(folder.journal, folder.journal.stat().st_size, begin)
    content = folder.journal.read_bytes()
    folder.journal.write_bytes(content[:begin] + b"\0" * (len(content) - begin - 1) + b"\n")
    assert publish(folder, store, lambda: False)[0]
    assert Progress(folder, store).files_left == []
