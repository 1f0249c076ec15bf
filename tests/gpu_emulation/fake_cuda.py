"""Tensors on a GPU that is not there: they have shapes and devices but no values, so that to read a value raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.base.timing import PhaseTimer
from pipeline.config import Config
from pipeline.data.augment import Augment
from pipeline.data.inputs import Prepare
from pipeline.data.loaders import Gather
from pipeline.data.order import Batch
from pipeline.learning.losses import LOSSES
from pipeline.learning.optim import Schedule, build_optimizer
from pipeline.learning.update import Precision, Update
from pipeline.models.catalog import ModelSpec
from pipeline.models.normalize import Normalize
from pipeline.parallel.rank import Rank
from pipeline.parallel.replicas import Replicas
from train.steps.parts import StepParts

GPU = torch.device("cuda", 0)
NUM_SAMPLES = 64
FUSED_KERNELS = ("_fused_sgd", "_fused_adam")


class HostWaits(Exception):
    """The host would wait here until the device has computed all that was queued."""


class OnTheDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses copies to the host, which fake tensors allow, and takes an optimizer's fused kernel, of which torch has
    no fake, for what it is: it changes its arguments on the device, and returns nothing."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(FUSED_KERNELS):
            return None
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if source.device.type == "cuda" and result.device.type == "cpu":
                raise HostWaits(str(func))
        return result


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Have all tensors that are made inside be on a fake GPU. Gradients are made up: no backward pass runs there."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Precision, "backward", make_up_gradients))
        stack.enter_context(mock.patch.object(torch.cuda, "default_generators", (mock.Mock(),)))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(OnTheDevice())  # type: ignore[no-untyped-call]
        stack.enter_context(GPU)
        yield


def make_up_gradients(precision: Precision, loss: Tensor) -> None:
    """Stand for the backward pass: give all that `loss` was computed from a gradient of its own shape."""
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        nodes += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            node.variable.grad = torch.empty_like(node.variable)


def build_parts(config: Config, *, captured: bool = False) -> StepParts:
    """Return the parts of a step on the fake GPU, with all stages, for a dataset of NUM_SAMPLES samples."""
    size = config.data.image_size or 28
    model = ModelSpec(config.model.name, config.model.arguments, channels=1, image_size=size, num_classes=10).build()
    precision, groups = Precision("fp32", GPU), [{"params": list(model.parameters())}]
    # an optimizer looks at its learning rate when it is made, which is before the first step
    with mock.patch.multiple(Tensor, __lt__=_never, __ge__=_always):
        optimizer = build_optimizer(config.optim, groups, capture_on=GPU if captured else None)
    pixels = torch.zeros(NUM_SAMPLES, 1, size, size, dtype=torch.uint8)
    prepare = Prepare(
        Gather(pixels, torch.zeros(NUM_SAMPLES, dtype=torch.int64)),
        Augment(seed=0, crop=2, flip=True),
        Normalize((0.5,), (0.5,), precision.weights_dtype),
    )
    return StepParts(
        replicas=Replicas(model),
        prepare=prepare,
        loss=LOSSES[config.loss],
        update=Update(optimizer, Schedule(config.optim, 10, 10), precision, config.train.clip_norm),
        precision=precision,
        rank=Rank(0, 0, 1, 1, GPU, "none", 1),
        timer=PhaseTimer(),
        seed=0,
    )


def make_batch(size: int) -> Batch:
    return Batch(0, size, (torch.zeros(size, dtype=torch.int64),))


def _never(*_: object) -> bool:
    return False


def _always(*_: object) -> bool:
    return True
