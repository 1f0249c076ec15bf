"""Optimizers are built as set, and learning rates are those of torch's schedulers, as functions of the step."""

from __future__ import annotations

import math
import random
from typing import Any, Literal

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

from pipeline.config.schema import OptimConfig
from pipeline.learning.optim import Schedule, build_optimizer

ScheduleName = Literal["constant", "step", "cosine", "one_cycle"]


def weights() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            OptimConfig(name="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
            optim.SGD([weights()], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        ),
        (OptimConfig(name="sgd", lr=0.5), optim.SGD([weights()], lr=0.5)),
        (OptimConfig(name="adam", lr=0.1, weight_decay=0.01), optim.Adam([weights()], lr=0.1, weight_decay=0.01)),
        (OptimConfig(name="adamw", lr=0.1, weight_decay=0.3), optim.AdamW([weights()], lr=0.1, weight_decay=0.3)),
        (OptimConfig(name="adamw", lr=0.1), optim.AdamW([weights()], lr=0.1, weight_decay=0)),
        (
            OptimConfig(name="rmsprop", lr=0.1, momentum=0.9, weight_decay=0.01),
            optim.RMSprop([weights()], lr=0.1, momentum=0.9, weight_decay=0.01),
        ),
        (OptimConfig(name="adadelta", lr=1.0, weight_decay=0.1), optim.Adadelta([weights()], lr=1, weight_decay=0.1)),
    ],
    ids=lambda v: f"{v.name}-{v.momentum}" if isinstance(v, OptimConfig) else "",
)
def test_an_optimizer_is_torchs_with_the_arguments_set(config: OptimConfig, expected: optim.Optimizer) -> None:
    parameter = weights()
    built = build_optimizer(config, [{"params": [parameter]}])
    assert isinstance(built, type(expected))
    assert type(built).__name__ == type(expected).__name__
    assert [group["params"] for group in built.param_groups] == [[parameter]]

    def settings(optimizer: optim.Optimizer) -> dict[str, Any]:
        other = ("params", "initial_lr", "fused", "foreach")  # the latter two are how it is executed
        return {key: value for key, value in optimizer.param_groups[0].items() if key not in other}

    assert settings(built) == settings(expected)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "adadelta"])
