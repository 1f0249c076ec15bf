"""What an epoch has to move and to compute, counted by hand for a small network."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from benchmarks.programs.hardware_floor import Floor, Kernel, Terms, count_terms, find_floor, list_kernels
from benchmarks.programs.same_training import Training

NETWORK = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
"""On 6x6: 36 pixels -> conv 2x4x4 = 32 -> pool 2x2x2 = 8 -> 3. Weights: 18 + 2 + 24 + 3 = 47."""


def test_layers_without_weights_belong_to_the_kernel_before_them() -> None:
    assert list_kernels(NETWORK, torch.zeros(1, 1, 6, 6)) == [
        Kernel("0", True, num_inputs=36, num_outputs=8, flops=32 * 9 * 2),
        Kernel("4", False, num_inputs=8, num_outputs=3, flops=8 * 3 * 2),
    ]
    with pytest.raises(ValueError, match="no weights"):
        list_kernels(nn.Sequential(nn.ReLU()), torch.zeros(1, 1, 6, 6))


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_an_epoch_is_counted_term_by_term(precision: Literal["fp32", "bf16"], width: int) -> None:
    training = Training(images=10, batch=4, optimizer="sgd", precision=precision)
    terms = count_terms(list_kernels(NETWORK, torch.zeros(1, 1, 6, 6)), 47, training)
    # pixels read in both directions, the outputs written and their gradients read; then the same for the linear layer,
    # which writes the gradients of its inputs besides
    per_image = 36 * 2 + 8 * 2 * width + 8 * 3 * width + 3 * 2 * width
    assert terms == Terms(
        activation_bytes=10 * per_image,
        choice_bytes=10 * 2 * (8 + 3),
        weight_bytes=3 * 47 * 4 * 6,  # 3 steps: 4 + 4 + 2 images
        optimizer_bytes=3 * 47 * 4 * 2,
        flops=10 * (2 * 576 + 3 * 48),
    )


def test_the_convnet_computes_what_is_known_of_it() -> None:
    training = Training(images=1)
    network = training.build_network()
    assert isinstance(network, nn.Sequential)
    kernels = list_kernels(network.eval(), torch.zeros(1, 1, 28, 28))
    assert sum(kernel.flops for kernel in kernels) == 2 * (26**2 * 16 * 9 + 24**2 * 32 * 16 * 9 + 4608 * 64 + 64 * 10)
    assert count_terms(kernels, 0, training).flops == 18_087_936


def test_the_longer_of_moving_and_computing_is_the_floor() -> None:
    terms = Terms(activation_bytes=1, choice_bytes=2, weight_bytes=3, optimizer_bytes=4, flops=100)
    assert find_floor(terms, bytes_per_second=5, flops_per_second=20) == Floor(2.0, 5.0)
    assert find_floor(terms, bytes_per_second=5, flops_per_second=20).seconds == 5.0
    assert find_floor(terms, bytes_per_second=1, flops_per_second=20).seconds == 10.0
