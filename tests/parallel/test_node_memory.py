"""Gradients summed through shared memory: exact, and no rank waits for one that is gone."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.base.timing import PhaseTimer
from pipeline.parallel import node_memory
from pipeline.parallel.rank import Rank, is_lost_connection
from pipeline.parallel.replicas import NodeSum, open_node_sum
from tests.ranks import run_ranks


@pytest.fixture
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in memory of this test alone."""
    with tempfile.TemporaryDirectory(dir=node_memory.SHARED_MEMORY) as folder:
        monkeypatch.setattr(node_memory, "SHARED_MEMORY", Path(folder))
        yield Path(folder)


def opened(rank: Rank, model: nn.Module | None = None) -> tuple[NodeSum, nn.Module]:
    model = model or nn.Linear(10, 1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    node = open_node_sum(rank, model, PhaseTimer(), timeout=60.0)
    assert node is not None
    return node, model


class Mixed(nn.Module):
    """Parameters of one, of no and of many elements, some of them channels-last, with batch statistics."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.single, self.none = (nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (1, 0))
        self.conv = nn.Conv2d(3, 5, 3, dtype=dtype).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(7, dtype=dtype)
        self.frozen = nn.Parameter(torch.zeros(3, dtype=torch.float16), requires_grad=False)
        self.linear = nn.Linear(300, 41, dtype=dtype)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_summed_in_the_order_of_the_ranks(
    world_size: int, dtype: torch.dtype, shared_memory: Path
) -> None:
    for sums, expected, buffers in run_ranks(world_size, _sum, dtype):
        assert len(sums) == len(expected) == 3 * 8
        assert all(torch.equal(s, e) for s, e in zip(sums, expected, strict=True))
        assert buffers == [0.0, 0.0, 0.0], "not those of rank 0"
    assert list(shared_memory.iterdir()) == []


def _sum(rank: Rank, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """Return the gradients of three steps, and what they should be."""
    node, model = opened(rank, Mixed(dtype))
    sums, expected = [], []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for buffer in model.buffers():
        buffer.fill_(rank.rank)
    for step in range(3):
        for i, parameter in enumerate(parameters):
            generators = [torch.Generator().manual_seed(1000 * step + 10 * i + r) for r in range(rank.world_size)]
            parts = [torch.randn(parameter.shape, generator=each).to(dtype) for each in generators]
            parameter.grad = parts[rank.rank].clone()
            total = parts[0].clone()
            for part in parts[1:]:
                total += part
            expected.append(total)
        node.reduce()
        for gradient in (parameter.grad for parameter in parameters):
            assert gradient is not None
            sums.append(gradient.clone())
            gradient.zero_()  # what a rank does to its own must not reach the others
    node.node.close()
    return sums, expected, [float(buffer.max()) for buffer in model.buffers()]


def test_a_parameter_that_one_rank_did_not_use_counts_there_as_zero() -> None:
    for gradient in run_ranks(2, _use_on_rank_1):
        assert torch.equal(gradient, torch.ones(1, 10))


def _use_on_rank_1(rank: Rank) -> torch.Tensor | None:
    layer = nn.Linear(10, 1)
    node, _ = opened(rank, layer)
    if rank.is_main:
        layer.weight.grad = None
    node.reduce()
    return layer.weight.grad


def test_parameters_of_two_dtypes_cannot_be_summed_in_shared_memory() -> None:
    assert run_ranks(2, _open_with_two_dtypes) == [True, True]


def _open_with_two_dtypes(rank: Rank) -> bool:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.float64))
    return open_node_sum(rank, model, PhaseTimer(), timeout=60.0) is None


def test_when_a_rank_dies_the_others_stop_waiting_at_once() -> None:
    results = run_ranks(3, _leave_at_the_second_meeting)
    assert results[1] == "left"
    for message, seconds, lost in (results[0], results[2]):
        assert "connection closed by peer" in message
        assert lost, "it would be taken for the cause"
        assert seconds < 10


def _leave_at_the_second_meeting(rank: Rank) -> object:
    node, _ = opened(rank)
    node.reduce()
    if rank.rank == 1:
        node.node.close()
        return "left"
    began = time.monotonic()
    try:
        node.reduce()
    except RuntimeError as error:
        return str(error), time.monotonic() - began, is_lost_connection(error)
    return "went on"


def test_a_rank_that_hangs_is_named_when_the_timeout_is_over() -> None:
    message, _ = run_ranks(2, _hang)
    assert message == "exchange of gradients: timed out after 1 s waiting for rank 1"


def _hang(rank: Rank) -> str:
    node, _ = opened(rank)
    for peer in node.node._peers.values():
        peer.settimeout(1.0)
    if rank.rank == 1:
        time.sleep(3)
        return ""
    with pytest.raises(RuntimeError) as error:
        node.reduce()
    return str(error.value)


def test_a_process_that_a_rank_forks_does_not_hold_its_connection() -> None:
    assert run_ranks(2, _fork_and_leave)[0] == "exchange of gradients with rank 1: connection closed by peer"


def _fork_and_leave(rank: Rank) -> str:
    node, _ = opened(rank)
    if rank.rank == 1:
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,), daemon=True).start()
        node.node.close()
        return ""
    with pytest.raises(RuntimeError) as error:
        node.reduce()
    return str(error.value)