def test_the_fast_form_of_an_optimizer_computes_what_the_plain_one_does(name: Any) -> None:
    torch.manual_seed(0)
    gradients = torch.randn(5, 3, dtype=torch.float64)
    results = []
    for plain in (False, True):
        parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = build_optimizer(OptimConfig(name=name, lr=0.1, weight_decay=0.01), [{"params": [parameter]}])
        if plain:
            optimizer.param_groups[0] |= {"fused": False, "foreach": False}
        for step, gradient in enumerate(gradients):
            parameter.grad = gradient.clone()
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.step()
        results.append(parameter.detach())
    assert not torch.equal(results[0], torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_weight_decay_is_decoupled_with_adamw_only() -> None:
    shrunk = {}
    for name in ("adam", "adamw"):
        parameter = weights()
        parameter.grad = torch.zeros(3)
        build_optimizer(OptimConfig(name=name, lr=0.1, weight_decay=0.5), [{"params": [parameter]}]).step()
        shrunk[name] = parameter[0].item()
    assert shrunk["adamw"] == pytest.approx(1 - 0.1 * 0.5, rel=1e-6)
    assert shrunk["adam"] == pytest.approx(1 - 0.1, rel=1e-6)  # Adam's first step is the sign of the gradient


def test_a_group_without_settings_of_its_own_has_those_of_the_config() -> None:
    plain, own = weights(), weights()
    groups: list[dict[str, Any]] = [{"params": [plain]}, {"params": [own], "lr": 0.5, "weight_decay": 0.0}]
    optimizer = build_optimizer(OptimConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.01), groups)
    found = [(g["params"], g["lr"], g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [([plain], 0.1, 0.1, 0.01), ([own], 0.5, 0.5, 0.0)]
    assert set(optimizer.state) == {plain, own}


def curve(name: ScheduleName, total_steps: int, *, steps_per_epoch: int = 10, **settings: Any) -> list[float]:
    config = OptimConfig(schedule=name, **settings)
    schedule = Schedule(config, steps_per_epoch, total_steps)
    return [config.lr * schedule.factor(step) for step in range(total_steps)]


def curve_of(scheduler_class: Any, num_steps: int, lr: float, **arguments: Any) -> list[float]:
    optimizer = optim.SGD([weights()], lr=lr, momentum=0.9)
    scheduler = scheduler_class(optimizer, **arguments)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < num_steps:
            scheduler.step()
    return rates


def test_constant_stays() -> None:
    assert curve("constant", 50, lr=0.3) == [0.3] * 50


def test_step_falls_by_gamma_every_so_many_epochs() -> None:
    rates = curve("step", 30, lr=2, step_epochs=2, step_gamma=0.5, steps_per_epoch=5)
    assert rates == [2.0] * 10 + [1.0] * 10 + [0.5] * 10


def test_cosine_at_points_computed_by_hand() -> None:
    schedule = Schedule(OptimConfig(schedule="cosine"), 10, 100)
    points = {0: 1.0, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 75: (1 - math.sqrt(0.5)) / 2, 100: 0.0}
    assert {step: schedule.factor(step) for step in points} == pytest.approx(points, rel=1e-15, abs=1e-15)


def test_one_cycle_at_points_computed_by_hand() -> None:
    rates = curve("one_cycle", 101, lr=2, warmup=40)
    # up to the peak at 40, its middle at 20; down over the 60 steps that remain, their middle at 70
    assert rates[0] == pytest.approx(2 / 25, rel=1e-14)
    assert rates[20] == pytest.approx((2 / 25 + 2) / 2, rel=1e-14)
    assert rates[40] == 2
    assert rates[70] == pytest.approx((2 + 2 / 25e4) / 2, rel=1e-14)
    assert rates[100] == pytest.approx(2 / 25e4, rel=1e-9)  # a difference of numbers near 1
    assert max(rates) == rates[40]


def test_one_cycle_without_warmup_rises_over_30_percent_of_the_steps() -> None:
    rates = curve("one_cycle", 1000, lr=1)
    assert rates.index(max(rates)) == 300


def up_to_rounding(expected: list[float]) -> Any:
    """torch computes a rate from the one before, which rounds by about 1e-16 in each of up to 200 steps."""
    return pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(("total_steps", "peak"), [(100, 30), (200, 1), (37, 35), (50, 25)])
def test_one_cycle_is_torchs_step_for_step(total_steps: int, peak: int) -> None:
    expected = curve_of(
        lr_scheduler.OneCycleLR,
        total_steps,
        lr=1.0,
        max_lr=0.7,
        total_steps=total_steps,
        pct_start=(peak + 1) / total_steps,  # torch's peak is at step pct_start * total_steps - 1
        cycle_momentum=False,
    )
    assert curve("one_cycle", total_steps, lr=0.7, warmup=peak) == up_to_rounding(expected)


@pytest.mark.parametrize(("step_epochs", "gamma"), [(1, 0.7), (3, 0.1)])
def test_step_is_torchs_step_for_step(step_epochs: int, gamma: float) -> None:
    expected = curve_of(lr_scheduler.StepLR, 60, lr=0.7, step_size=step_epochs * 10, gamma=gamma)
    rates = curve("step", 60, lr=0.7, step_epochs=step_epochs, step_gamma=gamma)
    assert rates == up_to_rounding(expected)


def test_cosine_is_torchs_stepped_once_a_step() -> None:
    expected = curve_of(lr_scheduler.CosineAnnealingLR, 200, lr=0.7, T_max=200)
    assert curve("cosine", 200, lr=0.7) == up_to_rounding(expected)


@pytest.mark.parametrize("name", ["constant", "cosine", "step"])
def test_warmup_rises_linearly_and_reaches_lr_on_the_step_after(name: ScheduleName) -> None:
    rates = curve(name, 100, lr=2, warmup=4, steps_per_epoch=50)
    assert rates[:5] == pytest.approx([2 / 5, 4 / 5, 6 / 5, 8 / 5, 2.0], rel=1e-15)


def test_a_warmup_longer_than_the_first_fall_of_a_step_schedule_reaches_lr_too() -> None:
    rates = curve("step", 100, lr=2, warmup=12, steps_per_epoch=10)
    assert rates[12] == 2
    assert max(rates) == rates[12]


def test_cosine_after_a_warmup_falls_over_the_steps_that_remain() -> None:
    schedule = Schedule(OptimConfig(schedule="cosine", warmup=20), 10, 100)
    assert schedule.factor(60) == pytest.approx(0.5, rel=1e-15)
    assert schedule.factor(100) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "one_cycle"])
@pytest.mark.parametrize(("total_steps", "warmup"), [(1, 0), (2, 1), (3, 2), (10, 0), (10, 9)])
def test_short_trainings_have_a_rate_between_0_and_lr_at_every_step(
    name: ScheduleName, total_steps: int, warmup: int
) -> None:
    rates = curve(name, total_steps, lr=0.5, warmup=warmup)
    assert len(rates) == total_steps
    assert all(0 < rate <= 0.5 for rate in rates)


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "one_cycle"])
def test_the_rate_is_a_function_of_the_step_alone(name: ScheduleName) -> None:
    schedule = Schedule(OptimConfig(schedule=name, warmup=7), 10, 90)
    steps = random.Random(0).sample(range(90), 90)
    shuffled = {step: schedule.factor(step) for step in steps}
    assert [schedule.factor(step) for step in range(90)] == [shuffled[step] for step in range(90)]


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_first_step_that_loss_scaling_skips_leaves_momentum_at_zero(nesterov: bool) -> None:
    parameter = nn.Parameter(torch.ones(1000))
    config = OptimConfig(name="sgd", lr=0.1, momentum=0.9, nesterov=nesterov)
    optimizer = build_optimizer(config, [{"params": [parameter]}])
    parameter.grad = torch.full((1000,), float("inf"))
    # what torch.amp.GradScaler sets when a gradient overflowed
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(parameter, torch.ones(1000))
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    parameter.grad = torch.ones(1000)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((1000,), 1 - 0.1 * (1.9 if nesterov else 1.0)))
