"""The collectives of a rank, in a world of one and between real ranks."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

from pipeline.parallel.rank import Rank, RemoteError, is_lost_connection
from tests.ranks import run_ranks

ALONE = Rank(0, 0, 1, 1, torch.device("cpu"), "none", 1)


def fail() -> NoReturn:
    raise ZeroDivisionError("of rank 0")


def test_a_world_of_one_is_main_and_needs_no_process_group() -> None:
    assert ALONE.is_main
    assert not dist.is_initialized()
    tensor = torch.tensor([1.0, 2.0])
    assert ALONE.reduce_sum(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    assert ALONE.gather({"a": 1}) == [{"a": 1}]
    assert ALONE.run_on_main(lambda: "result") == "result"
    assert ALONE.run_on_main(lambda: None) is None
    state = {"weight": tensor, "step": 3}
    assert ALONE.broadcast_state(state) is state


@pytest.mark.parametrize("flag", [True, False])
def test_in_a_world_of_one_any_is_its_own_flag(flag: bool) -> None:
    assert ALONE.any(flag) is flag


def test_in_a_world_of_one_errors_are_its_own() -> None:
    with pytest.raises(ZeroDivisionError, match="of rank 0"):
        ALONE.run_on_main(fail)
    with pytest.raises(ZeroDivisionError, match="of rank 0"):
        ALONE.run_on_all(fail)


def test_in_a_world_of_one_an_action_runs_once() -> None:
    calls: list[str] = []
    ALONE.run_on_all(lambda: calls.append("all"))
    ALONE.run_on_main(lambda: calls.append("main"))
    assert calls == ["all", "main"]


def _use_collectives(rank: Rank) -> list[Any]:
    tensor = torch.tensor([1.0, 10.0]) * (rank.rank + 1)
    assert rank.reduce_sum(tensor) is tensor
    flags = [rank.any(rank.rank == other) for other in (0, 2, 7)]
    return [tensor.tolist(), flags, rank.gather({"rank": rank.rank}), rank.run_on_main(lambda: ("main", rank.rank))]


def test_every_rank_gets_the_same_from_a_collective() -> None:
    expected = [[6.0, 60.0], [True, True, False], [{"rank": 0}, {"rank": 1}, {"rank": 2}], ("main", 0)]
    assert run_ranks(3, _use_collectives) == [expected] * 3


def _fail_on(rank: Rank, where: int) -> list[str]:
    def act() -> None:
        if rank.rank == where:
            fail()

    messages = []
    for collective in (rank.run_on_main, rank.run_on_all):
        try:
            collective(act)
        except (ZeroDivisionError, RemoteError) as error:
            messages.append(f"{type(error).__name__}({error})")
    rank.barrier()  # the ranks still go together
    return messages


def test_a_failure_on_one_rank_is_raised_there_and_told_to_all_others() -> None:
    own, told = "ZeroDivisionError(of rank 0)", "RemoteError(ZeroDivisionError: of rank 0)"
    assert run_ranks(3, _fail_on, 0) == [[own, own], [told, told], [told, told]]
    assert run_ranks(3, _fail_on, 1) == [[told], [own], [told]]  # run_on_main runs on rank 0 alone


def _sum_later(rank: Rank, begun: Path) -> list[float]:
    if rank.rank == 1:
        while not begun.exists():  # had rank 0 to wait for this one to begin, neither would go on
            time.sleep(0.01)
        time.sleep(0.3)
    pending = rank.reduce_sum_later(torch.tensor([1.0, 2.0]) * (rank.rank + 1))
    if rank.is_main:
        begun.touch()
    return pending.values()


def test_a_sum_that_was_begun_early_waits_for_the_late_rank_when_it_is_read(tmp_path: Path) -> None:
    assert run_ranks(2, _sum_later, tmp_path / "begun", timeout=30.0) == [[3.0, 6.0]] * 2


def state_of_main() -> dict[str, Any]:
    """As checkpoints have them: nested, with parameters by number, and what is no tensor between them."""
    generator = torch.Generator().manual_seed(0)
    conv = torch.randn(4, 3, 2, 2, generator=generator)
    return {
        "state": {
            0: {"step": torch.tensor(7.0), "momentum": conv.contiguous(memory_format=torch.channels_last)},
            1: {"momentum": torch.zeros(0, 3), "flag": torch.tensor([True, False])},
        },
        "groups": [{"params": [0, 1], "lr": 0.1}, torch.arange(3), None],
        "transposed": torch.randn(5, 2, generator=generator).T,
        "bfloat16": torch.randn(3, generator=generator).bfloat16(),
        "float64": torch.tensor([float("nan"), -0.0, 1 / 3], dtype=torch.float64),
        "text": "as it is",
        "none": None,
    }


def _broadcast_state(rank: Rank) -> tuple[Any, list[Any]]:
    other = {"ignored": torch.ones(9)}
    state = rank.broadcast_state(state_of_main() if rank.is_main else other)
    nothing = [
        rank.broadcast_state(None if rank.is_main else other),
        rank.broadcast_state({} if rank.is_main else None),
    ]
    return state, nothing


def test_every_rank_gets_the_state_of_rank_0_with_its_types_and_strides() -> None:
    for state, nothing in run_ranks(3, _broadcast_state):
        assert describe(state) == describe(state_of_main())
        assert nothing == [None, {}]


def describe(state: Any) -> Any:
    """Return `state` with each tensor as what it is, bit by bit: fused optimizers go by strides, too."""
    match state:
        case torch.Tensor():
            data = state.reshape(-1).view(torch.uint8).tolist()
            return state.dtype, state.shape, state.stride(), state.device, data
        case dict():
            return {key: describe(value) for key, value in state.items()}
        case list():
            return [describe(value) for value in state]
    return state


def _pickled_bytes(rank: Rank) -> int:
    """Return how much rank 0 sends as pickles for a state of 4 MB."""
    total, send = 0, dist.broadcast_object_list

    def spy(objects: list[Any], *arguments: Any, **options: Any) -> None:
        nonlocal total
        total += len(pickle.dumps(objects))
        send(objects, *arguments, **options)

    dist.broadcast_object_list = spy  # type: ignore[assignment]
    state = rank.broadcast_state({"weights": [torch.ones(1000, 100) for _ in range(10)]} if rank.is_main else None)
    assert all(torch.equal(weights, torch.ones(1000, 100)) for weights in state["weights"])
    return total


def test_tensors_of_a_state_are_not_sent_as_pickles() -> None:
    """A pickle of all of them would lie in the memory of every GPU."""
    assert 0 < run_ranks(2, _pickled_bytes)[0] < 10_000


def _broadcast_tensors(rank: Rank) -> list[Any]:
    weight = torch.full((2, 3, 4, 4), float(rank.rank)).contiguous(memory_format=torch.channels_last)
    tensors = [torch.nn.Parameter(weight), torch.tensor(rank.rank), torch.zeros(0), torch.full((2, 3), rank.rank).T]
    before = [tensor.data_ptr() for tensor in tensors]
    rank.broadcast_tensors(tensors)
    assert [tensor.data_ptr() for tensor in tensors] == before
    return [describe(tensor.detach()) for tensor in tensors]


def test_tensors_of_any_layout_are_overwritten_in_place_by_those_of_rank_0() -> None:
    mine, *others = run_ranks(3, _broadcast_tensors)
    assert set(mine[0][-1]) == {0}
    assert others == [mine, mine]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:1234"), True),
        (RuntimeError("Connection reset by peer"), True),
        (dist.DistBackendError("NCCL error"), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("connection reset"), False),
        (ZeroDivisionError(), False),
    ],
)
def test_the_loss_of_another_rank_is_told_from_a_failure_of_this_one(error: BaseException, expected: bool) -> None:
    assert is_lost_connection(error) is expected
