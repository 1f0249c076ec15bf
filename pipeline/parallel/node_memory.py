"""Memory that the CPU ranks of one node share, with a socket at which they meet; and gradients summed there."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.base.timing import PhaseTimer
from pipeline.parallel.rank import Rank, share
from pipeline.parallel.replicas import Replicas

SHARED_MEMORY = Path("/dev/shm")
ALIGNMENT = 64
"""In bytes: what belongs to a rank begins in a cache line of its own."""


class NodeSum(Replicas):
    """Sums the gradients of the CPU ranks of one node, each of which reads what the others wrote.

    A fraction of what gloo takes over the loopback, which copies through the kernel and has threads of its own that
    compete with the computing for the cores. Every rank writes its gradients into a slot, sums one stripe of all slots
    in the order of the ranks, and reads the stripes of the others; between these they meet at a socket. Buffers (batch
    statistics) become those of rank 0, as under DistributedDataParallel.
    """

    def __init__(self, rank: Rank, model: nn.Module, timer: PhaseTimer, node: "NodeMemory"):
        """`node` is as large as `open_node_sum` has it. `timer` gets a lap for `backward` where the exchange begins."""
        super().__init__(model, "shared memory")
        self._rank = rank
        self._timer = timer
        self.node = node
        self._parameters = trained_parameters(model)
        self._buffers = list(model.buffers())
        num_slots, slot_bytes = rank.world_size + 1, num_bytes(self._parameters)
        slots = [node.memory[slot_bytes * i : slot_bytes * (i + 1)] for i in range(num_slots)]
        self._mine = lay_out(self._parameters, slots[rank.rank])
        self._sums = lay_out(self._parameters, slots[-1])
        self._sent_buffers = lay_out(self._buffers, node.memory[slot_bytes * num_slots :])
        flat = [slot.view(self._parameters[0].dtype) for slot in slots]
        stripe = share(len(flat[0]), rank.rank, rank.world_size)
        *self._stripes, self._sum_stripe = [slot[stripe] for slot in flat]

    @torch.no_grad()
    def reduce(self) -> None:
        """Collective. Sum `grad` of every parameter over the ranks. Raises RuntimeError if a rank is gone."""
        self._timer.lap("backward")
        gradients = self._gradients()
        torch._foreach_copy_(self._mine, gradients)
        if self._rank.is_main and self._buffers:
            torch._foreach_copy_(self._sent_buffers, self._buffers)
        self.node.meet()
        first, *others = self._stripes
        self._sum_stripe.copy_(first)
        for stripe in others:
            self._sum_stripe.add_(stripe)
        if not self._rank.is_main and self._buffers:
            torch._foreach_copy_(self._buffers, self._sent_buffers)
        self.node.meet()
        torch._foreach_copy_(gradients, self._sums)

    def _gradients(self) -> list[Tensor]:
        gradients = []
        for parameter in self._parameters:
            if parameter.grad is None:  # not used in this step
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        return gradients


def open_node_sum(rank: Rank, model: nn.Module, timer: PhaseTimer, timeout: float) -> NodeSum | None:
    """Collective. Return None where it cannot be used: see `open_node_memory`; or for parameters of several types."""
    parameters = trained_parameters(model)
    if len({parameter.dtype for parameter in parameters}) != 1:
        return None
    size = (rank.world_size + 1) * num_bytes(parameters) + num_bytes(model.buffers())
    node = open_node_memory(rank, size, timeout)
    return None if node is None else NodeSum(rank, model, timer, node)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the size of the memory that `lay_out` needs."""
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)


def lay_out(tensors: Iterable[Tensor], memory: Tensor) -> list[Tensor]:
    """Return parts of `memory` (uint8) with the shapes, strides and types of `tensors`, one behind the other."""
    views, begin = [], 0
    for tensor in tensors:
        part = memory[begin : begin + tensor.nbytes].view(tensor.dtype)
        views.append(part.as_strided(tensor.shape, tensor.stride()))
        begin += num_bytes([tensor])
    return views


