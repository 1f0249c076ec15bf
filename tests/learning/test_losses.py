"""The losses: sums that divide into the mean torch computes, over any split."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import FIELDS
from pipeline.learning.losses import LOSSES, losses_for
from pipeline.parallel.rank import Rank
from tests.ranks import run_ranks


def test_nll_is_the_sum_of_the_negative_log_probabilities_of_the_truth() -> None:
    output = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.5, 0.375]], dtype=torch.float64).log()
    total = LOSSES["nll"].total(output, torch.tensor([1, 0]))
    assert total.item() == pytest.approx(math.log(4) + math.log(8), rel=1e-15)


def test_cross_entropy_is_the_nll_of_the_softmax_of_the_scores() -> None:
    scores = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    total = LOSSES["cross_entropy"].total(scores, torch.tensor([0, 1]))
    assert total.item() == pytest.approx(math.log(2) + math.log(4), rel=1e-15)


def test_squared_error_is_against_one_hot_targets_over_all_classes() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.5]])
    total = LOSSES["mse"].total(scores, torch.tensor([1, 2]))
    assert total.item() == (1 + 1 + 0) + (0 + 0 + 0.25)


def random_batch(num_samples: int = 12, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(num_samples, num_classes, generator=generator, dtype=torch.float64)
    return scores, torch.randint(num_classes, (num_samples,), generator=generator)


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("nll", lambda scores, labels: F.nll_loss(scores, labels)),
        ("cross_entropy", lambda scores, labels: F.cross_entropy(scores, labels)),
        ("mse", lambda scores, labels: F.mse_loss(scores, torch.eye(5, dtype=torch.float64)[labels])),
    ],
)
def test_divided_by_what_the_samples_count_for_it_is_torchs_mean(
    name: str, mean: Callable[[Tensor, Tensor], Tensor]
) -> None:
    scores, labels = random_batch()
    loss = LOSSES[name]
    expected = mean(scores, labels)
    assert loss.total(scores, labels).item() / (12 * loss.per_sample(5)) == pytest.approx(expected.item(), rel=1e-14)


def test_only_squared_error_counts_the_classes() -> None:
    assert {name: loss.per_sample(7) for name, loss in LOSSES.items()} == {"nll": 1, "cross_entropy": 1, "mse": 7}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sizes", [[12], [6, 6], [1, 11], [0, 5, 7], [1] * 12])
def test_the_sum_over_any_split_is_the_same(name: str, sizes: list[int]) -> None:
    scores, labels = random_batch()
    total = LOSSES[name].total
    parts = [total(s, t).item() for s, t in zip(torch.split(scores, sizes), torch.split(labels, sizes), strict=True)]
    assert sum(parts) == pytest.approx(total(scores, labels).item(), rel=1e-14)


def gradient_of_nothing(rank: Rank, name: str) -> tuple[float, list[list[float]]]:
    scores = torch.zeros(0, 3, requires_grad=True)
    weight = torch.ones(3, 3, requires_grad=True)
    loss = LOSSES[name].total(scores @ weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    return loss.item(), weight.grad.tolist()


@pytest.mark.parametrize("name", LOSSES)
def test_a_rank_without_samples_contributes_a_gradient_of_zero(name: str) -> None:
    assert run_ranks(1, gradient_of_nothing, name) == [(0.0, [[0.0] * 3] * 3)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_has_the_type_of_the_output(name: str, dtype: torch.dtype) -> None:
    scores, labels = random_batch()
    assert LOSSES[name].total(scores.to(dtype), labels).dtype == dtype


def test_the_losses_that_fit_an_output() -> None:
    assert losses_for("log_probabilities") == ["nll"]
    assert losses_for("scores") == ["cross_entropy", "mse"]


def test_the_register_holds_the_losses_that_the_config_offers() -> None:
    assert set(LOSSES) == set(get_args(FIELDS["loss"].annotation))
