"""With train.reproducible the number of ranks leaves no trace in the weights, the losses or the evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.parallel.rank import Rank
from pipeline.parallel.replicas import OrderedReplicas
from tests.faults.trainings import state
from tests.ranks import run_ranks
from tests.train.test_resume import assert_same_run, run
from train.steps.eager import OrderedStep

REPRODUCIBLE = ("train.reproducible=true", "checkpoint.every_steps=3", "data.augment.crop=2", "data.eval_batch_size=4")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(folder, *REPRODUCIBLE, world_size=1)
    return folder


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_any_number_of_ranks_ends_with_the_same_bits_and_history(tmp_path: Path, alone: Path, world_size: int) -> None:
    """With dropout, crops, a short last batch with empty virtual ranks, and records at which nothing ends."""
    run(tmp_path, *REPRODUCIBLE, world_size=world_size)
    assert_same_run(tmp_path, alone)


def test_without_it_they_do_not(tmp_path: Path, alone: Path) -> None:
    """Or the test above would show nothing."""
    ends = {}
    for world_size in (1, 3):
        run(tmp_path / str(world_size), "data.augment.crop=2", world_size=world_size)
        final = load_file(tmp_path / str(world_size) / "run" / "model" / "final.safetensors")
        ends[world_size] = torch.cat([value.flatten() for value in final.values()])
    assert not torch.equal(ends[1], ends[3])


@pytest.mark.parametrize("stops", [((4, 5), (2, 8), (1, 11), (3, 17)), ((2, 12), (8, 20))])
def test_stopped_and_resumed_on_other_numbers_of_ranks_it_ends_with_the_same_bits(
    tmp_path: Path, alone: Path, stops: tuple[tuple[int, int], ...]
) -> None:
    for world_size, at_step in stops:
        run(tmp_path, *REPRODUCIBLE, world_size=world_size, at_step=at_step, to=(0,), step=OrderedStep)
        assert state(tmp_path)["state"] == "preempted"
    run(tmp_path, *REPRODUCIBLE, world_size=2)
    assert_same_run(tmp_path, alone)


@pytest.mark.parametrize(("world_size", "num_local"), [(1, None), (2, None), (3, None), (2, 1), (3, 1), (5, 1)])
def test_virtual_ranks_are_summed_in_their_order_in_shared_memory_and_over_gloo(
    world_size: int, num_local: int | None
) -> None:
    for result, way in run_ranks(world_size, _sum_of_virtual_ranks, num_local=num_local):
        expected = torch.zeros(7)
        for virtual in range(8):
            expected += _gradient(virtual)
        assert torch.equal(result, expected)
        assert way == "of one rank" if world_size == 1 else ("shared memory" if num_local is None else "gloo") in way


def _gradient(virtual: int) -> torch.Tensor:
    return torch.randn(7, generator=torch.Generator().manual_seed(virtual)) * 10.0**virtual


def _sum_of_virtual_ranks(rank: Rank) -> tuple[torch.Tensor, str]:
    model = nn.ParameterList([torch.zeros(7)])
    replicas = OrderedReplicas(model, rank, 8, timeout=60.0)
    for _ in range(2):  # the second finds the slots as the first left them
        for virtual in replicas.own:
            model[0].grad = _gradient(virtual)
            replicas.store(virtual)
        replicas.reduce()
    assert model[0].grad is not None
    return model[0].grad.clone(), replicas.description
