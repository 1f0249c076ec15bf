"""A dataset in the memory of each node once: one rank loads it into a file in memory, all ranks there map that."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.data.sources.datasets import Dataset, DatasetInfo, ImageSet
from pipeline.parallel.rank import LONG_TIMEOUT, Rank

SHARED_MEMORY = Path("/dev/shm")
"""A file here lies in memory alone."""
ALIGNMENT = 64
"""Bytes, of each tensor in the file: what torch gives its own."""

logger = logging.getLogger("convoy")


def share_on_node(rank: Rank, load: Callable[[], Dataset]) -> Dataset:
    """Collective: every rank must call. What `load` returns, which local rank 0 of each node calls.

    The other ranks of the node read no data: memory and time do not grow with their number. Where there is no room
    for the file they share, a warning says so and each of them loads for itself. If `load` raises anywhere, that rank
    raises the same, and the others RemoteError.
    """
    dataset = load() if rank.world_size == 1 else _load_once_per_node(rank, load)
    _give_back_freed_memory()
    return dataset


def _load_once_per_node(rank: Rank, load: Callable[[], Dataset]) -> Dataset:
    """Collective: every rank must call."""
    patient: Any = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)  # to load may be to download
    with ExitStack() as until_mapped:

        def load_once() -> Dataset | SharedFile | None:
            if rank.local_rank != 0:
                return None
            dataset = load()
            file = _write(dataset, until_mapped) if rank.local_world_size > 1 else None
            return file or dataset

        own = rank.together(load_once, patient)
        offers = rank.gather(own if isinstance(own, SharedFile) else None, patient)
        offer = offers[rank.rank - rank.local_rank]  # torchrun numbers the ranks of a node one after the other

        def take() -> Dataset:
            mapped = _map(offer) if offer else None
            if mapped is not None:
                return mapped
            return own if isinstance(own, Dataset) else load()

        return rank.together(take, patient)


@dataclass(frozen=True)
class _Part:
    """Where in the file a tensor lies."""

    dtype: torch.dtype
    shape: torch.Size
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class SharedFile:
    """A dataset in a file that every rank of this node can map."""

    path: Path
    info: DatasetInfo
    digest: str
    parts: tuple[_Part, ...]
    """Images and labels for training, then those for evaluation."""

    @property
    def num_bytes(self) -> int:
        return self.parts[-1].end


def _write(dataset: Dataset, stack: ExitStack) -> SharedFile | None:
    """The dataset in a file whose name goes when `stack` ends; None, with a warning, where there is no room."""
    tensors = _tensors(dataset)
    reasons = []
    for folder in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        path = folder / f"convoy-dataset-{uuid.uuid4().hex}"
        file = SharedFile(path, dataset.info, dataset.digest, _lay_out(tensors))
        # Without a name the kernel frees the file when its last rank ends, be it killed: so the name goes in any case.
        stack.callback(path.unlink, missing_ok=True)
        try:
            _fill(file, tensors)
            return file
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
            path.unlink(missing_ok=True)
    logger.warning(
        "no room to share the dataset (%.0f MiB) among the ranks of this node, so each holds one of its own; "
        "at least twice that should be free in one of these: %s",
        _lay_out(tensors)[-1].end / 2**20,
        "; ".join(reasons),
    )
    return None


def _tensors(dataset: Dataset) -> list[torch.Tensor]:
    sets = (dataset.train, dataset.evaluation)
    return [tensor.contiguous() for images in sets for tensor in (images.images, images.labels)]


def _lay_out(tensors: list[torch.Tensor]) -> tuple[_Part, ...]:
    parts: list[_Part] = []
    for tensor in tensors:
        begin = parts[-1].end if parts else 0
        parts.append(_Part(tensor.dtype, tensor.shape, -(-begin // ALIGNMENT) * ALIGNMENT))
    return tuple(parts)


def _fill(file: SharedFile, tensors: list[torch.Tensor]) -> None:
    """Raises OSError, also if the file would take more than half of what is free: others live there too.

    It is written, not mapped and copied to: writing to a full disk is an error, touching a page there a SIGBUS.
    """
    if file.num_bytes > shutil.disk_usage(file.path.parent).free // 2:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with os.fdopen(os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
        for part, tensor in zip(file.parts, tensors, strict=True):
            target.seek(part.offset)
            target.write(tensor.numpy().data)


def _give_back_freed_memory() -> None:
    """What loading took besides the dataset: malloc may keep for this process what that has freed."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


def _map(file: SharedFile) -> Dataset | None:
    """The dataset in memory that all ranks of the node share; None, with a warning, if this rank cannot see it.

    Copy on write: nobody writes to these tensors, but if somebody should, it stays with that rank, as if it had loaded
    them for itself.
    """
    try:
        with file.path.open("rb") as source:
            memory = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:  # say, in a container of its own
        logger.warning("the dataset that this node shares cannot be mapped, so this rank loads its own: %s", error)
        return None
    tensors = [
        torch.frombuffer(memory, dtype=part.dtype, count=part.shape.numel(), offset=part.offset).view(part.shape)
        for part in file.parts
    ]
    return Dataset(file.info, ImageSet(*tensors[:2]), ImageSet(*tensors[2:]), file.digest)
