"""Gradients of virtual ranks, summed in their order, whichever rank computed which.

The last bits of a sum depend on its order. Here that order does not depend on the number of ranks: every rank puts the
gradient of each of its virtual ranks into a slot, all slots meet on every rank, and are added up one by one.
"""

import torch
import torch.distributed as dist
from torch import nn

from pipeline.parallel.node_memory import lay_out, num_bytes, open_node_memory, trained_parameters
from pipeline.parallel.rank import Rank, share
from pipeline.parallel.replicas import Replicas


class OrderedReplicas(Replicas):
    """A model whose gradients are summed in the same order on any number of ranks. Its parameters are of one type.

    Between CPU ranks of one node the slots are in memory that they share, and each rank sums a stripe of them; else
    each rank gathers those of all others, over gloo or NCCL.
    """

    def __init__(self, model: nn.Module, rank: Rank, num_virtual: int, timeout: float):
        """Collective. `timeout` is in seconds, for each meeting."""
        shares = [share(num_virtual, owner, rank.world_size) for owner in range(rank.world_size)]
        self.own = range(num_virtual)[shares[rank.rank]]
        """The virtual ranks of this rank."""
        self._rank = rank
        self._parameters = trained_parameters(model)
        dtype, size = self._parameters[0].dtype, num_bytes(self._parameters)
        self._node = open_node_memory(rank, size * (num_virtual + 1), timeout)
        if self._node is not None:
            *slots, total = self._node.memory.view(num_virtual + 1, size)
            stripe = share(len(total.view(dtype)), rank.rank, rank.world_size)
        else:
            most = -(-num_virtual // rank.world_size)  # every rank sends as many slots as the one that has most
            self._gathered = torch.zeros(rank.world_size, most, size, dtype=torch.uint8, device=rank.device)
            slots = [slot for i, own in enumerate(shares) for slot in self._gathered[i, : own.stop - own.start]]
            total, stripe = torch.zeros(size, dtype=torch.uint8, device=rank.device), slice(None)
        way = rank.backend if self._node is None else "shared memory"
        super().__init__(model, f"{way}, by virtual ranks" if rank.world_size > 1 else "of one rank")
        self._views = [lay_out(self._parameters, slots[virtual]) for virtual in self.own]
        self._sums = lay_out(self._parameters, total)
        self._gradients = [torch.empty_like(parameter) for parameter in self._parameters]
        *self._stripes, self._sum_stripe = [slot.view(dtype)[stripe] for slot in (*slots, total)]

    @torch.no_grad()
    def store(self, virtual: int) -> None:
        """Move the gradients of the parameters into the slot of a virtual rank; zeros where there are none."""
        for parameter, view in zip(self._parameters, self._views[virtual - self.own.start], strict=True):
            view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def reduce(self) -> None:
        """Collective. `grad` of every parameter becomes the sum over all virtual ranks."""
        if self._node is not None:
            self._node.meet()
        elif self._rank.world_size > 1:
            dist.all_gather(list(self._gathered), self._gathered[self._rank.rank].clone())
        self._sum_stripe.zero_()  # a sum of negative zeros then is zero, as it is where zeros are among them
        for stripe in self._stripes:
            self._sum_stripe.add_(stripe)
        if self._node is not None:
            self._node.meet()
        for parameter, gradient, total in zip(self._parameters, self._gradients, self._sums, strict=True):
            parameter.grad = gradient.copy_(total)
