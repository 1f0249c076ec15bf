"""The training as a script of its own would do it, in the style of PyTorch's examples.

torchrun --nproc_per_node=2 -m benchmarks.programs.plain_ddp --images=6400 --workers=1
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.programs.same_training import (
    EVAL_BATCH_SIZE,
    LOG_EVERY,
    EpochClock,
    Training,
    loader_settings,
    parse_training,
    report,
    torchvision_datasets,
)

Loader = DataLoader[tuple[Tensor, int]]


def main() -> None:
    training, workers = parse_training("the training as a plain DDP script")
    device = start_process_group(training)
    run(training, workers, device)  # holds the model, which must be gone before the process group can go
    dist.destroy_process_group()


def run(training: Training, workers: int, device: torch.device) -> None:
    train_set, test_set = torchvision_datasets(training)
    settings = loader_settings(training, workers)
    sampler: DistributedSampler[int] = DistributedSampler(train_set, shuffle=True)
    train_loader: Loader = DataLoader(train_set, training.batch, sampler=sampler, **settings)
    test_sampler: DistributedSampler[int] = DistributedSampler(test_set, shuffle=False)
    test_loader: Loader = DataLoader(test_set, EVAL_BATCH_SIZE, sampler=test_sampler, **settings)
    model = DistributedDataParallel(
        training.build_network().to(device), device_ids=[device] if device.type == "cuda" else None
    )
    optimizer = training.build_torch_optimizer(model)
    clock, accuracy = EpochClock(device), 0.0
    for epoch in range(training.epochs):
        sampler.set_epoch(epoch)
        with clock.epoch():
            train(training, model, device, train_loader, optimizer, epoch)
        accuracy = test(training, model, device, test_loader)
    if dist.get_rank() == 0:
        report(training, clock, accuracy)


def start_process_group(training: Training) -> torch.device:
    """Join the other ranks, and return the device of this one."""
    if training.device == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def train(
    training: Training, model: nn.Module, device: torch.device, loader: Loader, optimizer: Optimizer, epoch: int
) -> None:
    model.train()
    for index, (images, labels) in enumerate(loader):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        optimizer.zero_grad()
        with training.autocast:
            loss = F.nll_loss(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if index % LOG_EVERY == 0 and dist.get_rank() == 0:
            print(f"epoch {epoch + 1}  step {index}/{len(loader)}  loss {loss.item():.4f}")


def test(training: Training, model: nn.Module, device: torch.device, loader: Loader) -> float:
    """Return the share of test images that are classified rightly, over all ranks."""
    model.eval()
    right_and_all = torch.zeros(2, device=device)
    with torch.inference_mode(), training.autocast:
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            right = (model(images).argmax(1) == labels).sum()
            right_and_all += torch.stack([right, torch.tensor(len(labels), device=device)])
    dist.all_reduce(right_and_all)
    return float(right_and_all[0] / right_and_all[1])


if __name__ == "__main__":
    main()
