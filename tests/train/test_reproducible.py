"""With train.reproducible the number of ranks leaves no trace in the weights, the losses or the evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.base.launch import Launch
from pipeline.config import ConfigError
from pipeline.parallel.ordered import open_shards
from pipeline.parallel.rank import Rank
from tests.faults.trainings import state
from tests.ranks import run_ranks
from tests.train.helpers import config_of
from tests.train.test_resume import assert_same_run, run
from train import checks as contradictions
from train.steps.ordered import ShardStep

REPRODUCIBLE = ("train.reproducible=true", "checkpoint.every_steps=3", "data.random_crop=2", "data.eval_batch_size=4")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(folder, *REPRODUCIBLE, world_size=1)
    return folder


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_any_number_of_ranks_ends_with_the_same_bits_and_history(tmp_path: Path, alone: Path, world_size: int) -> None:
    """With dropout, crops, a short last batch of which some shards are empty, and records at which nothing ends."""
    run(tmp_path, *REPRODUCIBLE, world_size=world_size)
    assert_same_run(tmp_path, alone)


def test_without_it_they_do_not(tmp_path: Path, alone: Path) -> None:
    """Or the test above would show nothing."""
    ends = {}
    for world_size in (1, 3):
        run(tmp_path / str(world_size), "data.random_crop=2", world_size=world_size)
        final = torch.load(tmp_path / str(world_size) / "run" / "model" / "final.pt", weights_only=True)
        ends[world_size] = torch.cat([value.flatten() for value in final.values()])
    assert not torch.equal(ends[1], ends[3])


@pytest.mark.parametrize("stops", [((4, 5), (2, 8), (1, 11), (3, 17)), ((2, 12), (8, 20))])
def test_stopped_and_resumed_on_other_numbers_of_ranks_it_ends_with_the_same_bits(
    tmp_path: Path, alone: Path, stops: tuple[tuple[int, int], ...]
) -> None:
    for world_size, at_step in stops:
        run(tmp_path, *REPRODUCIBLE, world_size=world_size, at_step=at_step, to=(0,), step=ShardStep)
        assert state(tmp_path)["state"] == "preempted"
    run(tmp_path, *REPRODUCIBLE, world_size=2)
    assert_same_run(tmp_path, alone)


@pytest.mark.parametrize(("world_size", "num_local"), [(1, None), (2, None), (3, None), (2, 1), (3, 1), (5, 1)])
def test_shards_are_summed_in_their_order_in_shared_memory_and_over_gloo(
    world_size: int, num_local: int | None
) -> None:
    for result, way in run_ranks(world_size, _sum_of_shards, num_local=num_local):
        expected = torch.zeros(7)
        for shard in range(8):
            expected += _gradient(shard)
        assert torch.equal(result, expected)
        assert way == "of one rank" if world_size == 1 else ("shared memory" if num_local is None else "gloo") in way


def _gradient(shard: int) -> torch.Tensor:
    return torch.randn(7, generator=torch.Generator().manual_seed(shard)) * 10.0**shard


def _sum_of_shards(rank: Rank) -> tuple[torch.Tensor, str]:
    network = nn.ParameterList([torch.zeros(7)])
    shards, way = open_shards(rank, network, 8, timeout=60.0)
    for _ in range(2):  # the second finds the slots as the first left them
        for shard in shards.own:
            network[0].grad = _gradient(shard)
            shards.store(shard)
        shards.sum()
    assert network[0].grad is not None
    return network[0].grad.clone(), way


def test_more_ranks_than_shards_are_refused() -> None:
    config = config_of("train.reproducible=true", "train.virtual_shards=2")
    (problem,) = contradictions.find_contradictions(config, Launch(0, 0, 3, 3))
    assert "train.virtual_shards = 2: fewer than the 3 ranks" in problem.message
    assert list(contradictions.find_contradictions(config, Launch(0, 0, 2, 2))) == []


def test_networks_with_batch_statistics_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contradictions, "build_network", lambda *_: nn.Sequential(nn.BatchNorm2d(3)))
    (problem,) = contradictions.find_contradictions(config_of("train.reproducible=true"), Launch())
    assert "convnet has batch statistics" in problem.message


def test_accumulation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.accumulate = 2: a reproducible step computes its shards one after"):
        config_of("train.reproducible=true", "train.accumulate=2")
