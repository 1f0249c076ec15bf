"""What a training would be, without starting it: `--dry-run`."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.base.launch import Launch
from pipeline.config import Config
from pipeline.data.sources.datasets import DATASETS, is_present, prepare_dataset
from pipeline.learning.precision import choose_precision
from pipeline.models.catalog import describe_layers
from pipeline.parallel.machine import choose_device, choose_threads
from pipeline.run.checkpoint import CheckpointError
from pipeline.run.folder import RunError, RunFolder, slurm_run_name
from pipeline.run.locks import is_being_trained, wait_until_free
from pipeline.run.resume import changes, check_resumable, check_same_training, is_finished
from train import build


def describe_plan(config: Config, launch: Launch, config_name: str) -> str:
    """Resolved config, network, data, steps and run folder, as text.

    Raises DataError or RunError for what would keep a training from starting here.
    """
    info = build.dataset_info(config)
    schedule = build.build_schedule(config, info)
    device = choose_device(launch, config.train.device, config.train.backend)
    threads = choose_threads(launch, build.threads_of(config))
    batch_size = min(config.data.global_batch_size, info.train_size)
    return "\n".join(
        (
            config.to_yaml(),
            _describe_network(config),
            f"data: {info.name}, {info.train_size:,} training and {info.eval_size:,} evaluation images of "
            f"{info.channels}x{info.image_size}x{info.image_size} in {info.num_classes} classes; {_check_data(config)}",
            f"steps: {schedule.steps_per_epoch:,} an epoch of {batch_size} images each, "
            f"{schedule.total_steps:,} in all",
            f"ranks: {launch.world_size}, each on {device.type} in "
            f"{choose_precision(config.train.precision, device)} with {threads} thread(s)",
            f"run folder: {_folder(config, config_name)}",
            f"run: {_check_run(config, launch)}",
        )
    )


def _check_data(config: Config) -> str:
    data = config.data
    stored = DATASETS.get(data.dataset)
    if stored is None:
        return "made when it starts"
    if data.download and not is_present(stored, Path(data.root)):
        return f"not in {data.root} yet, will be downloaded"
    prepare_dataset(stored, Path(data.root), download=False)
    return "here and sound"


def _folder(config: Config, config_name: str) -> Path:
    name = config.run.name or slurm_run_name(os.environ) or f"{config_name}-<date>-<time>"
    return Path(config.run.dir).absolute() / name


def _check_run(config: Config, launch: Launch) -> str:
    folder = RunFolder(_folder(config, ""))
    if not folder.path.exists():
        check_resumable(folder, config, has_checkpoint=False)
        return "new"
    if launch.may_be_early:
        # ranks that are cut off from the others end by themselves; here nobody waits for this one in vain
        wait_until_free(folder, config.train.hang_timeout + 60)
    if is_being_trained(folder):
        raise RunError(
            f"run {folder.name} is being trained right now: wait for it, stop it, or choose another run.name"
        )
    try:
        state = build.build_checkpoints(config, folder).load_latest()
    except CheckpointError as error:
        raise RunError(str(error)) from error
    check_resumable(
        folder, config, has_checkpoint=state is not None, launch_id=launch.run_id, is_requeued=launch.is_requeued
    )
    if state is not None:  # whose dataset is not read here
        check_same_training(folder, config, state.config, state.dataset_digest, state.dataset_digest)
    status, step = folder.status(), state.position.global_step if state else 0
    if is_finished(status, config):
        return "finished, and left as it is; raise train.epochs to go on, or choose another run.name"
    before = {"running": "killed"}.get(status.get("state", "new"), status.get("state", "new"))
    changed = "".join(
        f"\n  from here on with {key}={now}, which was {was}" for key, was, now in changes(folder, config)
    )
    return f"{before}, continues behind step {step:,}{changed}"


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
