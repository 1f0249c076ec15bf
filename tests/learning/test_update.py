"""Number formats, and a step: its order, what is skipped, the rate of each group, and what a checkpoint keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import nn

from pipeline.config.schema import OptimConfig
from pipeline.learning.optim import Schedule, build_optimizer
from pipeline.learning.update import Precision, Update, _step_without_effect_unless, choose_precision
from pipeline.parallel.rank import Rank
from tests.ranks import run_ranks

CPU = torch.device("cpu")
OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop", "adadelta")


def update_of(
    groups: Sequence[dict[str, Any]], precision: str = "fp32", clip_norm: float | None = None, **settings: Any
) -> Update:
    config = OptimConfig(**({"name": "sgd", "lr": 1.0, "schedule": "constant"} | settings))
    optimizer = build_optimizer(config, groups)
    return Update(optimizer, Schedule(config, 10, 100), Precision(precision, CPU), clip_norm)


def step(update: Update, gradient: Sequence[float], number: int = 0) -> None:
    """Change the only parameter by a loss of that gradient."""
    (weights,) = update.parameters
    update.set_step(number)
    update._precision.backward((weights * torch.tensor(gradient)).sum())
    update()


def _descend(
    rank: Rank, precision: str, gradient: list[float], clip_norm: float | None
) -> tuple[list[float], bool, dict[str, Any]]:
    """Return the change by a step of plain gradient descent at rate 1, and whether the gradient was cleared."""
    weights = nn.Parameter(torch.zeros(len(gradient)))
    update = update_of([{"params": [weights]}], precision, clip_norm)
    step(update, gradient)
    return (-weights.detach()).tolist(), weights.grad is None, update.state_dict()


def change_by(precision: str, gradient: list[float], clip_norm: float | None) -> list[float]:
    ((change, is_cleared, _),) = run_ranks(1, _descend, precision, gradient, clip_norm)
    assert is_cleared
    return cast(list[float], change)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping_bounds_the_change_and_keeps_its_direction(precision: str) -> None:
    change = change_by(precision, [300.0, -400.0], 2.0)
    # torch divides by (norm + 1e-6), which 500 hides in float32's last digit
    assert change == pytest.approx([1.2, -1.6], rel=1e-6)
    assert math.hypot(*change) <= 2.0 * (1 + 1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("clip_norm", [None, 5.5])
def test_a_gradient_within_the_norm_is_taken_as_it_is(precision: str, clip_norm: float | None) -> None:
    assert change_by(precision, [3.0, -4.0], clip_norm) == [3.0, -4.0]


def test_without_clipping_the_change_is_not_bounded() -> None:
    assert change_by("fp32", [3e5, -4e5], None) == [3e5, -4e5]


def test_scaled_gradients_are_unscaled_before_they_are_clipped() -> None:
    gradient = [0.3, 0.4]  # of norm 0.5: its 65536-fold would be clipped, itself is not
    assert change_by("fp16", gradient, 1.0) == torch.tensor(gradient).tolist()


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_step_that_overflows_is_skipped_the_scale_halved_and_the_gradient_cleared(clip_norm: float | None) -> None:
    ((change, is_cleared, state),) = run_ranks(1, _descend, "fp16", [1e38, 1.0], clip_norm)  # 65536e38 > 3.4e38
    assert change == [0.0, 0.0]
    assert is_cleared
    assert state["scaler"]["scale"] == 32768.0


def _train(rank: Rank, precision: str, name: str, gradients: list[float]) -> tuple[list[float], list[float]]:
    """Return the weight after each step, and what was skipped."""
    weight = nn.Parameter(torch.zeros(1))
    momentum = 0.9 if name in ("sgd", "rmsprop") else 0.0
    update = update_of([{"params": [weight]}], precision, name=name, lr=0.1, momentum=momentum)
    weights = []
    for gradient in gradients:
        step(update, [gradient])
        weights.append(weight.item())
    return weights, update.pop_skipped().tolist()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_without_finite_gradients_changes_nothing_and_is_counted(precision: str, name: str) -> None:
    """Neither the weights nor what the optimizer remembers: the steps behind it are as if it had not been."""
    ((weights, skipped),) = run_ranks(1, _train, precision, name, [1.0, math.nan, math.inf, 2.0, -math.inf, 3.0])
    (without,) = run_ranks(1, _train, "fp32", name, [1.0, 2.0, 3.0])
    assert [weights[i] for i in (0, 3, 5)] == without[0]
    assert weights[0] == weights[1] == weights[2]
    assert weights[3] == weights[4]
    assert skipped == [3.0, 2.0]


def _age_on_the_device(rank: Rank, name: str) -> list[float]:
    weight = nn.Parameter(torch.ones(1))
    kind = {"rmsprop": torch.optim.RMSprop, "adadelta": torch.optim.Adadelta}[name]
    optimizer = kind([weight], lr=torch.tensor(0.1), foreach=True, weight_decay=0.1)
    weights = []
    for gradient in (1.0, math.nan, 1.0):
        weight.grad = torch.tensor([gradient])
        optimizer.param_groups[0]["lr"].fill_(0.1)
        _step_without_effect_unless(weight.grad.isfinite().all(), optimizer, [weight.grad])
        weights.append(weight.item())
    return weights


@pytest.mark.parametrize("name", ["rmsprop", "adadelta"])
def test_a_captured_step_without_finite_gradients_leaves_the_weights_alone(name: str) -> None:
    ((first, second, third),) = run_ranks(1, _age_on_the_device, name)
    assert first == second
    assert math.isfinite(third)
    assert third < second


def test_the_longest_run_of_skipped_steps_is_told_once() -> None:
    weight = nn.Parameter(torch.zeros(1))
    update = update_of([{"params": [weight]}])

    def take(*gradients: float) -> list[float]:
        for gradient in gradients:
            weight.grad = torch.tensor([gradient])
            update()
        return cast(list[float], update.pop_skipped().tolist())

    assert take(math.nan, math.nan, 1.0, math.nan) == [3.0, 2.0]
    assert take(math.nan) == [4.0, 2.0]  # a run goes on behind a record
    assert take(1.0) == [4.0, 2.0]
    assert take(1.0) == [4.0, 0.0]


def test_each_group_has_its_own_rate_which_the_schedule_scales() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups: list[dict[str, Any]] = [
        {"params": parameters[:1]},
        {"params": parameters[1:2], "lr": 0.25},
        {"params": parameters[2:]},
    ]
    update = update_of(groups, lr=0.5, schedule="step", step_epochs=1, step_gamma=0.1, warmup=1)
    for number, factor in ((0, 0.5), (1, 1.0), (11, 0.1), (0, 0.5)):
        update.set_step(number)
        rates = [group["lr"] for group in update.optimizer.param_groups]
        assert rates == pytest.approx([0.5 * factor, 0.25 * factor, 0.5 * factor], rel=1e-15)
        assert update.lr == rates[0]
    update.scale_lr(0.0)
    assert [group["lr"] for group in update.optimizer.param_groups] == [0.0, 0.0, 0.0]
    assert update.lr == 0.0
    update.set_step(1)
    for parameter in parameters:
        parameter.grad = torch.ones(1)
    update()
    assert [parameter.item() for parameter in parameters] == [-0.5, -0.25, -0.5]


def test_the_rate_of_an_optimizer_that_can_be_captured_is_set_in_place() -> None:
    config = OptimConfig(name="adam", lr=0.5, schedule="step", step_gamma=0.1)
    optimizer = build_optimizer(config, [{"params": [nn.Parameter(torch.zeros(1))]}], capture_on=CPU)
    update, rate = Update(optimizer, Schedule(config, 10, 100), Precision("fp32", CPU)), optimizer.param_groups[0]["lr"]
    update.set_step(10)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.05, rel=1e-6)
    assert update.lr == pytest.approx(0.05, rel=1e-12)  # told without waiting for a device


GRADIENTS = [[0.3, -2.0], [1.0, 0.5], [-0.7, 0.1], [0.2, 0.9], [1.5, -0.4]]


def _interrupt(rank: Rank, name: str, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights after five steps, and after five steps in two trainings."""
    momentum = 0.9 if name in ("sgd", "rmsprop") else 0.0

    def begin(weights: torch.Tensor) -> Update:
        groups = [{"params": [nn.Parameter(weights.clone())]}]
        return update_of(groups, precision, name=name, lr=0.1, momentum=momentum, weight_decay=0.01, schedule="cosine")

    whole, first = begin(torch.ones(2)), begin(torch.ones(2))
    for number, gradient in enumerate(GRADIENTS):
        step(whole, gradient, number)
    for number in range(3):
        step(first, GRADIENTS[number], number)
    second = begin(first.parameters[0].detach())
    second.load_state_dict(first.state_dict())
    for number in (3, 4):
        step(second, GRADIENTS[number], number)
    return whole.parameters[0].detach(), second.parameters[0].detach()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_interrupted_training_ends_with_the_same_bits_as_a_whole_one(name: str, precision: str) -> None:
    ((whole, resumed),) = run_ranks(1, _interrupt, name, precision)
    assert torch.equal(whole, resumed)


