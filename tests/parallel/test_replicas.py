"""Gradients averaged through shared memory: exact, and no rank waits for one that is gone."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.base.timing import PHASES, HostTimer
from pipeline.parallel import node_memory
from pipeline.parallel.node_sum import NodeAverage, open_node_average
from pipeline.parallel.rank import Rank, is_lost_connection
from pipeline.parallel.replicas import replicate
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in memory of this test alone."""
    with tempfile.TemporaryDirectory(dir=node_memory.SHARED_MEMORY) as folder:
        monkeypatch.setattr(node_memory, "SHARED_MEMORY", Path(folder))
        yield Path(folder)


def opened(rank: Rank, network: nn.Module | None = None) -> tuple[NodeAverage, nn.Module]:
    network = network or nn.Linear(10, 1)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    node = open_node_average(rank, network, HostTimer(), timeout=60.0)
    assert node is not None
    return node, network


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
def test_the_average_is_the_sum_in_the_order_of_the_ranks_over_their_number(
    world_size: int, dtype: torch.dtype, shared_memory: Path
) -> None:
    for averages, expected, buffers in run_ranks(world_size, _averages, dtype):
        assert len(averages) == len(expected) == 3 * 8
        assert all(torch.equal(a, e) for a, e in zip(averages, expected, strict=True))
        assert buffers == [0.0, 0.0, 0.0], "not those of rank 0"
    assert list(shared_memory.iterdir()) == []


def _averages(rank: Rank, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """Of several steps."""
    node, network = opened(rank, Mixed(dtype))
    averages, expected = [], []
    parameters = [p for p in network.parameters() if p.requires_grad]
    for buffer in network.buffers():
        buffer.fill_(rank.rank)
    for step in range(3):
        for i, parameter in enumerate(parameters):
            generators = [torch.Generator().manual_seed(1000 * step + 10 * i + r) for r in range(rank.world_size)]
            parts = [torch.randn(parameter.shape, generator=each).to(dtype) for each in generators]
            parameter.grad = parts[rank.rank].clone()
            total = parts[0].clone()
            for part in parts[1:]:
                total += part
            expected.append(total / rank.world_size)
        node.average()
        for gradient in (parameter.grad for parameter in parameters):
            assert gradient is not None
            averages.append(gradient.clone())
            gradient.zero_()  # what a rank does to its own must not reach the others
    node.node.close()
    return averages, expected, [float(buffer.max()) for buffer in network.buffers()]


def test_a_parameter_that_one_rank_did_not_use_counts_there_as_zero() -> None:
    for gradient in run_ranks(2, _use_on_rank_1):
        assert torch.equal(gradient, torch.full((1, 10), 0.5))


def _use_on_rank_1(rank: Rank) -> torch.Tensor | None:
    layer = nn.Linear(10, 1)
    node, _ = opened(rank, layer)
    if rank.is_main:
        layer.weight.grad = None
    node.average()
    return layer.weight.grad


def test_parameters_of_two_types_use_the_process_group() -> None:
    assert run_ranks(2, _open_with_two_types) == [True, True]


def _open_with_two_types(rank: Rank) -> bool:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.float64))
    return open_node_average(rank, network, HostTimer(), timeout=60.0) is None


def test_a_rank_that_dies_ends_the_waiting_of_the_others_at_once() -> None:
    results = run_ranks(3, _leave_at_the_second_meeting)
    assert results[1] == "left"
    for message, seconds, lost in (results[0], results[2]):
        assert "connection closed by peer" in message
        assert lost, "it would be taken for the cause"
        assert seconds < 10


def _leave_at_the_second_meeting(rank: Rank) -> object:
    node, _ = opened(rank)
    node.average()
    if rank.rank == 1:
        node.node.close()
        return "left"
    began = time.monotonic()
    try:
        node.average()
    except RuntimeError as error:
        return str(error), time.monotonic() - began, is_lost_connection(error)
    return "went on"


