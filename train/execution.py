"""How a training is executed where that is not set: by rule, never by timing, and by rank 0 for all.

The rules look at the device, the shapes, the settings and the room there is. Other ways of executing a step give other
last bits: chosen by a stopwatch, they would make a run that nobody can repeat.
"""

from dataclasses import dataclass

import torch

from pipeline.config import Config
from pipeline.data.build import num_bytes
from pipeline.data.samples import Dataset
from pipeline.learning.update import choose_precision
from pipeline.parallel.rank import Rank


@dataclass(frozen=True)
class Execution:
    placement: str
    """`device` or `workers`."""
    precision: str
    """`fp32`, `bf16`, `fp16` or `fp64`."""
    is_captured: bool
    """Whether the step is replayed as a CUDA graph."""
    compress: bool
    """Whether gradients are sent as bf16."""
    reasons: dict[str, str]
    """Name of a tag -> what was chosen and why, for people."""


def choose_execution(config: Config, rank: Rank, dataset: Dataset) -> Execution:
    """Return how rank 0 would have all ranks execute the training."""
    num_sharing = -(-rank.local_world_size // max(1, torch.cuda.device_count()))
    placement, why_there = choose_placement(config.data.placement, num_bytes(dataset) * num_sharing, rank.device)
    obstacle = find_capture_obstacle(config, rank, placement)
    precision = choose_precision(config.train.precision, rank.device)
    compress = rank.backend == "nccl" and (
        config.train.compress == "bf16" or (config.train.compress == "auto" and precision == "bf16")
    )
    reasons = {
        "placement": f"{placement} ({why_there})",
        "precision": precision,
        "step": "CUDA graph" if obstacle is None else f"eager ({obstacle})",
    }
    return Execution(placement, precision, obstacle is None, compress, reasons)


def find_capture_obstacle(config: Config, rank: Rank, placement: str) -> str | None:
    """Return why the step cannot be replayed as a CUDA graph; None if it can."""
    obstacles = {
        "train.reproducible": config.train.reproducible,
        "on CPU": rank.device.type != "cuda",
        "train.cuda_graph=never": config.train.cuda_graph == "never",
        "several ranks without nccl": rank.world_size > 1 and rank.backend != "nccl",
        "streamed data": placement != "device",
        "train.accumulate > 1": config.train.accumulate > 1,
        "fp16 scales the loss on the host": config.train.precision == "fp16",
        "ranks without samples": config.data.global_batch_size < rank.world_size,
    }
    return next((name for name, holds in obstacles.items() if holds), None)


def choose_placement(placement: str, num_bytes: int, device: torch.device) -> tuple[str, str]:
    """Return `device` or `workers`, and the reason. auto: `device` if the images fill at most half of what is free.

    On CPU the data are in the memory of the device already.
    """
    if placement != "auto":
        return placement, "as set"
    if device.type == "cpu":
        return "device", "on CPU the data are there already"
    free, _ = torch.cuda.mem_get_info(device)
    reason = f"{num_bytes / 2**20:,.0f} MiB of data, {free / 2**20:,.0f} MiB free on the device"
    return ("device" if num_bytes <= free // 2 else "workers"), reason
