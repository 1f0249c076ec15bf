"""Memory that the CPU ranks of one node share, with a socket at which they meet."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.parallel.rank import Rank

SHARED_MEMORY = Path("/dev/shm")
ALIGNMENT = 64
"""In bytes: what belongs to a rank begins in a cache line of its own."""


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
        is_main = 0 not in self._peers
        try:
            for receives in (is_main, not is_main):  # rank 0 receives from all others, then sends to them
                for other, peer in self._peers.items():
                    _exchange(other, peer, receives=receives)
        except RuntimeError:
            self.close()
            raise

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()


def _exchange(other: int, peer: socket.socket, *, receives: bool) -> None:
    """Send or receive one byte."""
    try:
        if not receives:
            peer.sendall(b".")
        elif not peer.recv(1):
            raise ConnectionError
    except TimeoutError as error:
        seconds = peer.gettimeout()
        raise RuntimeError(f"exchange of gradients: timed out after {seconds:g} s waiting for rank {other}") from error
    except OSError as error:
        raise RuntimeError(f"exchange of gradients with rank {other}: connection closed by peer") from error


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
