"""The page that compares runs: right, harmless, and made from files alone."""

from __future__ import annotations

import html
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest

from pipeline.__main__ import main
from pipeline.figures.drawing import draw_confusion_matrix
from pipeline.report.page import format_duration
from pipeline.run.folder import RunFolder
from pipeline.run.journal import Journal
from tests.report.recorded import Tables, append, make_report, record_run

ROOT = Path(__file__).parents[2]
NAMES = ["nought", "one"]


def test_it_shows_results_with_their_uncertainty_and_only_the_settings_that_differ(tmp_path: Path) -> None:
    slow = record_run(tmp_path / "slow", {"optim.lr": 0.1}, accuracy=0.8)
    fast = record_run(tmp_path / "fast", {"optim.lr": 1.0}, accuracy=0.95)
    page = Tables(make_report(tmp_path, slow, fast))
    header, *rows = page.tables["differing"]
    assert header == ["run", "optim.lr"]
    assert [(row[0][1:], row[1]) for row in rows] == [("slow", "0.1"), ("fast", "1.0")]
    _, slow_row, fast_row = page.tables["results"]
    assert (slow_row[2], fast_row[2]) == ("80.00%160 of 200", "95.00%190 of 200")
    assert fast_row[3] == "91.0\N{EN DASH}97.3%"  # Wilson's interval of 190 of 200, by hand
    assert (fast_row[6], fast_row[7], fast_row[9], fast_row[10]) == ("4", "200", "1,000", "2")
    settings = {row[0]: row[1:] for row in page.tables["params"][1:]}
    assert settings["optim.lr"] == ["0.1", "1.0"]
    assert settings["loss"] == ["nll", "nll"]


