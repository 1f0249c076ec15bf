"""Runs read from their folders, and the remarks on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.report.comparison import Accuracy, differing_params, read_run, read_runs
from pipeline.report.remarks import find_remarks
from pipeline.run.journal import Journal
from tests.report.recorded import Tables, append, make_report, record_run


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (("running", "finished"), None),
        (("running", "preempted"), "was stopped on request after step 200"),
        (("running", "failed"), "failed after step 200"),
        (("running",), "says that it is running (after step 200), but no training holds its folder here"),
    ],
)
def test_a_run_that_is_not_finished_is_marked(tmp_path: Path, states: tuple[str, ...], said: str | None) -> None:
    remarks = find_remarks([read_run(record_run(tmp_path / "run", states=states))])
    assert [said in remark.text for remark in remarks if said] == ([True] if said else [])
    if said is None:
        assert remarks == []


def test_the_state_that_the_publisher_found_counts_for_a_training_that_recorded_no_end(tmp_path: Path) -> None:
    folder = record_run(tmp_path / "run", states=("running",))
    folder.update_status(state="failed")
    assert read_run(folder).state == "failed"


def test_other_losses_and_other_data_under_one_name_are_called_incomparable(tmp_path: Path) -> None:
    mine, other = record_run(tmp_path / "mine"), record_run(tmp_path / "other", {"loss": "mse"})
    assert any("Losses cannot be compared" in r.text for r in find_remarks(read_runs([mine.path, other.path])))
    journal = Journal(mine.journal)
    append(journal, "dataset", name="digits", digest="another", source="s", num_train=1600, num_eval=200)
    journal.close()
    assert any("the data differ" in remark.text for remark in find_remarks(read_runs([mine.path, other.path])))


def test_a_difference_within_chance_is_called_so_and_a_real_one_is_not(tmp_path: Path) -> None:
    paths = [record_run(tmp_path / name, accuracy=a).path for name, a in (("a", 0.9), ("b", 0.91), ("c", 0.99))]
    near, far = find_remarks(read_runs(paths[:2])), find_remarks(read_runs(paths))
    # 2 of 200 images: 0.01 / sqrt(0.09 / 200 + 0.0819 / 200)
    assert ["2 of 200 images at their ends, 0.3 standard errors" in remark.text for remark in near] == [True]
    assert far == []


def test_values_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    folder = record_run(tmp_path / "run")
    journal = Journal(folder.journal)
    for step in (300, 310, 320):
        journal.metrics({"train/loss": float("nan")}, step)
    journal.close()
    run = read_run(folder)
    assert run.num_nonfinite == {"train/loss": 3}
    assert run.last("train/loss") == 10 / 200
    assert "train/loss 3 times" in make_report(tmp_path, folder)


def test_runs_of_one_name_and_a_folder_given_twice_are_told_apart(tmp_path: Path) -> None:
    paths = [record_run(tmp_path / where / "mnist").path for where in ("here", "there")]
    runs = read_runs([*paths, paths[0], paths[0] / ".." / "mnist"])
    assert [run.name for run in runs] == ["here/mnist", "there/mnist"]


def test_attempts_and_the_settings_that_changed_between_them(tmp_path: Path) -> None:
    folder = record_run(tmp_path / "run", states=("running", "preempted"))
    journal = Journal(folder.journal)
    append(journal, "tags", values={"attempt.1.end": "stopped on SIGTERM behind step 200"})
    append(journal, "tags", values={"attempt.2.world_size": "4", "attempt.2.optim.lr": "0.25", "attempt.2.host": "b"})
    append(journal, "status", state="running", timestamp_ms=5_000)
    append(journal, "status", state="running", timestamp_ms=8_000)  # the second was killed
    journal.metrics({"train/loss": 0.01}, 210)
    append(journal, "status", state="finished", timestamp_ms=9_000)
    journal.close()
    run = read_run(folder)
    assert [attempt.state for attempt in run.attempts] == ["preempted", "killed", "finished"]
    assert [attempt.last_step for attempt in run.attempts] == [200, None, 210]
    assert run.attempts[0].tags["end"] == "stopped on SIGTERM behind step 200"
    assert run.tag_history("world_size") == ["2", "4"]
    assert run.attempts[1].changed == {"optim.lr": "0.25"}
    assert run.params["optim.lr"] == "0.25"
    assert differing_params([run, read_run(record_run(tmp_path / "other"))]) == ["optim.lr"]
    rows = Tables(make_report(tmp_path, folder)).tables["attempts"]
    assert "optim.lr=0.25" in rows[2][-1]


def test_a_run_of_format_1_reads_as_one_of_today(tmp_path: Path) -> None:
    """Version 1 had the tags of later attempts as `resume.<n>.`, counted from 0."""
    recorded = record_run(tmp_path / "run", states=("running", "preempted")).journal.read_text().splitlines()
    paths = []
    for version, later in ((1, "resume.1"), (2, "attempt.2")):
        more = (
            {"kind": "tags", "values": {"attempt.1.end": "stopped"}},
            {"kind": "status", "state": "running", "timestamp_ms": 5_000},
            {"kind": "tags", "values": {f"{later}.world_size": "4", f"{later}.optim.lr": "0.25"}},
        )
        paths.append(tmp_path / f"version-{version}")
        paths[-1].mkdir()
        lines = [json.dumps(record | {"v": version}) for record in (*map(json.loads, recorded), *more)]
        (paths[-1] / "journal.jsonl").write_text("\n".join(lines) + "\n")
    old, new = read_runs(paths)
    assert old.tag_history("world_size") == ["2", "4"]
    assert old.attempts[1].changed == {"optim.lr": "0.25"}
    assert (old.params, old.tags, old.attempts, old.state) == (new.params, new.tags, new.attempts, new.state)
    assert old.curves == new.curves


def test_values_of_a_resumed_attempt_read_as_those_of_the_first(tmp_path: Path) -> None:
    folder = record_run(tmp_path / "run", {"train.compile": False, "train.clip_norm": 1.0})
    journal = Journal(folder.journal)
    append(journal, "tags", values={"attempt.2.train.compile": "True", "attempt.2.train.clip_norm": "None"})
    append(journal, "status", state="running", timestamp_ms=5_000)
    journal.close()
    params = read_run(folder).params
    assert (params["train.compile"], params["train.clip_norm"]) == ("true", "null")


def test_wilsons_interval() -> None:
    """Against the figures of Newcombe, Stat. Med. 17 (1998), table I."""
    for correct, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert Accuracy(correct / total, total).interval == pytest.approx((low, high), abs=5e-5)
    assert Accuracy(1.0, 360).interval == pytest.approx((0.98944, 1.0), abs=5e-5)
