"""The training with Accelerate, as its documentation recommends.

torchrun --nproc_per_node=2 -m benchmarks.programs.accelerate_ddp --images=6400 --workers=1
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.programs.same_training import (
    EVAL_BATCH_SIZE,
    LOG_EVERY,
    EpochClock,
    loader_settings,
    parse_training,
    report,
    torchvision_datasets,
)


def main() -> None:
    training, workers = parse_training("the training with Accelerate")
    accelerator = Accelerator(
        cpu=training.device == "cpu", mixed_precision="bf16" if training.precision == "bf16" else "no"
    )
    train_set, test_set = torchvision_datasets(training)
    settings = loader_settings(training, workers)
    network = training.build_network()
    # prepare() cuts the loaders' batches up among the ranks
    model, optimizer, train_loader, test_loader = accelerator.prepare(
        network,
        training.build_torch_optimizer(network),
        DataLoader(train_set, training.batch, shuffle=True, **settings),
        DataLoader(test_set, EVAL_BATCH_SIZE, **settings),
    )
    clock, accuracy = EpochClock(accelerator.device), 0.0
    for epoch in range(training.epochs):
        with clock.epoch():
            train(accelerator, model, optimizer, train_loader, epoch)
        accuracy = test(accelerator, model, test_loader)
    if accelerator.is_main_process:
        report(training, clock, accuracy)
    accelerator.end_training()


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, loader: Any, epoch: int) -> None:
    model.train()
    for index, (images, labels) in enumerate(loader):
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        if index % LOG_EVERY == 0 and accelerator.is_main_process:
            print(f"epoch {epoch + 1}  step {index}/{len(loader)}  loss {loss.item():.4f}")


def test(accelerator: Accelerator, model: nn.Module, loader: Any) -> float:
    """Return the share of test images that are classified rightly, over all ranks."""
    model.eval()
    num_right, num_images = 0, 0
    with torch.inference_mode():
        for images, labels in loader:
            predicted, known = accelerator.gather_for_metrics((model(images).argmax(1), labels))
            num_right += int((predicted == known).sum())
            num_images += len(known)
    return num_right / num_images


if __name__ == "__main__":
    main()
