"""A step of fixed shapes, from gathering the images to updating the weights, captured in a CUDA graph.

Small networks are bound by the launches: some fifty kernels a step, each of which takes longer to launch than to run.
Replaying a graph launches them all at once.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from pipeline.base.seeding import stream_seed
from pipeline.data.inputs import Batch
from pipeline.learning.optim import set_lr
from pipeline.parallel.ddp import joined
from train.steps.eager import EagerStep, StepParts, count_hits, seed_device

NUM_WARM_UP = 11
"""DDP settles its buckets and its statistics in its first eager iterations; torch's notes on CUDA graphs ask for 11."""


class StaticStep:
    """Does what EagerStep does, for batches of one micro-batch that are indices into a resident dataset.

    A shorter batch is padded with samples of weight zero, whose gradient is zero: exact, unless the network has batch
    statistics. Then it is done by an EagerStep. On CPU nothing is captured, which serves to test the arithmetic.
    """

    def __init__(self, parts: StepParts, batch_size: int, stream: torch.cuda.Stream | None = None):
        """`batch_size`: the most samples of this rank in a step. `stream`: where DDP was made, to capture on."""
        device, dtype = parts.rank.device, parts.precision.weights_dtype
        self._parts = parts
        self._parameters = parts.parameters
        self._stream = stream
        self._indices = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._weights = torch.zeros(batch_size, dtype=dtype, device=device)
        self._scale = torch.zeros((), dtype=dtype, device=device)
        self._counts: tuple[int, int] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._short = EagerStep(parts) if has_batch_statistics(parts.replicas.model) else None

    def prepare(self) -> None:
        """Collective: every rank must call. Capture the step; weights and optimizer are left as they are."""
        if self._stream is None or self._graph is not None:
            return
        before = self._snapshot()
        set_lr(self._parts.optimizer, 0.0)
        with joined(self._stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True.*")  # soon it will be captured
            for _ in range(NUM_WARM_UP):
                self._compute()
        self._restore(before)
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads of the process group and of the loaders may go on using the device meanwhile
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._sums = self._compute()
        self._graph = graph

    def __call__(self, batch: Batch, *, lr: float, global_step: int) -> Tensor:
        parts = self._parts
        (indices,) = batch.micro_batches
        if self._short is not None and len(indices) < len(self._indices):
            return self._short(batch, lr=lr, global_step=global_step)
        self._fill(indices, batch.global_count)
        set_lr(parts.optimizer, lr)
        seed_device(parts.rank.device, stream_seed(parts.seed, "step", global_step, parts.rank.rank))
        if self._graph is None:
            self._sums = self._compute()
        else:
            self._graph.replay()
        parts.timer.lap("graph")
        return self._sums

    def _fill(self, indices: Tensor, global_count: int) -> None:
        count = len(indices)
        self._indices[:count].copy_(indices)
        if self._counts != (count, global_count):  # else they are as the last step left them
            self._counts = (count, global_count)
            self._indices[count:].zero_()
            self._weights.zero_()
            self._weights[:count].fill_(1.0)
            self._scale.fill_(self._parts.rank.world_size / global_count)

    def _compute(self) -> Tensor:
        """One step on what is in the buffers."""
        parts = self._parts
        images, labels = parts.inputs(self._indices)
        with parts.precision.autocast():
            output = parts.replicas.model(images)
            losses = parts.loss.each(output, labels)
        total = (losses * self._weights).sum()
        parts.precision.backward(total * (self._scale / parts.loss.per_sample(output.shape[1])))
        parts.replicas.average()
        parts.precision.update(parts.optimizer, self._parameters, parts.clip_norm)
        return torch.stack((total.detach(), (count_hits(output, labels) * self._weights).sum())).double()

    def _snapshot(self) -> dict[tuple[Tensor, str], Tensor]:
        """All that a step changes: weights, buffers, and what the optimizer knows of each weight."""
        state: dict[tuple[Tensor, str], Tensor] = {(t, "value"): t.detach().clone() for t in self._changed()}
        for parameter, values in self._parts.optimizer.state.items():
            state |= {(parameter, key): v.clone() for key, v in values.items() if isinstance(v, Tensor)}
        return state

    def _changed(self) -> list[Tensor]:
        return [*self._parameters, *self._parts.replicas.model.buffers(), self._parts.precision.skipped]

    @torch.no_grad()
    def _restore(self, before: dict[tuple[Tensor, str], Tensor]) -> None:
        """In place: the graph will use these very tensors. What the warm-up made is zeroed, as all optimizers begin."""
        for tensor in self._changed():
            tensor.copy_(before[tensor, "value"])
        for parameter in self._parameters:
            for key, value in self._parts.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    known = before.get((parameter, key))
                    value.zero_() if known is None else value.copy_(known)


def has_batch_statistics(network: nn.Module) -> bool:
    """Whether padding a batch would change what the network computes for the other samples."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())
