"""What is wrong with a config that only datasets, networks and this machine know."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pipeline.base.launch import Launch
from pipeline.config import Config, Problem
from pipeline.learning.losses import losses_for
from pipeline.models.catalog import NETWORKS
from pipeline.parallel.machine import choose_device
from train.build import build_network, dataset_info
from train.steps.captured import has_batch_statistics


def find_contradictions(config: Config, launch: Launch) -> Iterable[Problem]:
    """What only datasets, networks and this machine know. Reads no file and starts nothing."""
    info, network = dataset_info(config), NETWORKS[config.model.name]
    fitting = losses_for(network.output)
    if config.loss not in fitting:
        yield Problem(
            ("loss", "model.name"),
            f"loss = {config.loss}: does not fit the {network.output.replace('_', '-')} of model.name="
            f"{config.model.name}; use loss={' or loss='.join(fitting)}",
        )
    for argument in ("dropout", "dropout2d"):
        if getattr(config.model, argument) is not None and argument not in network.arguments:
            yield Problem(
                (f"model.{argument}", "model.name"),
                f"model.{argument} = {getattr(config.model, argument)}: {config.model.name} has none; accepted: null",
            )
    if info.image_size < network.min_image_size:
        yield Problem(
            ("data.image_size", "model.name", "data.dataset"),
            f"data.image_size = {info.image_size}: too small for {config.model.name}; accepted: "
            f">= {network.min_image_size}",
        )
    for key, values in (("data.mean", info.mean), ("data.std", info.std)):
        if len(values) != info.channels:
            yield Problem(
                (key, "data.dataset"),
                f"{key} = {list(values)}: accepted: {info.channels} number(s), one per channel of {info.name}",
            )
    total_steps = config.train.epochs * -(-info.train_size // config.data.global_batch_size)
    if config.optim.warmup >= total_steps:
        yield Problem(
            ("optim.warmup", "train.epochs", "data.global_batch_size"),
            f"optim.warmup = {config.optim.warmup}: as long as the training or longer; accepted: < {total_steps}, the "
            "number of optimizer steps",
        )
    yield from _find_device_contradictions(config, launch)
    if config.train.reproducible:
        yield from _find_reproducibility_contradictions(config, launch)


def _find_reproducibility_contradictions(config: Config, launch: Launch) -> Iterable[Problem]:
    shards = config.train.virtual_shards
    if launch.world_size > shards:
        yield Problem(
            ("train.virtual_shards", "train.reproducible"),
            f"train.virtual_shards = {shards}: fewer than the {launch.world_size} ranks of a reproducible training; "
            "start as many ranks at most, or set more shards (which gives other bits)",
        )
    with torch.device("meta"):
        network = build_network(config, dataset_info(config))
    if has_batch_statistics(network):
        yield Problem(
            ("train.reproducible", "model.name"),
            f"train.reproducible = true: {config.model.name} has batch statistics, which depend on the number of "
            "ranks; choose another network",
        )


def _find_device_contradictions(config: Config, launch: Launch) -> Iterable[Problem]:
    try:
        device = choose_device(launch, config.train.device, config.train.backend)
    except ValueError as error:
        yield Problem(("train.device", "train.backend"), str(error))
        return
    if device.type == "cpu" and config.train.device == "auto":
        for key, value in (("train.precision", "fp16"), ("train.backend", "nccl"), ("train.compress", "bf16")):
            if config.get(key) == value:
                yield Problem((key, "train.device"), f"{key} = {value}: needs a GPU, and torch sees none here")
