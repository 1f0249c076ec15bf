"""The process group and this process's place in it."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous as find_store

from pipeline.launch import Launch

T = TypeVar("T")
LONG_TIMEOUT = timedelta(hours=12)


class RemoteError(Exception):
    """Another rank failed; that rank shows the cause."""


@dataclass(frozen=True)
class Rank:
    """This process among the others: its number, its device, and the collectives, which a world of one skips."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    backend: str
    num_threads: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait_for_device(self) -> None:
        """Until all that was queued on this rank's GPU is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Collective: every rank must call. Sums `tensor` over the ranks in place, and returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce_sum_later(self, tensor: torch.Tensor) -> PendingSum:
        """Collective: every rank must call. As `reduce_sum`, without waiting for the device or the other ranks."""
        work = dist.all_reduce(tensor, async_op=True) if self.world_size > 1 else None
        return PendingSum(tensor, work, waits_on_device=self.backend in ("nccl", "none"))

    def any(self, flag: bool) -> bool:
        """Collective: every rank must call. Whether `flag` is true on any rank."""
        return bool(self.reduce_sum(torch.tensor([float(flag)], device=self.device)).item())

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Collective: every rank must call. The picklable `value` of each rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group)
        return values

    def from_main(self, action: Callable[[], T]) -> T:
        """Collective: every rank must call. Rank 0 runs `action`; every rank returns its result.

        If it raises, rank 0 raises that, and the others RemoteError.
        """
        result, error = _run(action) if self.is_main else (None, None)
        told: list[Any] = [result, _describe(error)]
        if self.world_size > 1:
            dist.broadcast_object_list(told, src=0, device=self._object_device)
        if error is not None:
            raise error
        if told[1] is not None:
            raise RemoteError(told[1])
        return cast(T, told[0])

    def together(self, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Collective: every rank must call. What `action` returns on this rank, once it has returned on all.

        If it raises, that rank raises the same, and all others RemoteError.
        """
        result, error = _run(action)
        failures = [text for text in self.gather(_describe(error), group) if text is not None]
        if error is not None:
            raise error
        if failures:
            raise RemoteError(failures[0])
        return cast(T, result)

    @property
    def _object_device(self) -> torch.device:
        return self.device if self.backend == "nccl" else torch.device("cpu")


class PendingSum:
    """A sum over the ranks on its way to the host."""

    def __init__(self, tensor: torch.Tensor, work: Any, *, waits_on_device: bool):
        self._tensor = tensor
        self._work = work
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda and waits_on_device:  # the device waits for the others, then copies, and the host goes on
            if work is not None:
                work.wait()
            self._work = None
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def values(self) -> list[float]:
        """Waits until they are there."""
        if self._work is not None:
            self._work.wait()
        if self._copied is not None:
            self._copied.synchronize()
        return cast(list[float], self._tensor.tolist())


def _run(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What `action` returns, or raises: the others have to be told before it is raised here."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def _describe(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


def choose_device(launch: Launch, device: str, backend: str) -> torch.device:
    """The device of this rank: `cuda:<local rank>` where torch sees GPUs, unless set otherwise.

    Raises ValueError if there is no GPU although one was asked for, or fewer than ranks.
    """
    num_gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if num_gpus == 0:
        raise ValueError("train.device = cuda: torch sees no GPU here; use train.device=cpu or auto")
    if launch.local_world_size > num_gpus and backend != "gloo":
        raise ValueError(
            f"{launch.local_world_size} ranks on this node, but torch sees {num_gpus} GPU(s), and two ranks on one GPU "
            f"cannot use NCCL: start torchrun with --nproc_per_node={num_gpus}, or set train.device=cpu, or "
            "train.backend=gloo to share GPUs (slow)"
        )
    return torch.device("cuda", launch.local_rank % num_gpus)


def choose_threads(launch: Launch, threads: int | None) -> int:
    """Threads of this rank on CPU: the cores it may use and was granted, divided among the ranks of the node.

    torchrun would set OMP_NUM_THREADS=1, which leaves most cores of a node idle.
    """
    usable = len(os.sched_getaffinity(0))
    return threads or max(1, min(usable, launch.num_cores or usable) // launch.local_world_size)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the system, where it has that setting.

    Activations are allocated and freed in each step. Given back each time, their pages have to be faulted in and
    cleared anew: a third of a small network's step on CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    if mallopt(m_mmap_threshold, 2**30) or mallopt(m_mmap_threshold, 2**25):  # older ones take 32 MiB at most
        mallopt(m_trim_threshold, 2**30)


def be_deterministic() -> None:
    """Before anything is done on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA's notes on cuBLAS and reproducibility
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def record_collectives() -> None:
    """Have NCCL write what each rank was doing to /tmp when a collective times out: torch's flight recorder.

    Newer versions of torch call it FR, older ones NCCL.
    """
    for prefix, size in (("TORCH_FR", "BUFFER_SIZE"), ("TORCH_NCCL", "TRACE_BUFFER_SIZE")):
        os.environ.setdefault(f"{prefix}_{size}", "2000")
        os.environ.setdefault(f"{prefix}_DUMP_ON_TIMEOUT", "1")


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


def share(count: int, index: int, parts: int) -> slice:
    """The `index`-th of `parts` contiguous shares of `count` things; sizes differ by one at most."""
    return slice(count * index // parts, count * (index + 1) // parts)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, which is a consequence and never the cause."""
    signs = ("connection closed by peer", "connection reset", "broken pipe", "connection refused", "socket closed")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    )


def start_logging(rank: int) -> logging.Logger:
    """Rank 0 logs INFO as plain lines; the others warnings, with their rank. The root logger is left alone."""
    logger = logging.getLogger("convoy")
    handler = logging.StreamHandler(sys.stdout)
    form = "%(message)s" if rank == 0 else f"[rank {rank} on {socket.gethostname()}] %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(form))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    return logger
