"""`sync`: what is left of any run, once, with a table of what was published."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.__main__ import main
from pipeline.commands.publish import publish
from pipeline.run.folder import RunFolder
from pipeline.run.journal import Journal
from tests.records import run_record
from tests.servers import reserved_port


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def make_run(runs: Path, name: str, uri: str, *, num_points: int = 3) -> RunFolder:
    """A finished run that nobody has published."""
    folder = RunFolder(runs / name)
    folder.path.mkdir(parents=True)
    folder.config.write_text("run: {}\n")
    journal = Journal(folder.journal)
    journal.append(run_record(name, run_id=f"{runs}/{name}", experiment=str(runs), uri=uri))
    journal.append({"kind": "params", "values": {"optim.lr": 0.5, "steps_per_epoch": 10}})
    journal.append({"kind": "tags", "values": {"host": "here", "device": "cpu"}})
    journal.status("running")
    for step in range(num_points):
        journal.metrics({"train/loss": step}, step)
    journal.status("finished")
    journal.close()
    return folder


def points(uri: str, experiment: Path) -> dict[str, list[tuple[int, float]]]:
    client = MlflowClient(tracking_uri=uri)
    found = client.search_runs([client.get_experiment_by_name(str(experiment)).experiment_id])
    histories = {run.info.run_name: client.get_metric_history(run.info.run_id, "train/loss") for run in found}
    assert len(histories) == len(found), "a run stands there twice"
    return {name: sorted((p.step, p.value) for p in history) for name, history in histories.items()}


def test_without_a_folder_every_run_with_something_left_is_published_and_told(
    tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    make_run(runs, "one", uri, num_points=1500)
    assert main(["sync", "--runs", str(runs)]) == 0
    two = make_run(runs, "two", uri)
    capsys.readouterr()
    assert main(["sync", "--runs", str(runs)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "MLflow", "run", "points", "params", "tags", "files", "models", "outcome"]
    run_id = two.status()["mlflow_run_id"]
    assert row.split() == ["two", run_id, "3", "2", "2", "2", "0", "published", "to", uri]  # files: config, curves
    expected = {"one": [(s, float(s)) for s in range(1500)], "two": [(s, float(s)) for s in range(3)]}
    assert points(uri, runs) == expected
    assert main(["sync", "--runs", str(runs)]) == 0
    assert capsys.readouterr().out == "nothing is left to publish\n"
    assert points(uri, runs) == expected


def test_a_copy_of_the_folder_on_another_machine_publishes_into_the_same_run(tmp_path: Path, uri: str) -> None:
    runs = tmp_path / "runs"
    folder = make_run(runs, "one", uri)
    assert main(["sync", str(folder.path)]) == 0
    away = tmp_path / "away" / "one"
    shutil.copytree(folder.path, away)
    (away / "published.json").unlink()
    assert main(["sync", str(away)]) == 0
    assert points(uri, runs) == {"one": [(0, 0.0), (1, 1.0), (2, 2.0)]}


def test_a_torn_last_line_is_not_something_left(tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "runs", "one", uri)
    with folder.journal.open("ab") as file:
        file.write(b'{"v":1,"kind":"met')
    assert main(["sync", str(folder.path)]) == 0
    capsys.readouterr()
    assert main(["sync", "--runs", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out == "nothing is left to publish\n"


def test_one_that_cannot_be_published_stops_no_other(
    tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.commands.sync.publish", partial(publish, after_death=1.0))
    runs = tmp_path / "runs"
    make_run(runs, "b", uri)
    with reserved_port() as port:
        make_run(runs, "a", f"http://127.0.0.1:{port}")
        assert main(["sync", "--runs", str(runs)]) == 1
    out = capsys.readouterr().out
    assert "NOT all published to http://127.0.0.1" in out
    assert points(uri, runs)["b"] == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_what_is_no_run_folder_is_named_and_nothing_published(
    tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "runs", "one", uri)
    assert main(["sync", str(folder.path), str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path}/nowhere: no run folder" in capsys.readouterr().err
    assert not (folder.path / "published.json").exists()


def test_a_missing_folder_of_runs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", "--runs", str(tmp_path / "runs")]) == 2
    assert "no such folder; name run folders" in capsys.readouterr().err