def test_the_settings_of_now_win_over_those_of_a_checkpoint() -> None:
    weights = nn.Parameter(torch.zeros(2))
    saved = update_of([{"params": [weights]}], name="adamw", lr=0.1, weight_decay=0.5)
    weights.grad = torch.ones(2)
    saved()
    resumed = update_of([{"params": [weights]}], name="adamw", lr=0.2, weight_decay=0.25)
    resumed.load_state_dict(saved.state_dict())
    (group,) = resumed.optimizer.param_groups
    assert (group["weight_decay"], group["initial_lr"]) == (0.25, 0.2)
    assert resumed.optimizer.state[weights]["exp_avg"].tolist() == pytest.approx([0.1, 0.1])


def _continue_scale(rank: Rank) -> tuple[dict[str, Any], dict[str, Any], torch.Tensor]:
    weights = nn.Parameter(torch.zeros(1))
    saved, loaded = (update_of([{"params": [weights]}], "fp16") for _ in range(2))
    for _ in range(3):
        step(saved, [1e38])
    loaded.load_state_dict(saved.state_dict())
    loaded._precision.backward((weights * 3.0).sum())
    assert weights.grad is not None
    return saved.state_dict(), loaded.state_dict(), weights.grad


def test_the_loss_scale_and_the_count_of_skipped_steps_survive_a_checkpoint() -> None:
    ((saved, loaded, gradient),) = run_ranks(1, _continue_scale)
    assert saved["scaler"]["scale"] == 65536.0 / 8
    assert saved["skipped"] == 3.0
    assert (loaded["scaler"], loaded["skipped"]) == (saved["scaler"], 3.0)
    assert gradient.item() == 3.0 * 65536 / 8  # it is used, too


def test_a_checkpoint_continues_in_another_precision() -> None:
    weights = nn.Parameter(torch.zeros(1))
    scaled, plain = (update_of([{"params": [weights]}], precision) for precision in ("fp16", "bf16"))
    fresh = scaled.state_dict()["scaler"]
    scaled.load_state_dict(plain.state_dict())
    assert scaled.state_dict()["scaler"] == fresh != {}
    plain.load_state_dict(scaled.state_dict())
    assert plain.state_dict()["scaler"] == {}


def test_a_resumed_training_is_judged_by_its_own_steps() -> None:
    """What made the gradients infinite may have been mended; the count goes on."""
    weights = nn.Parameter(torch.zeros(1))
    saved, resumed = (update_of([{"params": [weights]}]) for _ in range(2))
    for _ in range(5):
        weights.grad = torch.tensor([math.nan])
        saved()
    resumed.load_state_dict(saved.state_dict())
    assert resumed.pop_skipped().tolist() == [5.0, 0.0]


@pytest.mark.parametrize(
    ("name", "weights", "result"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp16", torch.float32, torch.float16),
        ("fp64", torch.float64, torch.float64),
    ],
)
def test_weights_keep_their_dtype_and_matrix_products_get_that_of_the_precision(
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
