"""How long an all-reduce takes, by its size.

torchrun --nproc_per_node=4 -m benchmarks.programs.all_reduce --device=cuda
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.harness import print_result
from pipeline.base.launch import Launch
from pipeline.config.schema import TrainConfig
from pipeline.parallel.rank import Rank
from pipeline.parallel.start import start_rank

KIB = 2**10
SIZES = tuple(4 * KIB * 4**power for power in range(8))
"""Bytes: 4 KiB to 64 MiB."""
WARM_UP_CALLS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes")
    parser.add_argument("--calls", type=int, default=30, help="of each size; the median counts")
    given = parser.parse_args()
    with start_rank(Launch.from_environment(os.environ), TrainConfig(device=given.device, threads=1)) as rank:
        times = [measure(rank, size, given.calls) for size in given.sizes]
    if rank.is_main:
        print_result({"ranks": rank.world_size, "bytes": list(given.sizes), "seconds": times})


def measure(rank: Rank, num_bytes: int, num_calls: int) -> float:
    """Collective. Return the seconds of the median call on the slowest rank."""
    tensor = torch.zeros(num_bytes // 4, device=rank.device)
    seconds = [time_call(rank, tensor) for _ in range(WARM_UP_CALLS + num_calls)][WARM_UP_CALLS:]
    return max(rank.gather(median(seconds)))


def time_call(rank: Rank, tensor: torch.Tensor) -> float:
    """Collective. Return the seconds of one call; on GPUs between two events, so that its launch is no part of it."""
    if rank.device.type != "cuda":
        started = time.perf_counter()
        dist.all_reduce(tensor)
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    dist.all_reduce(tensor)  # lets the ranks meet, so that the next does not wait for one that came late
    begin.record()
    dist.all_reduce(tensor)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


if __name__ == "__main__":
    main()
