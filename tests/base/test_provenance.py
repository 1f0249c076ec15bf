"""The tags that say which code trained: the commit of Convoy's own checkout, or none."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from pipeline.base.provenance import collect_provenance


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "code.py").write_text("1\n")
    git(folder, "add", "code.py")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "one")
    return folder


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_and_whether_files_were_changed(checkout: Path) -> None:
    tags = collect_provenance({}, checkout)
    assert tags["mlflow.source.git.commit"] == git(checkout, "rev-parse", "HEAD")
    assert tags["git.dirty"] == "false"
    assert tags["torch"] == torch.__version__
    (checkout / "notes.txt").write_text("not of the code")
    assert collect_provenance({}, checkout)["git.dirty"] == "false"
    (checkout / "code.py").write_text("2\n")
    assert collect_provenance({}, checkout)["git.dirty"] == "true"


def test_a_repository_around_the_code_is_another_project(checkout: Path) -> None:
    installed = checkout / ".venv" / "lib" / "site-packages"
    installed.mkdir(parents=True)
    assert "mlflow.source.git.commit" not in collect_provenance({}, installed)
    assert "git.dirty" not in collect_provenance({}, installed)


def test_a_repository_that_the_environment_names_is_not_asked(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(checkout / ".git"))
    assert "mlflow.source.git.commit" not in collect_provenance({}, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give the checkout to somebody else")
def test_a_checkout_of_another_owner_is_asked_too(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    for path in (checkout, checkout / ".git"):
        os.chown(path, 65534, 65534)
    assert collect_provenance({}, checkout)["mlflow.source.git.commit"] == commit


def test_the_job_of_slurm(tmp_path: Path) -> None:
    tags = collect_provenance({"SLURM_JOB_ID": "17", "SLURM_JOB_PARTITION": "gpu", "SLURM_OTHER": "no"}, tmp_path)
    assert {key: value for key, value in tags.items() if key.startswith("slurm")} == {
        "slurm_job_id": "17",
        "slurm_job_partition": "gpu",
    }
