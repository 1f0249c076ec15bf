"""A dataset in one file that any number of processes map: what the ranks of a node share.

The file is in the safetensors format: a JSON header, then the tensors `<split>.labels` and `<split>.pixels`. All else
that is known of the dataset stands in the header's metadata.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from pipeline.base.files import write_atomically
from pipeline.base.logs import logger
from pipeline.data.samples import DataError, Dataset, PixelSamples
from pipeline.parallel.rank import LONG_TIMEOUT, Rank

FORMAT = "convoy-dataset-1"
PARTS = ("pixels", "labels")
DTYPES = {torch.int64: "I64", torch.uint8: "U8"}
SHARED_MEMORY = Path("/dev/shm")
"""A file here lies in memory alone."""


def write_packed(dataset: Dataset, path: Path) -> None:
    """Write a dataset of `load_dataset` to one file. Raises OSError where there is no room."""
    write_atomically(path, lambda file: file.writelines(_pack(dataset)))


def open_packed(path: Path) -> Dataset:
    """Return the dataset in a file of `write_packed`, mapped.

    Copy on write: nobody writes to these tensors, but if somebody should, it stays with that process. Raises OSError if
    the file cannot be mapped, and DataError if it is another file or damaged; pixels and labels are not verified.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if about["format"] != FORMAT or about["sha256"] != _sha256(about["dataset"]):
            raise ValueError("its header is of another version or not as it was written")
        known: dict[str, Any] = json.loads(about["dataset"])
        splits = {name: PixelSamples.of(*(tensors[f"{name}.{part}"] for part in PARTS)) for name in known.pop("splits")}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no packed dataset, or damaged: {error}; expected {FORMAT}") from error
    known = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
    return Dataset(**{"test": None} | known | splits)


def _pack(dataset: Dataset) -> list[bytes | memoryview]:
    """Return the content of the file, piece by piece: safetensors' own writer neither syncs nor says OSError."""
    names = {field.name for field in fields(dataset)} - {"train", "validation", "test", "files"}
    text = json.dumps({name: getattr(dataset, name) for name in names} | {"splits": list(dataset.splits)})
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "dataset": text, "sha256": _sha256(text)}}
    pieces, end = list[bytes | memoryview](), 0
    for part in reversed(PARTS):  # those of int64 first, so that all are aligned
        for name, samples in dataset.splits.items():
            tensor: torch.Tensor = getattr(samples, part)
            begin, end = end, end + tensor.nbytes
            about = {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
            header[f"{name}.{part}"] = about
            pieces.append(tensor.numpy().data)
    start = json.dumps(header).encode()
    start += b" " * (-len(start) % 8)
    return [len(start).to_bytes(8, "little"), start, *pieces]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def share_on_node(rank: Rank, load: Callable[[], Dataset]) -> Dataset:
    """Collective. Return what `load` returns, which local rank 0 of each node calls.

    The other ranks of the node read no data: memory and time do not grow with their number. Where there is no room
    for the file they share, a warning says so and each of them loads for itself. If `load` raises anywhere, that rank
    raises the same, and the others RemoteError.
    """
    if rank.world_size == 1:
        return load()
    patient: Any = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)  # to load may be to download
    with ExitStack() as until_mapped:

        def load_once() -> Dataset | Path | None:
            if rank.local_rank != 0:
                return None
            dataset = load()
            path = _offer(dataset, until_mapped) if rank.local_world_size > 1 else None
            return path or dataset

        own = rank.run_on_all(load_once, patient)
        offers = rank.gather(own if isinstance(own, Path) else None, patient)
        offer = offers[rank.rank - rank.local_rank]  # torchrun numbers the ranks of a node one after the other

        def take() -> Dataset:
            try:
                if offer:
                    return open_packed(offer)
            except (OSError, RuntimeError) as error:  # say, in a container of its own
                logger.warning("the dataset that this node shares cannot be mapped, so each loads its own: %s", error)
            return own if isinstance(own, Dataset) else load()

        return rank.run_on_all(take, patient)


def _offer(dataset: Dataset, stack: ExitStack) -> Path | None:
    """Write the dataset to a file for this user alone; return None, with a warning, where there is no room.

    It may take half of what is free: others live there too. Its name goes when `stack` ends: a file without a name is
    freed by the kernel when its last rank ends, be it killed. It is written, not mapped and copied to: writing to a
    full disk is an error, touching a page there a SIGBUS.
    """
    num_bytes, reasons = sum(memoryview(piece).nbytes for piece in _pack(dataset)), []
    for folder in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        try:
            if num_bytes > shutil.disk_usage(folder).free // 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            path = Path(tempfile.mkdtemp(prefix="convoy-dataset-", dir=folder)) / "dataset"
            stack.callback(shutil.rmtree, path.parent, ignore_errors=True)
            write_packed(dataset, path)
            return path
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
    logger.warning(
        "no room to share the dataset (%.0f MiB) among the ranks of this node, so each holds one of its own; "
        "at least twice that should be free in one of these: %s",
        num_bytes / 2**20,
        "; ".join(reasons),
    )
    return None
