"""How gradients meet: through shared memory among CPU ranks of one node, else by the process group."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from pipeline.distributed import Rank
from pipeline.timing import PhaseTimer

SHARED_MEMORY = Path("/dev/shm")
SLOT_BYTES = 4 * 2**20
"""Largest part of the gradients that is exchanged at a time, which bounds the memory: (ranks + 1) times this."""

ONE_BUCKET = 2**20
"""In MiB: more than any network has."""

Hook = Callable[[Any, GradBucket], "torch.futures.Future[Tensor]"]


class NodeAverage:
    """Averages tensors over the CPU ranks of one node, each of which reads what the others wrote.

    A third of what gloo takes over the loopback, which copies through the kernel and has threads of its own that
    compete with the computing for the cores. Every rank writes its tensor into a slot, sums one stripe of all slots in
    the order of the ranks, and reads the stripes of the others; between these they meet at a socket.
    """

    def __init__(self, rank: Rank, memory: Tensor, peers: dict[int, socket.socket]):
        """`memory`: uint8 [ranks + 1, slot bytes], shared. `peers`: of rank 0 all others, of the others rank 0."""
        self._rank = rank
        self._memory = memory
        self._peers = peers
        # a forked DataLoader worker would hold the connection of a rank that is dead
        os.register_at_fork(after_in_child=self.close)

    def average(self, tensor: Tensor) -> None:
        """Collective: every rank must call. In place; `tensor` is contiguous. Raises RuntimeError if a rank is gone.

        Then this rank is not to be waited for either, so that all others learn of it at once.
        """
        try:
            self._average(tensor)
        except RuntimeError:
            self.close()
            raise

    def _average(self, tensor: Tensor) -> None:
        world_size, index = self._rank.world_size, self._rank.rank
        slots = self._memory.view(tensor.dtype)
        for part in torch.split(tensor.view(-1), slots.shape[1]):
            count = len(part)
            stripe = slice(count * index // world_size, count * (index + 1) // world_size)
            total = slots[world_size, stripe]
            slots[index, :count].copy_(part)
            self._meet()
            total.copy_(slots[0, stripe])
            for other in range(1, world_size):
                total.add_(slots[other, stripe])
            total.div_(world_size)
            self._meet()
            part.copy_(slots[world_size, :count])

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


def open_node_average(rank: Rank, num_bytes: int, timeout: float) -> NodeAverage | None:
    """Collective: every rank must call. None where the ranks are not CPU ranks of one node, or there is no room.

    `num_bytes` is the size of all gradients; `timeout` is in seconds, for each meeting.
    """
    if rank.device.type != "cpu" or rank.world_size != rank.local_world_size or rank.world_size == 1:
        return None
    slot_bytes = min(SLOT_BYTES, -(-num_bytes // 64) * 64)
    size = (rank.world_size + 1) * slot_bytes
    listener = socket.socket(socket.AF_UNIX)
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
        listener.close()
        if rank.is_main:
            shutil.rmtree(folder)
    return NodeAverage(rank, shared.view(-1, slot_bytes), peers)


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


def wrap(
    network: nn.Module,
    rank: Rank,
    timer: PhaseTimer,
    images: Tensor,
    *,
    timeout: float,
    accumulate: int = 1,
    compress: bool = False,
    capture_stream: torch.cuda.Stream | None = None,
) -> tuple[nn.Module, str]:
    """Collective: every rank must call. DistributedDataParallel where there is more than one rank, and how it averages.

    DDP puts all gradients into one bucket for its first step, and regroups them by the order in which they became
    ready for all others. From three ranks on, the place in a bucket decides the order of summation, and so the last
    bits: a resumed training would differ in its first step. Two passes for nothing, on `images`, get that over.

    With `capture_stream` a step can be captured there in a CUDA graph, for which all of DDP has to be made there.
    """
    if rank.backend == "none":
        return network, "of one rank"
    on_one_node = rank.world_size == rank.local_world_size
    with joined(capture_stream):
        model = DistributedDataParallel(
            network,
            device_ids=[rank.device] if rank.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            static_graph=accumulate == 1,  # with no_sync it dies in an assertion
            # between CPU ranks of a node there is nothing to hide: communication is work for the same cores
            bucket_cap_mb=ONE_BUCKET if rank.device.type == "cpu" and on_one_node else None,
        )
        timed = capture_stream is None
        gradients = average_gradients(model, rank, timer, timeout=timeout, compress=compress, timed=timed)
        model.eval()  # batch statistics stay as they are
        for _ in range(2):  # the regrouping is done when the second begins
            model(images).sum().backward()
            model.zero_grad(set_to_none=True)
        model.train()  # type: ignore[no-untyped-call]
    return model, gradients


def new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def joined(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work inside is queued on `stream`, behind what was queued before and before what comes after; None: as it is."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def average_gradients(
    model: DistributedDataParallel,
    rank: Rank,
    timer: PhaseTimer,
    *,
    timeout: float,
    compress: bool = False,
    timed: bool = True,
) -> str:
    """Collective: every rank must call. Choose how DDP averages gradients, by rule; its name, for the record.

    `compress` sends them as bfloat16 (NCCL only). `timer` gets a lap at the end of the backward pass's own work: what
    is left of `backward()` then is communication that nothing hides. Without `timed` it gets none.
    """
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    node = open_node_average(rank, num_bytes, timeout)
    if node is not None:
        name, average = "shared memory", _hook_of(node)
    elif compress:
        name, average = f"{rank.backend}, as bfloat16", _average_as_bfloat16
    else:
        name, average = rank.backend, _average_by_process_group

    # without annotations: DDP compares them with classes, which postponed ones are not
    def hook(state, bucket):  # type: ignore[no-untyped-def]
        if bucket.is_last() and timed:
            timer.lap("backward")
        return average(state, bucket)

    if timed or average is not _average_by_process_group:  # which is what DDP does without a hook
        model.register_comm_hook(None, hook)
    return name


def _average_by_process_group(_: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    mine = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(mine, async_op=True).get_future().then(lambda future: future.value()[0])


def _average_as_bfloat16(_: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    # Imported here because it brings all of torch's hooks, which other runs need not wait for.
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    group = dist.group.WORLD
    assert group is not None
    return bf16_compress_hook(group, bucket)


def _hook_of(node: NodeAverage) -> Hook:
    def average(_: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        node.average(bucket.buffer())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    return average
