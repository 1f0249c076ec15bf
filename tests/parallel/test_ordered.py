"""Gradients of virtual ranks, summed in their order whichever rank computed which."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.parallel.rank import Rank
from pipeline.parallel.replicas import OrderedReplicas
from tests.ranks import run_ranks

NUM_VIRTUAL = 8


@pytest.mark.parametrize(("world_size", "num_local"), [(1, None), (2, None), (3, None), (2, 1), (3, 1), (5, 1)])
def test_the_sum_is_in_the_order_of_the_virtual_ranks_in_shared_memory_and_over_gloo(
    world_size: int, num_local: int | None
) -> None:
    expected = torch.zeros(7)
    for virtual in range(NUM_VIRTUAL):
        expected += _gradient(virtual)
    results = run_ranks(world_size, _sum, num_local=num_local)
    assert [virtual for own, *_ in results for virtual in own] == list(range(NUM_VIRTUAL))
    for _, sums, description in results:
        for ordinary, zeros, partly_used in sums:
            assert torch.equal(ordinary, expected)
            assert zeros.signbit().tolist() == [False] * 3  # as it is where a virtual rank has no samples
            assert torch.equal(partly_used, torch.full((2, 3), 2.0))
        way = "of one rank" if world_size == 1 else "shared memory" if num_local is None else "gloo"
        assert way in description


def _gradient(virtual: int) -> Tensor:
    """Return numbers whose sum depends on the order."""
    return torch.randn(7, generator=torch.Generator().manual_seed(virtual)) * 10.0**virtual


def _sum(rank: Rank) -> tuple[list[int], list[list[Tensor]], str]:
    """Return the virtual ranks of this rank, and the gradients of two steps."""
    frozen = nn.Parameter(torch.zeros(3, dtype=torch.float16), requires_grad=False)
    ordinary, zeros, partly_used = (nn.Parameter(torch.zeros(7)[:n]) for n in (7, 3, 6))
    partly_used.data = partly_used.data.view(3, 2).T
    model = nn.ParameterList([frozen, ordinary, zeros, partly_used])
    replicas = OrderedReplicas(model, rank, NUM_VIRTUAL, timeout=60.0)
    steps = []
    for step in range(2):  # the second finds the slots as the first left them
        for virtual in replicas.own:
            ordinary.grad, zeros.grad = _gradient(virtual), torch.full((3,), -0.0)
            partly_used.grad = torch.ones(2, 3) if virtual in (1 + step, 6 + step) else None
            replicas.store(virtual)
            assert ordinary.grad is None
        replicas.reduce()
        gradients = [parameter.grad for parameter in (ordinary, zeros, partly_used)]
        steps.append([gradient.clone() for gradient in gradients if gradient is not None])
        for gradient in gradients:
            assert gradient is not None
            gradient.fill_(9.0)  # what a rank does to its own must not reach the others
    assert frozen.grad is None
    return list(replicas.own), steps, replicas.description
