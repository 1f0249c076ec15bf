"""What a training would be, without starting it: `--dry-run`."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.config import Config
from pipeline.distributed import Launch, choose_device, choose_threads
from pipeline.models import describe_layers
from pipeline.precision import choose_precision
from pipeline.run_folder import slurm_run_name
from train import build


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
