"""From a listed dataset to loaded pixels, their digest, and loaders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.base.timing import PhaseTimer
from pipeline.config.schema import DataConfig, TrainConfig
from pipeline.data import build
from pipeline.data.augment import Augment
from pipeline.data.build import build_eval_loader, build_train_loader, num_bytes
from pipeline.data.loaders import ResidentLoader, StreamedLoader
from pipeline.data.samples import DataError, Dataset, PixelSamples, Samples
from tests.data.helpers import ALONE, listed, loaded, pixels, tensors

SMALL = {"train_size": 20, "validation_size": 10, "image_size": 6, "channels": 2}


def small(**changes: int) -> Dataset:
    return listed("synthetic", arguments=SMALL | changes)


def test_resizing_in_chunks_equals_resizing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = pixels(loaded(small()).train)
    for size in (4, 9):
        whole = loaded(replace(small(), image_size=size))
        assert [tensor.shape for tensor in tensors(whole)] == [(20, 2, size, size), (20,), (10, 2, size, size), (10,)]
        resized = pixels(whole.train)
        with monkeypatch.context() as patch:
            patch.setattr(build, "RESIZE_CHUNK_PIXELS", 2 * 81 * 3)
            assert torch.equal(pixels(loaded(replace(small(), image_size=size)).train), resized)
        # averages of noise: the mean stays, the deviation shrinks
        assert resized.dtype == torch.uint8
        assert resized.float().mean().item() == pytest.approx(stored.float().mean().item(), rel=0.05)
        assert resized.float().std() < stored.float().std()


def test_the_digest_changes_with_a_pixel_a_label_and_the_size_and_with_nothing_else() -> None:
    dataset = loaded(small())
    pixel, label = dataset.train.read(3).clone(), dataset.train.labels.clone()
    changed_pixels = pixels(dataset.train).clone()
    changed_pixels[3, 1, 0, 0] ^= 1
    label[7] = (label[7] + 1) % 10
    others = (
        replace(dataset, train=PixelSamples.of(changed_pixels, dataset.train.labels)),
        replace(dataset, validation=PixelSamples.of(pixels(dataset.validation), label[:10])),
        replace(dataset, image_size=7),
        replace(dataset, test=dataset.validation),
    )
    digests = [dataset.digest, *(loaded(other).digest for other in others)]
    assert len(set(digests)) == 5
    assert all(len(digest) == 16 for digest in digests)
    assert loaded(dataset).digest == loaded(small(validation_size=10)).digest == dataset.digest
    assert torch.equal(dataset.train.read(3), pixel)


def test_loading_leaves_nothing_in_the_dataset_that_was_listed() -> None:
    """Else what is stored would stay in memory beside what was made of it."""
    dataset = small()
    assert tensors(loaded(dataset))
    assert all("_content" not in vars(samples) for samples in dataset.splits.values())


class Drawn:
    """Samples of somebody else's making, one by one and of any size."""

    labels = torch.tensor([0, 1, 1])

    def __init__(self, brightness: int):
        self.brightness = brightness

    def __len__(self) -> int:
        return 3

    def read(self, index: int) -> torch.Tensor:
        return torch.full((2, 5 + index, 6), index + self.brightness, dtype=torch.uint8)


def test_samples_that_are_read_one_by_one_are_resized_and_gathered() -> None:
    datasets = []
    for brightness in (0, 0, 1):
        samples: Samples = Drawn(brightness)
        datasets.append(loaded(replace(small(), train=samples)))
    assert pixels(datasets[0].train).shape == (3, 2, 6, 6)
    assert [pixels(dataset.train)[:, 1, 3, 4].tolist() for dataset in datasets] == [[0, 1, 2], [0, 1, 2], [1, 2, 3]]
    assert datasets[0].digest == datasets[1].digest != datasets[2].digest


class Fractions(Drawn):
    """Images in 0..1, which would all be black."""

    def read(self, index: int) -> torch.Tensor:
        return super().read(index) / 255


