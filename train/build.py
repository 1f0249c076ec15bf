"""From a config to the parts of a training: the only place that knows every class."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.base.launch import Launch
from pipeline.base.seeding import stream_seed
from pipeline.base.signals import StopRequest
from pipeline.base.startup import StartupTimer
from pipeline.base.timing import PhaseTimer, build_timer
from pipeline.config import Config
from pipeline.data.augment import Augment
from pipeline.data.inputs import Loader
from pipeline.data.order import BlockSampler, GlobalOrderSampler
from pipeline.data.packed import share_on_node
from pipeline.data.resident import ResidentLoader
from pipeline.data.sources.datasets import DATASETS, Dataset, DatasetInfo, ImageSet, obtain_dataset, synthetic_info
from pipeline.data.streamed import StreamedLoader
from pipeline.learning.evaluation import Evaluator
from pipeline.learning.losses import LOSSES
from pipeline.learning.optim import Schedule, build_optimizer
from pipeline.learning.precision import Precision
from pipeline.models.catalog import build_model
from pipeline.models.normalize import Normalize
from pipeline.parallel.ddp import new_stream
from pipeline.parallel.ordered import Shards
from pipeline.parallel.rank import Rank
from pipeline.parallel.rendezvous import start_rank
from pipeline.parallel.replicas import replicate, replicate_by_shards
from pipeline.run.checkpoint import Checkpoints
from pipeline.run.folder import RunFolder
from train.display import BarDisplay, Display, LineDisplay, NoDisplay
from train.execution import choose
from train.output import RunOutput
from train.profiling import NoProfiler, StepProfiler
from train.steps.captured import StaticStep
from train.steps.eager import EagerStep, Step, StepParts
from train.steps.ordered import ShardStep
from train.trainer import Trainer

CAUSE_FIRST = 5.0
"""Seconds by which the others are more patient than the watchdog of a rank that stands still, which knows the cause."""
MIN_BLOCKS = 8
"""Of an evaluation, so that small ones are shared among some ranks too."""


def dataset_info(config: Config) -> DatasetInfo:
    """What is known of the dataset before a file is read, at the size and normalisation it will be used in."""
    data = config.data
    if data.dataset == "synthetic":
        info = synthetic_info(
            channels=data.synthetic_channels,
            num_classes=data.synthetic_classes,
            image_size=data.image_size or 28,
            train_size=data.synthetic_train_size,
            eval_size=data.synthetic_eval_size,
        )
    else:
        info = DATASETS[data.dataset]
    return replace(
        info,
        image_size=data.image_size or info.image_size,
        mean=data.mean or info.mean,
        std=data.std or info.std,
    )


def threads_of(config: Config) -> int | None:
    """None: by the cores. Another number gives other bits, and that of the cores depends on the number of ranks."""
    return config.train.threads or (1 if config.train.reproducible else None)


def join(config: Config, launch: Launch) -> AbstractContextManager[Rank]:
    """This process as a rank among the others, as long as the context lasts."""
    settings = config.train
    return start_rank(
        launch,
        device=settings.device,
        backend=settings.backend,
        threads=threads_of(config),
        deterministic=settings.reproducible or settings.deterministic,
        timeout=settings.hang_timeout + CAUSE_FIRST,
    )


def build_data(config: Config, rank: Rank) -> Dataset:
    """Collective: every rank must call. Raises DataError on the rank that finds it, RemoteError on the others."""
    info, data = dataset_info(config), config.data
    stored, root = DATASETS.get(info.name, info), Path(data.root)

    def load() -> Dataset:
        return obtain_dataset(stored, root, download=data.download, image_size=data.image_size, seed=config.run.seed)

    return replace(share_on_node(rank, load), info=info)


def build_network(config: Config, info: DatasetInfo) -> nn.Module:
    """The same initial weights on every rank, by the seed."""
    torch.manual_seed(stream_seed(config.run.seed, "weights"))
    return build_model(config.model.name, info.channels, info.image_size, info.num_classes, network_arguments(config))


def network_arguments(config: Config) -> dict[str, Any]:
    """The arguments that were set; the network's own defaults hold for the others."""
    chosen = {"dropout": config.model.dropout, "dropout2d": config.model.dropout2d}
    return {name: value for name, value in chosen.items() if value is not None}


def build_checkpoints(config: Config, folder: RunFolder) -> Checkpoints:
    return Checkpoints(
        folder.checkpoints,
        keep=config.checkpoint.keep,
        keep_best=config.checkpoint.keep_best,
        higher_is_better=config.checkpoint.metric == "eval/accuracy",
    )


