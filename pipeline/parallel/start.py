"""How a process becomes a rank: it takes a device and threads, finds the others, and joins their process group."""

import ctypes
import importlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous as find_store

from pipeline.base.launch import Launch
from pipeline.config.schema import TrainConfig
from pipeline.parallel.rank import Rank

WATCHDOG_FIRST = 5.0
"""Extra seconds that collectives wait, so that the hung rank's own watchdog speaks first."""


@contextmanager
def start_rank(launch: Launch, config: TrainConfig, *, rendezvous: str = "env://") -> Iterator[Rank]:
    """Take the device, join the process group, and leave it at the end. `rendezvous` is torch's init_method.

    After an exception the group is left alone: a collective on the way out would turn a crash into a hang.
    """
    device = choose_device(launch, config.device, config.backend)
    if config.reproducible or config.deterministic:
        use_deterministic_kernels()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # first of all, or every rank opens a context on GPU 0
    threads = num_threads(config, launch)
    torch.set_num_threads(threads)
    keep_freed_memory()
    backend = "none"
    if launch.world_size > 1:
        backend = config.backend if config.backend != "auto" else "nccl" if device.type == "cuda" else "gloo"
        _join_group(launch, backend, device, rendezvous, config.hang_timeout + WATCHDOG_FIRST)
    yield Rank(launch.rank, launch.local_rank, launch.world_size, launch.local_world_size, device, backend, threads)
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(launch: Launch, device: str, backend: str) -> torch.device:
    """Return the device of this rank: `cuda:<local rank>` where torch sees GPUs, unless set otherwise.

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


def num_threads(config: TrainConfig, launch: Launch) -> int:
    """Return the CPU threads of this rank: the cores it may use and was granted (by Slurm, or the quota
    of a container), divided among the ranks of the node.

    torchrun would set OMP_NUM_THREADS=1, which leaves most cores of a node idle. Reproducible training has one thread
    unless set: their number changes bits.
    """
    usable = len(os.sched_getaffinity(0))
    part = max(1, min(usable, launch.num_cores or usable, cpu_quota() or usable) // launch.local_world_size)
    return config.threads or (1 if config.reproducible else part)


def cpu_quota(root: Path = Path("/")) -> int | None:
    """Return how many CPUs the container of this process may use at a time, at least 1; None without a limit.

    From cgroup v2's cpu.max, or v1's cpu.cfs_quota_us (kernel documentation, admin-guide), of its own group and those
    around it.
    """
    quotas = []
    for line in _read_words(root / "proc/self/cgroup"):
        _, controllers, group = line[0].split(":", 2)
        is_v2, mount = not controllers, root / "sys/fs/cgroup" / ("" if not controllers else "cpu")
        if not is_v2 and "cpu" not in controllers.split(","):
            continue
        inner = mount / group.lstrip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(mount):
                break
            if is_v2:
                numbers = [word for words in _read_words(folder / "cpu.max") for word in words]
            else:
                files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                numbers = [word for name in files for words in _read_words(folder / name) for word in words]
            if len(numbers) == 2 and numbers[0].isdecimal() and int(numbers[1]) > 0:  # neither max nor -1
                quotas.append(max(1, round(int(numbers[0]) / int(numbers[1]))))
    return min(quotas, default=None)


def _read_words(path: Path) -> list[list[str]]:
    """Return the words of each line of a file, none if it cannot be read."""
    try:
        return [line.split() for line in path.read_text().splitlines() if line]
    except OSError:
        return []


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


def use_deterministic_kernels() -> None:
    """Allow only kernels that give the same bits each time; torch raises where it has none.

    To be called before anything is done on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA's notes on cuBLAS and reproducibility
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def _join_group(launch: Launch, backend: str, device: torch.device, rendezvous: str, timeout: float) -> None:
    """Collective. `timeout` is in seconds, for every collective."""
    # DDP imports it, and then the defaults of its functions hold the group for ever: gloo's threads outlive it, and now
    # and then abort the process at its exit. Imported before there is a group, they hold nothing.
    importlib.import_module("torch.distributed.nn.functional")
    if backend == "nccl":  # torch's flight recorder: a file says what each rank was doing when a collective timed out
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    patience = timedelta(seconds=timeout)
    store, _, _ = next(find_store(rendezvous, launch.rank, launch.world_size, timeout=patience))
    dist.init_process_group(
        backend,
        store=meet(store, launch.rank, launch.world_size, timeout),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=patience,
        device_id=device if backend == "nccl" else None,
    )


def meet(store: Store, rank: int, world_size: int, timeout: float) -> Store:
    """Collective. Return a part of `store` that only the ranks of this attempt know.

    torchrun keeps one store over all restarts, in which gloo would find the addresses of ranks that are dead, and wait
    for them. So each rank posts a fresh token, and rank 0 answers with that token and an id of the attempt: an answer
    to another token is stale. Raises TimeoutError after `timeout` seconds.
    """
    token, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    missing = set(range(1, world_size)) if rank == 0 else {0}
    attempt = token
    if rank != 0:
        store.set(f"hello/{rank}", token)
    while missing:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"rank {rank} timed out after {timeout:g} s waiting for rank(s) {sorted(missing)}: were they started, "
                "and do their nodes reach MASTER_ADDR?"
            )
        if rank == 0:
            missing -= {other for other in missing if _welcome(store, other, attempt)}
        else:
            hello, _, attempt = _read(store, f"welcome/{rank}").partition(" ")
            missing = set() if hello == token else {0}
        time.sleep(0.005 if missing else 0)  # nothing tells when a key of the store changes
    if rank != 0:
        store.set(f"seen/{rank}", attempt)
    return PrefixStore(attempt, store)


def _welcome(store: Store, rank: int, attempt: str) -> bool:
    """Answer a rank's last token, and return whether it has seen the answer of this attempt."""
    if hello := _read(store, f"hello/{rank}"):
        store.set(f"welcome/{rank}", f"{hello} {attempt}")
    return _read(store, f"seen/{rank}") == attempt


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
