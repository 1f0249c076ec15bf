"""Batches: the same from both placements and on any number of ranks, and inputs as documented."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.base.timing import PhaseTimer
from pipeline.data import loaders
from pipeline.data.augment import Augment
from pipeline.data.inputs import Inputs, Prepare
from pipeline.data.loaders import Gather, Loader, ResidentLoader, StreamedLoader
from pipeline.data.order import Batch, Order
from pipeline.models.normalize import Normalize
from tests.data.helpers import CPU

IMAGES = torch.randint(0, 256, (23, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(23)
NORMALIZE = Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


def order(rank: int = 1, world_size: int = 2, accumulate: int = 2) -> Order:
    return Order(23, global_batch_size=6, accumulate=accumulate, rank=rank, world_size=world_size)


def resident(order: Order, augment: nn.Module | None = None) -> ResidentLoader:
    return ResidentLoader(order, Prepare(Gather(IMAGES, LABELS), augment or nn.Identity(), NORMALIZE))


def streamed(order: Order, workers: int, augment: nn.Module | None = None) -> StreamedLoader:
    prepare = Prepare(nn.Identity(), augment or nn.Identity(), NORMALIZE)
    return StreamedLoader(Gather(IMAGES, LABELS), order, prepare, workers, PhaseTimer())


def content(loader: Loader, batch: Batch) -> list[Tensor]:
    inputs = [loader.prepare(micro_batch) for micro_batch in batch.micro_batches]
    return [tensor for each in inputs for tensor in (each.images, each.classes, each.weights)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("is_augmented", [False, True])
def test_streamed_batches_equal_resident_ones(workers: int, is_augmented: bool) -> None:
    augments = [Augment(0, 2, True, CPU) if is_augmented else None for _ in range(2)]
    on_device, by_workers = resident(order(), augments[0]), streamed(order(), workers, augments[1])
    for epoch, samples_seen in ((0, 0), (1, 0), (2, 12)):  # the same workers go on
        pairs = zip(on_device.batches(epoch, samples_seen), by_workers.batches(epoch, samples_seen), strict=True)
        starts = []
        for one, other in pairs:
            assert (one.start, one.global_count, one.end) == (other.start, other.global_count, other.end)
            tensors = zip(content(on_device, one), content(by_workers, other), strict=True)
            assert all(torch.equal(a, b) for a, b in tensors)
            starts.append((one.start, one.global_count))
        assert starts == [(0, 6), (6, 6), (12, 6), (18, 5)][samples_seen // 6 :]


def test_an_epoch_that_was_broken_off_leaves_nothing_to_the_next() -> None:
    loader = streamed(order(), 1)
    next(loader.batches(0))
    labels = [loader.prepare(part).classes[0] for batch in loader.batches(1) for part in batch.micro_batches]
    assert torch.cat(labels).tolist() == [i for step in order().steps(1) for part in step.micro_batches for i in part]


@pytest.mark.parametrize("world_size", [2, 3])
def test_augmented_pixels_of_a_global_batch_are_the_same_on_any_number_of_ranks(world_size: int) -> None:
    def pixels(ranks: int) -> list[Tensor]:
        parts = []
        for rank in range(ranks):
            loader = resident(order(rank, ranks, 1), Augment(3, 2, True, CPU))
            parts.append([loader.prepare(batch.micro_batches[0]).images for batch in loader.batches(1)])
        return [torch.cat(parts_of_step) for parts_of_step in zip(*parts, strict=True)]

    assert all(torch.equal(a, b) for a, b in zip(pixels(world_size), pixels(1), strict=True))


def test_inputs_are_the_samples_of_the_indices_normalised_each_with_one_class_of_weight_one() -> None:
    loader, expected = resident(order()), next(order().steps(0)).micro_batches[0]
    inputs = loader.prepare(next(loader.batches(0)).micro_batches[0])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    torch.testing.assert_close(inputs.images, (IMAGES[expected] / 255 - mean) / std)
    assert torch.equal(inputs.classes, LABELS[expected][None])
    assert torch.equal(inputs.weights, torch.ones(1, len(expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 2, 4])
def test_samples_behind_the_count_weigh_nothing(dtype: torch.dtype, count: int) -> None:
    prepare = Prepare(Gather(IMAGES, LABELS), nn.Identity(), Normalize([0.5] * 3, [0.5] * 3, dtype))
    inputs: Inputs = prepare(torch.tensor([5, 6, 0, 0]), torch.tensor(count))
    assert inputs.weights.tolist() == [[1.0] * count + [0.0] * (4 - count)]
    assert inputs.weights.dtype == inputs.images.dtype == dtype


def test_there_may_be_no_samples() -> None:
    prepare = Prepare(Gather(IMAGES, LABELS), Augment(0, 2, True, CPU), NORMALIZE)
    inputs = prepare(torch.arange(0))
    assert [tuple(t.shape) for t in (inputs.images, inputs.classes, inputs.weights)] == [(0, 3, 5, 5), (1, 0), (1, 0)]


def test_a_resident_split_is_no_part_of_what_a_module_saves() -> None:
    assert Prepare(Gather(IMAGES, LABELS), Augment(0, 2, True, CPU), NORMALIZE).state_dict().keys() == {
        "normalize.scale",
        "normalize.shift",
    }


@pytest.mark.parametrize("worker", [None, object()])
def test_a_worker_gathers_into_shared_memory(monkeypatch: pytest.MonkeyPatch, worker: object) -> None:
    monkeypatch.setattr(loaders, "get_worker_info", lambda: worker)
    pixels, labels, _ = Gather(IMAGES, LABELS)[torch.arange(3)]
    shared = [tensor.is_shared() for tensor in (pixels, labels)]  # type: ignore[no-untyped-call]
    assert shared == [worker is not None] * 2
