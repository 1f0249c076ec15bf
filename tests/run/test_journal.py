"""The journal: one record a line, each metric once, and nothing broken by a crash or for a reader."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_metric

from pipeline.run.journal import Journal, clean_name, iterate, metric_records, read_journal
from tests.records import run_record

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine" / "journal.jsonl"


def records_of(path: Path) -> list[dict[str, Any]]:
    """Read without the reader under test."""
    lines = path.read_bytes().decode().split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def points_of(path: Path) -> list[tuple[str, int, float]]:
    return [(r["key"], r["step"], r["value"]) for r in records_of(path) if r["kind"] == "metric"]


def test_a_metric_is_one_line_of_exactly_the_documented_fields(path: Path) -> None:
    journal = Journal(path)
    before = time.time_ns() // 1_000_000
    journal.metrics({"train/loss": 0.1 + 0.2, "eval/accuracy": 1}, step=450)
    after = time.time_ns() // 1_000_000
    first, second = records_of(path)
    assert before <= first["timestamp_ms"] <= after
    stamp = {"timestamp_ms": first["timestamp_ms"]}
    assert first == {"v": 2, "kind": "metric", "key": "train/loss", "value": 0.1 + 0.2, "step": 450} | stamp
    assert second == {"v": 2, "kind": "metric", "key": "eval/accuracy", "value": 1.0, "step": 450} | stamp
    assert [type(second[name]) for name in ("value", "step", "timestamp_ms")] == [float, int, int]


def test_other_records_hold_version_kind_and_their_fields(path: Path) -> None:
    journal = Journal(path)
    journal.append({"kind": "params", "values": {"optim.lr": 0.1, "run.name": None, "data.mean": (0.5, 0.25)}})
    journal.append({"kind": "tags", "values": {"quote": 'a "b"\n\r\u2028é\\'}})
    journal.append({"kind": "status", "state": "running", "timestamp_ms": 5})
    expected: list[dict[str, Any]] = [
        {"kind": "params", "values": {"optim.lr": 0.1, "run.name": None, "data.mean": [0.5, 0.25]}},
        {"kind": "tags", "values": {"quote": 'a "b"\n\r\u2028é\\'}},
        {"kind": "status", "state": "running", "timestamp_ms": 5},
    ]
    assert records_of(path) == [{"v": 2, **record} for record in expected]
    assert read_journal(path) == (expected, path.stat().st_size)


def test_a_record_is_on_disk_for_readers_at_once(path: Path) -> None:
    journal = Journal(path)
    for number in range(3):
        journal.metrics({"train/loss": 0.5}, step=number)
        assert len(read_journal(path)[0]) == number + 1


def test_nothing_to_record_writes_nothing(path: Path) -> None:
    Journal(path).metrics({}, step=1)
    assert path.read_bytes() == b""
    assert read_journal(path) == ([], 0)


def test_a_reader_goes_on_where_it_was(path: Path) -> None:
    journal = Journal(path)
    journal.status("running")
    first, offset = read_journal(path)
    assert read_journal(path, offset) == ([], offset)
    journal.status("finished")
    second, end = read_journal(path, offset)
    assert [record["state"] for record in (*first, *second) if record["kind"] == "status"] == ["running", "finished"]
    assert end == path.stat().st_size


def some_records(path: Path) -> bytes:
    journal = Journal(path)
    journal.append(run_record("mine", run_id="abc"))
    journal.status("running")
    journal.metrics({"train/loss": 1.0, "train/accuracy": 0.5}, step=1)
    journal.metrics({"train/loss": 0.5, "train/accuracy": 0.75}, step=2)
    journal.close()
    return path.read_bytes()


def test_a_journal_torn_at_any_byte_is_cut_to_its_complete_records_and_goes_on(path: Path) -> None:
    first = Journal(path)
    first.status("running")
    first.metrics({"train/loss": 1.0}, step=1)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        num_complete = whole[:size].count(b"\n")
        records, offset = read_journal(path)
        assert len(records) == num_complete
        assert path.stat().st_size == size  # a reader changes nothing
        journal = Journal(path)
        assert path.read_bytes() == whole[:offset]
        journal.append({"kind": "status", "state": "finished", "timestamp_ms": 5})
        journal.close()
        assert read_journal(path)[0] == [*records, {"kind": "status", "state": "finished", "timestamp_ms": 5}]


@pytest.mark.parametrize("tear", [b"\0" * 100, b'{"v":2,"kind":"metric","key":"\xc3', b"{", b'{"v":2}'])
def test_a_torn_line_is_left_by_the_reader_and_cut_by_the_writer(path: Path, tear: bytes) -> None:
    whole = some_records(path)
    with path.open("ab") as file:
        file.write(tear)
    assert read_journal(path)[1] == len(whole)
    assert len(read_journal(path)[0]) == 6
    Journal(path).close()
    assert path.read_bytes() == whole


POINT = '"v":2,"kind":"metric","key":"a","value":1.0,"step":1,"timestamp_ms":1'


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "",
        '{"v":2',
        "\0\0",
        "[1,2]",
        "[" * 200_000,
        "{}",
        '{"v":"two","kind":"metric"}',
        '{"v":2,"kind":"dream"}',
        '{"v":2,"kind":"metric","key":"a"}',
        f"{{{POINT}}}".replace("1.0", '"much"'),
        f"{{{POINT}}}".replace('"step":1', '"step":99999999999999999999'),
        f"{{{POINT}}}".replace('"timestamp_ms":1', '"timestamp_ms":-7'),
        '{"v":2,"kind":"status","state":"resting","timestamp_ms":1}',
        '{"v":2,"kind":"artifact","path":"../../x"}',
        '{"v":2,"kind":"artifact","path":"/etc/passwd"}',
        '{"v":2,"kind":"params","values":[]}',
    ],
)
def test_a_damaged_line_is_passed_over_by_name_and_hides_nothing(
    path: Path, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = some_records(path)
    path.write_bytes(whole + line.encode() + b"\n" + whole)
    records, end = read_journal(path)
    assert len(records) == 12
    assert end == path.stat().st_size
    read_journal(path)
    named = [message for message in caplog.messages if message.startswith(f"{path}, byte {len(whole)}: a damaged line")]
    assert len(named) == 1  # however often it is read
    journal = Journal(path)
    journal.append({"kind": "tags", "values": {"a": "b"}})
    journal.close()
    assert len(read_journal(path)[0]) == 13


def test_a_point_recorded_is_not_recorded_again(path: Path) -> None:
    journal = Journal(path)
    journal.metrics({"train/loss": 1.0}, step=10)
    journal.metrics({"train/loss": 2.0, "eval/loss": 3.0}, step=10)
    journal.metrics({"train/loss": 4.0}, step=9)
    journal.metrics({"train/loss": 5.0}, step=11)
    assert points_of(path) == [("train/loss", 10, 1.0), ("eval/loss", 10, 3.0), ("train/loss", 11, 5.0)]


def test_a_point_recorded_is_not_recorded_again_after_reopening(path: Path) -> None:
    before = Journal(path)
    for step in (10, 20):
        before.metrics({"train/loss": float(step)}, step=step)
    before.metrics({"eval/loss": 1.0}, step=10)
    before.close()
    resumed = Journal(path)  # behind step 5, say
    for step in (10, 20, 30):
        resumed.metrics({"train/loss": float(step), "eval/loss": 2.0}, step=step)
    assert [point for point in points_of(path) if point[0] == "train/loss"] == [
        ("train/loss", 10, 10.0),
        ("train/loss", 20, 20.0),
        ("train/loss", 30, 30.0),
    ]
    assert [point for point in points_of(path) if point[0] == "eval/loss"] == [
        ("eval/loss", 10, 1.0),
        ("eval/loss", 20, 2.0),
        ("eval/loss", 30, 2.0),
    ]


def test_step_0_is_recorded_once(path: Path) -> None:
    for _ in range(2):
        journal = Journal(path)
        journal.metrics({"train/loss": 1.0}, step=0)
        journal.close()
    assert points_of(path) == [("train/loss", 0, 1.0)]


def test_reopening_finds_the_run_and_its_attempts(path: Path) -> None:
    fresh = Journal(path)
    assert (fresh.run_id, fresh.num_attempts) == (None, 0)
    fresh.close()
    some_records(path)
    second = Journal(path)
    assert (second.run_id, second.num_attempts) == ("abc", 1)
    second.status("preempted")
    second.status("running")
    second.status("finished")
    second.close()
    assert Journal(path).num_attempts == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_recorded_as_such(path: Path, value: float) -> None:
    journal = Journal(path)
    journal.metrics({"train/loss": value, "train/accuracy": 0.5}, step=3)
    journal.close()
    Journal(path).metrics({"train/loss": value}, step=3)
    assert points_of(path) == [("train/loss_nonfinite", 3, 1.0), ("train/accuracy", 3, 0.5)]


def test_values_that_are_not_finite_are_counted_over_a_resume_too(path: Path) -> None:
    for step in (1, 2):
        journal = Journal(path)
        journal.metrics({"train/loss": math.nan}, 2 * step)
        journal.metrics({"train/loss": math.inf}, 2 * step + 1)
        journal.close()
    assert points_of(path) == [("train/loss_nonfinite", step, step - 1.0) for step in (2, 3, 4, 5)]


def test_credentials_in_tags_and_params_are_not_written(path: Path) -> None:
    journal = Journal(path)
    journal.append({"kind": "tags", "values": {"remote": "https://alice:hunter2@host/repository"}})
    journal.append({"kind": "params", "values": {"command": "run --token=hunter2", "lr": 0.5}})
    journal.close()
    assert b"hunter2" not in path.read_bytes()
    assert records_of(path)[1]["values"] == {"command": "run --token=***", "lr": 0.5}


def test_a_record_of_a_later_version_is_not_guessed_at(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text('{"v":3,"kind":"metric"}\n')
    with pytest.raises(ValueError, match="a record of version 3, and this program knows 1 and 2"):
        read_journal(path)


def test_a_record_with_a_value_that_is_not_finite_is_refused_before_it_is_written(path: Path) -> None:
    journal = Journal(path)
    with pytest.raises(ValueError, match="JSON compliant"):
        journal.append({"kind": "params", "values": {"x": math.nan}})
    assert path.read_bytes() == b""


def is_valid_in_mlflow(name: str) -> bool:
    try:
        _validate_metric(name, 1.0, 0, 0)
    except MlflowException:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("train/loss", "train/loss"),
        ("perf/images_per_second", "perf/images_per_second"),
        ("system/node-1.cluster/gpu 0: memory", "system/node-1.cluster/gpu 0: memory"),
        ("recall/T-shirt/top", "recall/T-shirt/top"),
        ("recall (%)", "recall ___"),
        ("größe", "gr__e"),
        ("a\tb\n", "a_b_"),
        ("/a//b/", "a/b"),
        ("a/../b/./c", "a/b/c"),
        ("", "_"),
        ("/", "_"),
        ("..", "_"),
        ("a.b..c", "a.b..c"),
        ("x" * 300, "x" * 250),
    ],
)
def test_a_cleaned_name_is_the_name_as_far_as_mlflow_takes_it(name: str, cleaned: str) -> None:
    assert clean_name(name) == cleaned
    assert is_valid_in_mlflow(cleaned)
    if name.isascii() and is_valid_in_mlflow(name):
        assert name == cleaned


@pytest.mark.parametrize(
    "name",
    [
        "..a",
        "../..a/b",
        "a" * 249 + "/b",
        "a" * 248 + "/.b",
    ],
)
def test_an_awkward_name_is_cleaned_to_one_that_mlflow_takes(name: str) -> None:
    assert not is_valid_in_mlflow(name)
    assert is_valid_in_mlflow(clean_name(name))


def test_random_names_are_cleaned_to_ones_that_mlflow_takes_and_stay_so() -> None:
    generator = random.Random(0)
    names = ["".join(generator.choices("ab_-. :/%é\n", k=generator.randrange(1, 12))) for _ in range(3000)]
    assert sum(not is_valid_in_mlflow(name) for name in names) > 1000
    cleaned = [clean_name(name) for name in names if not clean_name(name).startswith("..")]  # a known exception, above
    assert [name for name in cleaned if not is_valid_in_mlflow(name)] == []
    assert [clean_name(name) for name in cleaned] == cleaned


def test_a_long_name_of_a_value_that_is_not_finite_is_one_that_mlflow_takes(path: Path) -> None:
    Journal(path).metrics({"x" * 245: math.nan}, step=1)
    ((name, _, _),) = points_of(path)
    assert is_valid_in_mlflow(name)


NUM_RECORDS = 1500


def text_of(number: int) -> str:
    """Return texts from nothing to several pages and pipes' buffers."""
    return f"{number}" + ("x" * (number % 50) if number % 100 else "y" * 100_000)


