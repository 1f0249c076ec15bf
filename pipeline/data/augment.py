"""Random crops and flips of a whole batch at once, on the device, drawn from (seed, epoch, sample) alone."""

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.base.seeding import stream_seed

LOW_BITS = 2**31 - 1
Gathered = tuple[Tensor, Tensor, Tensor]
"""A micro-batch: pixels uint8 [N, C, H, W], labels int64 [N], and the samples' indices in the dataset, int64 [N]."""


class Augment(nn.Module):
    """Crops at random from the image with `crop` black pixels around it; `flip` mirrors half of the images.

    What is drawn for a sample in an epoch depends on neither its batch nor its rank, so that the same images are seen
    on any number of ranks and after any resume. Drawn by a hash and not by a generator: it needs no state to be
    carried, and can be captured in a CUDA graph.
    """

    key: Tensor

    def __init__(
        self, seed: int, crop: Annotated[int, Ge(0), Le(64)] = 0, flip: bool = False, device: torch.device | None = None
    ):
        super().__init__()
        self._seed = seed
        self._crop = crop
        self._flip = flip
        self.register_buffer("key", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    def set_epoch(self, epoch: int) -> None:
        self.key.fill_(stream_seed(self._seed, "augment", epoch) & LOW_BITS)

    def forward(self, batch: Gathered) -> Gathered:
        images, labels, indices = batch
        height, width = images.shape[-2:]
        draws = hash_bits(indices * 4 + self.key)
        offsets = 2 * self._crop + 1
        rows = torch.arange(height, device=images.device) + (draws % offsets)[:, None]
        columns = torch.arange(width, device=images.device).expand(len(images), -1)
        if self._flip:
            mirrored = (hash_bits(draws) & 1).bool()[:, None]
            columns = torch.where(mirrored, columns.flip(1), columns)
        columns = columns + (draws // offsets % offsets)[:, None]
        padded = F.pad(images, (self._crop,) * 4)
        samples = torch.arange(len(images), device=images.device)[:, None, None]
        # [N, H, W, C]: the three indices lie apart from the channels, which therefore come last
        cropped = padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]]
        return cropped.permute(0, 3, 1, 2), labels, indices


def hash_bits(numbers: Tensor) -> Tensor:
    """Return int64 in 0..2^31-1 that look random, for neighbours too: two rounds of multiply and shift.

    The multipliers are those of Wellons' lowbias32 (nullprogram.com/blog/2018/07/31).
    """
    numbers = numbers & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        numbers = ((numbers ^ (numbers >> shift)) * factor) & 0xFFFFFFFF
    return (numbers ^ (numbers >> 16)) & LOW_BITS
