"""Memory that the CPU ranks of one node share, and a socket at which they meet."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.parallel.rank import Rank

SHARED_MEMORY = Path("/dev/shm")
ALIGNMENT = 64
"""In bytes: what belongs to a rank begins in a cache line of its own."""


class NodeMemory:
    """`memory`, uint8, the same for all ranks of the node."""

    def __init__(self, rank: Rank, memory: Tensor, peers: dict[int, socket.socket]):
        """`peers`: of rank 0 all others, else rank 0."""
        self.memory = memory
        self._rank = rank
        self._peers = peers
        # a forked DataLoader worker would hold the connection of a rank that is dead
        os.register_at_fork(after_in_child=self.close)

    def meet(self) -> None:
        """Collective: every rank must call. No rank goes on before all are here, and sees what they wrote before.

        Raises RuntimeError if a rank is gone. Then this rank is not to be waited for either, so that all others learn
        of it at once.
        """
        try:
            for other in self._peers:  # rank 0 hears all others, they tell it
                self._hear(other) if self._rank.is_main else self._tell(other)
            for other in self._peers:
                self._tell(other) if self._rank.is_main else self._hear(other)
        except RuntimeError:
            self.close()
            raise

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()

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


def open_node_memory(rank: Rank, size: int, timeout: float) -> NodeMemory | None:
    """Collective: every rank must call. None where it cannot be: then the process group has to do it.

    That is where the ranks are not CPU ranks of one node, or the node has no room for `size` bytes in its shared
    memory. `timeout` is in seconds, for each meeting.
    """
    if rank.device.type != "cpu" or rank.world_size != rank.local_world_size or rank.world_size == 1:
        return None
    with socket.socket(socket.AF_UNIX) as listener:
        return _open(listener, rank, size, timeout)


def _open(listener: socket.socket, rank: Rank, size: int, timeout: float) -> NodeMemory | None:
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
    return NodeMemory(rank, shared, peers)


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
