"""Autocast, clipping and loss scaling, in the order unscale -> clip -> step -> update."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.distributed import Rank
from pipeline.precision import Precision, choose_precision
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
    assert loaded == saved
    assert gradient.item() == 3.0 * 65536 / 8  # it is used, too


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp64"])
def test_without_loss_scaling_there_is_no_state(name: str) -> None:
    assert Precision(name, CPU).state_dict() == {}


def test_a_checkpoint_goes_on_in_another_precision() -> None:
    scaled, plain = Precision("fp16", CPU), Precision("bf16", CPU)
    fresh = scaled.state_dict()
    scaled.load_state_dict(plain.state_dict())
    assert scaled.state_dict() == fresh
    plain.load_state_dict(fresh)
    assert plain.state_dict() == {}
