"""Crops and flips: of the image given, evenly spread, and a matter of the sample alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pipeline.base.timing import HostTimer
from pipeline.data.augment import Augment
from pipeline.data.order import GlobalOrderSampler
from pipeline.data.resident import ResidentLoader
from pipeline.data.streamed import StreamedLoader
from pipeline.models.normalize import Normalize
from tests.ranks import run_ranks
from tests.train.helpers import losses

CPU = torch.device("cpu")


def pictures(count: int = 2000, channels: int = 3) -> torch.Tensor:
    return torch.randint(1, 256, (count, channels, 7, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def augmented(
    images: torch.Tensor, *, seed: int = 0, epoch: int = 0, padding: int = 2, flip: bool = True
) -> torch.Tensor:
    augment = Augment(seed, padding, flip, CPU)
    augment.set_epoch(epoch)
    return augment(images, torch.arange(len(images)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("padding", "flip"), [(2, True), (2, False), (0, True)])
def test_every_crop_is_drawn_about_as_often_as_any_other(channels: int, padding: int, flip: bool) -> None:
    images = pictures(channels=channels)
    results = augmented(images, padding=padding, flip=flip)
    assert results.dtype == torch.uint8
    padded = F.pad(images, (padding,) * 4)
    counts = []
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            for mirrored in (False, True) if flip else (False,):
                crop = padded[:, :, top : top + 7, left : left + 5]
                crop = crop.flip(3) if mirrored else crop
                counts.append(int((crop == results).flatten(1).all(1).sum()))
    assert sum(counts) == len(images), "some image is none of its crops"
    expected = len(images) / len(counts)
    # chi-square: its mean is the degrees of freedom, its deviation the root of twice that
    spread = sum((count - expected) ** 2 / expected for count in counts)
    freedom = len(counts) - 1
    assert abs(spread - freedom) < 4 * (2 * freedom) ** 0.5 + 4


def test_the_padding_is_black_and_shows_on_either_side_but_never_on_both() -> None:
    white = torch.full((500, 1, 6, 6), 255, dtype=torch.uint8)
    results = augmented(white, padding=1)
    left, right = (results[:, 0, 2, column] == 0 for column in (0, -1))
    assert 100 < int(left.sum()) < 240
    assert 100 < int(right.sum()) < 240
    assert not (left & right).any()


def test_a_sample_is_the_same_in_every_batch_and_another_in_every_epoch_and_with_every_seed() -> None:
    images = pictures(100)
    whole = augmented(images)
    augment = Augment(0, 2, True, CPU)
    augment.set_epoch(0)
    some = torch.tensor([93, 5, 17])
    assert torch.equal(augment(images[some], some), whole[some])
    assert augment(images[:0], torch.arange(0)).shape == (0, 3, 7, 5)
    for other in (augmented(images, epoch=1), augmented(images, seed=1)):
        differing = (other != whole).flatten(1).any(1).float().mean()
        assert differing > 0.9


def test_resident_and_streamed_images_are_augmented_alike() -> None:
    images, labels = pictures(50), torch.arange(50)
    normalize = Normalize((0.5,) * 3, (0.5,) * 3)
    samplers = [GlobalOrderSampler(50, global_batch_size=8) for _ in range(2)]
    resident = ResidentLoader(images, labels, samplers[0], normalize, Augment(0, 2, True, CPU))
    streamed = StreamedLoader(images, labels, samplers[1], normalize, 0, HostTimer(), Augment(0, 2, True, CPU))
    for epoch in (0, 3):
        for sampler in samplers:
            sampler.set_position(epoch)
        for one, other in zip(resident, streamed, strict=True):
            for left, right in zip(one.micro_batches, other.micro_batches, strict=True):
                for a, b in zip(resident.inputs(left), streamed.inputs(right), strict=True):
                    assert torch.equal(a, b)


def test_losses_are_the_same_on_any_number_of_ranks() -> None:
    exact = ("train.precision=fp64", "model.dropout=0", "model.dropout2d=0")
    reference = run_ranks(1, losses, 5, (*exact, "data.random_crop=3"))[0]
    assert reference != run_ranks(1, losses, 5, exact)[0]
    for world_size in (2, 3):
        assert run_ranks(world_size, losses, 5, (*exact, "data.random_crop=3"))[0] == pytest.approx(reference, rel=1e-9)
