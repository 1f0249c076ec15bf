"""The program of the commands, by either of its names."""

from __future__ import annotations

import sys

import pytest

from pipeline.__main__ import main


@pytest.mark.parametrize(
    ("started_as", "name"), [("/usr/bin/convoy", "convoy"), ("/src/pipeline/__main__.py", "python -m pipeline")]
)
def test_it_is_called_as_it_was_started(
    started_as: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [started_as])
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {name} [-h] command ...")
    offered = {line.split()[0] for line in shown.splitlines() if line.startswith("    ") and line[4] != " "}
    assert offered == {"train", "prepare", "sync", "report", "sweep"}  # not what a training starts


def test_a_word_that_no_command_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["sync", "--everything"])
    assert end.value.code == 2
    assert "unrecognized arguments: --everything" in capsys.readouterr().err
