"""How the ranks of a training find each other and join one process group."""

from __future__ import annotations

import importlib
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous as find_store

from pipeline.base.launch import Launch
from pipeline.parallel.machine import (
    be_deterministic,
    choose_device,
    choose_threads,
    keep_freed_memory,
    record_collectives,
)
from pipeline.parallel.rank import Rank


@contextmanager
def start_rank(
    launch: Launch,
    *,
    device: str = "auto",
    backend: str = "auto",
    threads: int | None = None,
    timeout: float = 300.0,
    deterministic: bool = False,
    rendezvous: str = "env://",
) -> Iterator[Rank]:
    """Take the device, join the process group, and leave it at the end.

    `deterministic`: only kernels that give the same bits each time; torch raises where it has none. `timeout` is in
    seconds, for every collective; `rendezvous` is torch's init_method. After an exception the group is left alone: a
    collective on the way out would turn a crash into a hang.
    """
    chosen = choose_device(launch, device, backend)
    if deterministic:
        be_deterministic()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # first of all, or every rank opens a context on GPU 0
    if backend == "auto":
        backend = "nccl" if chosen.type == "cuda" else "gloo"
    if backend == "nccl":
        record_collectives()
    num_threads = choose_threads(launch, threads)
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    if launch.world_size > 1:
        # DDP imports it, and then the defaults of its functions hold the group for ever: gloo's threads outlive it, and
        # now and then abort the process at its exit. Imported before there is a group, they hold nothing.
        importlib.import_module("torch.distributed.nn.functional")
        patience = timedelta(seconds=timeout)
        store, _, _ = next(find_store(rendezvous, launch.rank, launch.world_size, timeout=patience))
        dist.init_process_group(
            backend,
            store=meet(store, launch.rank, launch.world_size, timeout),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=patience,
            device_id=chosen if backend == "nccl" else None,
        )
    yield Rank(
        launch.rank,
        launch.local_rank,
        launch.world_size,
        launch.local_world_size,
        chosen,
        backend if launch.world_size > 1 else "none",
        num_threads,
    )
    if dist.is_initialized():
        dist.destroy_process_group()


def meet(store: Store, rank: int, world_size: int, timeout: float) -> Store:
    """Collective: every rank must call. A part of `store` that only the ranks of this attempt know.

    torchrun keeps one store over all restarts, in which gloo would find the addresses of ranks that are dead, and wait
    for them. So every rank says hello with a word of its own, and rank 0 answers with the name of the attempt: an
    answer to somebody else's hello is of an earlier attempt. Raises TimeoutError after `timeout` seconds.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    missing = set(range(1, world_size)) if rank == 0 else {0}
    attempt = word
    if rank != 0:
        store.set(f"hello/{rank}", word)
    while missing:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"rank {rank} waited {timeout:g} s in vain for rank(s) {sorted(missing)}: were they started, "
                "and do their nodes reach MASTER_ADDR?"
            )
        if rank == 0:
            missing -= {other for other in missing if _welcome(store, other, attempt)}
        else:
            hello, _, attempt = _read(store, f"welcome/{rank}").partition(" ")
            missing = set() if hello == word else {0}
        time.sleep(0.005 if missing else 0)  # nothing tells when a key of the store changes
    if rank != 0:
        store.set(f"seen/{rank}", attempt)
    return PrefixStore(attempt, store)


def _welcome(store: Store, rank: int, attempt: str) -> bool:
    """Answer a rank's last hello; whether it has seen the answer of this attempt."""
    if hello := _read(store, f"hello/{rank}"):
        store.set(f"welcome/{rank}", f"{hello} {attempt}")
    return _read(store, f"seen/{rank}") == attempt


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
