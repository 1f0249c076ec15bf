"""Convoy itself as one of the compared programs: the settings of its command, and what its journal says of the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.harness import ROOT, BenchmarkError
from benchmarks.programs.same_training import (
    EVAL_BATCH_SIZE,
    LEARNING_RATES,
    LOG_EVERY,
    MOMENTUM,
    Training,
    steady_rate,
)
from pipeline.base.launch import Launch
from pipeline.config import load_config, parse_command_line
from train.attempt.claim import Invocation


def convoy_settings(training: Training, ranks: int) -> list[str]:
    """Return the training as key=value."""
    if training.data == "mnist":
        data = ["data.dataset=mnist", f"data.root={training.root}", "data.download=false"]
    else:
        sizes = {"data.arguments.train_size": training.images, "data.arguments.validation_size": training.eval_images}
        data = ["data.dataset=synthetic", *(f"{key}={value}" for key, value in sizes.items())]
    return [
        *data,
        f"data.global_batch_size={training.batch * ranks}",
        f"data.eval_batch_size={EVAL_BATCH_SIZE}",
        "model.name=convnet",
        f"optim.name={training.optimizer}",
        f"optim.lr={LEARNING_RATES[training.optimizer]}",
        f"optim.momentum={MOMENTUM[training.optimizer]}",
        "optim.schedule=constant",
        f"train.epochs={training.epochs}",
        f"train.device={training.device}",
        f"train.precision={training.precision}",
        f"train.log_every={LOG_EVERY}",
        "tracking.enabled=false",
        "tracking.system_every=0",
    ]


def read_invocation(arguments: Sequence[str], launch: Launch) -> Invocation:
    """Return what train/main.py makes of its arguments. Raises ConfigError."""
    command = parse_command_line(arguments)
    return Invocation(load_config(command), command.config_path.stem, launch, ROOT)


def read_convoy_run(records: Iterable[Mapping[str, Any]], training: Training) -> dict[str, Any]:
    """Return what a finished run says of itself. Raises BenchmarkError if not every epoch has its time."""
    records = list(records)
    metrics = [record for record in records if record["kind"] == "metric"]
    epoch_seconds = [record["value"] for record in metrics if record["key"] == "perf/epoch_seconds"]
    if len(epoch_seconds) != training.epochs:
        raise BenchmarkError(f"{len(epoch_seconds)} of {training.epochs} epochs have perf/epoch_seconds in the journal")
    tags = {key: value for record in records if record["kind"] == "tags" for key, value in record["values"].items()}
    return {
        "images_per_second": steady_rate(training.images, epoch_seconds),
        "epoch_seconds": epoch_seconds,
        "accuracy": [record["value"] for record in metrics if record["key"] == "eval/accuracy"][-1],
        "threads": int(tags["threads_per_rank"]),
    }
