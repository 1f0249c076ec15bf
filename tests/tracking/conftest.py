"""A run folder with its journal, and a store to publish it to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.models.bundle import TRUST_VARIABLE
from pipeline.run.folder import RunFolder
from pipeline.run.journal import Journal
from pipeline.tracking.store import open_store
from tests.records import run_record


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new store takes seconds to be created, so it is done once and copied."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def _trusted_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a training: models of these tests may be imported."""
    monkeypatch.setenv(TRUST_VARIABLE, "1")


@pytest.fixture
def store(migrated: Path, tmp_path: Path) -> str:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "run")
    folder.path.mkdir(parents=True)
    folder.config.write_text("run: {}\n")
    return folder


@pytest.fixture
def journal(folder: RunFolder) -> Iterator[Journal]:
    journal = Journal(folder.journal)
    journal.append(run_record("run"))
    journal.status("running")
    yield journal
    journal.close()
