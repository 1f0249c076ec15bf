"""From stored pixels to what a network is fed with."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """uint8 (or float) pixels in 0..255 -> (pixel / 255 - mean) / std in `dtype`, channel by channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Iterable[float], std: Iterable[float], dtype: torch.dtype = torch.float32):
        super().__init__()
        mean_, std_ = (torch.tensor(list(v), dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
        self.register_buffer("scale", (1 / (255 * std_)).to(dtype))
        self.register_buffer("shift", (-mean_ / std_).to(dtype))

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self.scale.dtype) * self.scale).add_(self.shift)
