"""The training in Lightning, set up as its documentation recommends, with all that only shows or stores turned off.

torchrun --nproc_per_node=2 -m benchmarks.programs.lightning_ddp --images=6400 --workers=1
"""

from __future__ import annotations

import os
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader

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

Batch = tuple[Tensor, Tensor]


class Classifier(lightning.LightningModule):
    def __init__(self, training: Training):
        super().__init__()
        self._settings = training
        self.network: nn.Module = training.build_network()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.nll_loss(self.network(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        right = (self.network(images).argmax(1) == labels).float().mean()
        self.log("accuracy", right, sync_dist=True, batch_size=len(labels))

    def configure_optimizers(self) -> Optimizer:
        return self._settings.build_torch_optimizer(self.network)


class TimeEpochs(lightning.Callback):
    """An epoch ends with its last training batch: Lightning evaluates before it says that the epoch is over."""

    def __init__(self, clock: EpochClock):
        self._clock = clock

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._clock.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:
            self._clock.stop()


def main() -> None:
    training, workers = parse_training("the training in Lightning")
    train_set, test_set = torchvision_datasets(training)
    settings = loader_settings(training, workers)
    # Lightning puts DistributedSamplers into both
    train_loader = DataLoader(train_set, training.batch, shuffle=True, **settings)
    test_loader = DataLoader(test_set, EVAL_BATCH_SIZE, **settings)
    on_gpu = training.device == "cuda"
    clock = EpochClock(torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu"))
    trainer = lightning.Trainer(
        strategy="ddp",
        accelerator="gpu" if on_gpu else "cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        precision="bf16-mixed" if training.precision == "bf16" else "32-true",
        max_epochs=training.epochs,
        log_every_n_steps=LOG_EVERY,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        callbacks=[TimeEpochs(clock)],
    )
    trainer.fit(Classifier(training), train_loader, test_loader)
    if trainer.is_global_zero:
        report(training, clock, float(trainer.callback_metrics["accuracy"]))


if __name__ == "__main__":
    main()
