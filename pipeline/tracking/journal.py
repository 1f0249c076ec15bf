"""The journal: all that a run records, one JSON object a line, appended and never changed.

Every line has `v` (1) and `kind`:

    run         run_id, name, experiment, tracking_uri, timestamp_ms: first of the file, once
    params      values: {dotted key: value}
    tags        values: {key: value}
    dataset     name, digest, source, num_train, num_eval
    metric      key, value, step, timestamp_ms
    evaluation  path of an .npz in the run folder: what the figures are drawn from
    artifact    path of a file in the run folder, which is logged under the same path
    model       path of the weights in the run folder, and all it takes to rebuild the network
    status      state (running, finished, preempted or failed), timestamp_ms
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

VERSION = 1
NAME_LENGTH = 250
NONFINITE = "_nonfinite"
encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode  # json.dumps would make one for each record


class Journal:
    """Appends records. One `write` a call, so that a reader never sees half of one but after a crash."""

    def __init__(self, path: Path):
        """Opens or creates `path`; a line torn by a crash is cut off."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        records, complete_bytes = read_journal(path)
        os.ftruncate(self._file, complete_bytes)
        self._last_step: dict[str, int] = {}
        for record in records:
            if record["kind"] == "metric":
                self._last_step[record["key"]] = record["step"]
        self.run_id: str | None = next((r["run_id"] for r in records if r["kind"] == "run"), None)
        self.num_attempts = sum(r["kind"] == "status" and r["state"] == "running" for r in records)

    def append(self, kind: str, **fields: Any) -> None:
        self.append_all([{"kind": kind, **fields}])

    def append_all(self, records: list[dict[str, Any]]) -> None:
        """Records that make sense only together, in one write."""
        data = "".join(encode({"v": VERSION, **record}) + "\n" for record in records).encode()
        while data:
            data = data[os.write(self._file, data) :]

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics of one step. A (key, step) recorded before a resume is not recorded again.

        MLflow keeps a point for every value and time given to one step, for good, so the first must be the only one.
        A value that is not finite is recorded as `<key>_nonfinite` = 1: MLflow's page breaks on NaN.
        """
        timestamp_ms = now_ms()
        lines = []
        for key, value in values.items():
            name, number = clean_name(key), float(value)
            if not math.isfinite(number):
                name, number = clean_name(key, NAME_LENGTH - len(NONFINITE)) + NONFINITE, 1.0
            if step > self._last_step.get(name, -1):
                self._last_step[name] = step
                lines.append(
                    {"kind": "metric", "key": name, "value": number, "step": step, "timestamp_ms": timestamp_ms}
                )
        self.append_all(lines)

    def sync(self) -> None:
        """Force what was appended to the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        self.sync()
        os.close(self._file)


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow has times."""
    return time.time_ns() // 1_000_000


def read_journal(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Complete records from byte `offset` on, and the offset behind the last of them.

    A line without its end is being written, or was torn by a crash: it is left for the next reading. Raises ValueError
    naming file and byte for a complete line that is no record.
    """
    entries = read_entries(path, offset)
    return [record for record, _ in entries], entries[-1][1] if entries else offset


def read_entries(path: Path, offset: int = 0) -> list[tuple[dict[str, Any], int]]:
    """The records of `read_journal`, each with the offset behind it."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    complete = data[: data.rfind(b"\n") + 1]
    entries = []
    for line in complete.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, byte {offset}: not a journal record ({error})") from error
        offset += len(line) + 1
        entries.append((record, offset))
    return entries


@lru_cache(maxsize=1024)
def clean_name(name: str, limit: int = NAME_LENGTH) -> str:
    """A metric name that MLflow takes: other characters become `_`, empty path parts go, and what is too long.

    MLflow allows letters, digits and `_ - . space : /`, no `..` in front, and rejects a whole batch for one bad name.
    """
    allowed = re.sub(r"[^\w\-. :/]", "_", name[:limit], flags=re.ASCII)
    parts = [part for part in allowed.split("/") if part not in ("", ".", "..")]
    joined = "/".join(parts) or "_"
    return f"_{joined[1:]}" if joined.startswith("..") else joined
