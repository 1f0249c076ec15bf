"""A file that is replaced is the old one or the whole new one, also after a failure of the program or the power."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import IO

import pytest

from pipeline.base.files import locked, write_atomically
from tests.base.disk import record_disk


def test_text_bytes_and_what_a_function_writes_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    for content, expected in (("ü", "ü".encode()), (b"\xff", b"\xff"), (lambda file: file.write(b"w"), b"w")):
        write_atomically(path, content)
        assert path.read_bytes() == expected
        assert list(path.parent.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_is_renamed_and_its_folder_behind_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = record_disk(monkeypatch)
    write_atomically(tmp_path / "status.json", b"12345")
    assert events == [
        ("fsync", ".writing-status.json", 5),
        ("rename", ".writing-status.json", "status.json"),
        ("fsync", tmp_path.name, 0),
    ]


@pytest.mark.parametrize("error", [OSError("no room"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object) -> Path:
        raise error

    def write(file: IO[bytes]) -> None:
        file.write(b"new")
        if where == "write":
            fail()

    if where == "rename":
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_waiting_lock_waits(tmp_path: Path) -> None:
    path = tmp_path / "made" / "lock"
    order: list[str] = []
    entered = threading.Event()

    def second() -> None:
        entered.set()
        with locked(path):
            order.append("second")

    with locked(path):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
