"""Before a training exists: what it would be (`--dry-run`), and how to leave when another rank has the say."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from pipeline.config import Config
from pipeline.distributed import Launch, choose_device, choose_threads
from pipeline.models import describe_layers
from pipeline.precision import choose_precision
from pipeline.run_folder import slurm_run_name
from train import build

LAUNCHER_GRACE = 30.0
"""Seconds; torchrun ends the other ranks within a second of the first failure, and kills after 30."""


def await_end(launch: Launch) -> None:
    """Leave the first word to the rank that has the cause: the launcher ends this one when that has exited.

    Exiting at once could make the launcher end that rank before it has printed. Without a launcher nobody would end
    this process, so it does not wait.
    """
    if launch.run_id is not None and launch.world_size > 1:
        threading.Event().wait(LAUNCHER_GRACE)


def describe_plan(config: Config, launch: Launch, config_name: str) -> str:
    """Resolved config, network, steps and run folder, as text."""
    info = build.dataset_info(config)
    schedule = build.build_schedule(config, info)
    device = choose_device(launch, config.train.device, config.train.backend)
    name = config.run.name or slurm_run_name(os.environ) or f"{config_name}-<date>-<time>"
    return "\n".join(
        (
            config.to_yaml(),
            _describe_network(config),
            f"data: {info.name}, {info.train_size:,} training and {info.eval_size:,} evaluation images of "
            f"{info.channels}x{info.image_size}x{info.image_size} in {info.num_classes} classes",
            f"steps: {schedule.steps_per_epoch:,} an epoch of {config.data.global_batch_size} images each, "
            f"{schedule.total_steps:,} in all",
            f"ranks: {launch.world_size}, each on {device.type} in "
            f"{choose_precision(config.train.precision, device)} with {choose_threads(launch, config.train.threads)} "
            "thread(s)",
            f"run folder: {Path(config.run.dir).absolute() / name}",
        )
    )


def _describe_network(config: Config) -> str:
    info = build.dataset_info(config)
    network = build.build_network(config, info)
    rows = describe_layers(network, info.channels, info.image_size)
    lines = [f"network: {config.model.name}", f"  {'layer':<12} {'kind':<12} {'output':<14} {'parameters':>10}"]
    for row in rows:
        shape = "x".join(str(size) for size in row.output_shape)
        lines.append(f"  {row.name:<12} {row.kind:<12} {shape:<14} {row.num_parameters:>10,}")
    total = sum(parameter.numel() for parameter in network.parameters())
    return "\n".join((*lines, f"  {'total':<40} {total:>10,}", ""))
