"""A dataset in one file, and one copy of it per node: equal to what was loaded, and nothing stays behind."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from logging.handlers import BufferingHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save

from pipeline.data import packed
from pipeline.data.packed import open_packed, share_on_node, write_packed
from pipeline.data.samples import DataError, Dataset
from pipeline.parallel.rank import Rank, is_lost_connection
from tests.data.helpers import ALONE, are_equal, listed, loaded, pixels, tensors
from tests.ranks import run_ranks

SIZES = {"train_size": 3001, "validation_size": 500, "image_size": 27, "classes": 7}
MIN_BYTES = (3001 + 500) * 27**2


def load() -> Dataset:
    return loaded(listed("synthetic", seed=3, arguments=SIZES))


def test_what_was_packed_is_opened_as_it_was(tmp_path: Path) -> None:
    for test_size in (0, 9):
        dataset = loaded(listed("synthetic", arguments=SIZES | {"test_size": test_size}, mean=(1 / 3,), std=(0.1,)))
        write_packed(dataset, tmp_path / "packed")
        opened = open_packed(tmp_path / "packed")
        assert are_equal(opened, dataset)
        assert {tensor.data_ptr() % tensor.itemsize for tensor in tensors(opened)} == {0}
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_anybody_can_read_a_packed_file_as_safetensors(tmp_path: Path) -> None:
    dataset = load()
    write_packed(dataset, tmp_path / "packed")
    found = load_file(tmp_path / "packed")
    assert list(found) == ["train.labels", "validation.labels", "train.pixels", "validation.pixels"]
    assert torch.equal(found["validation.labels"], dataset.validation.labels)


def test_a_foreign_or_damaged_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "packed"
    write_packed(load(), path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + length], whole[8 + length :]
    about = json.loads(header)["__metadata__"]

    def with_header(old: bytes, new: bytes) -> bytes:
        assert old in header
        changed = header.replace(old, new)
        return len(changed).to_bytes(8, "little") + changed + data

    contents = {
        "no file of any kind": b"",
        "a text": b"image,label\n" * 1000,
        "half a header": whole[: length // 2],
        "half of the tensors": whole[: len(whole) // 2],
        "more than the tensors": whole + b"\0",
        "another version": with_header(b"convoy-dataset-1", b"convoy-dataset-0"),
        "one bit of what is known": with_header(b"class 6", b"class 7"),
        "a tensor by another name": with_header(b"train.labels", b"train.labelz"),
        "weights": save({"train.pixels": torch.ones(3)}),
        "weights with metadata": save({"weight": torch.ones(3)}, {"format": "pt"}),
    }
    assert about["format"] == "convoy-dataset-1"
    for what, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            open_packed(path)
        assert f"{path} is no packed dataset, or damaged" in str(caught.value), what
    with pytest.raises(FileNotFoundError):
        open_packed(tmp_path / "nowhere")


def test_a_file_that_cannot_be_written_whole_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIN_BYTES // 2, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_packed(load(), tmp_path / "packed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@dataclass
class Places:
    """Folders in the place of the two in which a shared file may lie."""

    memory: Path
    temporary: Path

    def names(self) -> list[str]:
        return [path.name for folder in (self.memory, self.temporary) for path in folder.glob("convoy-dataset-*")]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    """No test may leave a name in either of them."""
    memory = Path(tempfile.mkdtemp(prefix="test-", dir=packed.SHARED_MEMORY))
    monkeypatch.setattr(packed, "SHARED_MEMORY", memory)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = Places(memory, tmp_path)
    try:
        yield found
        assert found.names() == []
    finally:
        shutil.rmtree(memory)


@dataclass(frozen=True)
class Mapping:
    """One mapping of a shared file into this process, as the kernel counts it."""

    inode: int
    name: str
    resident_kib: int
    proportional_kib: int
    """What is resident, each page divided by the number of processes that map it."""


def mappings() -> list[Mapping]:
    found, lines = [], iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if "/convoy-dataset-" in line:
            _, _, _, _, inode, name = line.split(maxsplit=5)
            sizes = dict(next(lines).split()[:2] for _ in range(8))
            found.append(Mapping(int(inode), name, int(sizes["Rss:"]), int(sizes["Pss:"])))
    return found


def as_on_nodes(rank: Rank, ranks_per_node: int) -> Rank:
    """The same rank, were only so many of them on a node."""
    local_rank = rank.rank % ranks_per_node
    first = rank.rank - local_rank
    return replace(rank, local_rank=local_rank, local_world_size=min(ranks_per_node, rank.world_size - first))


@dataclass(frozen=True)
class Held:
    """What a rank has to say of its dataset while all ranks hold theirs."""

    is_right: bool
    num_loads: int
    mappings: list[Mapping]
    misalignments: list[int]
    names: list[str]
    warnings: list[str]


def hold(rank: Rank, ranks_per_node: int, places: Places, prepare: Callable[[Rank], None] = lambda rank: None) -> Held:
    prepare(rank)
    loads: list[Dataset] = []
    log = BufferingHandler(capacity=100)
    logging.getLogger("convoy").addHandler(log)

    def counted() -> Dataset:
        loads.append(dataset := load())
        return dataset

    dataset = share_on_node(as_on_nodes(rank, ranks_per_node), counted)
    num_loads = len(loads)
    loads.clear()
    is_right = are_equal(dataset, load())  # reads every page
    rank.gather(None)
    held = Held(
        is_right,
        num_loads,
        mappings(),
        [tensor.data_ptr() % tensor.itemsize for tensor in tensors(dataset)],
        places.names(),
        [record.getMessage() for record in log.buffer if record.levelno == logging.WARNING],
    )
    rank.gather(None)
    return held


def test_ranks_of_a_node_hold_one_copy_that_one_of_them_loaded(places: Places) -> None:
    ranks = run_ranks(4, hold, 2, places)
    assert all(held.is_right for held in ranks)
    assert [held.num_loads for held in ranks] == [1, 0, 1, 0]
    first, second, third, fourth = (mapping for held in ranks for mapping in held.mappings)
    assert first.inode == second.inode != third.inode == fourth.inode
    for mapping in (first, second, third, fourth):
        assert mapping.resident_kib >= MIN_BYTES / 1024
        assert mapping.proportional_kib <= 0.51 * mapping.resident_kib
    assert {offset for held in ranks for offset in held.misalignments} == {0}


def test_the_file_has_no_name_any_more_while_the_ranks_use_it(places: Places) -> None:
    for held in run_ranks(2, hold, 2, places):
        (mapping,) = held.mappings
        assert mapping.name.startswith(str(places.memory))
        assert mapping.name.endswith("(deleted)")
        assert held.names == held.warnings == []


def test_a_rank_alone_on_its_node_makes_no_file(places: Places) -> None:
    ranks = run_ranks(3, hold, 2, places)
    assert all(held.is_right for held in ranks)
    assert [held.num_loads for held in ranks] == [1, 0, 1]
    assert [len(held.mappings) for held in ranks] == [1, 1, 0]


def test_a_world_of_one_gets_what_was_loaded_itself(places: Places) -> None:
    dataset = load()
    assert share_on_node(ALONE, lambda: dataset) is dataset


def refuse_room(monkeypatch: pytest.MonkeyPatch, *folders: Path, missing_bytes: int = 1) -> None:
    """Just not enough is free in `folders`, and plenty everywhere else."""
    needed = 2 * sum(memoryview(piece).nbytes for piece in packed._pack(load()))

    def disk_usage(path: Path) -> Any:
        return SimpleNamespace(free=needed - missing_bytes if path in folders else 2**40)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)


def test_without_room_in_memory_it_lies_in_the_temporary_folder(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_room(monkeypatch, places.memory)
    for held in run_ranks(2, hold, 2, places):
        assert held.is_right
        assert [mapping.name.startswith(str(places.temporary)) for mapping in held.mappings] == [True]
        assert held.warnings == []


def test_just_enough_room_is_enough(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_room(monkeypatch, places.memory, places.temporary, missing_bytes=0)
    assert [held.num_loads for held in run_ranks(2, hold, 2, places)] == [1, 0]


def test_without_room_each_rank_loads_for_itself_and_the_first_says_so(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_room(monkeypatch, places.memory, places.temporary)
    ranks = run_ranks(2, hold, 2, places)
    assert [(held.is_right, held.num_loads, held.mappings) for held in ranks] == [(True, 1, [])] * 2
    assert [len(held.warnings) for held in ranks] == [1, 0]
    for part in ("no room", str(places.memory), str(places.temporary), "No space left"):
        assert part in ranks[0].warnings[0]


def fill_the_disk(rank: Rank) -> None:
    """The check sees room, which is taken before the file is written."""

    def fill(dataset: Dataset, path: Path) -> None:
        path.write_bytes(b"begun")
        raise OSError(28, "No space left on device")

    packed.write_packed = fill


def test_a_disk_that_fills_up_meanwhile_is_no_room(places: Places) -> None:
    ranks = run_ranks(2, hold, 2, places, fill_the_disk)
    assert [(held.is_right, held.num_loads, held.mappings) for held in ranks] == [(True, 1, [])] * 2
    assert [held.names for held in ranks] == [[], []]


def hide_the_file_from_rank_1(rank: Rank) -> None:
    def refuse(*arguments: Any, **more: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    if rank.rank == 1:
        packed.safe_open = refuse  # type: ignore[assignment,attr-defined]


def test_a_rank_that_cannot_map_the_file_loads_for_itself_and_says_so(places: Places) -> None:
    ranks = run_ranks(3, hold, 3, places, hide_the_file_from_rank_1)
    assert [(held.is_right, held.num_loads, len(held.mappings)) for held in ranks] == [
        (True, 1, 1),
        (True, 1, 0),
        (True, 0, 1),
    ]
    assert [len(held.warnings) for held in ranks] == [0, 1, 0]


def overwrite_on_rank_1(rank: Rank) -> tuple[int, int]:
    dataset = share_on_node(rank, load)
    if rank.rank == 1:
        pixels(dataset.train)[:] = 77
    rank.gather(None)
    here = int(pixels(dataset.train).ne(77).sum())
    rank.gather(None)
    return here, mappings()[0].inode


def test_what_a_rank_writes_stays_with_it(places: Places) -> None:
    (first, one), (second, other) = run_ranks(2, overwrite_on_rank_1)
    assert one == other
    assert second == 0
    assert first == int(pixels(load().train).ne(77).sum())


def fail_on(rank: Rank, failing: list[int], ranks_per_node: int) -> tuple[str, str]:
    """Type and text of what is raised."""

    def load_or_fail() -> Dataset:
        if rank.rank in failing:
            raise DataError(f"the cause, on rank {rank.rank}")
        return load()

    try:
        share_on_node(as_on_nodes(rank, ranks_per_node), load_or_fail)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(("failing", "ranks_per_node"), [(0, 3), (2, 2)])
def test_if_a_rank_fails_to_load_it_raises_that_and_all_others_name_it(
    places: Places, failing: int, ranks_per_node: int
) -> None:
    """On the first node, and alone on the second, while the first has its file already."""
    ranks = run_ranks(3, fail_on, [failing], ranks_per_node)
    assert ranks[failing] == ("DataError", f"the cause, on rank {failing}")
    others = [ranks[rank] for rank in range(3) if rank != failing]
    assert others == [("RemoteError", f"DataError: the cause, on rank {failing}")] * 2


def test_if_a_rank_fails_to_load_for_itself_all_raise(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_room(monkeypatch, places.memory, places.temporary)
    ranks = run_ranks(3, fail_on, [1], 3)
    assert [name for name, _ in ranks] == ["RemoteError", "DataError", "RemoteError"]


def leave_rank_0_alone(rank: Rank) -> str:
    if rank.rank == 1:
        dist.new_group(backend="gloo")  # as far as share_on_node comes before it loads
        dist.destroy_process_group()
        return ""
    try:
        share_on_node(rank, load)
    except RuntimeError as error:
        return str(error)
    return "shared"


def test_the_name_goes_too_when_another_rank_is_gone(places: Places) -> None:
    message, _ = run_ranks(2, leave_rank_0_alone)
    assert is_lost_connection(RuntimeError(message)), message
