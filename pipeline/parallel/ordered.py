"""Gradients of the shards of a global batch, summed in the order of the shards, whichever rank computed which.

The last bits of a sum depend on its order. Here that order does not depend on the number of ranks: every rank puts the
gradient of each of its shards into a slot of its own, all slots meet on every rank, and are added up one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.parallel.node_memory import lay_out, num_bytes, open_node_memory, trained_parameters
from pipeline.parallel.rank import Rank, share


class Shards:
    """A slot for the gradients of each shard, and their sum. Its parameters are of one type."""

    def __init__(self, parameters: Sequence[nn.Parameter], slots: Sequence[Tensor], total: Tensor, own: range):
        """`slots` by shard, and `total`: uint8, each of num_bytes(parameters). `own`: the shards of this rank."""
        self.own = own
        self._parameters = parameters
        self._views = [lay_out(parameters, slots[shard]) for shard in own]
        self._slots = [slot.view(parameters[0].dtype) for slot in slots]
        self._total = total.view(parameters[0].dtype)
        self._gradients = [torch.empty_like(parameter) for parameter in parameters]
        self._sums = lay_out(parameters, total)
        self.exchange: Callable[[], None] = self._add
        """Collective: every rank must call. From the slots that the ranks have filled to the sum, on every rank."""

    @torch.no_grad()
    def store(self, shard: int) -> None:
        """Move the gradients of the parameters into the slot of `shard`; zeros where there are none."""
        for parameter, view in zip(self._parameters, self._views[shard - self.own.start], strict=True):
            view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def sum(self) -> None:
        """Collective: every rank must call. `grad` of every parameter becomes the sum over all shards."""
        self.exchange()
        for parameter, gradient, total in zip(self._parameters, self._gradients, self._sums, strict=True):
            parameter.grad = gradient.copy_(total)

    def _add(self, part: slice = slice(None)) -> None:
        """From zero on: a sum of negative zeros then is zero, as it is where zeros are among them."""
        total = self._total[part].zero_()
        for slot in self._slots:
            total.add_(slot[part])


def open_shards(rank: Rank, network: nn.Module, num_shards: int, timeout: float) -> tuple[Shards, str]:
    """Collective: every rank must call. With the way in which the slots meet, for the record.

    Between CPU ranks of one node the slots are in memory that they share; else each rank gathers those of all others,
    over gloo or NCCL. `timeout` is in seconds.
    """
    parameters = trained_parameters(network)
    if rank.world_size == 1:
        return _alone(rank, parameters, num_shards), "of one rank"
    return _on_node(rank, parameters, num_shards, timeout) or _in_group(rank, parameters, num_shards)


def _own_shards(rank: Rank, num_shards: int) -> range:
    own = share(num_shards, rank.rank, rank.world_size)
    return range(own.start, own.stop)


def _alone(rank: Rank, parameters: Sequence[nn.Parameter], num_shards: int) -> Shards:
    *slots, total = _new_slots(rank, parameters, num_shards + 1)
    return Shards(parameters, slots, total, range(num_shards))


def _on_node(
    rank: Rank, parameters: Sequence[nn.Parameter], num_shards: int, timeout: float
) -> tuple[Shards, str] | None:
    size = num_bytes(parameters)
    node = open_node_memory(rank, size * (num_shards + 1), timeout)
    if node is None:
        return None
    *slots, total = [node.memory[size * i : size * (i + 1)] for i in range(num_shards + 1)]
    shards = Shards(parameters, slots, total, _own_shards(rank, num_shards))
    stripe = share(size // parameters[0].element_size(), rank.rank, rank.world_size)

    def exchange() -> None:
        node.meet()
        shards._add(stripe)
        node.meet()

    shards.exchange = exchange
    return shards, "shared memory, by shards"


def _in_group(rank: Rank, parameters: Sequence[nn.Parameter], num_shards: int) -> tuple[Shards, str]:
    """Every rank sends as many slots as the one with most shards has."""
    most, size = -(-num_shards // rank.world_size), num_bytes(parameters)
    gathered = _new_slots(rank, parameters, rank.world_size * most).view(rank.world_size, most, size)
    slots = []
    for owner in range(rank.world_size):
        shares = share(num_shards, owner, rank.world_size)
        slots += list(gathered[owner, : shares.stop - shares.start])
    shards = Shards(parameters, slots, _new_slots(rank, parameters, 1)[0], _own_shards(rank, num_shards))

    def exchange() -> None:
        dist.all_gather(list(gathered), gathered[rank.rank].clone())
        shards._add()

    shards.exchange = exchange
    return shards, f"{rank.backend}, by shards"


def _new_slots(rank: Rank, parameters: Sequence[nn.Parameter], count: int) -> Tensor:
    return torch.zeros(count, num_bytes(parameters), dtype=torch.uint8, device=rank.device)
