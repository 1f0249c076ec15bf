"""Hold a dataset as the ranks of a training on CPU do, read all of it, and say what that takes of memory and time.

torchrun --nproc_per_node=2 -m benchmarks.programs.hold_dataset --images=60000 [--apart]
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import print_result
from pipeline.base.launch import Launch
from pipeline.config import load_config, parse_command_line
from pipeline.config.schema import DataConfig, TrainConfig
from pipeline.data.build import list_dataset, load_dataset
from pipeline.data.samples import Dataset, PixelSamples
from pipeline.parallel.rank import Rank
from pipeline.parallel.start import start_rank

EVAL_SHARE = 6
"""Training images per evaluation image, as in MNIST."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, required=True, help="28x28, for training")
    parser.add_argument("--apart", action="store_true", help="each rank makes and holds a dataset of its own")
    given = parser.parse_args()
    sizes = {"train": given.images, "validation": max(1, given.images // EVAL_SHARE)}
    settings = ["data.dataset=synthetic", *(f"data.arguments.{name}_size={size}" for name, size in sizes.items())]
    config = load_config(parse_command_line(settings))
    with start_rank(Launch.from_environment(os.environ), TrainConfig(device="cpu", threads=1)) as rank:
        measure(config.data, rank, apart=given.apart)


def measure(config: DataConfig, rank: Rank, *, apart: bool) -> None:
    """Collective. Print the figures of all ranks, on rank 0."""
    rank.gather(None)  # from here on all share torch's pages, and nobody's time includes waiting for a late start
    before = proportional_bytes()
    rank.gather(None)
    started = time.perf_counter()
    dataset = load_dataset(config, list_dataset(config, seed=0), alone_on_node(rank) if apart else rank)
    seconds = time.perf_counter() - started
    num_bytes = read_all(dataset)
    rank.gather(None)  # from here on all have read theirs
    figures = {
        "seconds": seconds,
        "dataset_bytes": num_bytes,
        "mapped_bytes": proportional_bytes("/convoy-dataset-"),
        "added_bytes": proportional_bytes() - before,
        "all_bytes": proportional_bytes(),
    }
    by_rank = rank.gather(figures)  # and until here nobody lets go of it
    if rank.is_main:
        print_result({"ranks": by_rank})


def alone_on_node(rank: Rank) -> Rank:
    """Return a rank that has nobody to share with."""
    return replace(rank, local_rank=0, local_world_size=1)


def read_all(dataset: Dataset) -> int:
    """Touch each page, with which it counts for this process; return the bytes of the dataset."""
    num_bytes = 0
    for samples in dataset.splits.values():
        assert isinstance(samples, PixelSamples)
        for tensor in (samples.pixels, samples.labels):
            tensor.max()  # unlike a sum, without a wider copy
            num_bytes += tensor.nbytes
    return num_bytes


def proportional_bytes(name: str | None = None) -> int:
    """Return the memory of this process, each page divided by the number of processes that map it; or that of the
    mappings whose file has `name` in its path."""
    if name is None:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(pss_bytes(line) for line in lines)
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(maxsplit=1)[0].endswith(":"):
            inside = name in line
        elif inside:
            total += pss_bytes(line)
    return total


def pss_bytes(line: str) -> int:
    return 1024 * int(line.split()[1]) if line.startswith("Pss:") else 0


if __name__ == "__main__":
    main()