class NodeMemory:
    """`memory`, uint8, the same for all ranks of the node."""

    def __init__(self, memory: Tensor, peers: dict[int, socket.socket]):
        """`peers` are all other ranks on rank 0, and rank 0 on the others."""
        self.memory = memory
        self._peers = peers
        # a forked DataLoader worker would hold the connection of a rank that is dead
        os.register_at_fork(after_in_child=self.close)

    def meet(self) -> None:
        """Collective. Wait until all ranks are here; then each sees what the others wrote before.

        Raises RuntimeError if a rank is gone, and closes the connections, so that all others learn of it at once.
        """
        try:  # rank 0 hears all others, then tells them
            for exchange in (_tell, _hear) if 0 in self._peers else (_hear, _tell):
                for other, peer in self._peers.items():
                    exchange(other, peer)
        except RuntimeError:
            self.close()
            raise

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()


def _tell(other: int, peer: socket.socket) -> None:
    try:
        peer.sendall(b".")
    except OSError as error:
        raise RuntimeError(f"exchange of gradients with rank {other}: connection closed by peer") from error


def _hear(other: int, peer: socket.socket) -> None:
    try:
        heard = peer.recv(1)
    except TimeoutError as error:
        seconds = peer.gettimeout()
        raise RuntimeError(f"exchange of gradients: timed out after {seconds:g} s waiting for rank {other}") from error
    except OSError:
        heard = b""
    if not heard:
        raise RuntimeError(f"exchange of gradients with rank {other}: connection closed by peer")


def open_node_memory(rank: Rank, size: int, timeout: float) -> NodeMemory | None:
    """Collective. Return memory of `size` bytes that all ranks share, or None where that cannot be.

    It cannot where the ranks are not CPU ranks of one node, or the node has no room in its shared memory. `timeout` is
    in seconds, for each meeting.
    """
    if rank.device.type != "cpu" or rank.world_size != rank.local_world_size or rank.world_size == 1:
        return None
    with socket.socket(socket.AF_UNIX) as listener:
        folder = rank.run_on_main(lambda: _offer(listener, size))
        if folder is None:
            return None
        try:
            shared = _map(folder / "memory", size)
            if rank.any(shared is None):  # on one node, but in containers of their own
                return None
            assert shared is not None
            peers = _accept_all(listener, rank, timeout) if rank.is_main else _connect(folder / "meet", timeout, rank)
            rank.barrier()  # all have opened it: nothing needs a name any more
        finally:
            if rank.is_main:
                shutil.rmtree(folder)
    return NodeMemory(shared, peers)


def _offer(listener: socket.socket, size: int) -> Path | None:
    """Return a folder with the shared memory and the socket at which to meet, for this user only; None without room."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="convoy-", dir=SHARED_MEMORY))
    except OSError:
        return None
    try:
        with (folder / "memory").open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # found missing later, the room would be a SIGBUS
        listener.bind(str(folder / "meet"))
        listener.listen(1024)
    except OSError:
        shutil.rmtree(folder)
        return None
    return folder


def _map(memory: Path, size: int) -> Tensor | None:
    try:
        return torch.from_file(str(memory), shared=True, size=size, dtype=torch.uint8)
    except RuntimeError:
        return None


def _accept_all(listener: socket.socket, rank: Rank, timeout: float) -> dict[int, socket.socket]:
    listener.settimeout(timeout)
    peers: dict[int, socket.socket] = {}
    try:
        while len(peers) < rank.world_size - 1:
            peer, _ = listener.accept()
            peer.settimeout(timeout)
            peers[int.from_bytes(peer.recv(4), "little")] = peer
    except TimeoutError as error:
        late = sorted(set(range(1, rank.world_size)) - peers.keys())
        raise RuntimeError(
            f"exchange of gradients: timed out after {timeout:g} s waiting for rank(s) {late}"
        ) from error
    return dict(sorted(peers.items()))


def _connect(address: Path, timeout: float, rank: Rank) -> dict[int, socket.socket]:
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(timeout)
    peer.connect(str(address))
    peer.sendall(rank.rank.to_bytes(4, "little"))
    return {0: peer}
