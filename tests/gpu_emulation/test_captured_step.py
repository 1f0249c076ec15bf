"""A captured step trains as an eager one: shown by a CUDA graph that is emulated on the CPU."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from pipeline.parallel.rank import Rank
from tests.gpu_emulation.cpu_graph import capture, capturing_on_the_cpu
from tests.ranks import run_ranks
from tests.train.helpers import config_of, flat_weights, make_trainer
from train.steps.captured import CapturedStep
from train.trainer import Trainer

SETTINGS = (
    "data.dataset=synthetic",
    "data.arguments.train_size=72",
    "data.arguments.validation_size=10",
    "data.global_batch_size=24",
    "data.augment.crop=2",
    "train.precision=fp64",
    "train.clip_norm=0.5",
    "train.epochs=2",
    "optim.schedule=step",
    "optim.step_gamma=0.5",
)
SHORT_LAST_BATCH = ("data.arguments.train_size=56", "model.arguments.dropout=0", "model.arguments.dropout2d=0")
"""Without dropout, which draws for the padding too, and so other numbers for what follows."""
LEARNING_RATES = {"sgd": 2**-4, "adam": 2**-8, "rmsprop": 2**-10, "adadelta": 2**-1}
"""Powers of two, as the factors of the schedule are: a captured step has them as float32, which holds these exactly."""
OPTIMIZERS = tuple(LEARNING_RATES)


def build(rank: Rank, optimizer: str, *settings: str) -> Trainer:
    momentum = ("optim.momentum=0.9",) if optimizer == "sgd" else ()
    named = (f"optim.name={optimizer}", f"optim.lr={LEARNING_RATES[optimizer]}")
    return make_trainer(rank, config_of(*SETTINGS, *named, *momentum, *settings))[0]


def executing(way: str) -> AbstractContextManager[None]:
    return capturing_on_the_cpu() if way == "captured" else nullcontext()


def train(rank: Rank, optimizer: str, way: str, settings: tuple[str, ...]) -> Tensor:
    with executing(way):
        trainer = build(rank, optimizer, *settings)
        assert isinstance(trainer.step, CapturedStep) == (way == "captured")
        trainer.fit()
    return flat_weights(trainer)


@pytest.mark.parametrize("settings", [(), SHORT_LAST_BATCH], ids=["dropout", "short last batch"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_captured_step_trains_as_an_eager_one(optimizer: str, settings: tuple[str, ...]) -> None:
    (captured,), (eager,) = (run_ranks(1, train, optimizer, way, settings) for way in ("captured", "eager"))
    torch.testing.assert_close(captured, eager, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimizer", ["sgd", "adadelta"])
def test_a_captured_step_over_ddp_trains_as_an_eager_one(optimizer: str) -> None:
    settings = (*SHORT_LAST_BATCH, "train.backend=gloo")
    captured, eager = (run_ranks(2, train, optimizer, way, settings) for way in ("captured", "eager"))
    assert torch.equal(*captured)
    torch.testing.assert_close(captured[0], eager[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_capturing_leaves_weights_and_optimizer_as_they_were(optimizer: str) -> None:
    (states,) = run_ranks(1, everything_around_a_capture, optimizer)
    for before, after in states:
        assert torch.equal(before, after)


def everything_around_a_capture(rank: Rank, optimizer: str) -> list[tuple[Tensor, Tensor]]:
    with executing("eager"):
        trained = build(rank, optimizer)
        trained.train_epoch()
    with executing("captured"):
        trainer = build(rank, optimizer)
        trainer.load_state(trained.state())
        before = everything(trainer)
        trainer.step.prepare()
    return list(zip(before, everything(trainer), strict=True))


def everything(trainer: Trainer) -> list[Tensor]:
    """Return weights and the state of the optimizer, but for the learning rate, which every step sets."""
    states = (value for state in trainer.update.optimizer.state.values() for value in state.values())
    return [flat_weights(trainer), trainer.update.skipped.clone(), *(state.clone() for state in states)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_captured_step_without_finite_gradients_changes_no_weight_and_is_counted(optimizer: str) -> None:
    ((weights, skipped),) = run_ranks(1, train_with_a_nan, optimizer)
    for index, (before, after) in enumerate(itertools.pairwise(weights)):
        assert after.isfinite().all()
        assert torch.equal(before, after) == (index == 1)
    assert skipped == [1.0, 0.0, 1.0]


def train_with_a_nan(rank: Rank, optimizer: str) -> tuple[list[Tensor], list[float]]:
    """Return the weights before and behind each of three steps, the second of which has images of NaN."""
    with executing("captured"):
        trainer = build(rank, optimizer)
        shift, weights = trainer.train_loader.prepare.normalize.shift, [flat_weights(trainer)]
        usual = shift.clone()
        trainer.step.prepare()
        for step, batch in enumerate(trainer.train_loader.batches(0)):
            shift.fill_(torch.nan) if step == 1 else shift.copy_(usual)
            trainer.step(batch, step)
            weights.append(flat_weights(trainer))
    return weights, trainer.update.skipped.tolist()


def test_the_emulated_graph_reads_tensors_anew_and_keeps_numbers() -> None:
    value, tensor, number = torch.zeros(3), torch.ones(()), 1.0

    def compute() -> Tensor:
        value.add_(tensor).add_(number)
        return value * 2

    replay, result = capture(compute, None)
    assert value.tolist() == [0.0] * 3
    tensor.fill_(10.0)
    number = 100.0
    replay()
    assert value.tolist() == [11.0] * 3
    assert result.tolist() == [22.0] * 3


def test_the_emulated_graph_refuses_to_read_on_the_host() -> None:
    values = torch.ones(3)

    def compute() -> Tensor:
        return values.neg_() if values.sum() > 0 else values

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        capture(compute, None)
