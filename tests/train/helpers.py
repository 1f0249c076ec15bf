"""Trainings for tests: built as the program builds them, without a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.base.signals import StopRequest
from pipeline.base.timing import StartupTimer
from pipeline.config import CommandLine, Config, load_config
from pipeline.data.build import list_dataset, load_dataset
from pipeline.data.samples import Dataset, PixelSamples
from pipeline.parallel.rank import Rank
from pipeline.run.checkpoint import TrainingState
from train.build import build_trainer
from train.output import RunOutput
from train.trainer import Trainer

DEFAULT = Path(__file__).parents[2] / "configs" / "default.yaml"


class Recorder(RunOutput):
    """A RunOutput that keeps in memory what a run folder would get."""

    run_id = "test"

    def __init__(self) -> None:
        self.points: list[tuple[str, int, float]] = []
        self.states: list[TrainingState] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.points += [(key, step, value) for key, value in values.items()]

    def save_checkpoint(self, state: TrainingState, value: float | None) -> None:
        self.states.append(state)

    def execution(self, reasons: Mapping[str, str]) -> None:
        self.chosen = dict(reasons)

    def history(self, key: str) -> list[float]:
        return [value for name, _, value in self.points if name == key]


def config_of(*settings: str) -> Config:
    return load_config(CommandLine(DEFAULT, settings, dry_run=False))


def make_trainer(rank: Rank, config: Config, num_train: int | None = None) -> tuple[Trainer, Recorder]:
    """A trainer on the config's dataset, cut to its first `num_train` samples."""
    dataset = load_dataset(config.data, list_dataset(config.data, config.run.seed), rank)
    if num_train is not None:
        dataset = cut(dataset, num_train)
    recorder = Recorder()
    return build_trainer(config, rank, dataset, recorder, StopRequest(), StartupTimer()), recorder


def cut(dataset: Dataset, num_train: int) -> Dataset:
    assert isinstance(dataset.train, PixelSamples)
    train = PixelSamples.of(dataset.train.pixels[:num_train], dataset.train.labels[:num_train])
    return replace(dataset, train=train)


def flat_weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def set_total_steps(trainer: Trainer, total_steps: int) -> None:
    trainer.update.schedule = replace(trainer.update.schedule, total_steps=total_steps)


def losses(rank: Rank, steps: int, settings: Sequence[str]) -> list[float]:
    """The loss of each of the first `steps` global batches."""
    trainer, recorder = make_trainer(rank, config_of("train.log_every=1", *settings))
    set_total_steps(trainer, steps)
    while trainer.position.global_step < steps:
        trainer.train_epoch()
        trainer.position = replace(trainer.position, epoch=trainer.position.epoch + 1, samples_seen=0)
    return recorder.history("train/loss")[:steps]
