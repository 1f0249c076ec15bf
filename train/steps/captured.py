"""A step of fixed shapes, from gathering the images to updating the weights, captured in a CUDA graph.

Small models are bound by the launches: some fifty kernels a step, each of which takes longer to launch than to run.
Replaying a graph launches them all at once.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.data.order import Batch
from pipeline.models.catalog import has_batch_statistics
from pipeline.parallel.replicas import on_stream
from train.steps.eager import EagerStep
from train.steps.parts import Step, StepParts

NUM_WARM_UP = 11
"""DDP settles its buckets and its statistics in its first eager iterations; torch's notes on CUDA graphs ask for 11."""


def capture(compute: Callable[[], Tensor], stream: torch.cuda.Stream) -> tuple[Callable[[], None], Tensor]:
    """Capture what `compute` does, on `stream`; return what replays it, and the tensor that holds each result."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: threads of the process group and of the loaders may go on using the device meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = compute()
    return graph.replay, result


class CapturedStep(Step):
    """Computes what EagerStep computes, for batches of one micro-batch that are indices into a resident dataset.

    A shorter batch is padded with samples of weight zero, whose gradient is zero: exact, unless the model has batch
    statistics. Then an EagerStep computes it. On CPU nothing is captured, which serves to test the arithmetic.
    """

    def __init__(self, parts: StepParts, batch_size: int):
        """`batch_size`: the most samples of this rank in a step."""
        device = parts.rank.device
        super().__init__(parts)
        self._stream = parts.replicas.capture_stream
        self._indices = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._scale = torch.zeros((), dtype=parts.precision.weights_dtype, device=device)
        self._filled: tuple[int, int] | None = None
        self._replay: Callable[[], None] | None = None
        self._sums = parts.zero_sums()
        self._short = EagerStep(parts) if has_batch_statistics(parts.replicas.model) else None

    def prepare(self) -> None:
        """Collective. Capture the step; weights and optimizer are left as they are."""
        if self._stream is None or self._replay is not None:
            return
        before = {tensor: tensor.detach().clone() for tensor in self._changed()}
        self.parts.update.scale_lr(0.0)
        with on_stream(self._stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True.*")  # soon it will be captured
            for _ in range(NUM_WARM_UP):
                self._compute()
        with torch.no_grad():
            for tensor in self._changed():  # in place: the graph will use these very tensors
                # what the warm-up made is zeroed, as all optimizers begin; what was there, they update in place
                tensor.copy_(before[tensor]) if tensor in before else tensor.zero_()
        self._replay, self._sums = capture(self._compute, self._stream)

    def __call__(self, batch: Batch, step: int) -> Tensor:
        parts = self.parts
        (indices,) = batch.micro_batches
        if self._short is not None and len(indices) < len(self._indices):
            return self._short(batch, step)
        self._fill(indices, batch.global_count)
        parts.update.set_step(step)
        parts.seed_step(step)
        if self._replay is None:
            self._sums = self._compute()
        else:
            self._replay()
        parts.timer.lap("graph")
        return self._sums

    def _fill(self, indices: Tensor, global_count: int) -> None:
        count = len(indices)
        self._indices[:count].copy_(indices)
        if self._filled != (count, global_count):  # else they are as the last step left them
            self._filled = (count, global_count)
            self._indices[count:].zero_()
            self._count.fill_(count)
            self._scale.fill_(1 / global_count)

    def _compute(self) -> Tensor:
        """Compute one step on what is in the buffers."""
        parts = self.parts
        loss, sums = parts.forward(parts.prepare(self._indices, self._count))
        parts.precision.backward(loss * self._scale)
        parts.replicas.reduce()
        parts.update()
        return sums.double()

    def _changed(self) -> list[Tensor]:
        """Return all that a step changes: weights, buffers, counts, and what the optimizer knows of each weight."""
        update = self.parts.update
        known = [value for state in update.optimizer.state.values() for value in state.values()]
        weights = [*update.parameters, *self.parts.replicas.model.buffers(), update.skipped]
        return [*weights, *(value for value in known if isinstance(value, Tensor))]
