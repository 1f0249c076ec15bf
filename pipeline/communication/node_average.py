"""Gradients averaged in shared memory, among CPU ranks of one node."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.distributed import Rank
from pipeline.timing import PhaseTimer

SHARED_MEMORY = Path("/dev/shm")
ALIGNMENT = 64
"""In bytes: what belongs to a rank begins in a cache line of its own."""


class NodeAverage:
    """Averages the gradients of the CPU ranks of one node, each of which reads what the others wrote.

    A fraction of what gloo takes over the loopback, which copies through the kernel and has threads of its own that
    compete with the computing for the cores. Every rank writes its gradients into a slot, sums one stripe of all slots
    in the order of the ranks, and reads the stripes of the others; between these they meet at a socket. Buffers (batch
    statistics) become those of rank 0, as under DistributedDataParallel.
    """

    def __init__(
        self, rank: Rank, network: nn.Module, timer: PhaseTimer, memory: Tensor, peers: dict[int, socket.socket]
    ):
        """`memory`: uint8, shared, of the size `open_node_average` takes. `peers`: of rank 0 all others, else rank 0.

        `timer` gets a lap for `backward` where communication begins.
        """
        self._rank = rank
        self._timer = timer
        self._peers = peers
        self._parameters = trained_parameters(network)
        self._buffers = list(network.buffers())
        num_slots, slot_bytes = rank.world_size + 1, num_bytes(self._parameters)
        slots = [memory[slot_bytes * i : slot_bytes * (i + 1)] for i in range(num_slots)]
        self._mine = lay_out(self._parameters, slots[rank.rank])
        self._mean = lay_out(self._parameters, slots[-1])
        self._sent_buffers = lay_out(self._buffers, memory[slot_bytes * num_slots :])
        flat = [slot.view(self._parameters[0].dtype) for slot in slots]
        begin, end = (len(flat[0]) * index // rank.world_size for index in (rank.rank, rank.rank + 1))
        *self._stripes, self._mean_stripe = [slot[begin:end] for slot in flat]
        # a forked DataLoader worker would hold the connection of a rank that is dead
        os.register_at_fork(after_in_child=self.close)

    @torch.no_grad()
    def average(self) -> None:
        """Collective: every rank must call. `grad` of every parameter becomes the mean; RuntimeError if a rank is gone.

        Then this rank is not to be waited for either, so that all others learn of it at once.
        """
        self._timer.lap("backward")
        try:
            gradients = self._gradients()
            self._write(gradients)
            self._meet()
            self._sum()
            self._meet()
            torch._foreach_copy_(gradients, self._mean)
        except RuntimeError:
            self.close()
            raise

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

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()

    def _meet(self) -> None:
        """No rank goes on before all are here. What they wrote before is then seen by all."""
        for other in self._peers:  # rank 0 hears all others, they tell it
            self._hear(other) if self._rank.is_main else self._tell(other)
        for other in self._peers:
            self._tell(other) if self._rank.is_main else self._hear(other)

    def _tell(self, other: int) -> None:
        try:
            self._peers[other].sendall(b".")
        except OSError as error:
            raise RuntimeError(f"exchange of gradients with rank {other}: connection closed by peer") from error

    def _hear(self, other: int) -> None:
        try:
            heard = self._peers[other].recv(1)
        except TimeoutError as error:
            seconds = self._peers[other].gettimeout()
            raise RuntimeError(f"exchange of gradients: waited {seconds:g} s in vain for rank {other}") from error
        except OSError:
            heard = b""
        if not heard:
            raise RuntimeError(f"exchange of gradients with rank {other}: connection closed by peer")


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """That `lay_out` needs."""
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)


def lay_out(tensors: Iterable[Tensor], memory: Tensor) -> list[Tensor]:
    """Parts of `memory` (uint8) of the shapes, strides and types of `tensors`, one behind the other."""
    views, begin = [], 0
    for tensor in tensors:
        part = memory[begin : begin + tensor.nbytes].view(tensor.dtype)
        views.append(part.as_strided(tensor.shape, tensor.stride()))
        begin += num_bytes([tensor])
    return views


def open_node_average(rank: Rank, network: nn.Module, timer: PhaseTimer, timeout: float) -> NodeAverage | None:
    """Collective: every rank must call. None where it cannot be: then the process group has to do it.

    That is where the ranks are not CPU ranks of one node, or the node has no room in its shared memory, or the
    parameters are of several types. `timeout` is in seconds, for each meeting.
    """
    if rank.device.type != "cpu" or rank.world_size != rank.local_world_size or rank.world_size == 1:
        return None
    parameters = trained_parameters(network)
    if len({parameter.dtype for parameter in parameters}) != 1:
        return None
    size = (rank.world_size + 1) * num_bytes(parameters) + num_bytes(network.buffers())
    with socket.socket(socket.AF_UNIX) as listener:
        return _open(listener, rank, network, timer, size, timeout)


def _open(
    listener: socket.socket, rank: Rank, network: nn.Module, timer: PhaseTimer, size: int, timeout: float
) -> NodeAverage | None:
    folder = rank.from_main(lambda: _offer(listener, size))
    if folder is None:
        return None
    try:
        shared = _map(folder / "memory", size)
        if rank.any(shared is None):  # on one node, but in containers of their own
            return None
        assert shared is not None
        peers = _accept_all(listener, rank, timeout) if rank.is_main else _connect(folder / "meet", timeout, rank)
        rank.any(False)  # all have opened it: nothing needs a name any more
    finally:
        if rank.is_main:
            shutil.rmtree(folder)
    return NodeAverage(rank, network, timer, shared, peers)


def _map(memory: Path, size: int) -> Tensor | None:
    try:
        return torch.from_file(str(memory), shared=True, size=size, dtype=torch.uint8)
    except RuntimeError:
        return None


def _offer(listener: socket.socket, num_bytes: int) -> Path | None:
    """A folder with the shared memory and the socket at which to meet, for this user only; None without room."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="convoy-", dir=SHARED_MEMORY))
    except OSError:
        return None
    try:
        with (folder / "memory").open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # found missing later, the room would be a SIGBUS
        listener.bind(str(folder / "meet"))
        listener.listen(1024)
    except OSError:
        shutil.rmtree(folder)
        return None
    return folder


def _accept_all(listener: socket.socket, rank: Rank, timeout: float) -> dict[int, socket.socket]:
    listener.settimeout(timeout)
    peers: dict[int, socket.socket] = {}
    while len(peers) < rank.world_size - 1:
        try:
            peer, _ = listener.accept()
            peer.settimeout(timeout)
            peers[int.from_bytes(peer.recv(4), "little")] = peer
        except TimeoutError as error:
            missing = sorted(set(range(1, rank.world_size)) - peers.keys())
            raise RuntimeError(f"exchange of gradients: waited {timeout:g} s in vain for rank(s) {missing}") from error
    return dict(sorted(peers.items()))


def _connect(address: Path, timeout: float, rank: Rank) -> dict[int, socket.socket]:
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(timeout)
    peer.connect(str(address))
    peer.sendall(rank.rank.to_bytes(4, "little"))
    return {0: peer}