def append_many(path: Path, is_read: Event) -> None:
    journal = Journal(path)
    for number in range(NUM_RECORDS):
        if number == NUM_RECORDS // 2:
            is_read.wait(60)
        journal.append({"kind": "artifact", "path": text_of(number)})


def test_a_reader_beside_a_writer_never_sees_a_broken_record(path: Path) -> None:
    Journal(path).close()
    is_read = FORK.Event()
    writer = FORK.Process(target=append_many, args=(path, is_read))
    writer.start()
    try:
        seen: list[str] = []
        offset, num_readings = 0, 0
        deadline = time.monotonic() + 60
        while len(seen) < NUM_RECORDS and time.monotonic() < deadline:
            records, offset = read_journal(path, offset)
            if records:
                num_readings += 1
                is_read.set()
            seen += [record["path"] for record in records if record["kind"] == "artifact"]
    finally:
        writer.kill()
        writer.join()
    assert seen == list(map(text_of, range(NUM_RECORDS)))
    assert num_readings > 1  # it did read while the other wrote


def test_what_a_full_disk_does_not_take_is_written_when_there_is_room_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes half a line before it is full."""
    journal, write = Journal(path), os.write
    journal.metrics({"loss": 0.0}, 0)

    def write_half(file: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: len(data) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write_half)
        for step in range(1, 4):
            journal.metrics({"loss": float(step)}, step)
            assert [r["step"] for r in records_of(path)] == [0]
        with pytest.raises(OSError, match="No space left"):
            journal.sync()
    journal.metrics({"loss": 4.0}, 4)
    journal.close()
    assert [r["step"] for r in records_of(path)] == [0, 1, 2, 3, 4]


def test_only_what_is_wanted_is_read(path: Path) -> None:
    journal = Journal(path)
    journal.append({"kind": "params", "values": {"note": '"kind":"tags"'}})
    journal.metrics({"loss": 1.0, "loss/2": 2.0}, 1)
    journal.append({"kind": "tags", "values": {}})
    entries = list(iterate(path, kinds=("tags",), keys=("loss",)))
    assert [record["kind"] for record, _ in entries] == ["metric", "tags"]
    assert entries[-1][1] == path.stat().st_size
    assert [record for record, _ in iterate(path, 0, entries[0][1], kinds=("metric",))] == [entries[0][0]]
    assert [record["value"] for record in metric_records(path, "loss/2", "loss")] == [1.0, 2.0]
    journal.close()


def test_records_of_version_1_are_read_as_those_of_today(path: Path) -> None:
    path.parent.mkdir(parents=True)
    spec = {"name": "convnet", "arguments": {"dropout": 0.5}, "channels": 1, "image_size": 28, "num_classes": 10}
    about = {"path": "model/best.pt", "sha256": "s", "step": 5, "metric": "eval/loss", "register": None}
    dataset = {"dataset": "mnist", "dataset_digest": "d"}
    tags = {"resume.1.optim.lr": "0.5", "resume.12.host": "h", "attempt.1.end": "e", "device": "cpu"}
    old: list[dict[str, Any]] = [
        {"kind": "status", "state": "running", "timestamp_ms": 5},
        {"kind": "tags", "values": tags},
        {"kind": "model", **about, **dataset, **spec, "mean": [0.5], "std": [0.25]},
    ]
    path.write_text("".join(json.dumps({"v": 1, **record}) + "\n" for record in old))
    status, upgraded, model = read_journal(path)[0]
    assert status == old[0]
    values = {"attempt.2.optim.lr": "0.5", "attempt.13.host": "h", "attempt.1.end": "e", "device": "cpu"}
    assert upgraded == {"kind": "tags", "values": values}
    description = {"format": 1, "spec": spec, "mean": [0.5], "std": [0.25], "classes": ()}
    assert model == {"kind": "model", **about, **dataset, "description": description}
    journal = Journal(path)
    assert journal.num_attempts == 1
    journal.close()
