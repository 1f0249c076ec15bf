"""What is set on this machine before training: device, threads, memory, determinism."""

from __future__ import annotations

import ctypes
import os

import torch

from pipeline.base.launch import Launch


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
