"""Autocast, clipping and loss scaling, in the order unscale -> clip -> step -> update."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import OptimConfig
from pipeline.learning.optim import build_optimizer
from pipeline.learning.precision import Precision, _step_without_effect_unless, choose_precision
from pipeline.parallel.rank import Rank
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "weights", "result"),
    [
        ("fp32", torch.float32, torch.float32),
        ("auto", torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp16", torch.float32, torch.float16),
        ("fp64", torch.float64, torch.float64),
    ],
)
def test_weights_keep_their_type_and_matrix_products_get_that_of_the_precision(
    name: str, weights: torch.dtype, result: torch.dtype
) -> None:
    precision = Precision(name, CPU)
    assert precision.weights_dtype == weights
    layer = nn.Linear(4, 2).to(precision.weights_dtype)
    with torch.no_grad(), precision.autocast():
        assert layer(torch.ones(1, 4, dtype=weights)).dtype == result
    with torch.no_grad():
        assert layer(torch.ones(1, 4, dtype=weights)).dtype == weights  # no longer than the block
    assert layer.weight.dtype == weights


def test_bf16_really_computes_in_bf16() -> None:
    third = torch.full((1, 1), 1 / 3)
    with torch.no_grad(), Precision("bf16", CPU).autocast():
        product = third @ torch.ones(1, 1)
    assert product.item() == torch.tensor(1 / 3).bfloat16().item() != third.item()


@pytest.mark.parametrize(
    ("name", "device", "has_bf16", "expected"),
    [
        ("auto", "cpu", True, "fp32"),
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp32"),
        ("fp16", "cuda", True, "fp16"),
        ("fp32", "cuda", True, "fp32"),
        ("bf16", "cpu", False, "bf16"),
        ("fp64", "cpu", False, "fp64"),
    ],
)
def test_auto_is_bf16_on_a_gpu_that_computes_in_it_else_fp32(
    name: str, device: str, has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert choose_precision(name, torch.device(device)) == expected


def descend(
    rank: Rank, name: str, gradient: list[float], clip_norm: float | None, num_steps: int = 1
) -> tuple[list[float], bool, dict[str, Any]]:
    """The update of plain gradient descent at rate 1 on a loss of that gradient; whether the gradient is cleared."""
    precision = Precision(name, CPU)
    weights = nn.Parameter(torch.zeros(len(gradient)))
    optimizer = torch.optim.SGD([weights], lr=1.0)
    for _ in range(num_steps):
        precision.backward((weights * torch.tensor(gradient)).sum())
        precision.update(optimizer, [weights], clip_norm)
    return (-weights.detach()).tolist(), weights.grad is None, precision.state_dict()


def update_of(name: str, gradient: list[float], clip_norm: float | None) -> list[float]:
    (result,) = run_ranks(1, descend, name, gradient, clip_norm)
    update: list[float] = result[0]
    return update


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_clipping_bounds_the_update_and_keeps_its_direction(name: str) -> None:
    update = update_of(name, [300.0, -400.0], 2.0)
    # torch divides by (norm + 1e-6), which 500 hides in float32's last digit
    assert update == pytest.approx([1.2, -1.6], rel=1e-6)
    assert math.hypot(*update) <= 2.0 * (1 + 1e-6)


@pytest.mark.parametrize("name", ["fp32", "fp16"])
@pytest.mark.parametrize("clip_norm", [None, 5.5])
def test_a_gradient_within_the_norm_is_taken_as_it_is(name: str, clip_norm: float | None) -> None:
    assert update_of(name, [3.0, -4.0], clip_norm) == [3.0, -4.0]


def test_without_clipping_the_update_is_not_bounded() -> None:
    assert update_of("fp32", [3e5, -4e5], None) == [3e5, -4e5]


def test_scaled_gradients_are_unscaled_before_they_are_clipped() -> None:
    gradient = [0.3, 0.4]  # of norm 0.5: its 65536-fold would be clipped, itself is not
    assert update_of("fp16", gradient, 1.0) == torch.tensor(gradient).tolist()


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_the_gradient_is_cleared(name: str, clip_norm: float | None) -> None:
    ((_, is_cleared, _),) = run_ranks(1, descend, name, [3.0], clip_norm)
    assert is_cleared


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_step_that_overflows_is_skipped_the_scale_halved_and_the_gradient_cleared(clip_norm: float | None) -> None:
    ((update, is_cleared, state),) = run_ranks(1, descend, "fp16", [1e38, 1.0], clip_norm)  # 65536e38 > 3.4e38
    assert update == [0.0, 0.0]
    assert is_cleared
    assert state["scale"] == 32768.0


def continued_scale(rank: Rank) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    _, _, state = descend(rank, "fp16", [1e38], None, num_steps=3)
    precision = Precision("fp16", CPU)
    precision.load_state_dict(state)
    weights = nn.Parameter(torch.zeros(1))
    loss = (weights * 3.0).sum()
    precision.backward(loss)
    assert weights.grad is not None
    return state, precision.state_dict(), weights.grad


def test_the_loss_scale_survives_a_checkpoint() -> None:
    ((saved, loaded, gradient),) = run_ranks(1, continued_scale)
    assert saved["scale"] == 65536.0 / 8
    assert loaded == saved | {"skipped": [3.0, 0.0, 0.0]}
    assert gradient.item() == 3.0 * 65536 / 8  # it is used, too


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp64"])
def test_without_loss_scaling_the_state_is_what_was_skipped(name: str) -> None:
    assert Precision(name, CPU).state_dict() == {"skipped": [0.0, 0.0, 0.0]}


def test_a_checkpoint_goes_on_in_another_precision() -> None:
    scaled, plain = Precision("fp16", CPU), Precision("bf16", CPU)
    fresh = scaled.state_dict()
    scaled.load_state_dict(plain.state_dict())
    assert scaled.state_dict() == fresh
    plain.load_state_dict(fresh)
    assert plain.state_dict() == {"skipped": [0.0, 0.0, 0.0]}


def skipping(rank: Rank, name: str, optimizer_name: str, gradients: list[float]) -> tuple[list[float], list[float]]:
    """The weight after each step, and what was skipped; with `capturable`, as the device would do it by itself."""
    precision, weight = Precision(name, CPU), nn.Parameter(torch.zeros(1))
    momentum = 0.9 if optimizer_name == "sgd" else 0.0
    config = OptimConfig(name=cast(Any, optimizer_name), lr=0.1, momentum=momentum)
    optimizer = build_optimizer(config, [weight])
    weights = []
    for gradient in gradients:
        precision.backward((weight * torch.tensor([gradient])).sum())
        precision.update(optimizer, [weight], None)
        weights.append(weight.item())
    return weights, precision.state_dict()["skipped"]


@pytest.mark.parametrize("optimizer_name", ["sgd", "adam", "adamw", "rmsprop", "adadelta"])
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp64", "fp16"])
def test_a_step_without_finite_gradients_changes_nothing_and_is_counted(name: str, optimizer_name: str) -> None:
    """Neither the weights nor what the optimizer remembers: the steps behind it are as if it had not been."""
    (with_them,) = run_ranks(1, skipping, name, optimizer_name, [1.0, math.nan, math.inf, 2.0, -math.inf, 3.0])
    (without,) = run_ranks(1, skipping, "fp32", optimizer_name, [1.0, 2.0, 3.0])
    weights, skipped = with_them
    assert [weights[i] for i in (0, 3, 5)] == without[0]
    assert weights[0] == weights[1] == weights[2]
    assert weights[3] == weights[4]
    assert skipped == [3.0, 0.0, 2.0]


def aged_on_the_device(rank: Rank, optimizer_name: str) -> list[float]:
    weight = nn.Parameter(torch.ones(1))
    kind = {"rmsprop": torch.optim.RMSprop, "adadelta": torch.optim.Adadelta}[optimizer_name]
    optimizer = kind([weight], lr=torch.tensor(0.1), foreach=True, weight_decay=0.1)
    weights = []
    for gradient in (1.0, math.nan, 1.0):
        weight.grad = torch.tensor([gradient])
        optimizer.param_groups[0]["lr"].fill_(0.1)
        _step_without_effect_unless(weight.grad.isfinite().all(), optimizer, [weight.grad])
        weights.append(weight.item())
    return weights


@pytest.mark.parametrize("optimizer_name", ["rmsprop", "adadelta"])
def test_a_captured_step_without_finite_gradients_leaves_the_weights_alone(optimizer_name: str) -> None:
    ((first, second, third),) = run_ranks(1, aged_on_the_device, optimizer_name)
    assert first == second
    assert math.isfinite(third)
    assert third < second


def test_the_longest_row_is_told_once() -> None:
    precision, weight = Precision("fp32", CPU), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def take(*gradients: float) -> list[float]:
        for gradient in gradients:
            weight.grad = torch.tensor([gradient])
            precision.update(optimizer, [weight], None)
        taken: list[float] = precision.take_skipped().tolist()
        return taken

    assert take(math.nan, math.nan, 1.0, math.nan) == [3.0, 2.0]
    assert take(math.nan) == [4.0, 2.0]  # a row goes on behind a record
    assert take(1.0) == [4.0, 2.0]
    assert take(1.0) == [4.0, 0.0]


def test_a_resumed_training_is_judged_by_its_own_steps() -> None:
    """What made the gradients infinite may have been mended; the count goes on."""
    precision = Precision("fp32", CPU)
    precision.load_state_dict({"skipped": [7.0, 5.0, 5.0]})
    assert precision.take_skipped().tolist() == [7.0, 0.0]
