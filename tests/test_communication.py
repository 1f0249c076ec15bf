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
from torch.nn.parallel import DistributedDataParallel

from pipeline import communication
from pipeline.communication import NodeAverage, average_gradients, open_node_average
from pipeline.distributed import Rank, is_lost_connection
from pipeline.timing import PHASES, HostTimer
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
SLOT_BYTES = 4096


@pytest.fixture
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in memory of this test alone."""
    with tempfile.TemporaryDirectory(dir=communication.SHARED_MEMORY) as folder:
        monkeypatch.setattr(communication, "SHARED_MEMORY", Path(folder))
        yield Path(folder)


def opened(rank: Rank) -> NodeAverage:
    node = open_node_average(rank, SLOT_BYTES, timeout=60.0)
    assert node is not None
    return node


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_average_is_the_sum_in_the_order_of_the_ranks_over_their_number(
    world_size: int, dtype: torch.dtype, shared_memory: Path
) -> None:
    for averages, expected in run_ranks(world_size, _averages, dtype):
        assert all(torch.equal(a, e) for a, e in zip(averages, expected, strict=True))
    assert list(shared_memory.iterdir()) == []


def _averages(rank: Rank, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of several tensors in turn: fewer elements than ranks, no element, and more than fit into a slot at a time."""
    node = opened(rank)
    averages, expected = [], []
    for size in (1, 0, 3, 1000, 5 * SLOT_BYTES):
        parts = [
            torch.randn(size, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(rank.world_size)
        ]
        mine = parts[rank.rank].clone()
        node.average(mine)
        averages.append(mine)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        expected.append(total / rank.world_size)
    node.close()
    return averages, expected


def test_a_rank_that_dies_ends_the_waiting_of_the_others_at_once() -> None:
    results = run_ranks(3, _leave_at_the_second_meeting)
    assert results[1] == "left"
    for message, seconds, lost in (results[0], results[2]):
        assert "connection closed by peer" in message
        assert lost, "it would be taken for the cause"
        assert seconds < 10


def _leave_at_the_second_meeting(rank: Rank) -> object:
    node = opened(rank)
    node.average(torch.ones(10))
    if rank.rank == 1:
        node.close()
        return "left"
    began = time.monotonic()
    try:
        node.average(torch.ones(10))
    except RuntimeError as error:
        return str(error), time.monotonic() - began, is_lost_connection(error)
    return "went on"


def test_a_rank_that_stands_still_is_named_when_the_time_is_up() -> None:
    message, _ = run_ranks(2, _stand_still)
    assert message == "exchange of gradients: waited 1 s in vain for rank 1"


def _stand_still(rank: Rank) -> str:
    node = opened(rank)
    for peer in node._peers.values():
        peer.settimeout(1.0)
    if rank.rank == 1:
        time.sleep(3)
        return ""
    with pytest.raises(RuntimeError) as error:
        node.average(torch.ones(10))
    return str(error.value)


def test_a_process_that_a_rank_forks_does_not_hold_its_connection() -> None:
    assert run_ranks(2, _fork_and_leave)[0] == "exchange of gradients with rank 1: connection closed by peer"


def _fork_and_leave(rank: Rank) -> str:
    node = opened(rank)
    if rank.rank == 1:
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,), daemon=True).start()
        node.close()
        return ""
    with pytest.raises(RuntimeError) as error:
        node.average(torch.ones(10))
    return str(error.value)


def test_a_rank_that_cannot_reach_the_shared_memory_makes_all_use_the_process_group() -> None:
    assert run_ranks(3, _ddp_in_a_container)[0] == "gloo"


def _ddp_in_a_container(rank: Rank) -> str:
    if rank.rank == 1:
        communication._map = lambda memory, size: None
    return _ddp_step(rank)[0]


def test_ranks_of_several_nodes_and_a_node_without_room_use_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_ranks(2, _ddp_step)[0][0] == "shared memory"
    assert run_ranks(2, _ddp_step, num_local=1)[0][0] == "gloo"
    monkeypatch.setattr(communication, "SHARED_MEMORY", Path("/nonexistent"))
    assert run_ranks(2, _ddp_step)[0][0] == "gloo"


@pytest.mark.parametrize("num_local", [1, 2])
def test_gradients_of_ddp_are_the_means_and_waiting_is_counted_as_communication(num_local: int) -> None:
    for _, gradient, milliseconds in run_ranks(2, _ddp_step, num_local=num_local):
        assert torch.equal(gradient, torch.full((1, 4), 1.5))
        times = dict(zip(PHASES, milliseconds, strict=True))
        assert times["communication"] > 0
        assert times["backward"] > 0
    waited = [dict(zip(PHASES, row[2], strict=True))["communication"] for row in run_ranks(2, _ddp_step, 1.0)]
    assert waited[0] > waited[1]  # the one that comes late finds the other there


def _ddp_step(rank: Rank, late: float = 0.0) -> tuple[str, torch.Tensor, tuple[float, ...]]:
    """Rank r feeds r + 1, so that the gradients are 1 and 2; rank 1 comes `late` seconds late."""
    layer, timer = nn.Linear(4, 1, bias=False), HostTimer()
    model = DistributedDataParallel(layer, gradient_as_bucket_view=True)
    name = average_gradients(model, rank, timer, timeout=30.0)
    timer.start()
    timer.begin_step()
    output = model(torch.full((1, 4), float(rank.rank + 1))).sum()
    time.sleep(late * rank.rank)
    timer.lap("forward")
    output.backward()
    timer.lap("communication")
    assert layer.weight.grad is not None
    return name, layer.weight.grad, timer.read().milliseconds


def test_no_thread_of_the_process_group_outlives_it(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        """
import os, torch
from pipeline.communication import wrap
from pipeline.distributed import Launch, start_rank
from pipeline.timing import HostTimer

with start_rank(Launch.from_environment(os.environ)) as rank:
    wrap(torch.nn.Linear(3, 2), rank, HostTimer(), torch.zeros(1, 3), timeout=30)
os.write(1, b"threads at the end: %d\\n" % len(os.listdir("/proc/self/task")))  # in one piece: both ranks write here
"""
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("threads at the end: 1\n") == 2, done.stdout + done.stderr
