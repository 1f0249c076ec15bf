"""Sweeps: which runs a file makes, what is missing of them, and what each is called to train."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.run.folder import RunFolder
from pipeline.run.sweep import (
    SweepError,
    find_all_runs,
    find_runs,
    open_sweep_folder,
    read_sweep,
    read_sweep_folder,
)
from tests.base.disk import record_disk
from tests.faults.trainings import records, train_forked

ROOT = Path(__file__).parents[2]
GRID = """
config: ROOT/configs/default.yaml
settings: [train.epochs=3]
grid:
  optim.lr: [1e-3, 0.1]
  optim.name: [sgd, adam]
"""
RANDOM = """
config: ROOT/configs/default.yaml
random:
  number: NUMBER
  seed: 7
  keys:
    optim.lr: {log_uniform: [0.001, 1]}
    model.arguments.dropout: {uniform: [0, 0.5]}
    train.epochs: {integer: [1, 9]}
    optim.name: {choice: [sgd, adam]}
"""


def write(folder: Path, text: str = GRID, number: int = 1) -> Path:
    path = folder / "rates.yaml"
    path.write_text(text.replace("ROOT", str(ROOT)).replace("NUMBER", str(number)))
    return path


def test_a_grid_has_every_combination_and_values_stay_as_they_are_written(tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path))
    assert list(sweep.runs) == [
        "lr-1e-3_optim-sgd",
        "lr-1e-3_optim-adam",
        "lr-0.1_optim-sgd",
        "lr-0.1_optim-adam",
    ]
    assert sweep.runs["lr-1e-3_optim-adam"] == ("train.epochs=3", "optim.lr=1e-3", "optim.name=adam")
    assert sweep.name == "rates"


def test_points_drawn_at_random_stay_when_more_are_drawn_and_are_within_their_ranges(tmp_path: Path) -> None:
    few = list(read_sweep(write(tmp_path, RANDOM, number=5)).runs.items())
    many = list(read_sweep(write(tmp_path, RANDOM, number=40)).runs.items())
    assert many[:5] == few
    points = [dict(setting.split("=") for setting in settings) for _, settings in many]
    for values in points:
        assert 0.001 <= float(values["optim.lr"]) <= 1
        assert 0 <= float(values["model.arguments.dropout"]) <= 0.5
        assert int(values["train.epochs"]) in range(1, 10)
    assert sum(float(values["optim.lr"]) < 0.03 for values in points) in range(10, 31)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("optim.lr:", "optim.learn:", "optim.learn: unknown key; did you mean optim."),
        ("optim.lr:", "run.name:", "run.name: cannot be swept; each run is named by its values"),
        ("[1e-3, 0.1]", "[]", "grid.optim.lr: "),
        ("[1e-3, 0.1]", "[0.1, 0.1]", "lr-0.1_optim-sgd would be there twice"),
        ("grid:", "points:", "points: unknown; docs/slurm.md and configs/sweeps/ show"),
        (
            "grid:",
            "random: {number: 2, keys: {optim.lr: {uniform: [0, 1]}}}\ngrid:",
            "accepted: one of grid and random",
        ),
        ("config:", "recipe:", "config: Field required"),
        (
            "grid:",
            "random: {number: 2, keys: {optim.lr: {uniform: [2, 1]}}}\ngrid:",
            "[lowest, highest], given [2.0, 1",
        ),
        ("grid:", "random: {number: 2, keys: {optim.lr: {uniform: [0, 1], choice: [1]}}}\ngrid:", "one of choice, un"),
        ("config:", "config: [", "cannot be read"),
        ("[train.epochs=3]", "[optim.lr=3]", "optim.lr cannot be set for all runs"),
        ("[train.epochs=3]", "[run.name=x]", "run.name cannot be set for all runs"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write(tmp_path, GRID.replace(old, new))
    with pytest.raises(SweepError) as caught:
        read_sweep(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("written", "name"), [("1e+5", "lr-1e5"), ("1e-5", "lr-1e-5"), ("-1", "lr--1"), ("a b/c", "lr-a-b-c")]
)
def test_names_tell_values_apart(tmp_path: Path, written: str, name: str) -> None:
    sweep = read_sweep(write(tmp_path, GRID.replace("[1e-3, 0.1]", f"['{written}']").replace("[sgd, adam]", "[sgd]")))
    assert list(sweep.runs) == [f"{name}_optim-sgd"]


def test_the_sweeps_in_configs_are_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
    assert len(files) == 3
    for file in files:
        assert main(["sweep", str(file)]) == 0
        assert f"configs/sweeps/{file.name}" in file.read_text()


def test_what_is_missing_is_shown_with_the_jobs_that_train_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path)
    for name, state in (
        ("lr-1e-3_optim-sgd", "finished"),
        ("lr-0.1_optim-sgd", "failed"),
        ("lr-0.1_optim-adam", "running"),
    ):
        folder = RunFolder(tmp_path / "runs" / "rates" / name)
        folder.path.mkdir(parents=True)
        folder.update_status(state=state, epoch=4)
    assert main(["sweep", str(file), "train.epochs=4", "--options=--gpus-per-node=2 --comment='a b'"]) == 0
    shown = capsys.readouterr().out
    assert "0  finished    lr-1e-3_optim-sgd" in shown
    assert "1  missing     lr-1e-3_optim-adam" in shown
    assert "3  killed      lr-0.1_optim-adam" in shown
    script = ROOT / "slurm" / "sweep.sbatch"
    assert f"sbatch --gpus-per-node=2 '--comment=a b' --array=1,2,3 {script} {file} train.epochs=4\n" in shown
    assert not (tmp_path / "runs" / "rates" / "sweep.json").exists()
    assert main(["sweep", str(file), "train.epochs=5"]) == 0
    assert "0  unfinished  lr-1e-3_optim-sgd" in capsys.readouterr().out


def test_an_element_is_what_main_py_is_called_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path)
    own = ["run.dir=runs/rates", "run.name=lr-1e-3_optim-adam"]
    settings = ["train.epochs=3", "run.seed=4", "optim.lr=1e-3", "optim.name=adam"]
    config = ["--config", str(ROOT / "configs" / "default.yaml")]
    assert main(["sweep", str(file), "run.seed=4", "--element", "1"]) == 0
    journal_only = "tracking.enabled=false"
    assert capsys.readouterr().out.split("\0") == [*config, journal_only, *settings, *own, ""]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert main(["sweep", str(file), "run.seed=4", "--element", "1"]) == 0
    assert capsys.readouterr().out.split("\0") == [*config, *settings, *own, ""]
    assert main(["sweep", str(file), "run.seed=4", "--element", "4"]) == 2
    assert "element 4 is none of the sweep; accepted: 0, 1, 2, 3" in capsys.readouterr().err


def test_a_number_means_the_same_run_whatever_becomes_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    open_sweep_folder(tmp_path / "runs" / "rates", read_sweep(write(tmp_path)))
    file = write(tmp_path, GRID.replace("[1e-3, 0.1]", "[0.5, 0.1]"))
    assert main(["sweep", str(file), "--element", "3"]) == 0
    assert "run.name=lr-0.1_optim-adam" in capsys.readouterr().out
    assert main(["sweep", str(file), "--element", "4"]) == 0
    assert "run.name=lr-0.5_optim-sgd" in capsys.readouterr().out
    assert main(["sweep", str(file), "--element", "0"]) == 2
    assert "element 0 (lr-1e-3_optim-sgd) is not in its file any more; acc" in capsys.readouterr().err


def test_what_slurm_has_in_its_queue_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (
        ("squeue", 'printf "%s\\n" "17 1" "17 N/A" "99 2"'),
        ("sbatch", "echo 17; echo $* >> submitted"),
    ):
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    file = write(tmp_path)
    assert main(["sweep", str(file), "--submit", "train.seed=3".replace("train", "run"), "--at-once=2"]) == 0
    shown = capsys.readouterr().out
    assert "submitted as job 17" in shown
    trained, published = (tmp_path / "submitted").read_text().splitlines()
    assert trained.split()[:2] == ["--parsable", "--array=0,1,2,3%2"]
    assert trained.endswith(f"{file} run.seed=3")
    assert published.split()[:2] == ["--parsable", "--dependency=afterany:17"]
    assert main(["sweep", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "1  queued      lr-1e-3_optim-adam" in shown
    assert "--array=0,2,3 " in shown
    assert f"{file} run.seed=3\n" in shown  # with the settings that it was submitted with
    assert main(["sweep", str(file), "run.seed=4"]) == 2
    assert "was trained with run.seed=3, not with run.seed=4" in capsys.readouterr().err
    assert main(["sweep", str(file), "--options=--array=1-2"]) == 2


def test_a_wrong_setting_of_an_element_is_said_before_anything_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(write(tmp_path, GRID.replace("0.1", "-1"))), "--submit"]) == 2
    error = capsys.readouterr().err
    assert "lr--1_optim-sgd: " in error
    assert "optim.lr = -1" in error
    assert not (tmp_path / "runs").exists()


def test_without_sbatch_it_says_where_to_submit(tmp_path: Path) -> None:
    file = write(tmp_path)
    environment = os.environ | {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipeline", "sweep", str(file), "--submit"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "login node" in done.stderr


def test_a_folder_stays_the_same_sweep_and_is_never_a_runs(tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path))
    folder = tmp_path / "runs" / "rates"
    open_sweep_folder(folder, sweep)
    first = read_sweep_folder(folder)
    open_sweep_folder(folder, sweep)
    assert read_sweep_folder(folder) == first
    assert first is not None
    assert first["names"] == first["numbered"] == list(sweep.runs)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").touch()
    with pytest.raises(SweepError, match="is the folder of a run"):
        open_sweep_folder(tmp_path / "run", sweep)
    assert find_runs([folder, tmp_path / "run"]) == [tmp_path / "run"]
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "journal.jsonl").touch()
    assert find_runs([folder, tmp_path / "run"]) == [folder / "a", folder / "b", tmp_path / "run"]
    assert find_all_runs(tmp_path / "runs") == [folder / "a", folder / "b"]


def test_the_identity_of_a_sweep_is_on_the_disk_before_it_replaces_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rates"
    events = record_disk(monkeypatch)
    open_sweep_folder(folder, read_sweep(write(tmp_path)))
    size = (folder / "sweep.json").stat().st_size
    temporary = ".writing-sweep.json"
    assert events == [("fsync", temporary, size), ("rename", temporary, "sweep.json"), ("fsync", "rates", 0)]


def test_a_run_in_the_folder_of_a_sweep_records_which_it_is(tmp_path: Path) -> None:
    open_sweep_folder(tmp_path, read_sweep(write(tmp_path)))
    assert train_forked(tmp_path, 1).failure is None
    assert records(tmp_path)[0]["sweep"] == read_sweep_folder(tmp_path)
