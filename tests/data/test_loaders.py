"""Batches: the same from both placements, normalised as documented."""

from __future__ import annotations

import pytest
import torch

from pipeline.base.timing import HostTimer
from pipeline.data.inputs import Batch, Loader
from pipeline.data.order import GlobalOrderSampler
from pipeline.data.resident import ResidentLoader
from pipeline.data.streamed import StreamedLoader
from pipeline.models.normalize import Normalize
from train.execution import choose_placement

IMAGES = torch.randint(0, 256, (23, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(23)
NORMALIZE = Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


def sampler() -> GlobalOrderSampler:
    return GlobalOrderSampler(23, global_batch_size=6, accumulate=2, rank=1, world_size=2)


def content(loader: Loader, batch: Batch) -> list[torch.Tensor]:
    return [tensor for micro_batch in batch.micro_batches for tensor in loader.inputs(micro_batch)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_batches_equal_resident_ones(num_workers: int) -> None:
    on_device = ResidentLoader(IMAGES, LABELS, sampler(), NORMALIZE)
    by_workers = StreamedLoader(IMAGES, LABELS, sampler(), NORMALIZE, num_workers, HostTimer())
    for epoch, samples_seen in ((0, 0), (1, 0), (2, 12)):  # the same workers go on
        for loader in (on_device, by_workers):
            loader.sampler.set_position(epoch, samples_seen)
        compare(on_device, by_workers, samples_seen)


def compare(on_device: ResidentLoader, by_workers: StreamedLoader, samples_seen: int) -> None:
    resident, streamed = list(on_device), list(by_workers)
    assert [(b.start, b.global_count) for b in resident] == [(0, 6), (6, 6), (12, 6), (18, 5)][samples_seen // 6 :]
    assert [(b.start, b.global_count) for b in streamed] == [(b.start, b.global_count) for b in resident]
    for one, other in zip(resident, streamed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(content(on_device, one), content(by_workers, other), strict=True))


def test_a_batch_holds_the_samples_of_its_indices_normalised() -> None:
    loader = ResidentLoader(IMAGES, LABELS, sampler(), NORMALIZE)
    images, labels = loader.inputs(next(iter(loader)).micro_batches[0])
    expected = next(sampler().steps()).micro_batches[0]
    assert torch.equal(labels, LABELS[expected])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    torch.testing.assert_close(images, (IMAGES[expected] / 255 - mean) / std)


def test_normalisation_is_done_in_the_dtype_asked_for() -> None:
    assert NORMALIZE(IMAGES).dtype == torch.float32
    assert Normalize([0.5], [0.5], torch.float64)(IMAGES[:, :1]).dtype == torch.float64


def test_on_cpu_auto_is_where_the_data_are_and_a_choice_is_obeyed() -> None:
    cpu = torch.device("cpu")
    assert choose_placement("auto", 10**12, cpu)[0] == "device"
    assert choose_placement("workers", 1, cpu)[0] == "workers"