def test_it_loads_nothing_and_runs_no_script(tmp_path: Path) -> None:
    runs = [record_run(tmp_path / name) for name in ("a", "b")]
    text = make_report(tmp_path, *runs)
    page = Tables(text)
    assert all(address.startswith("data:") for address in page.loaded)
    assert page.loaded
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\((?!#)", text)


def test_what_comes_from_runs_is_text_and_never_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"'&"
    folder = record_run(tmp_path / "plain", {"optim.lr": evil, f"key.{evil}": "1"}, dataset=evil)
    journal = Journal(folder.journal)
    append(journal, "tags", values={"mlflow.source.git.commit": evil, "host": evil, "gpu": evil})
    journal.metrics({"time/" + "x_ms": 1.0}, 300)
    journal.close()
    renamed = RunFolder(folder.path.rename(tmp_path / evil.replace("/", "")))
    text = make_report(tmp_path, renamed, record_run(tmp_path / "other"))
    tags = Tables(text).tags
    assert "script" not in tags
    assert tags.count("img") == 4  # the charts
    assert evil not in text
    assert html.escape(evil, quote=True).replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in text


def test_a_link_from_a_run_folder_cannot_be_a_script(tmp_path: Path) -> None:
    folder = record_run(tmp_path / "run")
    published = {"javascript:alert(1)//": {"mlflow_run_id": '"><script>', "mlflow_experiment_id": "1"}}
    (folder.path / "published.json").write_text(json.dumps(published))
    text = make_report(tmp_path, folder)
    assert re.findall(r'href="([^"]*)"', text)
    assert all(address.startswith("http://127.0.0.1:5000/") for address in re.findall(r'href="([^"]*)"', text))
    assert "script" not in Tables(text).tags


def test_runs_evaluated_on_other_data_are_called_incomparable_and_none_is_called_best(tmp_path: Path) -> None:
    few, many = record_run(tmp_path / "few"), record_run(tmp_path / "many", num_eval=10_000, accuracy=0.99)
    text = make_report(tmp_path, few, many)
    assert "Accuracies and losses cannot be compared" in text
    assert 'class="best"' not in text
    assert 'class="best"' in make_report(tmp_path, few, record_run(tmp_path / "better", accuracy=0.95))


def test_torn_and_damaged_lines_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = record_run(tmp_path / "run")
    whole = make_report(tmp_path, folder)
    with folder.journal.open("ab") as file:
        file.write(b'{"v":1,"kind":"metric","key":"eval/accu')
    torn = make_report(tmp_path, folder)
    assert re.sub("Made.*", "", torn) == re.sub("Made.*", "", whole)
    with folder.journal.open("ab") as file:
        file.write(b"\n")
    damaged = make_report(tmp_path, folder)
    assert re.sub("Made.*", "", damaged) == re.sub("Made.*", "", whole)
    assert "a damaged line is passed over" in caplog.text


def test_without_a_journal_nothing_is_written_and_all_that_is_wrong_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = record_run(tmp_path / "good")
    arguments = [str(good.path), str(tmp_path / "none"), str(tmp_path), "--out", str(tmp_path / "report.html")]
    assert main(["report", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("no run folder (it has no journal.jsonl)") == 2
    assert str(tmp_path / "none") in said
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_page_that_cannot_be_written_leaves_the_old_one_and_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a disk that is full, as a limit on the size of files plays it."""
    folder = record_run(tmp_path / "run")
    out = tmp_path / "report.html"
    out.write_text("the old page")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert main(["report", str(folder.path), "--out", str(out)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "choose another --out" in capsys.readouterr().err
    assert out.read_text() == "the old page"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]
    assert main(["report", str(folder.path), "--out", str(folder.path)]) == 1  # a folder


def test_an_empty_journal_and_one_run_alone_make_a_page_too(tmp_path: Path) -> None:
    empty = RunFolder(tmp_path / "empty")
    Journal(empty.journal).close()
    text = make_report(tmp_path, empty)
    assert "empty has no evaluation yet" in text
    alone = make_report(tmp_path, record_run(tmp_path / "alone"))
    assert "<h1>alone</h1>" in alone
    assert "What differs" not in alone
    assert "Validation accuracy" in alone


def test_it_leaves_run_folders_as_they_are(tmp_path: Path) -> None:
    folder = record_run(tmp_path / "run", states=("running",))
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    make_report(tmp_path, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before


def test_the_phases_of_a_step_are_shown_in_its_order(tmp_path: Path) -> None:
    folder = record_run(tmp_path / "run")
    journal = Journal(folder.journal)
    journal.metrics({"time/update_ms": 7.5, "time/data_ms": 1.5, "time/new_phase_ms": 0.5}, 200)
    journal.close()
    text = make_report(tmp_path, folder)
    assert re.findall(r'class="phase"[^>]*>([^<]*)', text) == ["data", "forward", "update", "new phase"]
    assert 'title="forward: 2.5 ms"' in text


def test_figures_of_a_run_are_in_the_page_and_drawn_for_one_that_was_never_published(tmp_path: Path) -> None:
    folder = record_run(tmp_path / "run")
    (folder.path / "evaluation").mkdir()
    arrays: dict[str, Any] = {"confusion": np.array([[90, 10], [5, 95]])}
    for group in ("wrong", "samples"):
        arrays |= {f"{group}_images": np.zeros((2, 1, 8, 8), np.uint8), f"{group}_labels": np.array([0, 1])}
        arrays |= {f"{group}_predicted": np.array([1, 0]), f"{group}_confidence": np.array([0.9, 0.8])}
    np.savez(folder.path / "evaluation" / "e.npz", **arrays)
    journal = Journal(folder.journal)
    append(journal, "evaluation", path="evaluation/e.npz", step=200, class_names=NAMES)
    journal.close()
    drawn = make_report(tmp_path, folder)
    assert drawn.count('src="data:image/png;base64,iVBOR') == 3
    assert not folder.figures.exists()
    draw_confusion_matrix(arrays["confusion"], NAMES, folder.figures / "confusion_matrix.png", title="run")
    (folder.figures / "broken.png").write_bytes(b"no picture")
    (folder.figures / ".writing-wrong.png").write_bytes((folder.figures / "confusion_matrix.png").read_bytes())
    there = make_report(tmp_path, folder)
    assert there.count('src="data:image/png;base64,iVBOR') == 1
    assert "Confusion matrix of run" in there


@pytest.mark.parametrize("damaged", [b"", b"PK\x03\x04 torn"])
def test_an_evaluation_that_cannot_be_read_is_left_out(tmp_path: Path, damaged: bytes) -> None:
    folder = record_run(tmp_path / "run")
    (folder.path / "evaluation").mkdir()
    (folder.path / "evaluation" / "e.npz").write_bytes(damaged)
    journal = Journal(folder.journal)
    append(journal, "evaluation", path="evaluation/e.npz", step=200, class_names=NAMES)
    journal.close()
    assert "data:image/png" not in make_report(tmp_path, folder)


def test_where_mlflow_has_the_runs_is_said_for_a_server_and_for_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [record_run(tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        entry = {"mlflow_run_id": f"id-{folder.name}", "mlflow_experiment_id": "7"}
        stores = {"http://server:5000": entry, f"sqlite:///{tmp_path}/my store.db": entry}
        (folder.path / "published.json").write_text(json.dumps(stores))
    make_report(tmp_path, *folders)
    said = capsys.readouterr().out
    assert f"mlflow server --backend-store-uri 'sqlite:///{tmp_path}/my store.db'" in said
    (address,) = re.findall(r"(http://server:5000/#/compare-runs\?\S+)", said)
    query = parse_qs(address.partition("?")[2])
    assert json.loads(query["runs"][0]) == ["id-a", "id-b"]
    assert json.loads(query["experiments"][0]) == ["7"]
    assert "http://server:5000/#/experiments/7/runs?workflowType=machine_learning&compareRunsMode=CHART" in said


def test_it_imports_neither_torch_nor_mlflow(tmp_path: Path) -> None:
    record_run(tmp_path / "run")
    code = (
        "import sys\n"
        "from pipeline.__main__ import main\n"
        "assert main(['report', 'run']) == 0\n"
        "loaded = {'torch', 'mlflow'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "report.html: 1 run," in done.stdout


@pytest.mark.parametrize(("seconds", "said"), [(0, "0:00:00"), (8.26, "0:00:08"), (11_530, "3:12:10")])
def test_durations_are_hours_minutes_and_seconds(seconds: float, said: str) -> None:
    assert format_duration(seconds) == said
