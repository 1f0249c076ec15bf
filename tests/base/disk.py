"""What a program does to the disk, in order: what is only written can be lost in a power failure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

Event = tuple[str, str, str | int]
"""("fsync", name, its size at that time), or ("rename", name, new name)."""


def record_disk(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Return a list that grows with each file or folder that is forced to the disk, and with each rename."""
    events: list[Event] = []
    fsync = os.fsync

    def spy_on_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(("fsync", path.name, 0 if path.is_dir() else path.stat().st_size))

    def spy_on(rename: Any) -> Any:
        def run(path: Path, target: Path) -> Any:
            events.append(("rename", path.name, target.name))
            return rename(path, target)

        return run

    monkeypatch.setattr(os, "fsync", spy_on_fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, spy_on(getattr(Path, name)))
    return events
