"""A dataset that lies on the device: a micro-batch is a tensor of indices, gathered there."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from pipeline.data.augment import Augment
from pipeline.data.inputs import Batch
from pipeline.data.order import GlobalOrderSampler
from pipeline.models.normalize import Normalize


class ResidentLoader:
    """The dataset lies as uint8 on the device; a micro-batch is a tensor of indices, gathered and normalised there."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        sampler: GlobalOrderSampler,
        normalize: Normalize,
        augment: Augment | None = None,
    ):
        device = normalize.scale.device
        self.sampler = sampler
        self._augment = augment
        self._images = images.to(device)
        self._labels = labels.to(device)
        self._normalize = normalize

    def __iter__(self) -> Iterator[Batch]:
        if self._augment is not None:
            self._augment.set_epoch(self.sampler.epoch)
        # one copy an epoch: a copy a step would be a launch and a synchronisation each
        for step in self.sampler.steps(self._images.device):
            yield Batch(step.start, step.global_count, step.micro_batches)

    def inputs(self, micro_batch: Tensor) -> tuple[Tensor, Tensor]:
        # on CPU five times as fast as indexing with a tensor
        images, labels = (data.index_select(0, micro_batch) for data in (self._images, self._labels))
        if self._augment is not None:
            images = self._augment(images, micro_batch)
        return self._normalize(images), labels
