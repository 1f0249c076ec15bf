"""The limit of data-parallel training without its costs: no loader, no DDP, no communication.

One process per rank, all at once, each with the network, the forward and backward pass and the update as Convoy
executes them, on one batch that lies on the device. On GPUs also as a CUDA graph; the faster counts.

torchrun --nproc_per_node=2 -m benchmarks.programs.compute_alone --images=6400
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from benchmarks.harness import print_result
from benchmarks.programs.same_training import EpochClock, Training, parse_training, steady_rate
from pipeline.base.launch import Launch
from pipeline.config.schema import TrainConfig
from pipeline.data.inputs import Inputs
from pipeline.learning.losses import LOSSES
from pipeline.learning.update import Precision
from pipeline.parallel.rank import Rank
from pipeline.parallel.replicas import new_stream, on_stream
from pipeline.parallel.start import start_rank
from train.steps.captured import capture

Step = Callable[[], Tensor]


class Neighbours:
    """The processes that compute at the same time: they know each other by torchrun's store alone."""

    def __init__(self, launch: Launch):
        store, rank, world_size = next(rendezvous("env://", launch.rank, launch.world_size))
        self._store: Store = PrefixStore("compute-alone", store)
        self._rank = rank
        self._world_size = world_size

    def wait_for_all(self, what: str) -> None:
        """Return in all processes at once."""
        if self._store.add(f"{what}/arrived", 1) == self._world_size:
            self._store.set(f"{what}/all", "")
        self._store.wait([f"{what}/all"])

    def sum(self, what: str, value: float) -> float:
        """Return the sum of `value` over all processes."""
        self._store.set(f"{what}/{self._rank}", repr(value))
        return sum(float(self._store.get(f"{what}/{rank}")) for rank in range(self._world_size))


def main() -> None:
    training, _ = parse_training("forward, backward and update alone")
    launch = Launch.from_environment(os.environ)
    neighbours = Neighbours(launch)
    with start_rank(replace(launch, rank=0, world_size=1), TrainConfig(device=training.device)) as rank:
        executions: dict[str, Callable[[Training, Rank], Step]] = {"eager": build_step}
        if rank.device.type == "cuda":
            executions["CUDA graph"] = build_graph
        rates = {name: measure(name, build, training, rank, neighbours) for name, build in executions.items()}
    fastest = max(rates, key=lambda name: rates[name])
    neighbours.wait_for_all("end")  # rank 0's process may hold the store
    if launch.rank == 0:
        print_result(
            {
                "images_per_second": rates[fastest],
                "epoch_seconds": [training.images / rates[fastest]],
                "execution": fastest,
                "images_per_second_by_execution": rates,
                "threads": rank.num_threads,
            }
        )


def measure(
    name: str, build: Callable[[Training, Rank], Step], training: Training, rank: Rank, neighbours: Neighbours
) -> float:
    """Return the images per second, summed over the processes."""
    step, clock = build(training, rank), EpochClock(rank.device)
    num_steps = -(-training.images // (training.batch * rank.local_world_size))
    for epoch in range(training.epochs):
        neighbours.wait_for_all(f"{name}/{epoch}")
        with clock.epoch():
            for _ in range(num_steps):
                step()
    return neighbours.sum(name, steady_rate(training.batch * num_steps, clock.seconds))


def build_step(training: Training, rank: Rank) -> Step:
    """Return one optimizer step on a fixed batch."""
    precision, loss = Precision(training.precision, rank.device), LOSSES["nll"]
    network = training.build_network().to(rank.device).to(memory_format=torch.channels_last).train()
    update = training.build_convoy_update(network, precision, rank.device if rank.device.type == "cuda" else None)
    update.set_step(0)
    labels = torch.arange(training.batch, device=rank.device) % 10
    inputs = Inputs(
        images=torch.randn(training.batch, 1, 28, 28, device=rank.device),
        classes=labels[None],
        weights=torch.ones(1, training.batch, device=rank.device),
    )

    def step() -> Tensor:
        with precision.autocast():
            total = loss(network(inputs.images), inputs)
        precision.backward(total * (1 / training.batch))
        update()
        return total.detach()

    return step


def build_graph(training: Training, rank: Rank) -> Step:
    """Return the same step, captured once and replayed as one launch."""
    step, stream = build_step(training, rank), new_stream(rank.device)
    with on_stream(stream):
        for _ in range(3):  # what is allocated and chosen in the first steps must not be captured
            step()
    replay, loss = capture(step, stream)

    def replayed() -> Tensor:
        assert step is not None  # holds network, optimizer and images, on whose memory the graph works
        replay()
        return loss

    return replayed


if __name__ == "__main__":
    main()