def test_a_rank_that_stands_still_is_named_when_the_time_is_up() -> None:
    message, _ = run_ranks(2, _stand_still)
    assert message == "exchange of gradients: waited 1 s in vain for rank 1"


def _stand_still(rank: Rank) -> str:
    node, _ = opened(rank)
    for peer in node.node._peers.values():
        peer.settimeout(1.0)
    if rank.rank == 1:
        time.sleep(3)
        return ""
    with pytest.raises(RuntimeError) as error:
        node.average()
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
        node.average()
    return str(error.value)


def test_a_rank_that_cannot_reach_the_shared_memory_makes_all_use_the_process_group() -> None:
    assert run_ranks(3, _step_in_a_container)[0] == "gloo"


def _step_in_a_container(rank: Rank) -> str:
    if rank.rank == 1:
        node_memory._map = lambda memory, size: None
    return _step(rank)[0]


def test_ranks_of_several_nodes_and_a_node_without_room_use_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_ranks(2, _step)[0][0] == "shared memory"
    assert run_ranks(2, _step, num_local=1)[0][0] == "gloo"
    monkeypatch.setattr(node_memory, "SHARED_MEMORY", Path("/nonexistent"))
    assert run_ranks(2, _step)[0][0] == "gloo"


@pytest.mark.parametrize("num_local", [1, 2])
def test_gradients_are_the_means_and_waiting_is_counted_as_communication(num_local: int) -> None:
    for _, gradient, milliseconds in run_ranks(2, _step, num_local=num_local):
        assert torch.equal(gradient, torch.full((1, 4), 1.5))
        times = dict(zip(PHASES, milliseconds, strict=True))
        assert times["communication"] > 0
        assert times["backward"] > 0
    waited = [
        dict(zip(PHASES, row[2], strict=True))["communication"] for row in run_ranks(2, _step, 1.0, num_local=num_local)
    ]
    assert waited[0] > waited[1]  # the one that comes late finds the other there


def _step(rank: Rank, late: float = 0.0) -> tuple[str, torch.Tensor, tuple[float, ...]]:
    """Rank r feeds r + 1, so that the gradients are 1 and 2; rank 1 comes `late` seconds late."""
    layer, timer = nn.Linear(4, 1, bias=False), HostTimer()
    replicas = replicate(layer, rank, timer, torch.zeros(1, 4), timeout=30.0)
    timer.start()
    timer.begin_step()
    output = replicas.model(torch.full((1, 4), float(rank.rank + 1))).sum()
    time.sleep(late * rank.rank)
    timer.lap("forward")
    output.backward()
    replicas.average()
    timer.lap("communication")
    assert layer.weight.grad is not None
    return replicas.gradients, layer.weight.grad, timer.read().milliseconds


@pytest.mark.parametrize("num_local", [1, 2])
def test_all_ranks_begin_with_the_weights_of_rank_0(num_local: int) -> None:
    mine, other = run_ranks(2, _begin, num_local=num_local)
    assert torch.equal(mine, other)


def _begin(rank: Rank) -> torch.Tensor:
    torch.manual_seed(rank.rank)
    layer = nn.Linear(4, 1, bias=False)
    replicate(layer, rank, HostTimer(), torch.zeros(1, 4), timeout=30.0)
    return layer.weight.detach()


def test_no_thread_of_the_process_group_outlives_it(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        """
import os, torch
from dataclasses import replace
from pipeline.parallel.replicas import replicate
from pipeline.parallel.rendezvous import start_rank
from pipeline.base.launch import Launch
from pipeline.base.timing import HostTimer

with start_rank(Launch.from_environment(os.environ)) as rank:
    apart = replace(rank, local_world_size=1)  # as on two nodes: over the process group
    replicate(torch.nn.Linear(3, 2), apart, HostTimer(), torch.zeros(1, 3), timeout=30)
os.write(1, b"threads at the end: %d\\n" % len(os.listdir("/proc/self/task")))  # in one piece: both ranks write here
"""
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("threads at the end: 1\n") == 2, done.stdout + done.stderr
