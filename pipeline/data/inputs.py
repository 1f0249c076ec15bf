"""From indices to normalised batches on the device: resident (held as uint8 there) or streamed by workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from pipeline.data.order import GlobalOrderSampler


@dataclass(frozen=True)
class Batch:
    """What one rank computes in one optimizer step."""

    start: int
    """Position in the epoch of the step's first sample, over all ranks."""
    global_count: int
    """Samples of the step over all ranks: what the summed losses are divided by."""
    micro_batches: tuple[Any, ...]
    """On the device, as the loader's `inputs` takes them."""

    @property
    def end(self) -> int:
        return self.start + self.global_count


class Loader(Protocol):
    """Yields the remaining batches of the position its sampler was set to."""

    sampler: GlobalOrderSampler

    def __iter__(self) -> Iterator[Batch]: ...

    def inputs(self, micro_batch: Any) -> tuple[Tensor, Tensor]:
        """Normalised images [N, C, H, W] and int64 labels [N], on the device; N may be 0."""
