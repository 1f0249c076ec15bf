"""`python -m pipeline prepare`: datasets in place before a training needs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.__main__ import main


def test_a_dataset_that_is_there_is_verified(mnist_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "mnist", "digits", "--root", str(mnist_root)]) == 0
    assert capsys.readouterr().out == "mnist: ready, and verified\ndigits: ready, and verified\n"


def test_a_damaged_one_is_named(tmp_path: Path, mnist_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (mnist_root / "MNIST" / "raw").iterdir():
        (raw / path.name).write_bytes(path.read_bytes()[:-1])
    assert main(["prepare", "mnist", "--root", str(tmp_path)]) == 1
    assert "idx" in capsys.readouterr().err


def test_an_unknown_one_is_refused_with_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "minst", "--root", str(tmp_path)]) == 2
    assert "minst: unknown; did you mean mnist? accepted: digits, mnist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
