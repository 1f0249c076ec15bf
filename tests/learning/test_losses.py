"""The losses: sums over samples with weighted classes that divide into the mean torch computes, over any split."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import FIELDS
from pipeline.data.inputs import Inputs
from pipeline.learning.losses import LOSSES
from pipeline.parallel.rank import Rank
from tests.ranks import run_ranks


def loss_of(name: str, output: Tensor, classes: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the loss of classes [N], each of weight 1, or of classes and weights [K, N]."""
    if weights is None:
        classes, weights = classes[None], output.new_ones(1, len(classes))
    return LOSSES[name](output, Inputs(output.new_zeros(len(output), 1, 2, 2), classes, weights))


def test_nll_is_the_sum_of_the_negative_log_probabilities_of_the_truth() -> None:
    output = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.5, 0.375]], dtype=torch.float64).log()
    assert loss_of("nll", output, torch.tensor([1, 0])).item() == pytest.approx(math.log(4) + math.log(8), rel=1e-15)


def test_cross_entropy_is_the_nll_of_the_softmax_of_the_logits() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    loss = loss_of("cross_entropy", logits, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(math.log(2) + math.log(4), rel=1e-15)


def test_squared_error_is_against_one_hot_targets_as_the_mean_over_the_classes() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    loss = loss_of("mse", logits, torch.tensor([1, 2]))
    assert loss.item() == pytest.approx((1 + 1 + 0) / 3 + (0 + 0 + 0.25) / 3, rel=1e-15)


def random_batch(num_samples: int = 12, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(num_samples, num_classes, generator=generator, dtype=torch.float64)
    return output, torch.randint(num_classes, (num_samples,), generator=generator)


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("nll", F.nll_loss),
        ("cross_entropy", F.cross_entropy),
        ("mse", lambda output, classes: F.mse_loss(output, torch.eye(5, dtype=torch.float64)[classes])),
    ],
)
def test_divided_by_the_number_of_samples_it_is_torchs_mean(
    name: str, mean: Callable[[Tensor, Tensor], Tensor]
) -> None:
    output, classes = random_batch()
    expected = mean(output, classes).item()
    assert loss_of(name, output, classes).item() / 12 == pytest.approx(expected, rel=1e-14)


def test_two_weighted_classes_have_the_cross_entropy_of_their_mixture() -> None:
    """As mixup and label smoothing have it: torch takes the mixture as probabilities."""
    output, first = random_batch()
    second, share = (first + 1) % 5, torch.linspace(0.1, 0.9, 12, dtype=torch.float64)
    mixture = share[:, None] * F.one_hot(first, 5) + (1 - share)[:, None] * F.one_hot(second, 5)
    loss = loss_of("cross_entropy", output, torch.stack((first, second)), torch.stack((share, 1 - share)))
    expected = F.cross_entropy(output, mixture, reduction="sum").item()
    assert loss.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_samples_of_weight_zero_are_padding(name: str) -> None:
    output, classes = random_batch()
    weights = (torch.arange(12) < 7).double()[None]
    loss = loss_of(name, output, classes[None], weights)
    assert loss.item() == pytest.approx(loss_of(name, output[:7], classes[:7]).item(), rel=1e-14)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sizes", [[1, 11], [0, 5, 7], [1] * 12])
def test_the_sum_over_any_split_is_the_same(name: str, sizes: list[int]) -> None:
    output, classes = random_batch()
    parts = zip(torch.split(output, sizes), torch.split(classes, sizes), strict=True)
    total = sum(loss_of(name, *part).item() for part in parts)
    assert total == pytest.approx(loss_of(name, output, classes).item(), rel=1e-14)


def gradient_of_nothing(rank: Rank, name: str) -> tuple[float, list[list[float]]]:
    weight = torch.ones(3, 3, requires_grad=True)
    loss = loss_of(name, torch.zeros(0, 3) @ weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    return loss.item(), weight.grad.tolist()


@pytest.mark.parametrize("name", LOSSES)
def test_a_rank_without_samples_contributes_a_gradient_of_zero(name: str) -> None:
    assert run_ranks(1, gradient_of_nothing, name) == [(0.0, [[0.0] * 3] * 3)]


@pytest.mark.parametrize("name", LOSSES)
def test_the_sum_has_the_dtype_of_the_output(name: str) -> None:
    output, classes = random_batch()
    assert loss_of(name, output, classes).dtype == torch.float64
    assert loss_of(name, output.float(), classes).dtype == torch.float32


def test_there_is_a_loss_for_each_name_that_the_config_accepts() -> None:
    assert set(LOSSES) == set(get_args(FIELDS["loss"].annotation))
