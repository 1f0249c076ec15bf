"""This process among the others: its place in the process group, and the collectives.

A docstring that begins with "Collective." describes a call that every rank must make.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
LONG_TIMEOUT = timedelta(hours=12)


class RemoteError(Exception):
    """Another rank failed, and shows the cause."""


@dataclass(frozen=True)
class Rank:
    """The number and the device of this process, and the collectives, which a world of one skips."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    backend: str
    num_threads: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait_for_device(self) -> None:
        """Wait until all that was queued on this rank's GPU is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """Collective. Sum `tensor` over the ranks in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce_sum_later(self, tensor: Tensor) -> "PendingSum":
        """Collective. Begin to sum `tensor` over the ranks, without waiting for the device or the other ranks."""
        work = dist.all_reduce(tensor, async_op=True) if self.world_size > 1 else None
        return PendingSum(tensor, work, waits_on_device=self.backend in ("nccl", "none"))

    def any(self, flag: bool) -> bool:
        """Collective. Return whether `flag` is true on any rank."""
        return bool(self.reduce_sum(torch.tensor([float(flag)], device=self.device)).item())

    def barrier(self) -> None:
        """Collective. Wait until every rank is here."""
        self.any(False)

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Collective. Return the picklable `value` of each rank, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group)
        return values

    def run_on_main(self, action: Callable[[], T]) -> T:
        """Collective. Run `action` on rank 0, and return its picklable result on every rank.

        If it raises, rank 0 raises that, and the others RemoteError.
        """
        told = [self.run_on_all(lambda: action() if self.is_main else None)]
        if self.world_size > 1:
            dist.broadcast_object_list(told, src=0)
        return cast(T, told[0])

    def run_on_all(self, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Collective. Run `action` on every rank, and return its result once it has returned on all.

        If it raises, that rank raises the same, and all others RemoteError.
        """
        result, error = None, None
        try:
            result = action()
        except Exception as raised:  # the others have to be told before it is raised here
            error = raised
        told = self.gather(None if error is None else f"{type(error).__name__}: {error}", group)
        if error is not None:
            raise error
        for failure in filter(None, told):
            raise RemoteError(failure)
        return cast(T, result)

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Collective. Overwrite `tensors` in place by those of rank 0, one after the other.

        One at a time, and as raw bytes: a pickle of all would lie in the memory of every GPU.
        """
        device = self.device if self.backend == "nccl" else torch.device("cpu")
        for tensor in tensors if self.world_size > 1 else ():
            sent = tensor.detach().to(device, memory_format=torch.contiguous_format, copy=True)
            dist.broadcast(sent.reshape(-1).view(torch.uint8), src=0)  # not every type can be sent as itself
            tensor.detach().copy_(sent)

    def broadcast_state(self, state: T | None) -> T:
        """Collective. Return rank 0's `state`, nested dicts and lists of tensors and plain values, with its tensors on
        the CPU. `state` of the other ranks is ignored."""
        # of the same strides, which fused optimizers rely on
        skeleton = self.run_on_main(lambda: _map_tensors(partial(torch.empty_like, device="meta"), state))
        if not self.is_main:
            state = _map_tensors(partial(torch.empty_like, device="cpu"), skeleton)
        tensors: list[Tensor] = []
        _map_tensors(tensors.append, state)
        self.broadcast_tensors(tensors)
        return cast(T, state)


def _map_tensors(function: Callable[[Tensor], object], state: Any) -> Any:
    """Return `state` with each of its tensors replaced by `function(tensor)`, in their order."""
    match state:
        case Tensor():
            return function(state)
        case dict():
            return {key: _map_tensors(function, value) for key, value in state.items()}
        case list():
            return [_map_tensors(function, value) for value in state]
    return state


class PendingSum:
    """A sum over the ranks on its way to the host."""

    def __init__(self, tensor: Tensor, work: Any, *, waits_on_device: bool):
        self._tensor = tensor
        self._wait: Callable[[], object] = work.wait if work is not None else lambda: None
        if tensor.is_cuda and waits_on_device:  # the device waits for the others, then copies, and the host goes on
            self._wait()
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
            self._wait = copied.synchronize

    def values(self) -> list[float]:
        """Wait for the sum, and return it."""
        self._wait()
        return cast(list[float], self._tensor.tolist())


def share(count: int, index: int, parts: int) -> slice:
    """Return the `index`-th of `parts` contiguous shares of `count` things, whose sizes differ by one at most."""
    return slice(count * index // parts, count * (index + 1) // parts)


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error looks like a lost rank: any torch DistError, or a RuntimeError that names a connection.

    It is a consequence then, and the cause is on the other rank.
    """
    signs = ("connection closed by peer", "connection reset", "broken pipe", "connection refused", "socket closed")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    )
