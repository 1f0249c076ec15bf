"""What all compared programs are given alike: the settings, the images, the network, the optimizer and the clock."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_type_hints

import torch

# DDP imports this, and it takes the process group of that moment as its functions' default, for good: threads of gloo
# then outlive destroy_process_group, and one that drops a tensor while Python ends aborts the process. Imported now,
# there is no group to take.
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from benchmarks.harness import print_result
from pipeline.config.schema import OptimConfig
from pipeline.data import samples
from pipeline.data.catalog import source
from pipeline.learning.optim import Schedule, build_optimizer
from pipeline.learning.update import Precision, Update
from pipeline.models.catalog import ModelSpec

LEARNING_RATES = {"adadelta": 0.5, "sgd": 0.01}
MOMENTUM = {"adadelta": 0.0, "sgd": 0.9}
EVAL_BATCH_SIZE = 500
"""Per rank, in every program."""
LOG_EVERY = 10
"""Steps between two looks at the loss, in every program."""


@dataclass(frozen=True)
class Training:
    """One training, to be done alike by every program."""

    data: Literal["synthetic", "mnist"] = "synthetic"
    root: str = "data"
    """Folder that holds MNIST/raw."""
    images: int = 6400
    eval_images: int = 1000
    epochs: int = 2
    batch: int = 32
    """Samples per rank and optimizer step."""
    optimizer: Literal["adadelta", "sgd"] = "adadelta"
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"

    def arguments(self) -> list[str]:
        """Return what `parse_training` reads."""
        return [f"--{each.name}={getattr(self, each.name)}" for each in fields(self)]

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")

    def dataset(self) -> samples.Dataset:
        """Return the images that Convoy trains on."""
        sizes = {"train_size": self.images, "validation_size": self.eval_images}
        return source(self.data)(root=Path(self.root), seed=0, **(sizes if self.data == "synthetic" else {}))

    def build_network(self) -> nn.Module:
        """Return the network with the same initial weights in every process of a program."""
        torch.manual_seed(0)
        return ModelSpec("convnet", {}, channels=1, image_size=28, num_classes=10).build()

    def build_torch_optimizer(self, network: nn.Module) -> Optimizer:
        """Return the optimizer as a script of its own would build it."""
        lr = LEARNING_RATES[self.optimizer]
        if self.optimizer == "sgd":
            return torch.optim.SGD(network.parameters(), lr=lr, momentum=MOMENTUM["sgd"])
        return torch.optim.Adadelta(network.parameters(), lr=lr)

    def build_convoy_update(self, network: nn.Module, precision: Precision, capture_on: torch.device | None) -> Update:
        """Return the optimizer step as Convoy builds it, to be captured on a device in a CUDA graph if one is given."""
        lr, momentum = LEARNING_RATES[self.optimizer], MOMENTUM[self.optimizer]
        config = OptimConfig(name=self.optimizer, lr=lr, momentum=momentum, schedule="constant")
        optimizer = build_optimizer(config, [{"params": list(network.parameters())}], capture_on=capture_on)
        return Update(optimizer, Schedule(config, steps_per_epoch=1, total_steps=1), precision)


def parse_training(description: str) -> tuple[Training, int]:
    """Return the training and the number of DataLoader workers, from the command line of one of the programs."""
    parser = argparse.ArgumentParser(description=description)
    types = get_type_hints(Training)
    for each in fields(Training):
        kind = types[each.name]
        parser.add_argument(f"--{each.name}", type=int if kind is int else str, default=each.default)
    parser.add_argument("--workers", type=int, default=0, help="DataLoader processes per rank")
    values = vars(parser.parse_args())
    workers = values.pop("workers")
    return Training(**values), workers


class SyntheticMnist(Dataset[tuple[Tensor, int]]):
    """Images in memory, handed out one by one as torchvision's MNIST does: a PIL image, transformed, and a number."""

    def __init__(self, split: samples.Samples, transform: Any):
        from PIL import Image

        assert isinstance(split, samples.PixelSamples)
        self.data = split.pixels[:, 0]
        self.targets = split.labels
        self._to_pil = Image.fromarray
        self._transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.data[index], int(self.targets[index])
        return self._transform(self._to_pil(image.numpy(), mode="L")), target


def torchvision_datasets(training: Training) -> tuple[Dataset[tuple[Tensor, int]], Dataset[tuple[Tensor, int]]]:
    """Return training and test images with the transforms of the examples."""
    from torchvision import datasets, transforms

    ours = training.dataset()
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(ours.mean, ours.std)])
    if training.data == "mnist":
        train, test = (datasets.MNIST(training.root, train=train, transform=transform) for train in (True, False))
        return cast("Dataset[tuple[Tensor, int]]", train), cast("Dataset[tuple[Tensor, int]]", test)
    return SyntheticMnist(ours.train, transform), SyntheticMnist(ours.validation, transform)


def loader_settings(training: Training, workers: int) -> dict[str, Any]:
    """Return what the documentation of torch, Lightning and Accelerate advises: pinned for GPUs, workers kept."""
    return {
        "num_workers": workers,
        "pin_memory": training.device == "cuda",
        "persistent_workers": workers > 0,
    }


@dataclass
class EpochClock:
    """Seconds of each training epoch, its data loading included, evaluation and everything else excluded."""

    device: torch.device
    seconds: list[float] = field(default_factory=list)
    _started: float = 0.0

    def start(self) -> None:
        self._synchronize()
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._synchronize()
        self.seconds.append(time.perf_counter() - self._started)

    @contextmanager
    def epoch(self) -> Iterator[None]:
        self.start()
        yield
        self.stop()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def steady_rate(images: int, epoch_seconds: list[float]) -> float:
    """Return the images per second in the second and later epochs: the first one warms up what there is."""
    if len(epoch_seconds) < 2:
        raise ValueError(f"{len(epoch_seconds)} epoch(s): at least 2 are needed, the first is not counted")
    return images * (len(epoch_seconds) - 1) / sum(epoch_seconds[1:])


def report(training: Training, clock: EpochClock, accuracy: float) -> None:
    """Print the result of a program, on rank 0."""
    print_result(
        {
            "images_per_second": steady_rate(training.images, clock.seconds),
            "epoch_seconds": clock.seconds,
            "accuracy": accuracy,
            "threads": torch.get_num_threads(),
        }
    )
