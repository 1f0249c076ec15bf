"""One model on all ranks, whose gradients are summed: by nobody, in memory that the ranks of a node share, in the order
of virtual ranks, or by DistributedDataParallel over gloo or NCCL. Which of them is chosen by rule."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.cuda import Stream
from torch.nn.parallel import DistributedDataParallel

from pipeline.base.timing import PhaseTimer
from pipeline.config.schema import TrainConfig
from pipeline.parallel.node_memory import NodeMemory, lay_out, num_bytes, open_node_memory
from pipeline.parallel.rank import Rank, share
from pipeline.parallel.start import WATCHDOG_FIRST


class Replicas:
    """A model with the same weights on every rank. The gradients of a step become their SUM over the ranks.

    A step divides by the global count, and by nothing else. This class is a model that is alone.
    """

    waits_in_backward = False
    """Whether a rank waits for the others within `backward()`."""

    def __init__(self, model: nn.Module, description: str = "of one rank", capture_stream: Stream | None = None):
        """`model` is what a batch goes through; `description` says how gradients are summed, for the record.

        `capture_stream`: where a step is to be captured in a CUDA graph, if it is.
        """
        self.model = model
        self.description = description
        self.capture_stream = capture_stream

    def accumulate(self) -> AbstractContextManager[Any]:
        """Return the context for all but the last micro-batch of a step: their gradients are only added up."""
        return nullcontext()

    def reduce(self) -> None:
        """Collective. Sum the gradients over the ranks, behind the last `backward()` of a step."""


class NodeSum(Replicas):
    """Sums the gradients of the CPU ranks of one node, each of which reads what the others wrote.

    A fraction of what gloo takes over the loopback, which copies through the kernel and has threads of its own that
    compete with the computing for the cores. Every rank writes its gradients into a slot, sums one stripe of all slots
    in the order of the ranks, and reads the stripes of the others; between these they meet at a socket. Buffers (batch
    statistics) become those of rank 0, as under DistributedDataParallel.
    """

    def __init__(self, rank: Rank, model: nn.Module, timer: PhaseTimer, node: NodeMemory):
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


class OrderedReplicas(Replicas):
    """Sums the gradients of virtual ranks in their order, whichever rank computed which: the last bits depend on it.

    Every rank puts the gradient of each of its virtual ranks into a slot. Between CPU ranks of one node the slots are
    in memory that they share, and each rank sums a stripe of them; else each rank gathers those of all others, over
    gloo or NCCL. The parameters are of one type.
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


class DDPReplicas(Replicas):
    """A model in DistributedDataParallel, with a hook that sums where DDP itself would take the mean."""

    waits_in_backward = True

    def __init__(
        self,
        model: nn.Module,
        rank: Rank,
        timer: PhaseTimer,
        images: Tensor,
        accumulate: int,
        compress: bool,
        capture_stream: Stream | None,
    ):
        """Collective.

        DDP puts all gradients into one bucket for its first step, and regroups them by the order in which they became
        ready for all others. From three ranks on, the place in a bucket decides the order of summation, and so the last
        bits: a resumed training would differ in its first step. Two passes for nothing, on `images`, get that over.

        To be captured on a stream, all of DDP has to be made there.
        """
        with on_stream(capture_stream):
            wrapped = DistributedDataParallel(
                model,
                device_ids=[rank.device] if rank.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                static_graph=accumulate == 1,  # with no_sync it dies in an assertion
            )
            _register_hook(wrapped, timer, compress=compress, timed=capture_stream is None)
            wrapped.eval()  # batch statistics stay as they are
            for _ in range(2):  # the regrouping is done when the second begins
                wrapped(images).sum().backward()
                wrapped.zero_grad(set_to_none=True)
            wrapped.train()  # type: ignore[no-untyped-call]
        super().__init__(wrapped, f"{rank.backend}, as bfloat16" if compress else rank.backend, capture_stream)
        self._wrapped = wrapped

    def accumulate(self) -> AbstractContextManager[Any]:
        """Return DDP's no_sync, which has to cover the forward pass too: DDP decides there whether to reduce."""
        return self._wrapped.no_sync()


def _register_hook(model: DistributedDataParallel, timer: PhaseTimer, *, compress: bool, timed: bool) -> None:
    """Have DDP sum each bucket, sent as bfloat16 if `compress`; with a lap of `timer` at the last one if `timed`."""

    def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        if bucket.is_last() and timed:
            timer.lap("backward")
        gradients = bucket.buffer()
        sent = gradients.bfloat16() if compress else gradients
        reduced = dist.all_reduce(sent, async_op=True).get_future()
        return reduced.then(lambda done: gradients.copy_(done.value()[0]) if compress else done.value()[0])

    model.register_comm_hook(None, hook)


def build_replicas(
    config: TrainConfig,
    model: nn.Module,
    rank: Rank,
    timer: PhaseTimer,
    images: Tensor,
    *,
    compress: bool = False,
    capture: bool = False,
) -> Replicas:
    """Collective. Give all ranks the weights of rank 0, and choose by rule how their gradients are summed.

    CPU ranks of one node use memory that they share, unless a backend is set; all others DistributedDataParallel, which
    hides the communication behind the backward pass. `images` is a batch to try DDP with, `compress` sends gradients as
    bfloat16 (NCCL only), with `capture` a step can be captured. `timer` gets a lap at the end of the backward pass's
    own work: what comes behind is communication that nothing hides.
    """
    timeout = config.hang_timeout + WATCHDOG_FIRST
    rank.broadcast_tensors([*model.parameters(), *model.buffers()])
    if config.reproducible:
        return OrderedReplicas(model, rank, config.virtual_ranks, timeout)
    node = open_node_sum(rank, model, timer, timeout) if config.backend == "auto" else None
    if node is not None:
        return node
    stream = new_stream(rank.device) if capture else None
    if rank.world_size > 1:
        return DDPReplicas(model, rank, timer, images, config.accumulate, compress, stream)
    return Replicas(model, capture_stream=stream)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def new_stream(device: torch.device) -> Stream:
    return Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """Queue the work inside on `stream`, behind what was queued before and before what comes after; None: as it is."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
