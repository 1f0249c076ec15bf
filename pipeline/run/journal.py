"""The journal: all that a run records, one JSON object a line, appended and never changed.

Every line has `v` (1) and `kind`:

    run         run_id, name, experiment, tracking_uri, timestamp_ms: first of the file, once
    params      values: {dotted key: value}
    tags        values: {key: value}
    dataset     name, digest, source, num_train, num_eval
    metric      key, value, step, timestamp_ms
    predictions step, predicted and confidence: of the images in evaluation/samples.npz, at an evaluation
    evaluation  path of an .npz in the run folder: what the figures are drawn from
    artifact    path of a file in the run folder, which is logged under the same path
    model       path of the weights in the run folder, the step they are of, and all it takes to rebuild the network
    status      state (running, finished, preempted or failed), timestamp_ms
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.base.credentials import without_credentials

Record = dict[str, Any]

VERSION = 1
NAME_LENGTH = 250
TAIL_BYTES = 2**18
NONFINITE = "_nonfinite"
KILLED = "killed, or its machine failed"
"""Why an attempt ended that recorded no end."""
encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode  # json.dumps would make one for each record


class Journal:
    """Appends records. One `write` a call, so that a reader never sees half of one but after a crash.

    While the disk is full, records are kept in memory: they are written when there is room again, and `sync` raises
    until then.
    """

    def __init__(self, path: Path):
        """Opens or creates `path`; a line torn by a crash is cut off."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._last_step: dict[str, int] = {}
        self._num_nonfinite: dict[str, int] = {}
        self.run_id: str | None = None
        self.num_attempts = 0
        self.state: str | None = None
        """Of the last status record: `running` if the attempt before was killed."""
        complete_bytes = 0
        for record, end in iterate(path):
            self._remember(record)
            complete_bytes = end
        os.ftruncate(self._file, complete_bytes)
        self._unwritten = b""

    def _remember(self, record: Record) -> None:
        match record["kind"]:
            case "metric":
                self._last_step[record["key"]] = record["step"]
                if record["key"].endswith(NONFINITE):
                    self._num_nonfinite[record["key"]] = int(record["value"])
            case "run":
                self.run_id = record["run_id"]
            case "status":
                self.state = record["state"]
                self.num_attempts += record["state"] == "running"

    def append(self, kind: str, **fields: Any) -> None:
        self.append_all([{"kind": kind, **fields}])

    def append_all(self, records: list[Record]) -> None:
        """Records that make sense only together, in one write. Credentials in params and tags are left out."""
        lines = "".join(encode({"v": VERSION, **_without_credentials(record)}) + "\n" for record in records)
        self._unwritten += lines.encode()
        try:
            self._write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def _write(self) -> None:
        """All that is not written yet, or nothing: half a line would spoil the next."""
        size, data = os.fstat(self._file).st_size, self._unwritten
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError:
            os.ftruncate(self._file, size)
            raise
        self._unwritten = b""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics of one step. A (key, step) recorded before a resume is not recorded again.

        MLflow keeps a point for every value and time given to one step, for good, so the first must be the only one.
        Values that are not finite are recorded as their count so far, `<key>_nonfinite`: MLflow's page breaks on NaN.
        """
        timestamp_ms = now_ms()
        lines = []
        for key, value in values.items():
            name, number = clean_name(key), float(value)
            is_finite = math.isfinite(number)
            if not is_finite:
                name = clean_name(key, NAME_LENGTH - len(NONFINITE)) + NONFINITE
            if step > self._last_step.get(name, -1):
                self._last_step[name] = step
                if not is_finite:
                    number = self._num_nonfinite[name] = self._num_nonfinite.get(name, 0) + 1
                lines.append(
                    {"kind": "metric", "key": name, "value": number, "step": step, "timestamp_ms": timestamp_ms}
                )
        self.append_all(lines)

    def status(self, state: str) -> None:
        """Record that the run is in this state from now on."""
        record = {"kind": "status", "state": state, "timestamp_ms": now_ms()}
        self.append_all([record])
        self._remember(record)

    def sync(self) -> None:
        """Force what was appended to the disk. Raises OSError if that cannot be."""
        self._write()
        os.fsync(self._file)

    def close(self) -> None:
        try:
            self.sync()
        finally:
            os.close(self._file)


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow has times."""
    return time.time_ns() // 1_000_000


def read_journal(path: Path, offset: int = 0) -> tuple[list[Record], int]:
    """All complete records from byte `offset` on, and the offset behind the last; raises what `iterate` raises."""
    entries = list(iterate(path, offset))
    return [record for record, _ in entries], entries[-1][1] if entries else offset


def iterate(
    path: Path, offset: int = 0, end: int | None = None, *, kinds: Collection[str] = (), keys: Collection[str] = ()
) -> Iterator[tuple[Record, int]]:
    """The complete records from byte `offset` to `end`, each with the offset behind it.

    With `kinds`, or `keys` of metrics, only those: the others are not decoded, which is twenty times as fast. A line
    without its end is being written, or was torn by a crash: it is left for the next reading. Raises ValueError naming
    file and byte for a complete line that is no record.
    """
    wanted = [f'"kind":"{kind}"'.encode() for kind in kinds] + [f'"key":{encode(key)}'.encode() for key in keys]
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n") or (end is not None and offset >= end):
                return
            begin, offset = offset, offset + len(line)
            if not wanted or any(mark in line for mark in wanted):
                yield _decode(line, path, begin), offset


def last_moment(path: Path) -> int | None:
    """When the last of the records with a time was written, in ms since 1970."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().split(b"\n")[1:-1]  # the first may be cut, behind the last is none or a torn one
    times = [json.loads(line).get("timestamp_ms") for line in lines]
    return max((moment for moment in times if moment is not None), default=None)


def _decode(line: bytes, path: Path, offset: int) -> Record:
    try:
        record: Record = json.loads(line)
        version = record["v"], record["kind"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}, byte {offset}: not a journal record ({error})") from error
    if version[0] != VERSION:
        raise ValueError(
            f"{path}, byte {offset}: a record of version {version[0]}, and this program knows {VERSION}: use the "
            "version of Convoy that wrote it"
        )
    return record


def _without_credentials(record: Record) -> Record:
    if record["kind"] not in ("params", "tags"):
        return record
    values = {k: without_credentials(v) if isinstance(v, str) else v for k, v in record["values"].items()}
    return record | {"values": values}


@lru_cache(maxsize=1024)
def clean_name(name: str, limit: int = NAME_LENGTH) -> str:
    """A metric name that MLflow takes: other characters become `_`, empty path parts go, and what is too long.

    MLflow allows letters, digits and `_ - . space : /`, no `..` in front, and rejects a whole batch for one bad name.
    """
    allowed = re.sub(r"[^\w\-. :/]", "_", name[:limit], flags=re.ASCII)
    parts = [part for part in allowed.split("/") if part not in ("", ".", "..")]
    joined = "/".join(parts) or "_"
    return f"_{joined[1:]}" if joined.startswith("..") else joined
