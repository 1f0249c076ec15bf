"""The order of samples: the same for any number of ranks, complete, and resumable anywhere."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.order import Blocks, Order
from pipeline.parallel.rank import share


def order(rank: int = 0, world_size: int = 1, *, num_samples: int = 103, accumulate: int = 1, seed: int = 5) -> Order:
    return Order(num_samples, global_batch_size=16, rank=rank, world_size=world_size, accumulate=accumulate, seed=seed)


def global_batches(world_size: int, epoch: int = 0, samples_seen: int = 0, **kwargs: int) -> list[list[int]]:
    """The indices of each global batch, put together from what every rank would compute."""
    per_rank = []
    for rank in range(world_size):
        steps = order(rank, world_size, **kwargs).steps(epoch, samples_seen)
        per_rank.append([torch.cat(step.micro_batches).tolist() for step in steps])
    return [sum(parts, []) for parts in zip(*per_rank, strict=True)]


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("epoch", [0, 1])
def test_any_number_of_ranks_sees_the_same_global_batches(world_size: int, accumulate: int, epoch: int) -> None:
    assert global_batches(world_size, epoch, accumulate=accumulate) == global_batches(1, epoch)


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_sample_is_seen_once_an_epoch(world_size: int) -> None:
    seen = sum(global_batches(world_size), [])
    assert sorted(seen) == list(range(103))


def test_the_last_batch_holds_what_is_left_and_may_leave_a_rank_without_samples() -> None:
    assert [len(batch) for batch in global_batches(4)] == [16] * 6 + [7]
    shares = [len(torch.cat(list(order(rank, 8, num_samples=20).steps(0))[-1].micro_batches)) for rank in range(8)]
    assert sorted(shares) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    assert global_batches(1, 0) != global_batches(1, 1)
    assert global_batches(1, 0) != global_batches(1, 0, seed=6)
    assert global_batches(1, 1) == global_batches(1, 1)


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 3])
def test_an_epoch_resumed_on_other_ranks_goes_on_with_the_next_batch(before: int, after: int) -> None:
    first = global_batches(before)[:3]
    assert first + global_batches(after, samples_seen=48) == global_batches(1)


def test_any_sample_is_a_position() -> None:
    rest = sum(global_batches(3, samples_seen=41), [])
    assert rest == sum(global_batches(1), [])[41:]
    assert global_batches(2, samples_seen=103) == []


def test_iterating_goes_through_the_epoch_that_was_set_as_a_distributed_sampler_does() -> None:
    part = order(1, 3)
    for epoch in (0, 2):
        part.set_epoch(epoch)
        assert list(part) == [i for step in part.steps(epoch) for m in step.micro_batches for i in m.tolist()]
        assert len(part) == len(list(part))


def test_a_position_is_asked_for_and_not_kept() -> None:
    part = order()
    rest = [step.start for step in part.steps(0, 48)]
    assert rest[0] == 48
    assert [step.start for step in part.steps(0)][3:] == rest
    assert len(list(part)) == part.num_samples == 103


def test_without_shuffling_the_order_is_that_of_the_dataset() -> None:
    part = Order(10, global_batch_size=4, shuffle=False)
    assert list(part) == list(range(10))


def test_micro_batches_of_a_share_are_as_even_as_can_be_and_the_last_is_never_the_empty_one() -> None:
    for step in order(0, 4, accumulate=3).steps(0):
        sizes = [len(micro) for micro in step.micro_batches]
        assert max(sizes) - min(sizes) <= 1
        assert sizes[-1] == max(sizes)


def test_shares_are_contiguous_and_complete() -> None:
    for count in range(20):
        shares = [list(range(count))[share(count, i, 6)] for i in range(6)]
        assert sum(shares, []) == list(range(count))


def test_no_share_of_any_step_is_larger_than_a_full_one_is_said_to_be() -> None:
    for world_size in range(1, 9):
        for batch in range(1, 20):
            for total in (batch - 1, batch, 2 * batch - 1, 3 * batch + batch // 2):
                if total > 0:
                    orders = [
                        Order(total, global_batch_size=batch, world_size=world_size, rank=rank)
                        for rank in range(world_size)
                    ]
                    shares = [len(step.micro_batches[0]) for order in orders for step in order.steps(0)]
                    assert max(shares) == orders[0].full_share


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_samples", "block_size"), [(50, 7), (56, 7), (5, 7), (21, 1)])
def test_blocks_are_the_same_on_any_number_of_ranks(num_samples: int, block_size: int, world_size: int) -> None:
    blocks = []
    for rank in range(world_size):
        order = Blocks(num_samples, block_size=block_size, world_size=world_size, rank=rank)
        steps = [step.micro_batches[0].tolist() for step in order.steps(0)]
        assert len(steps) == -(-num_samples // (block_size * world_size))
        blocks += [block for block in steps if block]
    expected = [list(range(begin, min(begin + block_size, num_samples))) for begin in range(0, num_samples, block_size)]
    assert sorted(blocks) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_virtual_ranks_have_the_same_samples_on_any_number_of_ranks(world_size: int) -> None:
    def parts_on(ranks: int) -> list[list[list[int]]]:
        orders = [
            Order(50, global_batch_size=16, virtual_ranks=8, world_size=ranks, rank=rank, seed=3)
            for rank in range(ranks)
        ]
        return [
            [part.tolist() for step in steps for part in step.micro_batches]
            for steps in zip(*(order.steps(0) for order in orders), strict=True)
        ]

    assert parts_on(world_size) == parts_on(1)
    assert all(len(step) == 8 for step in parts_on(world_size))
