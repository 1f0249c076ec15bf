"""The host never waits for the device within a step: shown on fake tensors, from which no value can be read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from tests.gpu_emulation.fake_cuda import HostWaits, build_parts, fake_gpu, make_batch
from tests.train.helpers import config_of
from train.steps.captured import CapturedStep
from train.steps.eager import EagerStep

SETTINGS = ("train.clip_norm=1.0", "optim.lr=0.1", "data.global_batch_size=32")
EAGER_WAITS = pytest.mark.xfail(
    raises=DataDependentOutputException,
    strict=True,
    reason="an optimizer that is neither fused nor capturable cannot skip a step on the device: the host looks whether "
    "the gradients are finite",
)


@pytest.mark.parametrize(
    "optimizer",
    ["sgd", "adam", "adamw", pytest.param("rmsprop", marks=EAGER_WAITS), pytest.param("adadelta", marks=EAGER_WAITS)],
)
def test_the_host_does_not_wait_in_an_eager_step(optimizer: str) -> None:
    with fake_gpu():
        parts = build_parts(config_of(*SETTINGS, f"optim.name={optimizer}"))
        step, sums = EagerStep(parts), parts.zero_sums()
        for number in range(2):
            sums += step(make_batch(32), number)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop", "adadelta"])
def test_the_host_does_not_wait_in_a_step_that_is_captured(optimizer: str) -> None:
    with fake_gpu():
        parts = build_parts(config_of(*SETTINGS, f"optim.name={optimizer}"), captured=True)
        step, sums = CapturedStep(parts, batch_size=32), parts.zero_sums()
        for number, size in enumerate((32, 32, 7)):
            sums += step(make_batch(size), number)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_the_host_does_not_wait_for_any_loss(loss: str) -> None:
    with fake_gpu():
        other = ("model.name=lenet_5x5", "data.image_size=32", f"loss={loss}", "optim.name=sgd")
        EagerStep(build_parts(config_of(*SETTINGS, *other)))(make_batch(32), 0)


@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (Tensor.item, DataDependentOutputException),
        (bool, DataDependentOutputException),
        (Tensor.nonzero, DynamicOutputShapeException),
        (Tensor.cpu, HostWaits),
    ],
)
def test_a_wait_is_noticed(wait: Callable[[Tensor], object], error: type[Exception]) -> None:
    with fake_gpu(), pytest.raises(error):
        wait(torch.ones(1))
