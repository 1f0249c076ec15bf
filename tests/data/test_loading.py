"""Batches: the same from both placements, normalised as documented."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.loading import Batch, Normalize, ResidentLoader, StreamedLoader, choose_placement
from pipeline.data.sampler import GlobalOrderSampler

IMAGES = torch.randint(0, 256, (23, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(23)
NORMALIZE = Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


def sampler() -> GlobalOrderSampler:
    return GlobalOrderSampler(23, global_batch_size=6, accumulate=2, rank=1, world_size=2)


def content(batch: Batch) -> list[torch.Tensor]:
    return [tensor for pair in batch.micro_batches for tensor in pair]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_batches_equal_resident_ones(num_workers: int) -> None:
    resident = list(ResidentLoader(IMAGES, LABELS, sampler(), NORMALIZE))
    streamed = list(StreamedLoader(IMAGES, LABELS, sampler(), NORMALIZE, num_workers))
    assert [(b.start, b.global_count) for b in resident] == [(0, 6), (6, 6), (12, 6), (18, 5)]
    assert [(b.start, b.global_count) for b in streamed] == [(b.start, b.global_count) for b in resident]
    for one, other in zip(resident, streamed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(content(one), content(other), strict=True))


def test_a_batch_holds_the_samples_of_its_indices_normalised() -> None:
    (images, labels), _ = next(iter(ResidentLoader(IMAGES, LABELS, sampler(), NORMALIZE))).micro_batches
    expected = next(sampler().steps()).micro_batches[0]
    assert torch.equal(labels, LABELS[expected])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    torch.testing.assert_close(images, (IMAGES[expected] / 255 - mean) / std)


def test_normalisation_is_done_in_the_dtype_asked_for() -> None:
    assert NORMALIZE(IMAGES).dtype == torch.float32
    assert Normalize([0.5], [0.5], torch.float64)(IMAGES[:, :1]).dtype == torch.float64


def test_on_cpu_auto_is_where_the_data_are_and_a_choice_is_obeyed() -> None:
    cpu = torch.device("cpu")
    assert choose_placement("auto", 10**12, cpu) == "device"
    assert choose_placement("workers", 1, cpu) == "workers"
