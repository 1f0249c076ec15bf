"""One model on all ranks: how its gradients are summed is chosen by rule, and the sum is the same in every way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.base.timing import PHASES, PhaseTimer
from pipeline.config.schema import TrainConfig
from pipeline.parallel import node_memory
from pipeline.parallel.rank import Rank
from pipeline.parallel.replicas import Replicas, build_replicas
from tests.ranks import run_ranks


def build(rank: Rank, model: nn.Module, *, compress: bool = False, **config: Any) -> Replicas:
    images = torch.zeros(1, next(model.parameters()).shape[1])
    return build_replicas(TrainConfig(**config), model, rank, PhaseTimer(), images, compress=compress)


def _describe(rank: Rank, config: dict[str, Any]) -> str:
    return build(rank, nn.Linear(4, 1), **config).description


@pytest.mark.parametrize(
    ("world_size", "num_local", "config", "expected"),
    [
        (1, None, {}, "of one rank"),
        (2, None, {}, "shared memory"),
        (2, None, {"backend": "gloo"}, "gloo"),
        (2, 1, {}, "gloo"),
        (2, None, {"reproducible": True}, "shared memory, by virtual ranks"),
        (2, 1, {"reproducible": True}, "gloo, by virtual ranks"),
    ],
)
def test_cpu_ranks_of_one_node_use_shared_memory_unless_a_backend_is_set(
    world_size: int, num_local: int | None, config: dict[str, Any], expected: str
) -> None:
    assert run_ranks(world_size, _describe, config, num_local=num_local) == [expected] * world_size


def test_a_node_without_room_for_shared_memory_uses_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_memory, "SHARED_MEMORY", Path("/dev/null/absent"))
    assert run_ranks(2, _describe, {}) == ["gloo"] * 2


def _describe_in_a_container(rank: Rank) -> str:
    if rank.rank == 1:
        node_memory._map = lambda memory, size: None
    return _describe(rank, {})


def test_a_rank_that_cannot_reach_the_shared_memory_makes_all_use_the_process_group() -> None:
    assert run_ranks(3, _describe_in_a_container) == ["gloo"] * 3


def _begin(rank: Rank, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rank.rank)
    layer, norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
    norm.running_mean = torch.full((3,), rank.rank + 5.0)
    model = nn.Sequential(layer, norm)
    build(rank, model, **config)
    assert model.training
    return layer.weight.detach(), norm.running_mean


@pytest.mark.parametrize(("num_local", "reproducible"), [(None, False), (1, False), (1, True)])
def test_all_ranks_begin_with_the_weights_and_statistics_of_rank_0(num_local: int | None, reproducible: bool) -> None:
    torch.manual_seed(0)
    expected = nn.Linear(4, 3).weight
    for weight, mean in run_ranks(2, _begin, {"reproducible": reproducible}, num_local=num_local):
        assert torch.equal(weight, expected)
        assert mean.tolist() == [5.0] * 3


def _step(rank: Rank, late: float = 0.0) -> tuple[Tensor, dict[str, float]]:
    """Rank r has the gradient r + 1; rank 1 comes `late` seconds late."""
    layer, timer = nn.Linear(4, 1, bias=False), PhaseTimer()
    replicas = build_replicas(TrainConfig(), layer, rank, timer, torch.zeros(1, 4))
    timer.start()
    timer.begin_step()
    output = replicas.model(torch.full((1, 4), float(rank.rank + 1))).sum()
    time.sleep(late * rank.rank)
    timer.lap("forward")
    output.backward()
    replicas.reduce()
    timer.lap("communication")
    assert layer.weight.grad is not None
    return layer.weight.grad, dict(zip(PHASES, timer.read().milliseconds, strict=True))


@pytest.mark.parametrize("num_local", [1, 2])
def test_gradients_are_summed_and_waiting_is_counted_as_communication(num_local: int) -> None:
    (first, waited), (second, came_late) = run_ranks(2, _step, 1.0, num_local=num_local)
    assert torch.equal(first, torch.full((1, 4), 3.0))
    assert torch.equal(second, first)
    assert waited["communication"] > came_late["communication"] > 0
    assert min(waited["backward"], came_late["backward"]) > 0


def _accumulate(rank: Rank) -> Tensor:
    """Rank r has the gradients r + 1 and 10 (r + 1), in two micro-batches."""
    layer = nn.Linear(4, 1, bias=False)
    replicas = build(rank, layer, accumulate=2)
    for _ in range(2):
        layer.zero_grad(set_to_none=True)
        with replicas.accumulate():
            replicas.model(torch.full((1, 4), 1.0 + rank.rank)).sum().backward()
        replicas.model(torch.full((1, 4), 10.0 + 10 * rank.rank)).sum().backward()
        replicas.reduce()
    assert layer.weight.grad is not None
    return layer.weight.grad


@pytest.mark.parametrize("num_local", [1, 3])
def test_gradients_of_micro_batches_are_added_up_and_reduced_once(num_local: int) -> None:
    for gradient in run_ranks(3, _accumulate, num_local=num_local):
        assert torch.equal(gradient, torch.full((1, 4), 66.0))


def _gradients_of_steps(rank: Rank) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(300, 300) for _ in range(8)])  # several buckets
    replicas = build(rank, model, backend="gloo")
    images = torch.randn(4, 300, generator=torch.Generator().manual_seed(rank.rank))
    gradients = []
    for _ in range(4):
        replicas.model(images).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad(set_to_none=True)
    return gradients


def test_ddp_gives_the_same_bits_in_its_first_steps_as_in_all_others() -> None:
    """Else a training that is resumed, whose DDP is new, would differ from one that is not."""
    for first, *others in run_ranks(3, _gradients_of_steps):
        assert all(torch.equal(first, other) for other in others)


def _compress(rank: Rank) -> tuple[Tensor, str]:
    layer = nn.Linear(3, 1, bias=False)
    replicas = build(rank, layer, backend="gloo", compress=True)
    replicas.model(torch.tensor([[1.0, 1 / 3, 1000.0]]) * (rank.rank + 1)).sum().backward()
    assert layer.weight.grad is not None
    return layer.weight.grad, replicas.description


def test_compressed_gradients_are_summed_as_bfloat16_and_kept_as_they_are_trained() -> None:
    parts = [(torch.tensor([1.0, 1 / 3, 1000.0]) * (r + 1)).bfloat16() for r in range(2)]
    for gradient, description in run_ranks(2, _compress):
        assert torch.equal(gradient, (parts[0] + parts[1]).float()[None])
        assert description == "gloo, as bfloat16"