def test_samples_of_another_type_are_refused_and_not_rounded() -> None:
    samples: Samples = Fractions(7)
    with pytest.raises(DataError, match=r"the test split has pixels torch.float32 \[3, 2, 6, 6\]"):
        loaded(replace(small(), test=samples))


IMAGES, LABELS = torch.zeros(4, 2, 6, 6, dtype=torch.uint8), torch.arange(4)


@pytest.mark.parametrize(
    ("images", "labels", "found"),
    [
        (IMAGES.float(), LABELS, "pixels torch.float32 [4, 2, 6, 6]"),
        (IMAGES[:, :1], LABELS, "pixels torch.uint8 [4, 1, 6, 6]"),
        (IMAGES[0], LABELS, "pixels torch.uint8 [2, 6, 6]"),
        (IMAGES[:3], LABELS, "pixels torch.uint8 [3, 2, 6, 6]"),
        (IMAGES, LABELS.int(), "labels torch.int32 [4]"),
        (IMAGES, LABELS + 7, "from 7 to 10"),
        (IMAGES, LABELS - 1, "from -1 to 2"),
    ],
)
def test_a_split_that_is_not_what_the_dataset_says_is_refused(
    images: torch.Tensor, labels: torch.Tensor, found: str
) -> None:
    with pytest.raises(DataError) as caught:
        loaded(replace(small(), validation=PixelSamples(4, lambda: (images, labels, ""))))
    message = str(caught.value)
    assert found in message
    assert "data.dataset=synthetic: the validation split has" in message
    assert "accepted: torch.uint8 [4, 2, height, width] and torch.int64 [4] from 0 to 9" in message


def test_all_splits_count_for_the_room_on_the_device() -> None:
    assert num_bytes(loaded(small(test_size=5))) == (20 + 10 + 5) * 2 * 6 * 6


HOW: dict[str, Any] = {"placement": "device", "dtype": torch.float32, "timer": PhaseTimer()}


def test_loaders_are_built_as_the_config_says() -> None:
    dataset = loaded(small())
    data = DataConfig(global_batch_size=8, augment={"crop": "2"}, workers=0, eval_batch_size=4)
    train = TrainConfig(accumulate=2)
    kinds = {"device": ResidentLoader, "workers": StreamedLoader}
    for placement, kind in kinds.items():
        how: dict[str, Any] = {"placement": placement, "dtype": torch.float64, "timer": PhaseTimer()}
        training = build_train_loader(data, train, 0, dataset, ALONE, **how)
        evaluating = build_eval_loader(data, dataset, dataset.validation, ALONE, **how)
        assert type(training) is type(evaluating) is kind
        assert isinstance(training.prepare.augment, Augment)
        assert not isinstance(evaluating.prepare.augment, Augment)
        sizes = [[len(training.prepare(part).images) for part in batch.micro_batches] for batch in training.batches(0)]
        assert sizes == [[4, 4], [4, 4], [2, 2]]
        batches = [evaluating.prepare(batch.micro_batches[0]) for batch in evaluating.batches(0)]
        assert [len(inputs.images) for inputs in batches] == [2] * 5  # at least MIN_BLOCKS, were there enough
        assert torch.equal(torch.cat([inputs.classes[0] for inputs in batches]), dataset.validation.labels)
        assert batches[0].images.dtype == torch.float64


@pytest.mark.parametrize("augment", [{}, {"crop": 0}, {"crop": 0, "flip": False}])
def test_nothing_is_augmented_where_nothing_would_change(augment: dict[str, int]) -> None:
    loader = build_train_loader(DataConfig(augment=augment), TrainConfig(), 0, loaded(small()), ALONE, **HOW)
    assert isinstance(loader.prepare.augment, torch.nn.Identity)


def test_virtual_ranks_cut_the_batches_of_a_reproducible_training_alone() -> None:
    for reproducible, expected in ((True, 3), (False, 1)):
        train = TrainConfig(reproducible=reproducible, virtual_ranks=3)
        loader = build_train_loader(DataConfig(), train, 0, loaded(small()), ALONE, **HOW)
        assert len(next(loader.batches(0)).micro_batches) == expected
