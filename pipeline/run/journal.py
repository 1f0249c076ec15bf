"""The journal: all that a run records, one record a line (records.py), appended and never changed.

Records of version 1 are read as ones of version 2.
"""

import errno
import json
import math
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.base.credentials import without_credentials
from pipeline.base.logs import logger
from pipeline.run.records import RECORD, MetricRecord, Record, RunRecord, State

VERSION = 2
NAME_LENGTH = 250
NONFINITE = "_nonfinite"
KILLED = "killed, or its machine failed"
"""Why an attempt ended that recorded no end."""
encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode  # json.dumps would make one for each record


class Journal:
    """Appends records, in one `write` a call, so that a reader sees half of one only after a crash.

    While the disk is full, records are kept in memory: they are written when there is room again, and `sync` raises
    until then.
    """

    def __init__(self, path: Path):
        """Open or create `path`; a line torn by a crash is cut off."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self.last_steps: dict[str, int] = {}
        """Key of a metric -> step of its last point."""
        self._num_nonfinite: dict[str, int] = {}
        self.run_id: str | None = None
        self.num_attempts = 0
        self.state: State | None = None
        """State in the last status record: `running` if the attempt before was killed."""
        complete_bytes = 0
        for line, begin, end in _complete_lines(path):
            complete_bytes = end
            if record := _decode(line, path, begin):
                self._remember(record)
        os.ftruncate(self._file, complete_bytes)
        self._unwritten = b""

    def _remember(self, record: Record) -> None:
        match record["kind"]:
            case "metric":
                self.last_steps[record["key"]] = record["step"]
                if record["key"].endswith(NONFINITE):
                    self._num_nonfinite[record["key"]] = int(record["value"])
            case "run":
                self.run_id = record["run_id"]
            case "status":
                self.state = record["state"]
                self.num_attempts += record["state"] == "running"

    def append(self, *records: Record) -> None:
        """Append records in one write, so that they are there together. Credentials in params and tags are left out."""
        self._unwritten += "".join(map(_encode_line, records)).encode()
        for record in records:
            self._remember(record)
        try:
            self._write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def _write(self) -> None:
        """Write all that is not written yet, or nothing: half a line would spoil the next."""
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
        now = now_ms()
        records: dict[str, MetricRecord] = {}
        for key, value in values.items():
            name, number = clean_name(key), float(value)
            if not math.isfinite(number):
                name = clean_name(key, NAME_LENGTH - len(NONFINITE)) + NONFINITE
                number = self._num_nonfinite.get(name, 0) + 1
            if name not in records and step > self.last_steps.get(name, -1):
                records[name] = MetricRecord(kind="metric", key=name, value=number, step=step, timestamp_ms=now)
        self.append(*records.values())

    def status(self, state: State) -> None:
        """Record that the run is in this state from now on."""
        self.append({"kind": "status", "state": state, "timestamp_ms": now_ms()})

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
    """Return milliseconds since 1970, as MLflow has times."""
    return time.time_ns() // 1_000_000


def read_journal(path: Path, offset: int = 0) -> tuple[list[Record], int]:
    """Return all complete records from byte `offset` on, and the offset behind the last. Raises as `iterate` does."""
    entries = list(iterate(path, offset))
    return [record for record, _ in entries], entries[-1][1] if entries else offset


def iterate(
    path: Path, offset: int = 0, end: int | None = None, *, kinds: Collection[str] = (), keys: Collection[str] = ()
) -> Iterator[tuple[Record, int]]:
    """Yield the complete records from byte `offset` to `end`, each with the offset behind it.

    With `kinds`, or `keys` of metrics, only those: the others are not decoded, which is twenty times as fast. A
    damaged line is named in a warning and passed over. Raises ValueError for a record of a later version.
    """
    wanted = [f'"kind":"{kind}"'.encode() for kind in kinds] + [f'"key":{encode(key)}'.encode() for key in keys]
    for line, begin, behind in _complete_lines(path, offset, end):
        if wanted and not any(mark in line for mark in wanted):
            continue
        if record := _decode(line, path, begin):
            yield record, behind


def _complete_lines(path: Path, offset: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Yield the lines from byte `offset` to `end`, each with where it begins and the offset behind it.

    A line without its end is being written, or was torn by a crash: it is left for the next reading.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n") or (end is not None and offset >= end):
                return
            begin, offset = offset, offset + len(line)
            yield line, begin, offset


def last_moment(path: Path) -> int | None:
    """Return when the last of the records with a time was written, in ms since 1970."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**18))
        lines = file.read().split(b"\n")[1:-1]  # the first may be cut, behind the last is none or a torn one
    times = [json.loads(line).get("timestamp_ms") for line in lines]
    return max((moment for moment in times if moment is not None), default=None)


def run_record(path: Path) -> RunRecord | None:
    """Return the record that says which run this is; None where a run was killed before it recorded anything."""
    return next((record for record, _ in iterate(path, kinds=("run",)) if record["kind"] == "run"), None)


def metric_records(path: Path, *keys: str) -> Iterator[MetricRecord]:
    """Yield the points of some metrics, in the order they were recorded."""
    return (record for record, _ in iterate(path, keys=keys) if record["kind"] == "metric")


def _encode_line(record: Record) -> str:
    fields: dict[str, Any] = {"v": VERSION, **record}
    if record["kind"] == "params" or record["kind"] == "tags":
        values = record["values"].items()
        fields["values"] = {key: without_credentials(v) if isinstance(v, str) else v for key, v in values}
    return encode(fields) + "\n"


def _decode(line: bytes, path: Path, offset: int) -> Record | None:
    """Return the record in a line; None for a damaged one."""
    try:
        fields = json.loads(line)
        version = int(fields.pop("v"))
        if version == 1:
            _upgrade(fields["kind"], fields)
        if version in (1, VERSION):
            return RECORD.validate_python(fields)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        _warn(f"{path}, byte {offset}: a damaged line is passed over ({type(error).__name__}: {reason})")
        return None
    raise ValueError(
        f"{path}, byte {offset}: a record of version {version}, and this program knows 1 and {VERSION}: use the "
        "version of Convoy that wrote it"
    )


@cache
def _warn(message: str) -> None:
    """Log a warning once: a publisher reads the same lines again and again."""
    logger.warning("%s", message)


def _upgrade(kind: str, fields: dict[str, Any]) -> None:
    """Change the fields of a record of version 1 to those of version 2."""
    if kind == "tags":  # `resume.<n>.` numbered attempts from 0 on
        values = fields["values"].items()
        fields["values"] = {
            re.sub(r"^resume\.(\d+)\.", lambda found: f"attempt.{int(found[1]) + 1}.", key): v for key, v in values
        }
    if kind == "model":  # there was no model.json
        spec = {key: fields.pop(key) for key in ("name", "arguments", "channels", "image_size", "num_classes")}
        about = {"mean": fields.pop("mean"), "std": fields.pop("std"), "classes": ()}
        fields["description"] = {"format": 1, "spec": spec, **about}


@lru_cache(maxsize=1024)
def clean_name(name: str, limit: int = NAME_LENGTH) -> str:
    """Return a metric name that MLflow takes: other characters become `_`, empty path parts go, and what is too long.

    MLflow allows letters, digits and `_ - . space : /`, no `..` in front, and rejects a whole batch for one bad name.
    """
    allowed = re.sub(r"[^\w\-. :/]", "_", name[:limit], flags=re.ASCII)
    parts = [part for part in allowed.split("/") if part not in ("", ".", "..")]
    joined = "/".join(parts) or "_"
    return f"_{joined[1:]}" if joined.startswith("..") else joined
