"""How gradients meet: through shared memory among CPU ranks of one node, else by the process group."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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
ALIGNMENT = 64
"""In bytes: what belongs to a rank begins in a cache line of its own."""


@dataclass(frozen=True)
class Replicas:
    """A network that has the same weights on every rank, and is trained by the mean of their gradients."""

    model: nn.Module
    """What a batch goes through."""
    average: Callable[[], None] = lambda: None
    """Collective: every rank must call, behind the last `backward()` of a step. Then the gradients are the means."""
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Around forward and backward of those before, whose gradients are only added up."""
    gradients: str = "of one rank"
    """How they are averaged, for the record."""


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


def replicate(
    network: nn.Module,
    rank: Rank,
    timer: PhaseTimer,
    images: Tensor,
    *,
    timeout: float,
    accumulate: int = 1,
    compress: bool = False,
    capture_stream: torch.cuda.Stream | None = None,
) -> Replicas:
    """Collective: every rank must call. Give all ranks the weights of rank 0, and choose by rule how gradients meet.

    Between CPU ranks of one node, through memory that they share; else by DistributedDataParallel, which hides the
    communication behind the backward pass. `images` is a batch to try DDP with, `compress` sends gradients as bfloat16
    (NCCL only). With `capture_stream` a step can be captured there in a CUDA graph. `timer` gets a lap at the end of
    the backward pass's own work: what comes behind is communication that nothing hides.
    """
    if rank.backend == "none":
        return Replicas(network)
    node = open_node_average(rank, network, timer, timeout)
    if node is not None:
        network.load_state_dict(rank.from_main(network.state_dict))
        return Replicas(network, node.average, gradients="shared memory")
    model, gradients = _wrap(network, rank, timer, images, accumulate, compress, capture_stream)
    return Replicas(model, no_sync=model.no_sync, gradients=gradients)


def _wrap(
    network: nn.Module,
    rank: Rank,
    timer: PhaseTimer,
    images: Tensor,
    accumulate: int,
    compress: bool,
    capture_stream: torch.cuda.Stream | None,
) -> tuple[DistributedDataParallel, str]:
    """DDP puts all gradients into one bucket for its first step, and regroups them by the order in which they became
    ready for all others. From three ranks on, the place in a bucket decides the order of summation, and so the last
    bits: a resumed training would differ in its first step. Two passes for nothing, on `images`, get that over.

    To be captured on a stream, all of DDP has to be made there.
    """
    with joined(capture_stream):
        model = DistributedDataParallel(
            network,
            device_ids=[rank.device] if rank.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            static_graph=accumulate == 1,  # with no_sync it dies in an assertion
        )
        gradients = _choose_hook(model, rank, timer, compress=compress, timed=capture_stream is None)
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


def _choose_hook(model: DistributedDataParallel, rank: Rank, timer: PhaseTimer, *, compress: bool, timed: bool) -> str:
    """How DDP averages gradients, by its name; with a lap of `timer` at the last bucket if `timed`."""
    average = _average_as_bfloat16 if compress else _average_by_process_group

    # without annotations: DDP compares them with classes, which postponed ones are not
    def hook(state, bucket):  # type: ignore[no-untyped-def]
        if bucket.is_last() and timed:
            timer.lap("backward")
        return average(state, bucket)

    if timed or compress:  # without a hook DDP does the other by itself
        model.register_comm_hook(None, hook)
    return f"{rank.backend}, as bfloat16" if compress else rank.backend


def _average_by_process_group(_: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    mine = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(mine, async_op=True).get_future().then(lambda future: future.value()[0])


def _average_as_bfloat16(_: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    # Imported here because it brings all of torch's hooks, which other runs need not wait for.
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    group = dist.group.WORLD
    assert group is not None
    return bf16_compress_hook(group, bucket)