def build_schedule(config: Config, info: DatasetInfo) -> Schedule:
    steps_per_epoch = -(-info.train_size // config.data.global_batch_size)
    return Schedule(config.optim, steps_per_epoch, config.train.epochs * steps_per_epoch)


def build_trainer(
    config: Config,
    rank: Rank,
    dataset: Dataset,
    output: RunOutput,
    stop: StopRequest,
    startup: StartupTimer,
    run_id: str,
) -> Trainer:
    """Collective: every rank must call (rank 0's weights are sent to all)."""
    info, loss = dataset.info, LOSSES[config.loss]
    precision = Precision(config.train.precision, rank.device)
    network = build_network(config, info).to(rank.device, precision.weights_dtype)
    if config.train.channels_last:
        network = network.to(memory_format=torch.channels_last)
    choices = choose(config, rank, dataset)
    if config.train.compile:
        network.compile()
    stream = new_stream(rank.device) if choices.is_captured else None
    optimizer = build_optimizer(config.optim, network.parameters(), capture_on=rank.device if stream else None)
    timer = build_timer(rank.device)
    normalize = Normalize(info.mean, info.std, precision.weights_dtype).to(rank.device)
    train_sampler, eval_sampler = _train_sampler(config, rank, dataset), _eval_sampler(config, rank, dataset)
    augment = _build_augment(config, rank.device)
    train_loader = _build_loader(config, choices.placement, dataset.train, train_sampler, normalize, timer, augment)
    apart = build_timer(rank.device)  # an evaluation belongs to no step
    eval_loader = _build_loader(config, choices.placement, dataset.evaluation, eval_sampler, normalize, apart)
    timeout = config.train.hang_timeout + CAUSE_FIRST
    shards = None
    if config.train.reproducible:
        replicas, shards = replicate_by_shards(network, rank, config.train.virtual_shards, timeout=timeout)
    else:
        replicas = replicate(
            network,
            rank,
            timer,
            normalize(dataset.train.images[:1].to(rank.device)),
            timeout=timeout,
            shared_memory=config.train.backend == "auto",
            accumulate=config.train.accumulate,
            compress=choices.compress,
            capture_stream=stream,
        )
    output.choices(choices.reasons | {"gradients": replicas.gradients})
    parts = StepParts(
        replicas=replicas,
        inputs=train_loader.inputs,
        loss=loss,
        optimizer=optimizer,
        precision=precision,
        rank=rank,
        timer=timer,
        seed=config.run.seed,
        clip_norm=config.train.clip_norm,
    )
    return Trainer(
        config=config,
        rank=rank,
        network=network,
        step=_build_step(parts, train_sampler.full_share, stream, shards),
        optimizer=optimizer,
        schedule=build_schedule(config, info),
        precision=precision,
        train_loader=train_loader,
        evaluator=Evaluator(network, eval_loader, loss, precision, rank, info.num_classes),
        output=output,
        display=_build_display(config, rank, info),
        stop=stop,
        timer=timer,
        startup=startup,
        profiler=StepProfiler(config.train.profile) if config.train.profile and rank.is_main else NoProfiler(),
        run_id=run_id,
        dataset_digest=dataset.digest,
        waits_in_backward=replicas.meet_in_backward,
    )


def _build_step(parts: StepParts, batch_size: int, stream: torch.cuda.Stream | None, shards: Shards | None) -> Step:
    if shards is not None:
        return ShardStep(parts, shards)
    return EagerStep(parts) if stream is None else StaticStep(parts, batch_size, stream)


def _train_sampler(config: Config, rank: Rank, dataset: Dataset) -> GlobalOrderSampler:
    return GlobalOrderSampler(
        len(dataset.train.labels),
        global_batch_size=config.data.global_batch_size,
        world_size=rank.world_size,
        rank=rank.rank,
        accumulate=config.train.accumulate,
        shards=config.train.virtual_shards if config.train.reproducible else None,
        seed=config.run.seed,
    )


def _eval_sampler(config: Config, rank: Rank, dataset: Dataset) -> GlobalOrderSampler:
    size = len(dataset.evaluation.labels)
    block_size = min(config.data.eval_batch_size, -(-size // MIN_BLOCKS))
    return BlockSampler(size, block_size=block_size, world_size=rank.world_size, rank=rank.rank)


def _build_loader(
    config: Config,
    placement: str,
    images: ImageSet,
    sampler: GlobalOrderSampler,
    normalize: Normalize,
    timer: PhaseTimer,
    augment: Augment | None = None,
) -> Loader:
    if placement == "device":
        return ResidentLoader(images.images, images.labels, sampler, normalize, augment)
    return StreamedLoader(images.images, images.labels, sampler, normalize, config.data.workers, timer, augment)


def _build_augment(config: Config, device: torch.device) -> Augment | None:
    data = config.data
    if data.random_crop == 0 and not data.random_flip:
        return None
    return Augment(config.run.seed, data.random_crop, data.random_flip, device)


def _build_display(config: Config, rank: Rank, info: DatasetInfo) -> Display:
    if not rank.is_main:
        return NoDisplay()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return BarDisplay(config.train.epochs, info.train_size)
    return LineDisplay(config.train.epochs, build_schedule(config, info).total_steps)
