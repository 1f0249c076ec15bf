"""From what a loader yields to what a step computes on: pixels gathered, augmented and normalised on the device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.augment import Augment
from pipeline.models.normalize import Normalize


@dataclass(frozen=True)
class Inputs:
    """N samples on the device, each with K weighted classes. N may be 0; K is 1."""

    images: Tensor
    """[N, C, H, W], normalised."""
    classes: Tensor
    """int64 [K, N]."""
    weights: Tensor
    """[K, N], in the dtype of the images. A sample of weight 0 is padding."""


class Prepare(nn.Module):
    """Turns a micro-batch into Inputs on the device, without waiting for it; can be captured in a CUDA graph."""

    def __init__(self, take: nn.Module, augment: nn.Module, normalize: Normalize):
        """`take` turns what the loader yields into `Gathered`. A stage that does nothing is nn.Identity."""
        super().__init__()
        self.take = take
        self.augment = augment
        self.normalize = normalize
        self.device = normalize.scale.device
        self._one = torch.ones((), dtype=normalize.scale.dtype, device=self.device)

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.augment, Augment):
            self.augment.set_epoch(epoch)

    def forward(self, part: Any, count: Tensor | None = None) -> Inputs:
        """Return the inputs for `part`. Samples at positions >= `count`, an integer on the device, get weight 0."""
        pixels, labels, _ = self.augment(self.take(part))
        images = self.normalize(pixels)
        weights = self._one.expand(1, len(images))
        if count is not None:
            weights = weights * (torch.arange(len(images), device=self.device) < count)
        return Inputs(images, labels.unsqueeze(0), weights)
