"""The time of an epoch on one GPU by what has to be moved and what has to be computed, with nothing in between.

Both are counted from the network, and divided by the rates at which the device copies and multiplies large matrices.
All that is moved is taken to go through the memory; kernels that hand on results in the caches could be faster still.

python -m benchmarks.programs.hardware_floor --images=60000 --batch=64 --device=cuda --precision=bf16
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from benchmarks.harness import print_result
from benchmarks.programs.same_training import Training, parse_training

BYTES = {"fp32": 4, "bf16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHT_BYTES = 4
"""Weights, gradients and optimizer states are float32 in both precisions."""
OPTIMIZER_STATES = {"adadelta": 2, "sgd": 1}
"""Tensors that the optimizer keeps for each weight (sgd: with momentum)."""
COPY_BYTES = 2**30
MATRIX_SIZE = 8192


@dataclass(frozen=True)
class Kernel:
    """A convolution or linear layer with the elementwise layers and pools behind it, ideally fused into it."""

    name: str
    is_first: bool
    num_inputs: int
    """Elements read, per image."""
    num_outputs: int
    """Elements written behind the last fused layer, per image."""
    flops: int
    """Of the forward pass of one image; a multiplication and an addition are two."""


@dataclass(frozen=True)
class Terms:
    """Of one epoch on one device."""

    activation_bytes: float
    """Each kernel reads its inputs and writes its outputs; backwards it reads its inputs and the gradient of its
    outputs and writes that of its inputs, which the first has none of. Images are bytes."""
    choice_bytes: float
    """What pools, ReLUs and dropout chose: a byte per output of a kernel, written forwards and read backwards."""
    weight_bytes: float
    """Per step: read forwards, read backwards, gradient written and read, weight read and written."""
    optimizer_bytes: float
    """Per step: each state read and written."""
    flops: float
    """Forwards once, backwards twice, but for the gradient of the images, which nobody needs."""


def list_kernels(network: nn.Sequential, image: torch.Tensor) -> list[Kernel]:
    """Return the kernels of a network for `image` [1, C, H, W].

    Raises ValueError for a network that does not begin with a weighted layer.
    """
    kernels: list[Kernel] = []
    values = image
    for name, layer in network.named_children():
        inputs, values = values, layer(values)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            per_output = layer.weight[0].numel()
            flops = 2 * per_output * values.numel()
            kernels.append(Kernel(name, not kernels, inputs.numel(), values.numel(), flops))
        elif not kernels:
            raise ValueError(f"{name}: the first layer has no weights to be fused with")
        else:
            last = kernels[-1]
            kernels[-1] = Kernel(last.name, last.is_first, last.num_inputs, values.numel(), last.flops)
    return kernels


def count_terms(kernels: list[Kernel], num_weights: int, training: Training) -> Terms:
    images, steps = training.images, math.ceil(training.images / training.batch)
    width = BYTES[training.precision]
    states = OPTIMIZER_STATES[training.optimizer]
    return Terms(
        activation_bytes=images * sum(_activation_bytes(kernel, width) for kernel in kernels),
        choice_bytes=images * sum(2 * kernel.num_outputs for kernel in kernels),
        weight_bytes=steps * num_weights * WEIGHT_BYTES * 6,
        optimizer_bytes=steps * num_weights * WEIGHT_BYTES * 2 * states,
        flops=images * sum(kernel.flops * (2 if kernel.is_first else 3) for kernel in kernels),
    )


def _activation_bytes(kernel: Kernel, width: int) -> int:
    outputs = 2 * kernel.num_outputs * width  # written, and their gradient read
    if kernel.is_first:
        return 2 * kernel.num_inputs + outputs  # bytes, read twice
    return 3 * kernel.num_inputs * width + outputs  # read twice, and their gradient written


@dataclass(frozen=True)
class Floor:
    """Seconds of one epoch."""

    memory_seconds: float
    arithmetic_seconds: float

    @property
    def seconds(self) -> float:
        """Return the longer of the two, which can overlap."""
        return max(self.memory_seconds, self.arithmetic_seconds)


def find_floor(terms: Terms, bytes_per_second: float, flops_per_second: float) -> Floor:
    moved = terms.activation_bytes + terms.choice_bytes + terms.weight_bytes + terms.optimizer_bytes
    return Floor(moved / bytes_per_second, terms.flops / flops_per_second)


def best_seconds(action: Callable[[], object], repeats: int = 20) -> float:
    """Return the seconds of the shortest of `repeats`, after two for nothing, by the device's own clock."""
    times: list[float] = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        action()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times[2:])


def measure_copy(device: torch.device) -> float:
    """Return bytes per second, those read and those written counted both."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / best_seconds(lambda: target.copy_(source))


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOPs per second."""
    left, right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device, dtype=dtype) for _ in range(2))
    return 2 * MATRIX_SIZE**3 / best_seconds(lambda: left @ right)


def main() -> None:
    training, _ = parse_training("the time of an epoch by memory traffic and by arithmetic")
    device, network = torch.device("cuda"), training.build_network()
    assert isinstance(network, nn.Sequential)
    with torch.inference_mode():
        kernels = list_kernels(network, torch.zeros(1, 1, 28, 28))
    num_weights = sum(parameter.numel() for parameter in network.parameters())
    terms = count_terms(kernels, num_weights, training)
    copy_rate = measure_copy(device)
    matmul_rates = {name: measure_matmul(device, dtype) for name, dtype in DTYPES.items()}
    floor = find_floor(terms, copy_rate, matmul_rates[training.precision])
    print_result(
        {
            "images_per_second": training.images / floor.seconds,
            "epoch_seconds": [floor.seconds],
            "memory_seconds": floor.memory_seconds,
            "arithmetic_seconds": floor.arithmetic_seconds,
            "copy_bytes_per_second": copy_rate,
            "matmul_flops_per_second": matmul_rates,
            "terms": asdict(terms),
        }
    )


if __name__ == "__main__":
    main()
