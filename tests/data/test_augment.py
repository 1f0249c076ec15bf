"""Crops and flips: of the image given, evenly spread, and a matter of the sample alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pipeline.config.arguments import check_arguments
from pipeline.data.augment import Augment
from tests.data.helpers import CPU


def pictures(count: int = 2000, channels: int = 3) -> torch.Tensor:
    return torch.randint(1, 256, (count, channels, 7, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def augmented(
    images: torch.Tensor,
    *,
    seed: int = 0,
    epoch: int = 0,
    crop: int = 2,
    flip: bool = True,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    augment = Augment(seed, crop, flip, CPU)
    augment.set_epoch(epoch)
    indices = torch.arange(len(images)) if indices is None else indices
    results: torch.Tensor
    results, labels, same = augment((images, indices % 7, indices))
    assert torch.equal(labels, indices % 7)
    assert same is indices
    return results


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("crop", "flip"), [(2, True), (2, False), (0, True)])
def test_every_crop_is_drawn_about_as_often_as_any_other(channels: int, crop: int, flip: bool) -> None:
    images = pictures(channels=channels)
    results = augmented(images, crop=crop, flip=flip)
    assert results.dtype == torch.uint8
    padded = F.pad(images, (crop,) * 4)
    counts = []
    for top in range(2 * crop + 1):
        for left in range(2 * crop + 1):
            for mirrored in (False, True) if flip else (False,):
                part = padded[:, :, top : top + 7, left : left + 5]
                part = part.flip(3) if mirrored else part
                counts.append(int((part == results).flatten(1).all(1).sum()))
    assert sum(counts) == len(images), "some image is none of its crops"
    expected = len(images) / len(counts)
    # chi-square: its mean is the degrees of freedom, its deviation the root of twice that
    spread = sum((count - expected) ** 2 / expected for count in counts)
    freedom = len(counts) - 1
    assert abs(spread - freedom) < 4 * (2 * freedom) ** 0.5 + 4


def test_the_padding_is_black_and_shows_on_either_side_but_never_on_both() -> None:
    white = torch.full((500, 1, 6, 6), 255, dtype=torch.uint8)
    results = augmented(white, crop=1)
    left, right = (results[:, 0, 2, column] == 0 for column in (0, -1))
    assert 100 < int(left.sum()) < 240
    assert 100 < int(right.sum()) < 240
    assert not (left & right).any()


def test_a_sample_is_the_same_in_every_batch_and_another_in_every_epoch_and_with_every_seed() -> None:
    images = pictures(100)
    whole = augmented(images)
    some = torch.tensor([93, 5, 17])
    assert torch.equal(augmented(images[some], indices=some), whole[some])
    assert augmented(images[:0]).shape == (0, 3, 7, 5)
    for other in (augmented(images, epoch=1), augmented(images, seed=1)):
        differing = (other != whole).flatten(1).any(1).float().mean()
        assert differing > 0.9


def test_what_the_config_may_say_of_it_is_checked_by_its_signature() -> None:
    def problems(given: dict[str, object]) -> list[str]:
        return [problem.message for problem in check_arguments("data.augment", Augment, given, ("seed", "device"))]

    assert problems({"crop": 4, "flip": "true"}) == []
    assert ">= 0 and <= 64" in problems({"crop": 65})[0]
    assert "unknown" in problems({"crops": 4})[0]
