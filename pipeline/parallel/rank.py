"""The process group and this process's place in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")
LONG_TIMEOUT = timedelta(hours=12)


class RemoteError(Exception):
    """Another rank failed; that rank shows the cause."""


@dataclass(frozen=True)
class Rank:
    """This process among the others: its number, its device, and the collectives, which a world of one skips."""

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
        """Until all that was queued on this rank's GPU is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Collective: every rank must call. Sums `tensor` over the ranks in place, and returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce_sum_later(self, tensor: torch.Tensor) -> PendingSum:
        """Collective: every rank must call. As `reduce_sum`, without waiting for the device or the other ranks."""
        work = dist.all_reduce(tensor, async_op=True) if self.world_size > 1 else None
        return PendingSum(tensor, work, waits_on_device=self.backend in ("nccl", "none"))

    def any(self, flag: bool) -> bool:
        """Collective: every rank must call. Whether `flag` is true on any rank."""
        return bool(self.reduce_sum(torch.tensor([float(flag)], device=self.device)).item())

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Collective: every rank must call. The picklable `value` of each rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group)
        return values

    def from_main(self, action: Callable[[], T]) -> T:
        """Collective: every rank must call. Rank 0 runs `action`; every rank returns its result.

        If it raises, rank 0 raises that, and the others RemoteError.
        """
        result, error = _run(action) if self.is_main else (None, None)
        told: list[Any] = [result, _describe(error)]
        if self.world_size > 1:
            dist.broadcast_object_list(told, src=0, device=self._object_device)
        if error is not None:
            raise error
        if told[1] is not None:
            raise RemoteError(told[1])
        return cast(T, told[0])

    def together(self, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Collective: every rank must call. What `action` returns on this rank, once it has returned on all.

        If it raises, that rank raises the same, and all others RemoteError.
        """
        result, error = _run(action)
        failures = [text for text in self.gather(_describe(error), group) if text is not None]
        if error is not None:
            raise error
        if failures:
            raise RemoteError(failures[0])
        return cast(T, result)

    @property
    def _object_device(self) -> torch.device:
        return self.device if self.backend == "nccl" else torch.device("cpu")


class PendingSum:
    """A sum over the ranks on its way to the host."""

    def __init__(self, tensor: torch.Tensor, work: Any, *, waits_on_device: bool):
        self._tensor = tensor
        self._work = work
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda and waits_on_device:  # the device waits for the others, then copies, and the host goes on
            if work is not None:
                work.wait()
            self._work = None
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def values(self) -> list[float]:
        """Waits until they are there."""
        if self._work is not None:
            self._work.wait()
        if self._copied is not None:
            self._copied.synchronize()
        return cast(list[float], self._tensor.tolist())


def _run(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What `action` returns, or raises: the others have to be told before it is raised here."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def _describe(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


def share(count: int, index: int, parts: int) -> slice:
    """The `index`-th of `parts` contiguous shares of `count` things; sizes differ by one at most."""
    return slice(count * index // parts, count * (index + 1) // parts)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, which is a consequence and never the cause."""
    signs = ("connection closed by peer", "connection reset", "broken pipe", "connection refused", "socket closed")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    )
