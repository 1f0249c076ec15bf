"""Gradients averaged in shared memory, among CPU ranks of one node."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.base.timing import PhaseTimer
from pipeline.parallel.node_memory import NodeMemory, lay_out, num_bytes, open_node_memory, trained_parameters
from pipeline.parallel.rank import Rank


class NodeAverage:
    """Averages the gradients of the CPU ranks of one node, each of which reads what the others wrote.

    A fraction of what gloo takes over the loopback, which copies through the kernel and has threads of its own that
    compete with the computing for the cores. Every rank writes its gradients into a slot, sums one stripe of all slots
    in the order of the ranks, and reads the stripes of the others; between these they meet at a socket. Buffers (batch
    statistics) become those of rank 0, as under DistributedDataParallel.
    """

    def __init__(self, rank: Rank, network: nn.Module, timer: PhaseTimer, node: NodeMemory):
        """`node` is as large as `open_node_average` has it. `timer` gets a lap for `backward` where this begins."""
        self._rank = rank
        self._timer = timer
        self.node = node
        self._parameters = trained_parameters(network)
        self._buffers = list(network.buffers())
        num_slots, slot_bytes = rank.world_size + 1, num_bytes(self._parameters)
        slots = [node.memory[slot_bytes * i : slot_bytes * (i + 1)] for i in range(num_slots)]
        self._mine = lay_out(self._parameters, slots[rank.rank])
        self._mean = lay_out(self._parameters, slots[-1])
        self._sent_buffers = lay_out(self._buffers, node.memory[slot_bytes * num_slots :])
        flat = [slot.view(self._parameters[0].dtype) for slot in slots]
        begin, end = (len(flat[0]) * index // rank.world_size for index in (rank.rank, rank.rank + 1))
        *self._stripes, self._mean_stripe = [slot[begin:end] for slot in flat]

    @torch.no_grad()
    def average(self) -> None:
        """Collective: every rank must call. `grad` of every parameter becomes the mean.

        Raises RuntimeError if a rank is gone.
        """
        self._timer.lap("backward")
        gradients = self._gradients()
        self._write(gradients)
        self.node.meet()
        self._sum()
        self.node.meet()
        torch._foreach_copy_(gradients, self._mean)

    def _gradients(self) -> list[Tensor]:
        gradients = []
        for parameter in self._parameters:
            if parameter.grad is None:  # not used in this step
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        return gradients

    def _write(self, gradients: list[Tensor]) -> None:
        torch._foreach_copy_(self._mine, gradients)
        if self._rank.is_main and self._buffers:
            torch._foreach_copy_(self._sent_buffers, self._buffers)

    def _sum(self) -> None:
        first, *others = self._stripes
        self._mean_stripe.copy_(first)
        for stripe in others:
            self._mean_stripe.add_(stripe)
        self._mean_stripe.div_(self._rank.world_size)
        if not self._rank.is_main and self._buffers:
            torch._foreach_copy_(self._buffers, self._sent_buffers)


def open_node_average(rank: Rank, network: nn.Module, timer: PhaseTimer, timeout: float) -> NodeAverage | None:
    """Collective: every rank must call. None where it cannot be, as with `open_node_memory`, or for several types."""
    parameters = trained_parameters(network)
    if len({parameter.dtype for parameter in parameters}) != 1:
        return None
    size = (rank.world_size + 1) * num_bytes(parameters) + num_bytes(network.buffers())
    node = open_node_memory(rank, size, timeout)
    return None if node is None else NodeAverage(rank, network, timer, node)
